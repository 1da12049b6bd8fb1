"""What the parts of a model cost the stages of a pipeline, for `parallel.division`."""

from __future__ import annotations

from models.config import DecoderConfig
from models.flops import dropped_parameters, flops_by_layer, head_flops, layer_parameters
from parallel.division import Costs
from parallel.remat import PRESETS, RematConfig

# FLOPs that take as long as a byte of memory: H100 has 295 in bfloat16, TPU v5e 240, v5p 166.
BALANCE = 250
# Elements of D that one token moves: the lookup reads and writes a row, its gradient is read and
# added to a row, which is read and written.
LOOKUP, ITEM = 5, 4


def part_costs(config: DecoderConfig, sequence_length: int, remat: RematConfig) -> Costs:
    """FLOPs of one token in forward and backward: layers with what they compute again, embedding,
    head.

    The embedding has no products: its bytes count as the FLOPs that take as long. Left out are the
    sums of both tables' gradients, which differ with the layout and are alike at both ends, and a
    second recomputation, for a W that is apart from its B.
    """
    each = flops_by_layer(config, sequence_length)
    again = _again(config, each, remat)
    return Costs(
        tuple(flops + more for flops, more in zip(each, again, strict=True)),
        first=float(LOOKUP * ITEM * BALANCE * config.embed_dim),
        last=head_flops(config),
    )


def _again(config: DecoderConfig, each: tuple[float, ...], remat: RematConfig) -> tuple[float, ...]:
    """What the backward pass of each layer computes again."""
    names = remat.save if remat.policy == "custom" else PRESETS[remat.policy]
    if names is None:
        return (0.0,) * len(each)
    dropped = 2 * dropped_parameters(config, names)
    core = 0.0 if "attention_out" in names else 1 / 3  # of scores and weighted sums
    matrices = 6 * layer_parameters(config)
    return tuple(dropped + core * (flops - matrices) for flops in each)
