"""The device mesh: six named axes, all Explicit, one of which may be -1 in the config."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

# From the slowest links to the fastest: what the stages of a pipeline send each other is least, so
# they stand on different hosts where there are several.
# `expert` divides the batch, too: outside of experts it is one more `data`.
AXES = ("pipe", "data", "fsdp", "context", "expert", "tensor")
PIPE = "pipe"
NOT_BUILT_YET = ("context",)
# In force, it lets a program run on one device alone, which another mesh in force would not allow.
NO_MESH = Mesh(np.empty((), object), ())


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes (`config.mesh`); one may be -1 and takes the devices that are left."""

    data: int = -1
    fsdp: int = 1
    pipe: int = 1
    context: int = 1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for name, size in self.sizes().items():
            if size != -1 and size < 1:
                raise ValueError(f"config.mesh.{name} = {size}: an axis size is at least 1, or -1")
            if name in NOT_BUILT_YET and size != 1:
                raise ValueError(
                    f"config.mesh.{name} = {size}: {name} parallelism is not built yet; only 1 is "
                    f"right"
                )
        free = [name for name, size in self.sizes().items() if size == -1]
        if len(free) > 1:
            raise ValueError(
                f"config.mesh.{free[1]} = -1: config.mesh.{free[0]} is -1 already; only one axis "
                f"may be"
            )

    def sizes(self) -> dict[str, int]:
        """The axis sizes by name, in mesh order."""
        return {axis: getattr(self, axis) for axis in AXES}

    def resolve(self, device_count: int) -> MeshConfig:
        """The same config with -1 replaced, so that the product is `device_count`.

        Raises:
          ValueError: the sizes do not multiply to the number of devices.
        """
        sizes = self.sizes()
        fixed = math.prod(size for size in sizes.values() if size != -1)
        shown = (
            " x ".join(f"{axis} {size}" for axis, size in sizes.items() if abs(size) != 1) or "1"
        )
        for axis, size in sizes.items():
            if size == -1:
                if device_count % fixed:
                    raise ValueError(
                        f"config.mesh.{axis} = -1: the other axes ({shown}) do not divide the "
                        f"{device_count} devices; choose sizes whose product divides {device_count}"
                    )
                return dataclasses.replace(self, **{axis: device_count // fixed})
        if fixed != device_count:
            raise ValueError(
                f"config.mesh = {shown} needs {fixed} devices, but there are {device_count}; make "
                f"the product {device_count}, or set one axis to -1"
            )
        return self


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config` over `devices` (default: all devices of all processes).

    Every axis is `AxisType.Explicit`: a sharding is part of an array's type, so a collective that
    nobody asked for is an error while tracing and not a mystery in a profile. One device is a mesh
    of ones.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = tuple(config.resolve(len(devices)).sizes().values())
    return Mesh(arrange(sizes, devices), AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def arrange(sizes: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices as an array of `sizes`, the last (fastest) axes over the fastest links.

    GPUs are numbered host by host, so neighbours of the last axis share NVLink; on TPU JAX maps
    axes to dims of the torus.
    """
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(sizes)
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def platform() -> str:
    """What the program being traced will run on, which need not be here: cpu, gpu (cuda) or tpu."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
