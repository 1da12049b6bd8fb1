"""A compiled program replayed in its order: what is written when, read last, and into which buffer.

XLA assigns buffers to values, and some values share one: what a loop carries, what is updated in
place, what is computed over a dying operand. The text says enough to follow it. A loop is replayed
once, for all its iterations need the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from memory.hlo import Computation, Instruction, Module
from memory.hlo_shapes import Shape
from memory.sharing import in_place, over_dying_operand

VIEWS = {"bitcast", "get-tuple-element", "tuple", "optimization-barrier", "add-dependency"}


@dataclass(eq=False, slots=True)
class Value:
    """What one instruction writes into one array.

    Attributes:
      made_by: the instruction and its computation; a parameter's value has no maker of its own
        but `fed_by`, the values that flow into it.
      operands: the values that the maker reads, one list for each operand.
      start, end: the instructions, counted as they run, that write it and read it last.
      slot: the buffer, shared with other values (see `Slots`).
    """

    shape: Shape
    where: Computation
    made_by: Instruction
    leaf: int
    start: int
    end: int
    slot: int
    operands: list[list[Value]] = field(default_factory=list)
    fed_by: list[Value] = field(default_factory=list)


class Slots:
    """Disjoint sets of values that live in one buffer."""

    def __init__(self) -> None:
        self.above: list[int] = []

    def new(self) -> int:
        self.above.append(len(self.above))
        return self.above[-1]

    def find(self, slot: int) -> int:
        while self.above[slot] != slot:
            self.above[slot] = slot = self.above[self.above[slot]]
        return slot

    def join(self, a: Value, b: Value) -> None:
        self.above[self.find(a.slot)] = self.find(b.slot)


class Replay:
    """Runs a program's instructions in order and notes what each value's life is."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.slots = Slots()
        self.values: list[Value] = []
        self.outside: list[Value] = []  # arguments and outputs
        self.dying: list[tuple[Value, Value]] = []  # (result, operand it may be written over)
        self.now = 0
        entry = module.entry
        arguments = [self.fresh(entry, parameter) for parameter in entry.parameters]
        results = self.run(entry, arguments)
        paths = list(_paths(entry.root.shape))
        for value, path in zip(results, paths, strict=True):
            value.end = self.now
            self.outside.append(value)
            if path in module.aliases:
                number, inner = module.aliases[path]
                leaf = list(_paths(entry.parameters[number].shape)).index(inner)
                self.slots.join(value, arguments[number][leaf])
        for argument in arguments:
            self.outside.extend(argument)
        self.write_over_the_dying()

    def fresh(self, where: Computation, maker: Instruction) -> list[Value]:
        """New values for the arrays that an instruction gives."""
        made = [
            Value(shape, where, maker, n, self.now, self.now, self.slots.new())
            for n, shape in enumerate(maker.shape.leaves)
        ]
        self.values.extend(made)
        return made

    def flow(self, sources: list[Value], where: Computation, into: Instruction) -> list[Value]:
        """The values of a parameter or a result that are the same buffers as `sources`."""
        made = self.fresh(where, into)
        for value, source in zip(made, sources, strict=True):
            source.end = max(source.end, self.now)
            value.fed_by.append(source)
            self.slots.join(value, source)
        return made

    def run(self, where: Computation, arguments: list[list[Value]]) -> list[Value]:
        """Replays one computation; returns the values of its root."""
        env = dict(zip((p.name for p in where.parameters), arguments, strict=True))
        for instruction in where:
            if instruction.opcode == "parameter":
                continue
            operands = [env[name] for name in instruction.operands]
            self.now += 1
            env[instruction.name] = self.step(where, instruction, operands)
        return env[where.root.name]

    def step(self, where: Computation, i: Instruction, operands: list[list[Value]]) -> list[Value]:
        """Replays one instruction; returns the values of what it gives."""
        if i.opcode in VIEWS:
            return _view(where, i, operands)
        for value in (value for operand in operands for value in operand):
            value.end = max(value.end, self.now)
        if i.opcode.endswith("-done") and operands:
            return _of_start(where, i, operands[0])
        roles, computations = i.called(), self.module.computations
        if i.opcode == "while":
            condition, body = computations[roles["condition"]], computations[roles["body"]]
            self.run(condition, [self.flow(operands[0], condition, condition.parameters[0])])
            carried = self.flow(operands[0], body, body.parameters[0])
            results = self.run(body, [carried])
            self.now += 1
            for before, after in zip(carried, results, strict=True):
                if before is not after:
                    before.fed_by.insert(0, after)
                    self.slots.join(before, after)
            return self.flow(results, where, i)
        if i.opcode == "conditional":
            names = [roles[k] for k in ("true_computation", "false_computation") if k in roles]
            names = names or [roles[k] for k in sorted(set(roles) - {"to_apply"}, key=int)]
            return self.branches([computations[n] for n in names], where, i, operands[1:])
        if i.opcode == "call":
            called = computations[roles["to_apply"]]
            passed = [
                self.flow(operand, called, parameter)
                for operand, parameter in zip(operands, called.parameters, strict=True)
            ]
            return self.flow(self.run(called, passed), where, i)
        made = self.fresh(where, i)
        for value in made:
            value.operands = operands
        flat = [value for operand in operands for value in operand]
        if i.opcode.endswith("-start"):
            return _with_operands(i, made, flat, self.slots)
        for operand, leaf, result in in_place(self.module, i):
            if operands[operand][leaf].shape.bytes == made[result].shape.bytes:
                self.slots.join(made[result], operands[operand][leaf])
        for operand, leaf, result in over_dying_operand(self.module, where, i):
            self.dying.append((made[result], operands[operand][leaf]))
        return made

    def branches(
        self,
        computations: list[Computation],
        where: Computation,
        i: Instruction,
        operands: list[list[Value]],
    ) -> list[Value]:
        """Replays the branches of a conditional one after the other; they share their results."""
        ends = []
        for computation, operand in zip(computations, operands, strict=True):
            ends.append(
                self.run(computation, [self.flow(operand, computation, computation.parameters[0])])
            )
        self.now += 1
        results = self.flow(ends[0], where, i)
        for end in ends[1:]:
            for value, source in zip(results, end, strict=True):
                value.fed_by.append(source)
                self.slots.join(value, source)
        return results

    def write_over_the_dying(self) -> None:
        """An elementwise result takes its operand's buffer where nobody reads that again."""
        outside = {self.slots.find(value.slot) for value in self.outside}
        last: dict[int, int] = {}
        for value in self.values:
            slot = self.slots.find(value.slot)
            last[slot] = max(last.get(slot, 0), value.end)
        taken: set[Value] = set()
        for result, operand in self.dying:
            kept, over = self.slots.find(result.slot), self.slots.find(operand.slot)
            if result in taken or kept == over or over in outside or kept in outside:
                continue
            if last[over] != result.start or operand.end != result.start:
                continue
            taken.add(result)
            self.slots.join(result, operand)
            last[self.slots.find(operand.slot)] = max(last[kept], last[over])


