"""What chips reach of their figures, and a step's time as the sum of what it is spent on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Mesh axes whose collectives stand between two products, or between two ticks.
WAITED = {"tensor", "pipe"}


@dataclass(frozen=True)
class Ceilings:
    """Shares of a chip's figures that good programs reach; the same for every layout.

    Attributes:
      matrix: of the peak, by large matrix products.
      stream: of the memory's bandwidth.
      link: of the links' bandwidth.
      overlap: whether gathers of weights and reductions of gradients run beside products.
    """

    matrix: float
    stream: float
    link: float
    overlap: bool


CEILINGS = {
    "gpu": Ceilings(matrix=0.70, stream=0.85, link=0.80, overlap=True),
    "tpu": Ceilings(matrix=0.80, stream=0.85, link=0.85, overlap=True),
    "cpu": Ceilings(matrix=1.0, stream=1.0, link=1.0, overlap=False),
}


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step.

    Attributes:
      compute_seconds: matrix products, recomputed ones too.
      memory_seconds: norms, nonlinearities, softmax, loss and update.
      communication_seconds: mesh axis -> all its collectives.
      exposed_seconds: mesh axis -> what of it is waited for.
      host_seconds: what is moved to the host's memory and back, and waited for.
      bubble_seconds: pipeline stages that wait.
      mfu: the model's FLOPs (no recomputation) over the peak's in this time.
    """

    compute_seconds: float
    memory_seconds: float
    communication_seconds: dict[str, float]
    exposed_seconds: dict[str, float]
    host_seconds: float
    bubble_seconds: float
    mfu: float

    @property
    def seconds(self) -> float:
        return (
            self.compute_seconds
            + self.memory_seconds
            + sum(self.exposed_seconds.values())
            + self.host_seconds
            + self.bubble_seconds
        )

    def grade(self) -> dict[str, Any]:
        """As plain data, for a grade of a row."""
        return {"seconds": self.seconds} | vars(self)


def exposed(communication: Mapping[str, float], hidden: float) -> dict[str, float]:
    """What is waited for of collectives, by axis; `hidden` seconds of work run beside them."""
    waits = {}
    for axis, seconds in communication.items():
        if WAITED.intersection(axis.split("+")):
            waits[axis] = seconds
        else:
            waits[axis] = max(0.0, seconds - hidden)
            hidden = max(0.0, hidden - seconds)
    return waits
