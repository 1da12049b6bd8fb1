"""What lives in each part of a forward pass up to the loss, beside weights and batch.

Weights are those at rest, with their copy in compute dtype beside them where there is one; nothing
of a layer is kept for another, and the loss head has the logits of a chunk. Weights are those of a
training step (`memory/terms.py`), tensors and constants those of prefill.
"""

from __future__ import annotations

from memory.inference_constants import InferenceConstants
from memory.inference_parts import Parts, held, one_layer
from memory.job import Job
from memory.stream import Stream
from memory.terms import Terms
from parallel.chips import Chip


def forward_parts(terms: Terms, k: InferenceConstants) -> dict[str, Parts]:
    """Part -> component -> temporaries on one device, of one micro-step."""
    job = terms.job
    always: Parts = {
        "weights in compute dtype": held(terms.copy),
        "weights cut by the pattern": held(terms.cut),
    }
    layer, table = (
        held(size * terms.gathers_layers)
        for size in (terms.layer_read, terms.table * terms.product_item)
    )
    stream = _stream(job, terms.chip)
    found = {
        "layers": always
        | {"gathered weights": layer, "made of codes, or rounded": held(terms.layer_made)}
        | {"positions": held(stream.bias + stream.angles)}
        | one_layer(stream, k),
        "embedding": always | {"gathered weights": table, "residual stream": held(stream.narrow)},
    }
    if job.model.token_head:
        chunks = -(-job.tokens // job.loss.chunk)
        logits = -(-job.tokens // chunks) * job.model.padded_vocab * 4
        found["loss"] = {  # the layers' copy is gone by then
            "gathered weights": table,
            "loss head: logits": held(logits // job.rules.parts("act_vocab")),
            "residual stream": held(stream.narrow),
        }
    if job.encoder is not None:
        beside = _stream(job.encoder, terms.chip)
        features = {"the encoder's features": held(beside.narrow)}
        for name in found:
            found[name] |= features
        inner = {"positions": held(beside.bias + beside.angles)}
        found["encoder"] = always | inner | one_layer(beside, k)
    return found


def _stream(job: Job, chip: Chip) -> Stream:
    rows, compute = job.batch_size // job.micro_steps, job.precision.compute
    return Stream(job.model, job.stream_length, rows, job.rules, compute, chip.kind)
