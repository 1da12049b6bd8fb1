"""How many numbers each optimizer keeps of the weights: what `training/optim.py` makes, counted."""

from __future__ import annotations

from collections.abc import Callable

from memory.job import Job
from parallel.footprint import Weight
from training.matrices import matrix_dims, orthogonalises


def moments(
    job: Job, weights: list[Weight], at_rest: Callable[[list[Weight]], int]
) -> dict[str, int]:
    """Moment -> elements on one device.

    Args:
      at_rest: the elements of weights on one device as they are divided at rest.
    """
    name, momentum = job.optimizer.name, job.optimizer.momentum
    whole = at_rest(weights)
    if name == "adamw":
        return {"first moment": whole, "second moment": whole}
    if name == "lion" or (name == "sgd" and momentum):
        return {"momentum": whole}
    if name == "sgd":
        return {}
    if name == "adafactor":
        return {"factored second moment": sum(_factored(job, weight) for weight in weights)}
    assert name == "muon", name
    adam = [weight for weight in weights if not orthogonalises(weight.axes)]
    return {"momentum": whole, "second moment of vectors and tables": at_rest(adam)}


def _factored(job: Job, weight: Weight) -> int:
    """The sums over rows and over columns of a matrix; of what is no matrix, all."""
    dims = matrix_dims(weight.axes)
    left_out = ((),) if dims is None else (dims[1], dims[0])
    # A factor is divided as its dims are in the whole weight.
    spec = list(job.rules.at_rest(weight.axes, weight.shape))
    spec += [None] * (len(weight.shape) - len(spec))
    total = 0
    for gone in left_out:
        size = parts = 1
        for i, entry in enumerate(spec):
            if i not in gone:
                size *= weight.shape[i]
                parts *= job.rules.size((entry,) if isinstance(entry, str) else tuple(entry or ()))
        total += size // parts
    return total
