"""What devices that share the experts of a layer send each other, see `parallel/dispatch.py`."""

from __future__ import annotations

from typing import NamedTuple

from memory.terms import Terms
from parallel.dispatch import SLOTS
from parallel.footprint import Activation


class Exchange(NamedTuple):
    """Collectives over the expert axis, in one layer and micro-step.

    Attributes:
      kind: "all-to-all", "all-gather" or "reduce-scatter".
      bytes: on one device: what is gathered in all, or the operand of any other.
      times: forward and backward.
    """

    kind: str
    bytes: int
    times: int


def exchanges(terms: Terms) -> list[Exchange]:
    """The exchange of a layer's tokens, of their weights, and where rows are sorted of choices."""
    remat, config = terms.job.remat, terms.job.model.experts
    kept = (*(tensor.name for tensor in terms.saved_names), *remat.offload)
    again = int(remat.policy != "none")
    tokens_again = again * ("expert_input" not in kept)
    if config.capacity:
        features = terms.bytes_of([Activation("", f"{SLOTS} slot_embed")])
        scale = terms.bytes_of([Activation("", SLOTS, "float32")])
        return [
            Exchange("all-to-all", features, 4 + tokens_again),
            Exchange("all-to-all", scale, 2 + again),
        ]
    features = terms.bytes_of([Activation("", "group_batch seq slot_embed")])
    scale = terms.bytes_of([Activation("", "group_batch seq choice", "float32")])
    return [
        Exchange("all-gather", features, 2 + tokens_again),
        Exchange("reduce-scatter", features, 2),
        Exchange("all-gather", scale, 1 + again),
        Exchange("reduce-scatter", scale, 1),
        Exchange("all-gather", scale, 1 + again),  # choices, int32
    ]


def over_tensor(terms: Terms) -> float:
    """Bytes that gathers and scatters over `tensor` move in a layer beyond those of a dense one.

    Rows are gathered before an expert's first products and scattered after its last, forward and
    backward; tokens are gathered once each way, and not reduced.
    """
    rows = terms.bytes_of([Activation("", f"{terms.at_experts} act_embed")])
    return 4.0 * rows - 2.0 * terms.narrow


def exchanged(terms: Terms) -> float:
    """Bytes of gathers and scatters of a layer and micro-step; a ring moves (e - 1) / e of them."""
    return sum(float(e.bytes * e.times) for e in exchanges(terms))
