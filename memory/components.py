"""What a buffer of the compiled training step is for, and which line of Python asked for it.

A buffer is followed back to the instruction that computed its content: through copies, loops and
the stacks that a scan collects. Its kind is read from how it got there (stacked by the scan over
the layers, gathered, converted from an argument) and from the files of the Python code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from memory.hlo import Computation, Frame, Instruction, Module
from memory.replay import Value
from memory.sharing import fusion_results, updated_slice

COMPONENTS = (
    "activations",
    "weights in compute dtype",
    "gathered weights",
    "gradients",
    "optimizer",
    "loss head",
    "attention",
    "feed-forward",
    "embedding",
    "collectives",
    "batch",
    "teacher",
    "other",
)
# The first that matches any frame, in this order; what is left of a model is its residual stream.
FILES = (
    ("optimizer", re.compile(r"training/(optim|offload|matrices|schedules)\.py|/optax/")),
    ("loss head", re.compile(r"training/(losses|loss_chunks|distill_loss|classification)\.py")),
    ("attention", re.compile(r"models/(\w*attention|masks|\w*positions|projections)\.py")),
    ("feed-forward", re.compile(r"models/feed_forward\.py")),
    (
        "activations",
        re.compile(
            r"models/(block|layers|stack|tables|\w*decoder|encoder\w*|transform|heads|vision\w*)\.py"
        ),
    ),
)
HEAD = FILES[1][1]
ROOT = Path(__file__).resolve().parents[1]
LIBRARY = re.compile(r"site-packages|/parallel/|^<")
LOOP = re.compile(
    r"jit\(dynamic_(update_)?index_in_dim\)|(^|/)(while|body|closed_call|checkpoint|cond)$"
)
EQUATION = re.compile(r"/[a-z]+,[a-z]+->([a-z]+)/")
GATHERS = {"all-gather", "all-gather-start"}
COLLECTIVE = re.compile(r"all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute")
# Instructions whose result is their first operand, or a part of it, in another place or dtype.
MOVES = re.compile(
    "all-gather|all-gather-start|bitcast|convert|copy|copy-start|dynamic-slice|reduce-precision|"
    "reshape|slice|slice-start|transpose"
)
BLANK = {"broadcast", "constant", "iota"}


@dataclass(frozen=True)
class Explanation:
    """What fills a buffer: see `Buffer` of `memory/liveness.py`.

    `blank` is a buffer that was only allocated or set to zero: who writes it next says more.
    """

    component: str
    op_name: str
    source: str
    instruction: str
    blank: bool

    @property
    def known(self) -> bool:
        return bool(self.source) and self.component != "other"


@dataclass
class _Trail:
    """What was met on the way back from a buffer."""

    makers: list[Instruction]
    stacked: Instruction | None = None  # the update that collects a scan's outputs
    gathered: bool = False
    argument: str = ""


def explain(module: Module, value: Value) -> Explanation:
    """Says what a value is."""
    trail = _follow(module, value)
    known = [maker for maker in trail.makers if module.stack(maker)]
    telling = [maker for maker in known if not LOOP.search(maker.op_name)] or known
    best = telling[0] if telling else trail.makers[-1]
    named = best.op_name or next((m.op_name for m in trail.makers if m.op_name), "")
    return Explanation(
        _component(module, trail, best),
        named or trail.argument,
        source_line(module.stack(best)) or trail.argument,
        (trail.stacked or trail.makers[0]).name,
        trail.makers[-1].opcode in BLANK and not trail.argument,
    )


def source_line(frames: list[Frame]) -> str:
    """file:line of the innermost frame that is neither a library nor a helper for layouts."""
    if not frames:
        return ""
    own = [frame for frame in frames if not LIBRARY.search(frame.file)] or frames
    return f"{own[0].file.removeprefix(f'{ROOT}/')}:{own[0].line}"


def _component(module: Module, trail: _Trail, best: Instruction) -> str:
    stacked, frames = trail.stacked, module.stack(best)
    telling = stacked if stacked is not None and stacked.op_name else best
    backward = "transpose(" in telling.op_name
    files = [frame.file for frame in frames]
    if stacked is not None and _over_layers(module.stack(stacked)):
        return "gradients" if backward else "activations"
    if re.search(r"\bparams\b", trail.argument):
        if any(HEAD.search(file) for file in files):
            return "loss head"
        return "gathered weights" if trail.gathered else "weights in compute dtype"
    if trail.argument.startswith("teacher"):
        return "teacher"
    if re.search(r"\bopt", trail.argument):
        return "optimizer"
    if trail.argument.startswith("batch"):
        return "batch"
    if backward and best.op_name.endswith("scatter-add"):
        return "gradients"  # of a table
    equation = EQUATION.search(best.op_name)
    if backward and equation and "b" not in equation[1]:
        return "gradients"  # a product summed over the batch
    for component, pattern in FILES:
        if any(pattern.search(file) for file in files):
            looked_up = component == "activations" and best.op_name.endswith("gather")
            return "embedding" if looked_up else component
    if COLLECTIVE.match(best.opcode):
        return "collectives"
    if not frames and not best.op_name:
        return "other"
    if backward:
        return "gradients"
    return "activations" if "jvp(" in best.op_name else "other"


def _over_layers(frames: list[Frame]) -> bool:
    """Whether a scan is that over the layers; of a program that is not ours, any is."""
    if not any(pattern.search(frame.file) for frame in frames for _, pattern in FILES):
        return True
    return frames[0].file.endswith("models/stack.py") and frames[0].function.endswith(".run")


def _follow(module: Module, value: Value) -> _Trail:
    """Goes back to the instruction that computed a value, noting what lies between."""
    trail = _Trail([])
    seen: set[Value] = set()
    current: Value | None = value
    while current is not None and current not in seen:
        seen.add(current)
        if current.fed_by:
            current = next((v for v in current.fed_by if v not in seen), None)
            continue
        maker = current.made_by
        if maker.opcode == "parameter":  # of the entry: an argument
            trail.argument = maker.op_name or maker.name
            break
        current = _before(module, current, trail)
    trail.makers = trail.makers or [value.made_by]
    return trail


def _before(module: Module, value: Value, trail: _Trail) -> Value | None:
    """One step back; None where the value was computed here."""
    maker = value.made_by
    if maker.opcode == "dynamic-update-slice":
        trail.stacked = trail.stacked or maker
        return value.operands[1][0]
    if COLLECTIVE.match(maker.opcode):
        trail.gathered |= maker.opcode in GATHERS
        combined = len(value.operands) > 1  # several in one: its name is that of the first
        if not combined:
            trail.makers.append(maker)
        # A start gives its operands first, then its results.
        operand = value.operands[value.leaf % len(value.operands)][0]
        return operand if combined or maker.opcode in GATHERS else None
    if maker.opcode != "fusion":
        trail.makers.append(maker)
        return value.operands[0][0] if value.operands and _moves(value.where, maker) else None
    fused = module.inside(maker)
    assert fused is not None
    result = fusion_results(fused)[value.leaf]
    update = updated_slice(fused, result)
    if update is not None:
        trail.stacked = trail.stacked or (update if update.op_name else maker)
        result = fused.operands(update)[1]
    for inner in _moved(fused, result):
        if inner.opcode == "parameter":
            return value.operands[int(inner.literal)][0]
        trail.makers.append(inner if module.stack(inner) else maker)
        trail.gathered |= inner.opcode in GATHERS
    return None


def _moved(fused: Computation, result: Instruction) -> Iterator[Instruction]:
    """The instructions from a fusion's result back to its parameter or to what is computed."""
    while True:
        yield result
        if not _moves(fused, result):
            return
        result = fused.operands(result)[0]


def _moves(where: Computation, i: Instruction) -> bool:
    """Whether the result is the first operand in another form, or a part of it."""
    if i.opcode == "broadcast":  # that only adds dims of size 1
        return i.shape.elements == where.operands(i)[0].shape.elements > 1
    return bool(MOVES.fullmatch(i.opcode)) or "ConcatBitcast" in i.attributes