def _paths(shape: Shape, path: tuple[int, ...] = ()) -> Iterable[tuple[int, ...]]:
    """The index of every array in a tuple."""
    if shape.dtype != "tuple":
        yield path
    for n, part in enumerate(shape.parts):
        yield from _paths(part, (*path, n))


def _part(shape: Shape, values: list[Value], n: int) -> list[Value]:
    """The values of part n of a tuple."""
    before = sum(len(part.leaves) for part in shape.parts[:n])
    return values[before : before + len(shape.parts[n].leaves)]


def _view(where: Computation, i: Instruction, operands: list[list[Value]]) -> list[Value]:
    if i.opcode == "get-tuple-element":
        operand = where.operands(i)[0]
        return _part(operand.shape, operands[0], int(i.attribute("index")))
    if i.opcode == "tuple":
        return [value for operand in operands for value in operand]
    return operands[0]


def _with_operands(
    i: Instruction, made: list[Value], operands: list[Value], slots: Slots
) -> list[Value]:
    """The values of an asynchronous start: its tuple names the operands, too."""
    if i.opcode == "all-reduce-start":  # in place; newer XLA names the operands first
        for n, value in enumerate(made):
            slots.join(value, operands[n % len(operands)])
        return made
    rest = list(operands)
    first = 1 if i.opcode == "copy-start" else 0  # (copy, operand, ...), others (operand, ...)
    for n in range(first, len(made)):
        if rest and made[n].shape == rest[0].shape:
            made[n] = rest.pop(0)
    return made


def _of_start(where: Computation, i: Instruction, values: list[Value]) -> list[Value]:
    """The values of an asynchronous done: a part of what its start gave."""
    start = where.operands(i)[0]
    if start.shape.dtype != "tuple":
        return values
    if i.opcode == "all-reduce-done":
        return values[-len(i.shape.leaves) :]
    part = 0 if i.opcode in ("copy-done", "recv-done") else 1
    return _part(start.shape, values, part)
