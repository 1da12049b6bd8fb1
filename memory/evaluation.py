"""Bytes per device of a step of evaluate.py in closed form.

Weights are those at rest, with their copy in compute dtype beside them where there is one; nothing
of a layer is kept for another, and the loss head has the logits of a chunk. Weights are those of a
training step (`memory/terms.py`), tensors and constants those of prefill.
"""

from __future__ import annotations

from memory.inference_constants import constants_of
from memory.inference_parts import Parts, held, off_chip, one_layer
from memory.job import Job
from memory.predict import MIB, Prediction
from memory.stream import Stream
from memory.terms import Terms
from parallel.chips import Chip


def predict_evaluation(job: Job, chip: Chip) -> Prediction:
    """What a step needs of each device; `job` is of an experiment that is not for training."""
    terms, k = Terms(job, chip), constants_of(chip)
    always: Parts = {
        "weights in compute dtype": held(terms.copy),
        "weights cut by the pattern": held(terms.cut),
    }
    layer, table = (
        held(size * terms.product_item * terms.gathers_layers)
        for size in (terms.layer_weights, terms.table)
    )
    stream = _stream(job, chip)
    found = {
        "layers": always
        | {"gathered weights": layer, "positions": held(stream.bias + stream.angles)}
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
        beside = _stream(job.encoder, chip)
        features = {"the encoder's features": held(beside.narrow)}
        for name in found:
            found[name] |= features
        inner = {"positions": held(beside.bias + beside.angles)}
        found["encoder"] = always | inner | one_layer(beside, k)
    sums = {name: off_chip("layer", part, int(k.on_chip * MIB)) for name, part in found.items()}
    phases = {name: sum(sizes.values()) for name, sizes in sums.items()}
    temporaries = sums[max(phases, key=lambda name: phases[name])]
    arguments = {"weights (master copy)": terms.master, "batch": terms.batch}
    rest = {name: size for name, size in temporaries.items() if size}
    return Prediction(arguments | rest, phases, sum(arguments.values()), 0)


def _stream(job: Job, chip: Chip) -> Stream:
    rows, compute = job.batch_size, job.precision.compute
    return Stream(job.model, job.stream_length, rows, job.rules, compute, chip.kind)
