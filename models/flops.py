"""Operations of a training step, for MFU and the planner."""

from __future__ import annotations

from models.config import DecoderConfig


def matrix_parameters(config: DecoderConfig) -> int:
    """Weights that every token is multiplied with: no lookup tables, gains or biases."""
    D, F, H = config.embed_dim, config.mlp_dim, config.head_dim
    attention = 2 * D * config.heads * H + 2 * D * config.kv_heads * H
    feed_forward = (3 if config.gated else 2) * D * F
    return config.layers * (attention + feed_forward) + D * config.vocab_size


def flops_per_token(config: DecoderConfig, sequence_length: int) -> float:
    """Floating-point operations of forward and backward for one token, rematerialisation left out.

    6 for each weight of a matrix, 12 N H for each key that a query sees. Causality halves the keys,
    which most papers (PaLM, appendix B, https://arxiv.org/abs/2204.02311) do not count: their MFU
    is higher for long sequences. Norms, softmax and nonlinearities are left out (below 1% from
    D = 1024 on).
    """
    return 6 * matrix_parameters(config) + attention_flops_per_token(config, sequence_length)


def attention_flops_per_token(config: DecoderConfig, sequence_length: int) -> float:
    """Those of scores and weighted sums alone, in all layers."""
    keys = 0.0
    for layer in range(config.layers):
        local = config.pattern[layer % len(config.pattern)] == "local"
        window = min(config.window, sequence_length) if local else sequence_length
        # The mean over t = 1 ... T of min(t, window), the keys that query t sees.
        keys += window - window * (window - 1) / (2 * sequence_length)
    return 12 * config.heads * config.head_dim * keys
