"""What a teacher adds to a training step: arguments, its forward pass, its side of the loss.

Its parameters are arguments, in its compute dtype. Its forward pass comes before the student's and
keeps nothing but the features of its last layer, and the states that are matched, until the loss.
"""

from __future__ import annotations

from memory.constants import Constants
from memory.forward import forward_parts
from memory.inference_constants import constants_of
from memory.terms import Terms


def teacher_bytes(terms: Terms) -> int:
    """Its parameters on one device; 0 without one."""
    return 0 if terms.teacher is None else terms.teacher.master


def lesson(terms: Terms) -> dict[str, int]:
    """What is kept of its forward pass until the loss: its features, and states of both."""
    teacher = terms.teacher
    if teacher is None:
        return {}
    pairs = len(terms.job.pairs)
    parts = {"teacher: features": teacher.narrow}
    if pairs:
        parts["matched states"] = pairs * (teacher.narrow + terms.narrow)
    return parts


def taught_head(terms: Terms, k: Constants, rows: int) -> dict[str, int]:
    """Beside the student's loss head: the teacher's table as it is used, and its logits.

    Args:
      rows: tokens of a chunk.
    """
    teacher = terms.teacher
    if teacher is None:
        return {}
    model, rules = teacher.job.model, teacher.job.rules
    logits = rows * model.padded_vocab // rules.parts("act_vocab")
    gathered = teacher.table * teacher.product_item if teacher.gathers_layers else 0
    return {"teacher: table": gathered, "teacher: logits": int(k.logits * 4 * logits)}


def taught_phases(terms: Terms) -> dict[str, dict[str, int]]:
    """The phase of its forward pass, in its fullest part before the loss."""
    teacher = terms.teacher
    if teacher is None:
        return {}
    found = forward_parts(teacher, constants_of(terms.chip))
    sums = {
        name: sum(part.bytes for part in parts.values())
        for name, parts in found.items()
        if name != "loss"
    }
    return {"teacher": {"teacher: forward pass": max(sums.values())} | lesson(terms)}
