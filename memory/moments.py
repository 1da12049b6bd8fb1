"""How many bytes each optimizer keeps of the weights: what `training/optim.py` makes, counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from memory.job import Job
from parallel.footprint import ITEM, Weight
from training.blocks import FIRST, SECOND, divided
from training.low_rank import sides_of
from training.matrices import decays, matrix_dims, orthogonalises
from training.optim import BITS, SCALES


def moments(
    job: Job, weights: list[Weight], dtype: str, at_rest: Callable[[list[Weight]], int]
) -> dict[str, int]:
    """Moment -> bytes on one device.

    Args:
      dtype: of the weights.
      at_rest: the elements of weights on one device as they are divided at rest.
    """
    name, momentum = job.optimizer.name, job.optimizer.momentum
    item = ITEM[dtype]
    whole = at_rest(weights) * item
    if name in BITS:
        return _quantised(job, weights, at_rest)
    if name in SCALES:
        return {key: item * size for key, size in _low_rank(job, weights, at_rest).items()}
    if name == "adamw":
        return {"first moment": whole, "second moment": whole}
    if name == "lion" or (name == "sgd" and momentum):
        return {"momentum": whole}
    if name == "sgd":
        return {}
    if name == "adafactor":
        return {"factored second moment": item * sum(_factored(job, w) for w in weights)}
    assert name == "muon", name
    adam = [weight for weight in weights if not orthogonalises(weight.axes)]
    return {"momentum": whole, "second moment of vectors and tables": at_rest(adam) * item}


def _factored(job: Job, weight: Weight) -> int:
    """The sums over rows and over columns of a matrix; of what is no matrix, all."""
    dims = matrix_dims(weight.axes)
    left_out = ((),) if dims is None else (dims[1], dims[0])
    spec = _entries(job, weight)  # a factor is divided as its dims are in the whole weight
    total = 0
    for gone in left_out:
        size = parts = 1
        for i, entry in enumerate(spec):
            if i not in gone:
                size *= weight.shape[i]
                parts *= _size(job, entry)
        total += size // parts
    return total


def _quantised(
    job: Job, weights: list[Weight], at_rest: Callable[[list[Weight]], int]
) -> dict[str, int]:
    """Codes and scales of matrices; vectors in float32."""
    bits = BITS[job.optimizer.name]
    vectors = 4 * at_rest([weight for weight in weights if not decays(weight.axes)])
    found = {"first moment": vectors, "second moment": vectors}
    for name, coding in zip(found, (FIRST[bits], SECOND[bits]), strict=True):
        for weight in filter(lambda weight: decays(weight.axes), weights):
            layout = coding.layout(weight.axes, weight.shape)
            # A TPU pads codes as it does the weights; scales are few.
            local, codes = (_local(job, weight, s) for s in (weight.shape, layout.codes))
            found[name] += at_rest([weight]) * codes // local
            found[name] += 4 * _local(job, weight, layout.scales)
    return found


def _low_rank(
    job: Job, weights: list[Weight], at_rest: Callable[[list[Weight]], int]
) -> dict[str, int]:
    """Moments of projected matrices and, of GaLore, their projections; whole moments of others."""
    found = {"projections": 0, "projected moments": 0, "moments of what is not projected": 0}
    for weight in weights:
        sides = sides_of(weight.axes, weight.shape, job.optimizer.rank)
        if sides is None:
            found["moments of what is not projected"] += 2 * at_rest([weight])
            continue
        size = lambda entry: _size(job, entry)
        parts = [
            math.prod(shape) // math.prod(map(size, entries))
            for shape, entries in zip(
                (sides.projection, sides.moment),
                sides.divided(_entries(job, weight), size),
                strict=True,
            )
        ]
        found["projections"] += parts[0]
        found["projected moments"] += 2 * parts[1]
    if job.optimizer.name == "apollo":
        del found["projections"]
    return found


def _local(job: Job, weight: Weight, shape: tuple[int, ...]) -> int:
    """Elements on one device of an array with a dim for each of a weight's, divided as it is."""
    entries = divided(shape, _entries(job, weight), lambda entry: _size(job, entry))
    return math.prod(shape) // math.prod(_size(job, entry) for entry in entries)


def _entries(job: Job, weight: Weight) -> tuple[Any, ...]:
    spec = tuple(job.rules.at_rest(weight.axes, weight.shape))
    return spec + (None,) * (len(weight.shape) - len(spec))


def _size(job: Job, entry: Any) -> int:
    return job.rules.size((entry,) if isinstance(entry, str) else tuple(entry or ()))
