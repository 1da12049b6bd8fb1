"""Names of devices that need not be here."""

from __future__ import annotations

import pytest

from parallel.chips import CHIPS, chip_of
from parallel.targets import cpu_target, parse_target


@pytest.mark.parametrize(
    ("name", "devices", "on_a_host"),
    [
        ("cpu:8", 8, 8),
        ("tpu:v5e:4x4", 16, 4),
        ("tpu:v5p:8x8x8", 512, 4),
        ("tpu:v6e:16x16", 256, 4),
        ("gpu:h100:64x8", 512, 8),
        ("gpu:a100:1x4", 4, 4),
        ("gpu:b200:2x8", 16, 8),
    ],
)
def test_a_name_is_a_number_of_devices(name, devices, on_a_host):
    target = parse_target(name)
    assert (target.device_count, target.devices_per_host) == (devices, on_a_host)
    assert target.chip.memory > 0


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gpu:h300:1x8", "no such gpu 'h300', there are a100"),
        ("gpu:h100:8", "a shape of GPUs is HOSTSxGPUS"),
        ("gpu:h100:1x16", "16 GPUs on a host: 1 to 8 are right"),
        ("tpu:v5e:3x4", "sides of a slice are even, or 1"),
        ("tpu:v5e:4x4x4", "a slice of v5e has 2 sides"),
        ("tpu:v5p", "tpu wants a model and a shape"),
        ("npu:x:1", "no such platform 'npu'"),
        ("cpu:none", "a number of devices follows cpu"),
        ("gpu:h100:axb", "'axb' is not a shape"),
    ],
)
def test_a_wrong_name_is_one_clear_line(name, why):
    with pytest.raises(ValueError, match="--target=") as caught:
        parse_target(name)
    assert why in str(caught.value)
    assert "targets are cpu, cpu:8" in str(caught.value)


def test_every_chip_is_known_by_the_name_that_jax_gives_it():
    names = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA B200": "b200",
        "TPU v5 lite": "v5e",
        "TPU v5": "v5p",
        "TPU v6 lite": "v6e",
    }
    assert {device: getattr(chip_of(device), "name", None) for device in names} == names
    assert set(names.values()) == set(CHIPS)
    others = ("Radeon", "NVIDIA A100-SXM4-40GB", "NVIDIA GH200 480GB", "NVIDIA H100 PCIe")
    assert [chip_of(device) for device in others] == [None] * len(others)


def test_tensor_on_a_host_is_fast_and_fsdp_across_hosts_is_not():
    target = parse_target("gpu:h100:64x8")
    sizes = {"data": 1, "fsdp": 64, "pipe": 1, "context": 1, "expert": 1, "tensor": 8}
    assert target.bandwidth(sizes, ("tensor",)) == target.chip.link
    assert target.bandwidth(sizes, ("fsdp",)) == target.chip.network
    inside = sizes | {"fsdp": 512, "tensor": 1}  # eight cards of a host serve one ring
    assert target.bandwidth(inside, ("fsdp",)) == 8 * target.chip.network


def test_simulated_devices_share_the_machine():
    assert cpu_target(8).chip.memory * 8 <= cpu_target(1).chip.memory
    assert cpu_target(8).chip.matrix["float32"] * 8 == cpu_target(1).chip.matrix["float32"]
