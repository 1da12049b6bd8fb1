"""Operations of a training step, for MFU and the planner."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache

import numpy as np

from models.beside import beside_length, encoder_beside
from models.config import ModelConfig


def layer_parameters(config: ModelConfig) -> int:
    """Weights of one layer that a token is multiplied with: no gains or biases, and of experts
    those that it goes to. Keys and values of a source are not of the token.
    """
    D, H = config.embed_dim, config.head_dim
    query_and_out = 2 * D * config.heads * H
    router = D * config.experts.number
    feed_forward = (3 if config.gated else 2) * D * _active_dim(config)
    attentions = 2 if config.cross != "none" else 1
    return attentions * query_and_out + _key_value_parameters(config) + router + feed_forward


def _key_value_parameters(config: ModelConfig) -> int:
    """Those of keys and values, in one attention."""
    return 2 * config.embed_dim * config.kv_heads * config.head_dim


def dropped_parameters(
    config: ModelConfig, saved: Collection[str], source_share: float = 0.0
) -> float:
    """Weights of one layer whose products are computed again where only `saved` tensors are kept.

    The last product of a layer is none of them: no gradient reads what it gives. Those that a
    source is multiplied with count `source_share` times, its tokens for each of the target.
    """
    D, F, H = config.embed_dim, _active_dim(config), config.head_dim
    products = {  # output's name -> weights of the product that makes it
        "query": D * config.heads * H,
        "key": D * config.kv_heads * H,
        "value": D * config.kv_heads * H,
        "attention_projection": D * config.heads * H,
        "cross_query": D * config.heads * H if config.cross != "none" else 0,
        "cross_projection": D * config.heads * H if config.cross != "none" else 0,
        "cross_key": D * config.kv_heads * H * source_share,
        "cross_value": D * config.kv_heads * H * source_share,
        "mlp_gate": D * F if config.gated else 0,
        "mlp_up": D * F,
    }
    return sum(size for name, size in products.items() if name not in saved)


def _active_dim(config: ModelConfig) -> int:
    """Inner width of the feed-forward, of all experts of a token together."""
    return config.feed_forward_dim * (config.experts.per_token if config.experts.number else 1)


def empty_slots(config: ModelConfig, stream_length: int) -> float:
    """FLOPs of forward and backward a token, in all layers, on slots of experts beyond the tokens'
    own: computed whether a token has the slot or not.
    """
    experts = config.experts
    if not experts.number or not experts.capacity:
        return 0.0
    slots = experts.number * experts.slots(stream_length) / stream_length
    weights = (3 if config.gated else 2) * config.embed_dim * config.feed_forward_dim
    return 6.0 * config.layers * weights * (slots - experts.per_token)


def embed_parameters(config: ModelConfig) -> int:
    """Weights that an embedding is multiplied with: of a factorised one."""
    return config.embed_rank * config.embed_dim


def head_parameters(config: ModelConfig) -> int:
    """Weights of the loss head; none where no token is predicted."""
    D, rank = config.embed_dim, config.embed_rank
    own = rank * D + config.table_dim * config.vocab_size + config.head_transform * D * D
    return config.token_head * own


def row_parameters(config: ModelConfig) -> int:
    """Weights that whole rows are multiplied with: of tasks."""
    D = config.embed_dim
    classes = sum(number for _, number in config.tasks)
    return D * classes + (config.pooler and classes > 0) * D * D


def _patch_parameters(config: ModelConfig) -> int:
    """Weights of its own that a model applies to every patch before its stack."""
    D = config.embed_dim
    if config.family == "vision":
        return config.vision.patch_dim * D
    if config.family == "vision_language":
        return config.vision.embed_dim * D + (D * D if config.vision.projector == "mlp" else 0)
    return 0


def flops_before_stack(config: ModelConfig, source_length: int) -> float:
    """Those of one row up to the stack: of patches, and of an encoder beside a decoder; 0 where
    tokens are looked up alone.
    """
    flops = 6.0 * config.vision.patches * _patch_parameters(config)
    encoder = encoder_beside(config)
    if encoder is not None:
        length = beside_length(config, source_length)
        each = sum(flops_by_layer(encoder, length)) + 6 * embed_parameters(encoder)
        flops += each * length + flops_before_stack(encoder, 0)
    return flops


def stream_share(config: ModelConfig, sequence_length: int) -> float:
    """Tokens of the residual stream for each token of a row: images are in it, too."""
    return (sequence_length + config.image_tokens) / sequence_length


def flops_per_token(config: ModelConfig, sequence_length: int, source_length: int = 0) -> float:
    """Floating-point operations of forward and backward for one token, rematerialisation left out.

    6 for each weight of a matrix, 12 N H for each key that a query sees, and of what rows are
    classified by a token's share. Causality halves the keys,
    which most papers (PaLM, appendix B, https://arxiv.org/abs/2204.02311) do not count: their MFU
    is higher for long sequences. Norms, softmax and nonlinearities are left out (below 1% from
    D = 1024 on). What a source or an image goes through before is the work of a
    row's tokens, in equal shares.
    """
    layers = sum(flops_by_layer(config, sequence_length, source_length))
    before = flops_before_stack(config, source_length) / sequence_length
    tables = 6 * embed_parameters(config) + head_flops(config, sequence_length)
    return layers + tables + before


def _cross(config: ModelConfig, sequence_length: int, source_length: int) -> float:
    """Those of one layer's attention over the source but for its queries and what it gives: keys
    and values of the whole source, which every token of the target sees.
    """
    made = 6 * _key_value_parameters(config) * source_length / sequence_length
    return made + 12 * config.heads * config.head_dim * source_length


def attention_flops_per_token(
    config: ModelConfig, sequence_length: int, source_length: int = 0
) -> float:
    """Those of scores and weighted sums alone, in all layers of the decoder."""
    cross = 12 * config.heads * config.head_dim * source_length * (config.cross != "none")
    return sum(_attention(config, i, sequence_length) + cross for i in range(config.layers))


def flops_by_layer(
    config: ModelConfig, sequence_length: int, source_length: int = 0
) -> tuple[float, ...]:
    """Those of each layer; where an encoder stands beside, of the decoder's."""
    crosses = config.cross != "none"
    cross = _cross(config, sequence_length, source_length) if crosses else 0.0
    products = 6 * layer_parameters(config) * stream_share(config, sequence_length) + cross
    return tuple(products + _attention(config, i, sequence_length) for i in range(config.layers))


def head_flops(config: ModelConfig, sequence_length: int) -> float:
    """Those of the loss head and of tasks."""
    return 6 * head_parameters(config) + 6 * row_parameters(config) / sequence_length


def _attention(config: ModelConfig, layer: int, sequence_length: int) -> float:
    local = config.pattern[layer % len(config.pattern)] == "local"
    prefix, length = config.image_tokens, sequence_length + config.image_tokens
    seen = _seen(length, config.window if local else length, config.causal, prefix)
    return 12 * config.heads * config.head_dim * seen / sequence_length


@lru_cache(maxsize=1024)
def _seen(length: int, window: int, causal: bool, prefix: int) -> int:
    """Pairs of a query and a key that it sees in a row, as `models.masks.visible` has it."""
    query = np.arange(length)
    stop = np.maximum(query + 1, prefix) if causal else np.full(length, length)
    stop = np.minimum(stop, query + window)
    return int(np.sum(stop - np.maximum(0, query - window + 1)))
