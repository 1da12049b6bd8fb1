"""Every shipped experiment builds every dataclass, and has the size of the model that it names."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import pytest

from config_border import load_config, override
from config_types import plain
from configs import base
from experiment import Experiment, read_experiment
from models.config import DecoderConfig
from parallel.mesh import MeshConfig

FOLDER = Path(__file__).parent.parent.parent / "configs"
SHIPPED = sorted(f.stem for f in FOLDER.glob("*.py") if f.stem not in ("__init__", "base"))
SECTIONS = {
    name: cls
    for name, cls in typing.get_type_hints(Experiment).items()
    if dataclasses.is_dataclass(cls)
}

# Parameters as published with the weights (safetensors of the model cards named in the headers).
PARAMETERS = {
    "gpt2_124m": 124_439_808,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "qwen3_0_6b": 596_049_920,
    "gemma3_1b": 999_885_952,
}


def load(name):
    return load_config(str(FOLDER / f"{name}.py"))


def parameters(c: DecoderConfig) -> int:
    """Parameters of a decoder without the rows that pad its vocabulary."""
    inner, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    gains = 2 if c.norm == "layer" else 1
    norms = 4 if c.norm_position == "sandwich" else 2
    layer = c.embed_dim * (2 * inner + 2 * kv) + (3 if c.gated else 2) * c.embed_dim * c.mlp_dim
    layer += norms * gains * c.embed_dim
    layer += c.qkv_bias * (inner + 2 * kv) + c.attention_out_bias * c.embed_dim
    layer += c.mlp_bias * (c.embed_dim + c.mlp_dim * (2 if c.gated else 1))
    layer += c.qk_norm * 2 * c.head_dim
    outside = c.vocab_size * c.embed_dim * (1 if c.tied else 2) + gains * c.embed_dim
    outside += c.max_length * c.embed_dim * (c.positions == "learned")
    return outside + c.layers * layer


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("devices", [1, 8, 64])
def test_every_dataclass_is_built_on_many_devices(name, devices):
    assert read_experiment(load(name), devices).data.batch_size % 64 == 0


@pytest.mark.parametrize("section", SECTIONS)
def test_base_explains_every_key(section):
    keys = {field.name for field in dataclasses.fields(SECTIONS[section])}
    assert keys == set(base.get_config()[section])


def test_every_section_has_a_dataclass():
    sections = {name for name, value in plain(base.get_config()).items() if isinstance(value, dict)}
    assert sections == set(SECTIONS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_shape_has_the_published_number_of_parameters(name):
    assert parameters(read_experiment(load(name), 1).model) == PARAMETERS[name]
    assert f"{PARAMETERS[name]:,}" in (FOLDER / f"{name}.py").read_text()


def test_every_true_shape_is_checked():
    assert {*PARAMETERS, "tiny"} == set(SHIPPED)


def test_tiny_runs_on_any_mesh_of_eight():
    config = load("tiny")
    assert MeshConfig(**config.mesh) == MeshConfig(data=-1)
    assert config.model.heads % 8 == config.model.kv_heads % 8 == config.model.mlp_dim % 8 == 0
    dtypes = {config.precision[key] for key in ("params", "compute", "accumulate")}
    assert dtypes == {"float32"}
    assert config.data.source == "stdlib"


@pytest.mark.parametrize("name", ["tiny", "gemma3_1b"])
def test_every_key_can_be_overridden_by_its_own_value(name):
    """What `config.json` or a sweep prints can be given back as a flag."""
    config = load(name)
    flags = [
        f"--config.{section}.{key}={value}"
        for section, values in plain(config).items()
        if isinstance(values, dict)
        for key, value in values.items()
    ]
    assert override(config, flags) == config
