"""An import keeps the parameters, and while it lasts at most one tensor and 64 MiB besides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.import_memory import MIB, measure, write_folder
from models.experts_config import ExpertsConfig
from tests.hf import synthetic

# 74 M parameters: the largest tensor is of 31 MiB in bfloat16, all are 281 MiB in float32.
LARGE = replace(
    synthetic.LLAMA,
    vocab_size=32_000,
    layers=12,
    embed_dim=512,
    mlp_dim=1536,
    heads=8,
    kv_heads=8,
    head_dim=64,
)
EXPERTS = replace(LARGE, layers=3, rope_scaling="none", rope_factor=1.0, experts=ExpertsConfig(6))
BYTES = {"dense": (LARGE, 4 * 73_675_264), "experts": (EXPERTS, 4 * 78_393_856)}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux measures the peak")
@pytest.mark.parametrize("kind", BYTES)
def test_the_peak_of_an_import(kind, tmp_path):
    config, size = BYTES[kind]
    write_folder(tmp_path / "in", config, 60 * MIB)
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 2
    found = measure(tmp_path / "in", 1, "float32")
    print({name: f"{value / MIB:.0f} MiB" for name, value in found.items()})
    assert found["parameters"] == size
    assert found["over"] <= found["allowed"]
