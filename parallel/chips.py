"""What one device can do, by model: memory, arithmetic, and the links to its neighbours.

Makers' figures, dense (no structured sparsity), one direction of a link. What a program reaches is
less: `memory/roofline.py` says by how much.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One model of device.

    Attributes:
      name: as in a target, such as "h100".
      kind: the platform that runs it.
      device_kind: parts of JAX's `device_kind`, any of which tells this chip.
      memory: bytes that a program may use.
      matrix: FLOP/s of matrix products by compute dtype.
      memory_bandwidth: bytes/s.
      link: bytes/s out of one device to others of its host (GPU), or a link of the torus (TPU).
      network: bytes/s for one device between hosts; on TPU the torus has none within a slice: 0.
      host_link: bytes/s between the device and its host's memory.
      gpu: what XLA's compiler asks of a GPU model, as the text of its target description.
    """

    name: str
    kind: Literal["cpu", "gpu", "tpu"]
    device_kind: tuple[str, ...]
    memory: int
    matrix: dict[str, float]
    memory_bandwidth: float
    link: float
    network: float
    host_link: float
    gpu: str = ""

    def flops(self, dtype: str) -> float:
        """FLOP/s of matrix products in a compute dtype."""
        return self.matrix[dtype]


def _rates(half: float, single: float) -> dict[str, float]:
    return {"bfloat16": half, "float16": half, "float32": single}


def _tpu(
    name: str,
    kinds: tuple[str, ...],
    gib: float,
    flops: float,
    bandwidth: float,
    link: float,
) -> Chip:
    # JAX's default precision multiplies float32 in one pass of the bfloat16 unit.
    rates = {"bfloat16": flops, "float32": flops, "float16": flops}
    return Chip(name, "tpu", kinds, int(gib * GIB), rates, bandwidth, link, 0.0, 16e9)


def _target_config(
    name: str, cores: int, capability: tuple[int, int], memory: int, bandwidth: float, clock: float
) -> str:
    """The description of a GPU that XLA compiles for: the figures of NVIDIA's `deviceQuery`, which
    XLA keeps under xla/backends/gpu/target_config/specs.
    """
    major, minor = capability
    shared = {8: 167_936}.get(major, 233_472)
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49_152,
        "shared_memory_per_core": shared,
        "shared_memory_per_block_optin": shared - 1024,
        "threads_per_core_limit": 2048,
        "core_count": cores,
        "fpus_per_core": 64 if major == 8 else 128,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65_535,
        "block_dim_limit_z": 65_535,
        "memory_bandwidth": int(bandwidth),
        "l2_cache_size": {8: 41_943_040, 9: 52_428_800}.get(major, 132_644_864),
        "clock_rate_ghz": clock,
        "device_memory_size": memory,
        "registers_per_core_limit": 65_536,
        "registers_per_block_limit": 65_536,
    }
    lines = "\n".join(f"  {key}: {value}" for key, value in fields.items())
    return (
        f"gpu_device_info {{\n{lines}\n"
        f"  cuda_compute_capability {{ major: {major} minor: {minor} }}\n}}\n"
        f'platform_name: "CUDA"\ndnn_version_info {{ major: 9 minor: 10 }}\n'
        f'device_description_str: "{name}"\n'
    )


def _gpu(
    name: str,
    device_kind: str,
    memory: int,
    rates: dict[str, float],
    bandwidth: float,
    nvlink: float,
    cores: int,
    capability: tuple[int, int],
    clock: float,
    pcie: float,
) -> Chip:
    config = _target_config(device_kind, cores, capability, memory, bandwidth, clock)
    # One 400 Gbit/s network card for each GPU, as DGX and HGX machines have (A100: 200 Gbit/s).
    network = 25e9 if capability[0] == 8 else 50e9
    kinds = (device_kind.removeprefix("NVIDIA ").split("-")[0].split(" ")[0],)
    return Chip(name, "gpu", kinds, memory, rates, bandwidth, nvlink, network, pcie, gpu=config)


# TPU: https://cloud.google.com/tpu/docs/v5e, .../v5p, .../v6e (a chip's memory, less what the
# compiler keeps, and peak), links from https://jax-ml.github.io/scaling-book/tpus/.
# GPU: NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM, B200 (HGX). float32 is that of the
# plain units: XLA uses TF32 only where `jax_default_matmul_precision` asks for it.
CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v5e", ("TPU v5 lite", "TPU v5e"), 15.75, 197e12, 819e9, 45e9),
        _tpu("v6e", ("TPU v6 lite", "TPU v6e"), 31.25, 918e12, 1640e9, 90e9),
        _tpu("v5p", ("TPU v5p", "TPU v5"), 95.74, 459e12, 2765e9, 90e9),
        _gpu(
            "a100",
            "NVIDIA A100-SXM4-80GB",
            85_100_068_864,
            _rates(312e12, 19.5e12),
            2039e9,
            300e9,
            108,
            (8, 0),
            1.41,
            32e9,
        ),
        _gpu(
            "h200",
            "NVIDIA H200 141GB HBM3e",
            151_397_597_184,
            _rates(989e12, 67e12),
            4800e9,
            450e9,
            132,
            (9, 0),
            1.98,
            64e9,
        ),
        _gpu(
            "h100",
            "NVIDIA H100 80GB HBM3",
            84_942_979_072,
            _rates(989e12, 67e12),
            3352e9,
            450e9,
            132,
            (9, 0),
            1.98,
            64e9,
        ),
        _gpu(
            "b200",
            "NVIDIA B200",
            191_514_411_008,
            _rates(2250e12, 75e12),
            7672e9,
            900e9,
            148,
            (10, 0),
            1.965,
            64e9,
        ),
    )
}


# Relatives with other figures, which are no targets: FLOP/s in bfloat16 by a part of device_kind.
RELATIVES = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "GH200": 989e12,
    "A100-SXM4-40GB": 312e12,
    "A100-PCIE": 312e12,
    "A100 80GB PCIe": 312e12,
    "TPU v4": 275e12,
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device_kind`; None for one that is not in the table."""
    if any(part in device_kind for part in RELATIVES):
        return None
    for chip in CHIPS.values():
        if any(part in device_kind for part in chip.device_kind):
            return chip
    return None


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s in bfloat16 of what JAX calls `device_kind`; None where nobody has published one."""
    for part, flops in RELATIVES.items():
        if part in device_kind:
            return flops
    chip = chip_of(device_kind)
    return chip.flops("bfloat16") if chip else None
