"""Bytes per device of a training step in closed form: no trace, no compiler, milliseconds.

A step passes through phases (`memory/phases.py`), each with its own buffers beside the state and
what else must be held (`memory/terms.py`, exact); the largest phase decides. docs/memory.md derives
the terms.
"""

from __future__ import annotations

from dataclasses import dataclass

from memory.constants import CONSTANTS, Constants
from memory.job import Job
from memory.phases import phases
from memory.stage_phases import stage_phases
from memory.stages import Stages
from memory.taught import teacher_bytes
from memory.terms import Terms
from parallel.chips import Chip

MIB = 2**20


@dataclass(frozen=True)
class Prediction:
    """Bytes per device.

    Attributes:
      components: component -> bytes, of the state and of the phase that needs most.
      phases: phase -> bytes of its temporaries.
      arguments: state, batch and a teacher's parameters.
      host_bytes: what is offloaded, in the memory of the host.
    """

    components: dict[str, int]
    phases: dict[str, int]
    arguments: int
    host_bytes: int

    @property
    def temporaries(self) -> int:
        return max(self.phases.values())

    @property
    def total_bytes(self) -> int:
        return self.arguments + self.temporaries


def predict(job: Job, chip: Chip) -> Prediction:
    """What a step of `job` needs on each device, if it ran on devices like `chip`."""
    return prediction_of(Terms(job, chip), CONSTANTS[chip.kind])


def prediction_of(terms: Terms, constants: Constants) -> Prediction:
    """The prediction of all terms with these constants."""
    staged = terms.job.pipeline is not None
    parts = stage_phases(Stages(terms), constants) if staged else phases(terms, constants)
    sums = {}
    for name, of in parts.items():
        of["packing"] = int((constants.packing - 1) * sum(of.values()))
        sums[name] = max(0, sum(of.values()) - int(constants.on_chip * MIB))
    largest = max(parts, key=lambda name: (sums[name], sum(parts[name].values())))
    # What a TPU keeps beside its cores may be a part of anything.
    off_chip = sums[largest] / max(1, sum(parts[largest].values()))
    temporaries = {name: int(off_chip * size) for name, size in parts[largest].items()}
    temporaries["packing"] += sums[largest] - sum(temporaries.values())
    components = {"weights (master copy)": terms.master}
    for name, (stacked, outside) in terms.moments.items():
        components[f"optimizer: {name}"] = outside if terms.offloaded_state else stacked + outside
    components["batch"] = terms.batch
    components |= {"teacher": teacher_bytes(terms)} if terms.teacher is not None else {}
    arguments = sum(components.values())
    components |= {name: size for name, size in temporaries.items() if size}
    offloaded = terms.offloaded_state + sum(terms.offloaded.values())
    return Prediction(components, sums, arguments, offloaded)
