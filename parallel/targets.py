"""One name for any set of devices, here or not: what it has, and devices to compile for.

    cpu            the processor, as many devices as JAX finds or simulates
    cpu:8          eight simulated devices
    tpu:v5e:4x4    a slice of that topology
    gpu:h100:64x8  64 hosts of 8 GPUs each

A program can be compiled for a TPU or a GPU that is not here: libtpu (extra `tpu-target`) and the
CUDA plug-in (extra `gpu-target`) bring the compilers, and JAX gives devices that hold no memory.
No computation may run on those, not even `jax.random.key(0)`: pass `jax.ShapeDtypeStruct`s.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from parallel.chips import CHIPS, Chip

FORMS = "cpu, cpu:8, tpu:v5e:4x4, tpu:v5p:4x4x4, tpu:v6e:8x8, gpu:h100:1x8 (hosts x GPUs on each)"

# Smallest and largest slice of a TPU version, and the number of dims of its torus:
# https://cloud.google.com/tpu/docs/v5e, .../v5p, .../v6e.
TORUS = {"v5e": (2, 16), "v6e": (2, 16), "v5p": (3, 24)}
TPU_HOST = 4  # chips that share a host in a slice of several


@dataclass(frozen=True)
class Target:
    """A set of equal devices.

    Attributes:
      name: as the user writes it.
      chip: what one device can do.
      shape: sizes of the torus (TPU), (hosts, devices on each) (GPU), or (devices,) (CPU).
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def device_count(self) -> int:
        return math.prod(self.shape)

    @property
    def devices_per_host(self) -> int:
        """Devices that share one host's memory."""
        if self.chip.kind == "gpu":
            return self.shape[1]
        if self.chip.kind == "tpu":
            return min(self.device_count, 8 if self.device_count <= 8 else TPU_HOST)
        return self.device_count

    def bandwidth(self, sizes: Mapping[str, int], axes: Sequence[str]) -> float:
        """Bytes/s that leave one device in a ring over mesh axes laid out as `arrange` does.

        GPU: NVLink where the group stays on a host; else the network, which every GPU of a host
        that is in the group adds its own card to (rings are hierarchical: NCCL). TPU: both
        directions of one link for each dim of the torus that the group spans. CPU: shared memory.
        """
        group = math.prod(sizes[axis] for axis in axes)
        if group == 1 or self.chip.kind == "cpu":
            return self.chip.link
        if self.chip.kind == "tpu":
            spanned = 1 if group <= max(self.shape) else 2
            return 2 * self.chip.link * spanned
        names = list(sizes)
        last = max(names.index(axis) for axis in axes if sizes[axis] > 1)
        stride = math.prod(sizes[axis] for axis in names[last + 1 :])
        # Members of the group that share a host: neighbours that are `stride` apart.
        local = max(1, min(group, self.devices_per_host // stride))
        if local == group:
            return self.chip.link
        return min(self.chip.link, self.chip.network * local)

    def hop(self, sizes: Mapping[str, int], axis: str) -> float:
        """Bytes/s from a device to its neighbour along a mesh axis, the slowest of all hops: where
        a host of GPUs ends that is one card, and on a TPU one link of the torus.
        """
        names = list(sizes)
        stride = math.prod(sizes[name] for name in names[names.index(axis) + 1 :])
        if self.chip.kind == "gpu" and sizes[axis] * stride > self.devices_per_host:
            return self.chip.network
        return self.chip.link

    def environment(self) -> dict[str, str]:
        """Variables that must be set before JAX is imported in the process that compiles."""
        if self.chip.kind == "cpu":
            return {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(self.device_count)}
        if self.chip.kind == "tpu":
            return {
                "JAX_PLATFORMS": "cpu",
                "TPU_SKIP_MDS_QUERY": "1",  # or it looks for a cloud's metadata server
                "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # or a lock file lets one process in
                "TPU_ACCELERATOR_TYPE": "",
                "TPU_WORKER_HOSTNAMES": "localhost",
            }
        return {"JAX_PLATFORMS": "cpu,cuda", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}

    def check_compiler(self, instead: str = "") -> None:
        """Raises ValueError where the extra that compiles for this target is not installed.

        Args:
          instead: what the user could do without it.
        """
        wanted = {"tpu": ("tpu-target", "libtpu"), "gpu": ("gpu-target", "jax_plugins.xla_cuda12")}
        if self.chip.kind not in wanted:
            return
        extra, module = wanted[self.chip.kind]
        try:
            found = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            raise ValueError(
                f"--target={self.name}: its compiler is not installed; run "
                f"pip install -e '.[{extra}]'" + (f", or {instead}" if instead else "")
            )

    def devices(self) -> list[Any]:
        """Devices to compile for; the process was started with `environment()`.

        Raises:
          ValueError: the compiler knows no such topology.
        """
        import jax
        from jax.experimental import topologies

        if self.chip.kind == "cpu":
            return list(jax.devices("cpu")[: self.device_count])
        self.check_compiler()
        try:
            if self.chip.kind == "tpu":
                layout = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
                topology = topologies.get_topology_desc(platform="tpu", topology_name=layout)
            else:
                with contextlib.suppress(RuntimeError):
                    jax.devices("cuda")  # fails for want of a device; the plug-in is there then
                topology = topologies.get_topology_desc(
                    self.chip.name,
                    "cuda",
                    topology=f"1x{self.shape[0]}x{self.shape[1]}",
                    target_config=self.chip.gpu,
                )
        except jax.errors.JaxRuntimeError as error:
            line = str(error).splitlines()[0]
            raise ValueError(f"--target={self.name}: the compiler refuses it ({line})") from error
        return list(topology.devices)

    def compiler_options(self) -> dict[str, str | bool]:
        """What a step is compiled with, and what compiling without the device needs."""
        from parallel.compilation import safe_compilation

        options = safe_compilation(self.chip.kind)
        if self.chip.kind == "gpu":
            # There is no device to time kernels on; nobody runs the code, so it need not be fast.
            options |= {"xla_gpu_autotune_level": "0", "xla_llvm_disable_expensive_passes": True}
        return options


def parse_target(name: str) -> Target:
    """The target of a name.

    Raises:
      ValueError: no such target, saying which there are.
    """

    def wrong(why: str) -> ValueError:
        return ValueError(f"--target={name}: {why}; targets are {FORMS}")

    kind, *rest = name.split(":")
    if kind == "cpu":
        if len(rest) > 1 or (rest and not re.fullmatch("[1-9][0-9]*", rest[0])):
            raise wrong("a number of devices follows cpu")
        return cpu_target(int(rest[0]) if rest else None, name)
    if kind not in ("tpu", "gpu"):
        raise wrong(f"no such platform {kind!r}")
    known = [chip for chip, figures in CHIPS.items() if figures.kind == kind]
    if len(rest) != 2:
        raise wrong(f"{kind} wants a model and a shape")
    model, layout = rest
    if model not in known:
        raise wrong(f"no such {kind} {model!r}, there are {', '.join(known)}")
    if not re.fullmatch("[1-9][0-9]*(x[1-9][0-9]*)*", layout):
        raise wrong(f"{layout!r} is not a shape")
    shape = tuple(map(int, layout.split("x")))
    if kind == "gpu":
        if len(shape) != 2:
            raise wrong(f"a shape of GPUs is HOSTSxGPUS, not {layout!r}")
        if shape[1] > 8:
            raise wrong(f"{shape[1]} GPUs on a host: 1 to 8 are right")
    else:
        dims, longest = TORUS[model]
        if len(shape) != dims or max(shape) > longest:
            raise wrong(f"a slice of {model} has {dims} sides of at most {longest}, not {layout!r}")
        if shape != (1,) * dims and any(side % 2 for side in shape if side > 1):
            raise wrong(f"sides of a slice are even, or 1, not {layout!r}")
    return Target(name, CHIPS[model], shape)


def cpu_target(devices: int | None = None, name: str | None = None) -> Target:
    """This machine's processor as `devices` equal parts of it (default: as many as JAX simulates).

    Its figures are rough, for ordering layouts: 16 float32 multiply-adds a cycle and core, a
    quarter of that reached; simulated devices share cores and memory.
    """
    count = devices or int(os.environ.get("JAX_NUM_CPU_DEVICES", "1"))
    cores = psutil.cpu_count(logical=False) or 1
    flops, stream = cores * 100e9 / count, 12e9 / count
    chip = Chip(
        name="cpu",
        kind="cpu",
        device_kind=("cpu",),
        memory=psutil.virtual_memory().total // count,
        matrix={"float32": flops, "bfloat16": flops / 4, "float16": flops / 4},  # emulated
        memory_bandwidth=stream,
        link=stream / 4,  # a collective reads and writes each part several times
        network=stream / 4,
        host_link=stream,
    )
    return Target(name or f"cpu:{count}", chip, (count,))


def local_target() -> Target:
    """The devices that are here, as a target.

    Raises:
      ValueError: their model is not in the table of chips.
    """
    import jax

    from parallel.chips import chip_of

    devices = jax.devices()
    if devices[0].platform == "cpu":
        return cpu_target(len(devices))
    chip = chip_of(devices[0].device_kind)
    if chip is None:
        raise ValueError(
            f"--target: the devices here are {devices[0].device_kind!r}, whose figures are not "
            f"known; there are {', '.join(CHIPS)}"
        )
    if chip.kind == "gpu":
        hosts = jax.process_count()
        shape: tuple[int, ...] = (hosts, len(devices) // hosts)
    else:
        sides = zip(*(device.coords for device in devices), strict=True)
        shape = tuple(max(side) + 1 for side in sides)[: TORUS[chip.name][0]]
    return Target(f"{chip.kind}:{chip.name}:{'x'.join(map(str, shape))}", chip, shape)
