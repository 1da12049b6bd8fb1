"""Bytes per device of generation in closed form: no trace, no compiler, milliseconds.

Two programs: prefill reads prompts and fills the cache, decode adds a token to every row. Both hold
weights, cache, what a call is given and logits (`memory/inference_terms.py`, exact), and the
fullest of their parts (`memory/inference_parts.py`); the larger program decides.
"""

from __future__ import annotations

from dataclasses import dataclass

from memory.inference_constants import InferenceConstants, constants_of
from memory.inference_job import PHASES, InferenceJob
from memory.inference_parts import off_chip, parts, total
from memory.inference_terms import InferenceTerms
from parallel.chips import Chip

MIB = 2**20


@dataclass(frozen=True)
class Program:
    """One of the two, bytes per device.

    Attributes:
      arguments: weights, cache and what a call is given; the cache is written in place.
      logits: the result beside it.
      temporaries: component -> bytes, of the fullest part.
      part: that part.
    """

    arguments: int
    logits: int
    temporaries: dict[str, int]
    part: str

    @property
    def total_bytes(self) -> int:
        return self.arguments + self.logits + sum(self.temporaries.values())


@dataclass(frozen=True)
class InferencePrediction:
    """Bytes per device.

    Attributes:
      held: component -> bytes of weights and cache, which both programs have.
      programs: prefill and decode.
    """

    held: dict[str, int]
    programs: dict[str, Program]

    @property
    def decides(self) -> str:
        """The program that needs most."""
        return max(self.programs, key=lambda phase: self.programs[phase].total_bytes)

    @property
    def total_bytes(self) -> int:
        return self.programs[self.decides].total_bytes

    @property
    def components(self) -> dict[str, int]:
        """Component -> bytes of the program that needs most; they add up to the total."""
        program = self.programs[self.decides]
        given = program.arguments - sum(self.held.values())
        rest = {name: size for name, size in program.temporaries.items() if size}
        found = self.held | {"tokens and tables": given}
        return found | rest | {"logits": program.logits + rest.get("logits", 0)}


def predict_inference(job: InferenceJob, chip: Chip) -> InferencePrediction:
    """What generation needs of each device, if it ran on devices like `chip`."""
    return inference_of(InferenceTerms(job, chip), constants_of(chip))


def inference_of(terms: InferenceTerms, k: InferenceConstants) -> InferencePrediction:
    """The prediction of all terms with these constants."""
    held = {"weights": terms.weights} | terms.cache
    programs = {}
    for phase in PHASES:
        of = parts(terms, phase, k)
        sums = {name: off_chip(name, found, int(k.on_chip * MIB)) for name, found in of.items()}
        part = max(sums, key=lambda name: (sum(sums[name].values()), total(of[name])))
        arguments = sum(held.values()) + terms.inputs(phase)
        programs[phase] = Program(arguments, terms.logits, sums[part], part)
    return InferencePrediction(held, programs)


def predicted_arguments(job: InferenceJob, chip: Chip) -> int:
    """Of `predict_inference` what no constant is in: arguments of prefill."""
    terms = InferenceTerms(job, chip)
    return terms.weights + sum(terms.cache.values()) + terms.inputs("prefill")
