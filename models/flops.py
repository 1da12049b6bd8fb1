"""Operations of a training step, for MFU and the planner."""

from __future__ import annotations

from collections.abc import Collection

from models.config import DecoderConfig


def layer_parameters(config: DecoderConfig) -> int:
    """Weights of one layer that every token is multiplied with: no gains or biases."""
    D, F, H = config.embed_dim, config.mlp_dim, config.head_dim
    attention = 2 * D * config.heads * H + 2 * D * config.kv_heads * H
    return attention + (3 if config.gated else 2) * D * F


def dropped_parameters(config: DecoderConfig, saved: Collection[str]) -> int:
    """Weights of one layer whose products are computed again where only `saved` tensors are kept.

    The last product of a layer is none of them: no gradient reads what it gives.
    """
    D, F, H = config.embed_dim, config.mlp_dim, config.head_dim
    products = {  # output's name -> weights of the product that makes it
        "query": D * config.heads * H,
        "key": D * config.kv_heads * H,
        "value": D * config.kv_heads * H,
        "attention_projection": D * config.heads * H,
        "mlp_gate": D * F if config.gated else 0,
        "mlp_up": D * F,
    }
    return sum(size for name, size in products.items() if name not in saved)


def matrix_parameters(config: DecoderConfig) -> int:
    """The same of the whole model, with the loss head and without lookup tables."""
    return config.layers * layer_parameters(config) + config.embed_dim * config.vocab_size


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
    return sum(_attention(config, i, sequence_length) for i in range(config.layers))


def flops_by_layer(config: DecoderConfig, sequence_length: int) -> tuple[float, ...]:
    """Those of each layer."""
    return tuple(
        6 * layer_parameters(config) + _attention(config, i, sequence_length)
        for i in range(config.layers)
    )


def head_flops(config: DecoderConfig) -> float:
    """Those of the loss head; the embedding looks rows up and has none."""
    return 6 * config.embed_dim * config.vocab_size


def _attention(config: DecoderConfig, layer: int, sequence_length: int) -> float:
    local = config.pattern[layer % len(config.pattern)] == "local"
    window = min(config.window, sequence_length) if local else sequence_length
    # The mean over t = 1 ... T of min(t, window), the keys that query t sees.
    keys = window - window * (window - 1) / (2 * sequence_length)
    return 12 * config.heads * config.head_dim * keys
