"""The text of a compiled program, read into computations and instructions.

`compiled.as_text()` of a scheduled, partitioned program is all that is needed: the order of the
lines is the order of execution, shapes are those of one device. Written for XLA on CPU, GPU and
TPU; instructions of other makers are read but not understood.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from memory.hlo_shapes import Shape, parse_shape

HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^ +(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(")
PARENTHESIS = re.compile(r"[()]")
OPERAND = re.compile(r"%([\w.\-]+)")
OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
FRAME = re.compile(r"stack_frame_id=(\d+)")
SOURCE = re.compile(r'source_file="([^"]*)"(?: source_line=(\d+))?')
CALLED = re.compile(
    r"(calls|to_apply|condition|body|true_computation|false_computation)=%([\w.\-]+)"
)
BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
ALIAS = re.compile(r"\{([\d, ]*)\}: \((\d+), \{([\d, ]*)\}")
TRIPS = re.compile(r'known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)')
TABLE = re.compile(r"^(\d+) (.*)$")
KEYED = re.compile(r"(\w+)=(\d+)")


@dataclass(frozen=True)
class Frame:
    """One line of the Python code that traced an instruction."""

    file: str
    line: int
    function: str = ""


@dataclass(eq=False)
class Instruction:
    """One instruction of a computation.

    Attributes:
      operands: names of instructions of the same computation.
      literal: the text between the parentheses of a constant or a parameter.
      attributes: all that stands behind the operands, as it was written.
    """

    name: str
    opcode: str
    shape: Shape
    operands: tuple[str, ...]
    attributes: str
    literal: str = ""
    root: bool = False

    def attribute(self, key: str) -> str:
        """The text of a simple attribute, `{...}` or one word; "" where there is none."""
        found = re.search(
            rf"[ ,]{key}=(\{{[^{{}}]*(?:\{{[^{{}}]*\}}[^{{}}]*)*\}}|[^,\s]+)", self.attributes
        )
        return found[1] if found else ""

    @cached_property
    def op_name(self) -> str:
        """The path of transformations and primitives that JAX gave it."""
        found = OP_NAME.search(self.attributes)
        return found[1].replace("\\", "") if found else ""

    @cached_property
    def frame_id(self) -> int | None:
        """Its key in the module's table of frames; older compilers have none."""
        found = FRAME.search(self.attributes)
        return int(found[1]) if found else None

    @cached_property
    def frame(self) -> Frame | None:
        """The line of Python that older compilers write into the instruction itself."""
        found = SOURCE.search(self.attributes)
        return Frame(found[1], int(found[2] or 0)) if found else None

    def called(self) -> dict[str, str]:
        """Role (calls, body, condition, ...) -> name of a computation, branches by their number."""
        roles = dict(CALLED.findall(self.attributes))
        if found := BRANCHES.search(self.attributes):
            roles |= {str(n): name for n, name in enumerate(OPERAND.findall(found[1]))}
        return roles


@dataclass
class Computation:
    """Instructions in the order of the text, which is that of execution if it is scheduled."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    parameters: list[Instruction] = field(default_factory=list)
    root: Instruction = field(init=False)

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The instructions that it reads."""
        return [self.instructions[name] for name in instruction.operands]


@dataclass
class Module:
    """A program.

    Attributes:
      aliases: index of an output -> (number of the argument it is written into, index in it).
      frames: id -> the frames of the traced Python code, innermost first.
    """

    name: str
    computations: dict[str, Computation]
    entry: Computation
    aliases: dict[tuple[int, ...], tuple[int, tuple[int, ...]]]
    frames: dict[int, list[Frame]]
    inlined: dict[str, Computation] = field(default_factory=dict, repr=False)

    def stack(self, instruction: Instruction) -> list[Frame]:
        """The Python frames of an instruction, innermost first; [] where none was kept."""
        if instruction.frame_id is not None:
            return self.frames.get(instruction.frame_id, [])
        return [instruction.frame] if instruction.frame else []

    def inside(self, instruction: Instruction) -> Computation | None:
        """The computation of a fusion, a call or an async start; fusions in a fusion inlined."""
        roles = instruction.called()
        name = roles.get("calls") or roles.get("to_apply")
        if name is None or instruction.opcode != "fusion":
            return self.computations[name] if name else None
        if name not in self.inlined:
            self.inlined[name] = self._inline(self.computations[name])
        return self.inlined[name]

    def _inline(self, fused: Computation) -> Computation:
        if all(i.opcode != "fusion" for i in fused):
            return fused
        flat = Computation(fused.name, parameters=fused.parameters)
        renamed: dict[str, str] = {}

        def add(i: Instruction, name: str, names: dict[str, str]) -> None:
            operands = tuple(names.get(operand, operand) for operand in i.operands)
            flat.instructions[name] = replace(i, name=name, operands=operands)

        for i in fused:
            inner = self.inside(i) if i.opcode == "fusion" else None
            if inner is None:
                add(i, i.name, renamed)
                continue
            names = {part.name: f"{i.name}/{part.name}" for part in inner}
            for parameter, operand in zip(inner.parameters, i.operands, strict=True):
                names[parameter.name] = renamed.get(operand, operand)
            for part in inner:
                if part.opcode != "parameter":
                    add(part, names[part.name], names)
            renamed[i.name] = names[inner.root.name]
        flat.root = flat.instructions[renamed.get(fused.root.name, fused.root.name)]
        return flat


