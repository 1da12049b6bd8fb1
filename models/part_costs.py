"""What the parts of a model cost the stages of a pipeline, for `parallel.division`."""

from __future__ import annotations

from models.beside import beside_length, encoder_beside
from models.config import ModelConfig
from models.flops import (
    dropped_parameters,
    embed_parameters,
    flops_before_stack,
    flops_by_layer,
    head_flops,
    layer_parameters,
    stream_share,
)
from parallel.division import Costs
from parallel.remat import PRESETS, RematConfig

# FLOPs that take as long as a byte of memory: H100 has 295 in bfloat16, TPU v5e 240, v5p 166.
BALANCE = 250
# Elements of D that one token moves: the lookup reads and writes a row, its gradient is read and
# added to a row, which is read and written.
LOOKUP, ITEM = 5, 4


def part_costs(
    config: ModelConfig, sequence_length: int, remat: RematConfig, source_length: int = 0
) -> Costs:
    """FLOPs of one token in forward and backward: layers with what they compute again, embedding,
    head.

    The lookup has no products: its bytes count as the FLOPs that take as long. What a source or
    an image goes through before the layers is computed with it: a first time for the layers, and
    from the start again for its gradient. Left out are the sums of both tables' gradients, which
    differ with the layout and are alike at both ends, and a second recomputation, for a W that is
    apart from its B.
    """
    each = flops_by_layer(config, sequence_length, source_length)
    again = _again(config, each, remat, stream_share(config, sequence_length))
    lookup = float(LOOKUP * ITEM * BALANCE * config.embed_dim) * (config.padded_vocab > 0)
    before = 4 / 3 * flops_before_stack(config, source_length)
    if (encoder := encoder_beside(config)) is not None:
        length = beside_length(config, source_length)
        before += sum(_again(encoder, flops_by_layer(encoder, length), remat, 1.0)) * length
    return Costs(
        tuple(flops + more for flops, more in zip(each, again, strict=True)),
        first=lookup + 6 * embed_parameters(config) + before / sequence_length,
        last=head_flops(config, sequence_length),
    )


def _again(
    config: ModelConfig, each: tuple[float, ...], remat: RematConfig, share: float
) -> tuple[float, ...]:
    """What the backward pass of each layer computes again; `share` of `stream_share`."""
    names = remat.save if remat.policy == "custom" else PRESETS[remat.policy]
    if names is None:
        return (0.0,) * len(each)
    dropped = 2 * dropped_parameters(config, names) * share
    core = 0.0 if "attention_out" in names else 1 / 3  # of scores and weighted sums
    matrices = 6 * layer_parameters(config) * share
    return tuple(dropped + core * (flops - matrices) for flops in each)
