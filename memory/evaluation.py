"""Bytes per device of a step of evaluate.py in closed form: a forward pass (memory/forward.py)."""

from __future__ import annotations

from memory.forward import forward_parts
from memory.inference_constants import constants_of
from memory.inference_parts import off_chip
from memory.job import Job
from memory.predict import MIB, Prediction
from memory.terms import Terms
from parallel.chips import Chip


def predict_evaluation(job: Job, chip: Chip) -> Prediction:
    """What a step needs of each device; `job` is of an experiment that is not for training."""
    terms, k = Terms(job, chip), constants_of(chip)
    found = forward_parts(terms, k)
    sums = {name: off_chip("layer", part, int(k.on_chip * MIB)) for name, part in found.items()}
    phases = {name: sum(sizes.values()) for name, sizes in sums.items()}
    temporaries = sums[max(phases, key=lambda name: phases[name])]
    arguments = {"weights (master copy)": terms.master, "batch": terms.batch}
    rest = {name: size for name, size in temporaries.items() if size}
    return Prediction(arguments | rest, phases, sum(arguments.values()), 0)