def parse(text: str) -> Module:
    """Reads the text of a program, as `compiled.as_text()` gives it."""
    lines = text.splitlines()
    computations: dict[str, Computation] = {}
    entry = current = None
    header: list[str] = []
    for line in lines:
        if current is not None and (match := INSTRUCTION.match(line)):
            instruction = _instruction(match, line)
            current.instructions[instruction.name] = instruction
            if instruction.opcode == "parameter":
                current.parameters.append(instruction)
            if instruction.root:
                current.root = instruction
        elif current is not None:
            if line.startswith("}"):
                current.parameters.sort(key=lambda parameter: int(parameter.literal))
                current = None
        elif match := HEAD.match(line):
            current = computations[match[2]] = Computation(match[2])
            if match[1]:
                entry = current
        else:
            header.append(line)
    if entry is None:
        raise ValueError("no ENTRY computation: not the text of a compiled program")
    title = header[0]
    start = title.find("input_output_alias={")
    # The map ends where the next attribute of the module starts.
    stop = title.find("}, ", title.find(") }", start)) if start >= 0 else -1
    aliases = {
        _index(out): (int(number), _index(inner))
        for out, number, inner in ALIAS.findall(title[start:stop] if start >= 0 else "")
    }
    name = title.split(",")[0].removeprefix("HloModule ")
    return Module(name, computations, entry, aliases, _frames(header))


def trip_count(module: Module, where: Computation, loop: Instruction) -> int:
    """How often the body of a while runs; 1 where the text does not say.

    Compilers for CPU and GPU write it down. A TPU's leaves the condition to be read: a counter,
    carried with the loop and compared with a constant.
    """
    if found := TRIPS.search(loop.attributes):
        return int(found[1])
    roles = loop.called()
    condition, body = module.computations[roles["condition"]], module.computations[roles["body"]]
    root = condition.root
    if root.opcode != "compare" or "direction=LT" not in root.attributes:
        return 1
    counter, bound = condition.operands(root)
    initial = where.operands(loop)[0]

    def value(side: Instruction) -> int | None:
        if side.opcode == "get-tuple-element" and initial.opcode == "tuple":
            return _integer(where, where.operands(initial)[int(side.attribute("index"))])
        return _integer(condition, side)

    stop, start = value(bound), value(counter)
    if stop is None or start is None or counter.opcode != "get-tuple-element":
        return 1
    step = 1
    if body.root.opcode == "tuple":
        following = body.operands(body.root)[int(counter.attribute("index"))]
        if following.opcode == "add":
            steps = [_integer(body, operand) for operand in body.operands(following)]
            step = next((abs(n) for n in steps if n), 1)
    return max(0, -(-(stop - start) // step))


def _integer(where: Computation, instruction: Instruction) -> int | None:
    while instruction.opcode in ("copy", "bitcast", "convert"):
        instruction = where.operands(instruction)[0]
    literal = instruction.literal
    if instruction.opcode != "constant" or not literal.lstrip("-").isdigit():
        return None
    return int(literal)


def _instruction(match: re.Match[str], line: str) -> Instruction:
    root, name, shape, opcode = match.groups()
    start, depth = match.end(), 1
    for parenthesis in PARENTHESIS.finditer(line, start):
        depth += 1 if parenthesis[0] == "(" else -1
        if depth == 0:
            break
    stop = parenthesis.start()
    inner = line[start:stop]
    literal = inner if opcode in ("constant", "parameter") else ""
    operands = () if literal else tuple(OPERAND.findall(inner))
    return Instruction(
        name, opcode, parse_shape(shape), operands, line[stop + 1 :], literal, bool(root)
    )


def _index(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n.strip())


def _frames(header: Sequence[str]) -> dict[int, list[Frame]]:
    """The tables of newer compilers: every instruction names a frame, every frame its caller."""
    tables: dict[str, dict[int, str]] = {}
    rows: dict[int, str] = {}
    for line in header:
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            rows = tables.setdefault(line, {})
        elif row := TABLE.match(line):
            rows[int(row[1])] = row[2]
    files, functions = tables.get("FileNames", {}), tables.get("FunctionNames", {})
    places: dict[int, Frame] = {}
    for key, row_text in tables.get("FileLocations", {}).items():
        place = {name: int(n) for name, n in KEYED.findall(row_text)}
        file = files.get(place["file_name_id"], "").strip('"')
        function = functions.get(place.get("function_name_id", 0), "").strip('"')
        places[key] = Frame(file, place.get("line", 0), function)
    stacks: dict[int, list[Frame]] = {}
    for key, row_text in sorted(tables.get("StackFrames", {}).items()):
        row_ = {name: int(n) for name, n in KEYED.findall(row_text)}
        # The text counts callers from 1 more than frames: the outermost one names itself.
        above = row_.get("parent_frame_id", 0) - 1
        stacks[key] = [places[row_["file_location_id"]], *stacks.get(above, [])]
    return stacks
