"""What lives in each part of prefill and of a step of decoding, beside weights, cache and inputs.

    source      the encoder of a source, or of an image, before all layers
    gather      of the table of embeddings over fsdp, at ZeRO level 3
    embedding   the table as it is looked up, and what comes of it
    layer       one layer: its gathered weights, its tensors of all tokens of the call, attention
    head        the table gathered again, the logits of the last token of each row

Parts run one after the other and layers do so, too (`models/decode.py` sees to it): the fullest
part decides. What a compiler makes of each is in `memory/inference_constants.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from memory.inference_constants import InferenceConstants, Moment
from memory.inference_terms import InferenceTerms
from memory.stream import Stream


class Held(NamedTuple):
    """Bytes of one component, in tensors of at most so many bytes each."""

    bytes: int
    tensor: int


Parts = dict[str, Held]


def parts(terms: InferenceTerms, phase: str, k: InferenceConstants) -> dict[str, Parts]:
    """Part -> component -> temporaries on one device."""
    prefill = phase == "prefill"
    stream = terms.stream() if prefill else terms.stream(1)
    beside = terms.beside if prefill else None
    copied = (k.copied if prefill else k.copied_step) * terms.block_weights
    copied *= terms.gathers and not terms.unaligned
    always = {
        "positions": held(stream.angles + (stream.bias if prefill else 0)),
        "weights in another order": Held(int(copied), terms.largest_weight),
        "the encoder's features": held(0 if beside is None else beside.narrow),
    }
    gathered = (k.gathered if prefill else k.gathered_step) * terms.layer_weights * terms.gathers
    layer = {"gathered weights": Held(int(gathered), int(gathered))}
    layer |= one_layer(stream, k) if prefill else one_step(terms, stream, k)
    looked_up = table(terms, k)
    found = {
        "gather": {"weights in another order": always["weights in another order"]} | looked_up,
        "embedding": always
        | table(terms, replace(k, table_parts=0.0))
        | {"residual stream": held(stream.narrow)},
        "layer": always | layer,
        "head": table(terms, replace(k, table_parts=0.0)) | {"logits": held(logits(terms))},
    }
    if beside is not None:
        own = held(beside.bias + beside.angles), held(terms.recast)
        found["source"] = dict(
            zip(("positions", "weights as products read them"), own, strict=True)
        )
        found["source"] |= one_layer(beside, k)
    return found


def held(size: float, number: float = 1.0) -> Held:
    """So many tensors of one size."""
    return Held(int(size * number), int(size))


def table(terms: InferenceTerms, k: InferenceConstants) -> Parts:
    """A table of the vocabulary where it is gathered, beside a device's part of it in its order."""
    copies = 1 + k.table_parts / terms.fsdp + k.unaligned * terms.unaligned
    gathered = terms.table * copies * terms.gathers
    return {"gathered weights": held(gathered)}


def logits(terms: InferenceTerms) -> int:
    """Whole logits where they are put together; elsewhere they are the result itself."""
    return terms.logits if terms.job.rules.parts("act_vocab") > 1 else 0


def one_layer(stream: Stream, k: InferenceConstants) -> Parts:
    """A layer of whole rows at its fullest moment."""
    scores = (k.biased if stream.model.positions == "relative" else k.scores) * stream.scores
    inside = scores + k.blocks * stream.blocks
    found: list[Parts] = []
    alone = k.alone if stream.model.gated else k.plain
    for moment in k.divided if stream.divided else alone:
        found.append(at(moment, stream, 0 if moment.wide else inside))
    if stream.model.experts.number:
        rows = held(stream.at_experts, k.rows_at_experts)
        found.append(at(k.experts, stream, 0) | {"rows at their experts": rows})
    return max(found, key=total)


def at(moment: Moment, stream: Stream, inside: float) -> Parts:
    """The tensors of one moment, and of what attention makes `inside`."""
    heads = moment.heads * stream.heads + moment.kv * stream.kv
    return {
        "residual stream": held(stream.narrow, moment.narrow),
        "feed-forward": held(stream.wide, moment.wide),
        "attention": Held(int(heads + inside), max(stream.heads, int(inside))),
    }


def one_step(terms: InferenceTerms, stream: Stream, k: InferenceConstants) -> Parts:
    """A layer of one token a row, and what it reads of the cache in another form."""
    read = terms.largest_read
    wider = k.widened * read.int8
    attention = k.kept_scores * terms.kept_scores + k.pooled * read.pooled + wider
    reordered = k.one_row * terms.largest_weight * (terms.rows == 1)
    return {
        "residual stream": held(stream.narrow, 4),
        "feed-forward": held(max(stream.wide, stream.at_experts), 3),
        "attention": Held(int(attention), int(max(read.pooled, wider / 2))),
        "one row's weights in another order": held(reordered),
    }


def total(part: Parts) -> int:
    """Bytes of a part."""
    return sum(component.bytes for component in part.values())


def off_chip(name: str, part: Parts, on_chip: int) -> dict[str, int]:
    """Component -> bytes of a part in the device's memory, where tensors of a layer and logits that
    fit beside the cores, the smallest first, are there.
    """
    if name not in ("layer", "head"):
        on_chip = 0
    left = {name: component.bytes for name, component in part.items()}
    for name, component in sorted(part.items(), key=lambda item: item[1].tensor):
        while left[name] and min(component.tensor, left[name]) <= on_chip:
            taken = min(component.tensor, left[name])
            if not taken:
                break
            left[name] -= taken
            on_chip -= taken
    return left
