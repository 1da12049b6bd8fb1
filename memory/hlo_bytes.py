"""Bytes that one instruction moves between the device's memory and its cores."""

from __future__ import annotations

import re

from memory.hlo import Computation, Instruction, Module
from memory.hlo_shapes import DEVICE, Shape
from memory.sharing import fusion_results, updated_slice

NOTHING = re.compile(
    "parameter|constant|tuple|get-tuple-element|bitcast|while|conditional|call|after-all|"
    "partition-id|replica-id|optimization-barrier|add-dependency|async-start|.*-done"
)
SLICES = {"dynamic-slice", "slice", "gather", "slice-start"}


def bytes_moved(module: Module, where: Computation, i: Instruction) -> int:
    """Of one run: operands read and results written once, of slices only the slice.

    What a TPU keeps on its chip (memory space 1) is not counted.
    """
    if NOTHING.fullmatch(i.opcode) or "AllocateBuffer" in i.attributes:
        return 0
    operands = where.operands(i)
    if i.opcode == "fusion":
        return _fusion(module, i, operands)
    if i.opcode == "dynamic-update-slice":
        update = operands[1].shape
        return update.device_bytes + _in(i.shape, update.bytes)
    if i.opcode == "scatter":
        updates = sum(operand.shape.bytes for operand in operands[len(operands) // 2 + 1 :])
        return 3 * updates  # the update, and what stands there read and written
    results = _results(i)
    if i.opcode in SLICES:
        read = sum(result.bytes for result in results)
        return _in(operands[0].shape, read) + sum(result.device_bytes for result in results)
    read = sum({o.name: o.shape.device_bytes for o in operands}.values())
    return read + sum(result.device_bytes for result in results)


def _results(i: Instruction) -> tuple[Shape, ...]:
    """The arrays that an instruction writes: a start's tuple names the operands, too."""
    parts = i.shape.parts
    if i.opcode == "copy-start":
        return parts[:1]
    nested = bool(parts) and parts[0].dtype == "tuple"
    if (
        i.opcode.endswith("-start")
        and len(parts) > 1
        and (i.opcode != "all-reduce-start" or nested)
    ):
        return parts[1].leaves
    return i.shape.leaves


def _in(shape: Shape, size: int) -> int:
    """`size` bytes of an array, if it is in the device's memory."""
    return size if shape.space == DEVICE else 0


def _fusion(module: Module, i: Instruction, operands: list[Instruction]) -> int:
    fused = module.inside(i)
    assert fused is not None
    readers: dict[str, list[Instruction]] = {}
    for part in fused:
        for name in dict.fromkeys(part.operands):
            readers.setdefault(name, []).append(part)
    moved = 0
    for parameter, operand in zip(fused.parameters, operands, strict=True):
        if operand.shape.space == DEVICE:
            moved += _read(parameter, readers)
    for result, shape in zip(fusion_results(fused), i.shape.leaves, strict=True):
        update = updated_slice(fused, result)
        size = fused.operands(update)[1].shape.bytes if update else shape.bytes
        moved += _in(shape, size)
    return moved


def _read(array: Instruction, readers: dict[str, list[Instruction]]) -> int:
    """How much of an operand a fusion reads: slices, or all."""
    read = 0
    for reader in readers.get(array.name, []):
        if reader.opcode in ("bitcast", "copy"):
            read += _read(reader, readers)
        elif reader.opcode in SLICES and reader.operands[0] == array.name:
            read += reader.shape.bytes
        elif reader.opcode == "dynamic-update-slice" and reader.operands[0] == array.name:
            continue
        else:
            return array.shape.device_bytes or array.shape.bytes
    return min(read, array.shape.bytes)
