"""Which results of an instruction are written into the buffer of one of its operands.

Two grades: what XLA always does (a slice updated in place, the aliases a compiler wrote down), and
what it does where nobody reads the operand afterwards (an elementwise result over its operand).
Each is a list of (operand, array in the operand, array in the result).
"""

from __future__ import annotations

import re

from memory.hlo import Computation, Instruction, Module

Pairs = list[tuple[int, int, int]]
ALIASING = re.compile(r"output_to_operand_aliasing=\{(.*?\)) *\}")
PAIR = re.compile(r"\{([\d, ]*)\}: \((\d+), \{([\d, ]*)\}")
TPU_ALIASES = re.compile(r'"aliasing_operands":\{"lists":\[((?:\{"indices":\[[^\]]*\]\},?)*)\]')
QUOTED_LIST = re.compile(r"\[([^\]]*)\]")
ELEMENTWISE = re.compile(
    "abs|add|and|atan2|bitcast-convert|cbrt|ceil|clamp|compare|complex|convert|cosine|divide|erf|"
    "exponential|exponential-minus-one|floor|imag|is-finite|log|log-plus-one|logistic|maximum|"
    "minimum|multiply|negate|not|or|popcnt|power|real|reduce-precision|remainder|"
    "round-nearest-afz|round-nearest-even|rsqrt|select|shift-left|shift-right-arithmetic|"
    "shift-right-logical|sign|sine|sqrt|subtract|tan|tanh|xor"
)


def in_place(module: Module, i: Instruction) -> Pairs:
    """Results that always are the operand's buffer."""
    if i.opcode == "dynamic-update-slice":
        return [(0, 0, 0)]
    if i.opcode == "scatter":
        return [(n, 0, n) for n in range(len(i.shape.leaves))]
    if found := ALIASING.search(i.attributes):
        return [
            (int(operand), int(inner or 0), int(out or 0))
            for out, operand, inner in PAIR.findall(found[1])
            if "," not in out + inner
        ]
    fused = module.inside(i) if i.opcode == "fusion" else None
    if fused is None:
        return []
    pairs: Pairs = []
    for n, root in enumerate(fusion_results(fused)):
        update = updated_slice(fused, root)
        target = _through_views(fused, fused.operands(update)[0]) if update else None
        if target is not None and target.opcode == "parameter":
            pairs.append((int(target.literal), 0, n))
    return pairs


def over_dying_operand(module: Module, where: Computation, i: Instruction) -> Pairs:
    """Results that take an operand's buffer where that is read for the last time."""
    if found := TPU_ALIASES.search(i.attributes):
        pairs: Pairs = []
        for entry in QUOTED_LIST.findall(found[1]):
            # Operands and results are numbered in one row.
            operand, *rest = sorted(int(n.strip('" ')) for n in entry.split(","))
            pairs += [(operand, 0, n - len(i.operands)) for n in rest if n >= len(i.operands)]
        return [pair for pair in pairs if pair[2] < len(i.shape.leaves)]
    fused = module.inside(i) if i.opcode == "fusion" else None
    results = i.shape.leaves
    pairs = []
    for number, read in enumerate(where.operands(i)):
        same = [
            leaf
            for leaf, shape in enumerate(results)
            if (shape.bytes, shape.dims) == (read.shape.bytes, read.shape.dims)
        ]
        if not same or read.shape.dtype == "tuple":
            continue
        if fused is not None:
            fits = _only_elementwise(fused, fused.parameters[number])
        else:
            fits = _elementwise(i, read)
        if fits:
            pairs += [(number, 0, leaf) for leaf in same]
    return pairs


def fusion_results(fused: Computation) -> list[Instruction]:
    """The instructions that give the arrays of a fusion's result, one for each."""
    parts = fused.operands(fused.root) if fused.root.opcode == "tuple" else [fused.root]
    return [part for part in parts for _ in part.shape.leaves]


def updated_slice(fused: Computation, result: Instruction) -> Instruction | None:
    """The dynamic-update-slice that a fusion's result is, if it is one."""
    update = _through_views(fused, result)
    return update if update.opcode == "dynamic-update-slice" else None


def _through_views(where: Computation, instruction: Instruction) -> Instruction:
    while instruction.opcode == "bitcast":
        instruction = where.operands(instruction)[0]
    return instruction


def _elementwise(i: Instruction, operand: Instruction) -> bool:
    if ELEMENTWISE.fullmatch(i.opcode):
        return True
    # A copy that keeps the order is there for its reader's sake alone.
    return i.opcode == "copy" and i.shape.order == operand.shape.order


def _only_elementwise(fused: Computation, parameter: Instruction) -> bool:
    """Whether all that is computed from a parameter is elementwise, up to the results."""
    reached = {parameter.name}
    for i in fused:
        if reached.isdisjoint(i.operands):
            continue
        operand = next(operand for operand in fused.operands(i) if operand.name in reached)
        if i.opcode in ("bitcast", "tuple") or _elementwise(i, operand):
            reached.add(i.name)
        else:
            return False
    return True
