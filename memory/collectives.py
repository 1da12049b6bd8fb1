"""The collectives of a compiled program: how many bytes, over which axis of the mesh."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from memory.hlo import Computation, Instruction

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
LISTS = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}")
LIST = re.compile(r"\{([\d, ]+)\}")
IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?)\))? \{([^}]*)\}")
MESH_IDS = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
MESH_AXIS = re.compile(r"'(\w+)'=(\d+)")
USED_AXIS = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")


@dataclass(frozen=True)
class Collective:
    """Collectives of one form that run at one place.

    Attributes:
      kind: one of `KINDS`; several arrays that were combined are one.
      axis: of the mesh, several joined as "data+fsdp".
      bytes: on one device, of one run: the gathered result of an all-gather, the operand of any
        other. On a ring of n devices each sends bytes * (n - 1) / n, an all-reduce twice that, a
        collective-permute all bytes.
      group: n, how many devices take part together; 2 for a collective-permute.
      count: runs in one step, those of loops multiplied.
      loop: the innermost loop around it, None outside of loops.
    """

    kind: str
    axis: str
    bytes: int
    group: int
    count: int
    loop: str | None


def read_collective(
    where: Computation, i: Instruction, axes: Mapping[str, int], count: int, loop: str | None
) -> Collective | None:
    """What an instruction is as a collective; None for other instructions and groups of one."""
    kind = i.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    groups = device_groups(i, math.prod(axes.values()))
    group = groups.shape[1]
    if group == 1:
        return None
    axis = mesh_axes(groups, axes)
    operand = sum(operand.shape.payload for operand in where.operands(i))
    if kind == "all-reduce" and where.root.shape.elements * group == i.shape.elements > 1:
        kind = "reduce-scatter"  # a TPU's fusion that keeps one part of the sum
    return Collective(
        kind, axis, operand * group if kind == "all-gather" else operand, group, count, loop
    )


def device_groups(i: Instruction, devices: int) -> np.ndarray:
    """Who takes part with whom, [groups, members]: positions of devices in the mesh."""
    if found := LISTS.search(i.attributes):
        return np.array([[int(n) for n in row.split(",")] for row in LIST.findall(found[1])])
    if found := IOTA.search(i.attributes):
        groups, dims, order = found.groups()
        return _iota(dims, order).reshape(_numbers(groups))
    if found := MESH.search(i.attributes):
        return _mesh_groups(*found.groups())
    return np.arange(devices)[None]


def mesh_axes(groups: np.ndarray, axes: Mapping[str, int]) -> str:
    """The axes of the mesh along which the members of a group differ.

    Args:
      groups: [groups, members] positions in the mesh.
      axes: name -> size, the slowest first.

    Raises:
      ValueError: the program was compiled for more devices than the mesh has.
    """
    if groups.max() >= math.prod(axes.values()):
        raise ValueError(f"mesh = {dict(axes)}: the program is one for a larger mesh")
    places = np.unravel_index(groups, tuple(axes.values()))
    differ = [(place != place[:, :1]).any() for place in places]
    return "+".join(name for name, moves in zip(axes, differ, strict=True) if moves)


def _mesh_groups(mesh: str, device_ids: str | None, used: str) -> np.ndarray:
    """Groups as a mesh and its axes: mesh['a'=4,'b'=2] {'a'}; parts of axes as 'a':(2)2."""
    sizes = {name: int(size) for name, size in MESH_AXIS.findall(mesh)}
    ids = np.arange(math.prod(sizes.values()))
    if device_ids:
        found = MESH_IDS.search(device_ids)
        ids = _iota(*found.groups()) if found else np.array(_numbers(device_ids))
    parts = {name: (1, size, 1) for name, size in sizes.items()}
    for name, before, size in USED_AXIS.findall(used):
        if size:
            parts[name] = int(before), int(size), sizes[name] // (int(before) * int(size))
    ids = ids.reshape([n for part in parts.values() for n in part])
    names = {name for name, _, _ in USED_AXIS.findall(used)}
    moving = [3 * n + 1 for n, name in enumerate(parts) if name in names]
    ids = np.moveaxis(ids, moving, range(-len(moving), 0))
    return ids.reshape(-1, math.prod(parts[name][1] for name in names))


def _iota(dims: str, order: str | None) -> np.ndarray:
    shape = _numbers(dims)
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose(_numbers(order)).ravel() if order else ids.ravel()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n.strip())
