"""What XLA makes of a forward pass, one set a platform: which tensors of a layer live together.

Chosen on compiled cells that are in no published table (benchmarks/results/
inference_calibration.jsonl); the buffers at their peaks were read, not fitted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from parallel.chips import Chip


class Moment(NamedTuple):
    """Tensors of one layer that live together: [tokens, D], [tokens, F], queries, keys and values
    ([tokens, heads x head_dim] each).
    """

    narrow: float = 0.0
    wide: float = 0.0
    heads: float = 0.0
    kv: float = 0.0


@dataclass(frozen=True)
class InferenceConstants:
    """Factors of the terms in `memory/inference_parts.py`.

    Attributes:
      alone: the fullest moments of a layer where no axis divides its products, with a gated
        feed-forward; plain: with another.
      divided: the same where sums go over `tensor`, and stand beside their parts.
      experts: those of a mixture, of which `wide` is [rows, F], beside tensors [rows, D].
      rows_at_experts: how many of those.
      gathered: of one layer's gathered weights, while prefill uses them one after the other.
      gathered_step: the same in a step of decoding, where the compiler gathers them together.
      table_parts: a device's own part of a gathered table, in the order of the gather.
      copied, copied_step: of the blocks' weights that are gathered, a device's own parts in the
        order of the gather, of all layers: in prefill, and in a step of decoding.
      one_row: matrices of a feed-forward in another order where a product has one row.
      scores: float32 scores of attention that live together; biased: where a bias is added.
      blocks: float32 sums of the blocked form.
      kept_scores: scores of a step of decoding, over the slots of the cache.
      pooled: of a layer's keys and values, as a step of decoding reads them out of a pool.
      widened: bytes of an element of an int8 pool that is read, in wider dtypes.
      unaligned: copies of a table whose gathered parts are no whole tiles.
      on_chip: MiB of temporaries of a layer, or of logits, that are kept beside the cores.
    """

    alone: tuple[Moment, ...]
    plain: tuple[Moment, ...]
    divided: tuple[Moment, ...]
    experts: Moment = Moment(narrow=2, wide=1, kv=2)  # noqa: RUF009
    rows_at_experts: float = 3.0
    gathered: float = 1.0
    gathered_step: float = 1.0
    table_parts: float = 0.0
    copied: float = 0.0
    copied_step: float = 0.0
    one_row: float = 0.0
    scores: float = 1.0
    biased: float = 2.0
    blocks: float = 1.0
    kept_scores: float = 1.0
    pooled: float = 1.0
    widened: float = 0.0
    unaligned: float = 0.0
    on_chip: float = 0.0


INFERENCE_CONSTANTS = {
    "gpu": InferenceConstants(
        alone=(Moment(narrow=3, wide=2, kv=1), Moment(narrow=2, heads=1, kv=2)),
        plain=(Moment(narrow=2, wide=1, heads=1, kv=2), Moment(narrow=2, heads=1, kv=2)),
        divided=(
            Moment(narrow=3, wide=2, kv=1),
            Moment(narrow=4, wide=1),
            Moment(narrow=3, heads=1),
        ),
        gathered=0.5,
        table_parts=1.0,
        one_row=1.0,
    ),
    "tpu": InferenceConstants(
        alone=(Moment(narrow=1, wide=2), Moment(narrow=2, heads=1, kv=2)),
        plain=(Moment(narrow=1, wide=2), Moment(narrow=2, heads=1, kv=2)),
        divided=(Moment(narrow=3, wide=1, kv=1), Moment(narrow=3, heads=1, kv=2)),
        copied=0.9,
        copied_step=0.27,
        widened=6.0,
        unaligned=1.0,
    ),
    "cpu": InferenceConstants(
        alone=(Moment(narrow=3, wide=2), Moment(narrow=3, heads=2, kv=2)),
        plain=(Moment(narrow=3, wide=2), Moment(narrow=3, heads=2, kv=2)),
        divided=(Moment(narrow=3, wide=2), Moment(narrow=3, heads=2, kv=2)),
    ),
}

# MiB beside the cores that the compiler was seen to use: of v5p's it used none.
ON_CHIP = {"v5e": 90.0, "v6e": 90.0}


def constants_of(chip: Chip) -> InferenceConstants:
    """Those of a chip."""
    return replace(INFERENCE_CONSTANTS[chip.kind], on_chip=ON_CHIP.get(chip.name, 0.0))
