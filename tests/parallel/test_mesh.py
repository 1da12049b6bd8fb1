"""The mesh: sizes, the axis that takes what is left, and every error."""

from __future__ import annotations

import jax
import pytest
from jax.sharding import AxisType

from parallel.mesh import AXES, MeshConfig, make_mesh


@pytest.mark.parametrize(
    ("sizes", "devices", "want"),
    [
        ({}, 8, {"data": 8}),
        ({}, 1, {"data": 1}),
        ({"data": 2, "fsdp": -1}, 8, {"data": 2, "fsdp": 4}),
        ({"fsdp": 2, "tensor": 2}, 8, {"data": 2, "fsdp": 2, "tensor": 2}),
        ({"data": 1, "tensor": -1}, 6, {"tensor": 6}),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 8, {"data": 2, "fsdp": 2, "tensor": 2}),
        ({"data": 4, "tensor": -1}, 4, {"data": 4}),
    ],
)
def test_minus_one_takes_what_is_left(sizes, devices, want):
    resolved = MeshConfig(**sizes).resolve(devices)
    assert resolved.sizes() == dict.fromkeys(AXES, 1) | want
    assert resolved.resolve(devices) == resolved


def test_all_axes_are_there_and_explicit():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert mesh.axis_names == AXES == ("pipe", "data", "fsdp", "context", "expert", "tensor")
    assert mesh.axis_types == (AxisType.Explicit,) * 6
    assert dict(mesh.shape) == MeshConfig(data=2, fsdp=2, tensor=2).sizes()
    assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in jax.devices())


def test_some_of_the_devices():
    devices = jax.devices()[2:6]
    mesh = make_mesh(MeshConfig(data=-1, tensor=2), devices)
    assert dict(mesh.shape)["data"] == 2
    assert list(mesh.devices.flat) == devices  # tensor, the last axis, is the nearest


def test_a_stage_is_a_block_of_neighbours():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, pipe=2))
    stages = mesh.devices.reshape(2, 4)
    assert [d.id for d in stages[0]] == [d.id for d in jax.devices()[:4]]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 0}, "config.mesh.data = 0: an axis size is at least 1, or -1"),
        ({"tensor": -2}, "config.mesh.tensor = -2: an axis size is at least 1, or -1"),
        (
            {"context": -1},
            "config.mesh.context = -1: context parallelism is not built yet; only 1 is right",
        ),
        (
            {"data": -1, "fsdp": -1},
            "config.mesh.fsdp = -1: config.mesh.data is -1 already; only one axis may be",
        ),
    ],
)
def test_sizes_that_cannot_be(sizes, message):
    with pytest.raises(ValueError) as error:
        MeshConfig(**sizes)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("sizes", "devices", "message"),
    [
        (
            {"data": 2, "fsdp": 2},
            8,
            (
                "config.mesh = data 2 x fsdp 2 needs 4 devices, but there are 8; make the product "
                "8, or set one axis to -1"
            ),
        ),
        (
            {"data": 1},
            2,
            (
                "config.mesh = 1 needs 1 devices, but there are 2; make the product 2, or set one "
                "axis to -1"
            ),
        ),
        (
            {"tensor": 3},
            8,
            (
                "config.mesh.data = -1: the other axes (tensor 3) do not divide the 8 "
                "devices; choose sizes whose product divides 8"
            ),
        ),
    ],
)
def test_a_mesh_that_does_not_fit_names_the_devices(sizes, devices, message):
    with pytest.raises(ValueError) as error:
        MeshConfig(**sizes).resolve(devices)
    assert str(error.value) == message
