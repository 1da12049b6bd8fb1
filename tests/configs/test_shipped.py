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
from models.beside import encoder_beside
from models.config import ModelConfig
from models.experts_config import ExpertsConfig
from models.vision_config import VisionConfig
from parallel.mesh import MeshConfig

FOLDER = Path(__file__).parent.parent.parent / "configs"
SHIPPED = sorted(f.stem for f in FOLDER.glob("*.py") if f.stem not in ("__init__", "base"))
SECTIONS = {
    name: cls
    for name, cls in typing.get_type_hints(Experiment).items()
    if dataclasses.is_dataclass(cls)
} | {"experts": ExpertsConfig, "vision": VisionConfig}  # parts of the model

# Parameters as published with the weights (safetensors of the model cards named in the headers);
# of BERT without the pooler and the second objective's head, which are no part of a masked LM.
PARAMETERS = {
    "gpt2_124m": 124_439_808,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "qwen3_0_6b": 596_049_920,
    "gemma3_1b": 999_885_952,
    "mixtral_8x7b": 46_702_792_704,
    "paligemma_like": 2_923_466_480,
    "bert_base": 110_106_428 - (768 * 768 + 768) - (768 * 2 + 2),
    "t5_small": 60_506_624,
    "transformer_2017_base": 63_045_632,
    "qwen3_30b_a3b": 30_532_122_624,
}


def load(name):
    return load_config(str(FOLDER / f"{name}.py"))


def parameters(c: ModelConfig) -> int:
    """Parameters of a model without the rows that pad its vocabulary."""
    inner, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    gains = 2 if c.norm == "layer" else 1
    norms = (4 if c.norm_position == "sandwich" else 2) + (c.cross != "none")
    final = c.norm_position != "post"
    layer = c.embed_dim * (2 * inner + 2 * kv) + c.embed_dim * c.experts.number
    matrices = (3 if c.gated else 2) * max(1, c.experts.number)
    layer += matrices * c.embed_dim * c.feed_forward_dim
    layer += norms * gains * c.embed_dim
    layer += c.qkv_bias * (inner + 2 * kv) + c.attention_out_bias * c.embed_dim
    layer += c.mlp_bias * (c.embed_dim + c.mlp_dim * (2 if c.gated else 1))
    layer += c.qk_norm * 2 * c.head_dim
    outside = c.vocab_size * (c.embed_dim * (1 if c.tied else 2) + c.head_bias)
    outside += gains * c.embed_dim * (final + c.embed_norm)
    outside += c.head_transform * (c.embed_dim**2 + c.embed_dim + gains * c.embed_dim)
    outside += c.token_types * c.embed_dim
    outside += c.max_length * c.embed_dim * (c.positions == "learned")
    outside += c.relative_buckets * c.heads * (c.positions == "relative")
    if c.family == "vision_language":
        outside += vision_parameters(c.vision) + (c.vision.embed_dim + 1) * c.embed_dim
    if c.family == "encoder_decoder":
        layer += c.embed_dim * (2 * inner + 2 * kv)  # attention over the source
        table = c.vocab_size * c.embed_dim  # is the decoder's, too
        encoder = dataclasses.replace(encoder_beside(c), tied=True)
        outside += parameters(encoder) - table
    return outside + c.layers * layer


def vision_parameters(v: VisionConfig) -> int:
    """Parameters of a ViT beside a decoder."""
    D, F = v.embed_dim, v.mlp_dim
    layer = 4 * (D * D + D) + (2 * D * F + F + D) + 2 * 2 * D
    return v.layers * layer + (v.patch_dim + 1) * D + v.patches * D + 2 * D


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("devices", [1, 8, 64])
def test_every_dataclass_is_built_on_many_devices(name, devices):
    assert read_experiment(load(name), devices).data.batch_size % 64 == 0


OF_OTHERS = {
    "model": {"experts", "vision", "tasks", "token_head", "prefix_length"}
}  # fields that other sections fill


@pytest.mark.parametrize("section", SECTIONS)
def test_base_explains_every_key(section):
    keys = {field.name for field in dataclasses.fields(SECTIONS[section])}
    assert keys - OF_OTHERS.get(section, set()) == set(base.get_config()[section])


def test_every_section_has_a_dataclass():
    sections = {name for name, value in plain(base.get_config()).items() if isinstance(value, dict)}
    assert sections == set(SECTIONS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_shape_has_the_published_number_of_parameters(name):
    assert parameters(read_experiment(load(name), 1).model) == PARAMETERS[name]
    assert f"{PARAMETERS[name]:,}" in (FOLDER / f"{name}.py").read_text()


def test_every_true_shape_is_checked():
    small = {"tiny", "tiny_experts", "tiny_shared", "tiny_encoder", "tiny_seq2seq"}
    small |= {"tiny_digits", "tiny_captions"}
    assert small | set(PARAMETERS) == set(SHIPPED)


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
