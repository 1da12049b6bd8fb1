"""Checkpoint folders of random weights, written by the safetensors library and without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from hf.exporting import export_params
from hf.families import family_for, read_model
from hf.files import open_folder
from hf.importing import find_params, read_params
from hf.layout import places
from models.config import ModelConfig
from models.experts_config import ExpertsConfig
from parallel.precision import PrecisionConfig
from tests.small import Laid, layout
from training.state import abstract_params

SMALL = ModelConfig(
    vocab_size=250,  # padded to 256
    layers=4,
    embed_dim=32,
    mlp_dim=64,
    heads=8,
    kv_heads=2,
    head_dim=8,
    max_length=64,
)
LLAMA = replace(SMALL, tied=False, rope_scaling="llama3", rope_factor=8.0)
GPT2 = replace(
    SMALL,
    kv_heads=8,
    head_dim=4,
    norm="layer",
    positions="learned",
    activation="gelu_tanh",
    gated=False,
    qkv_bias=True,
    attention_out_bias=True,
    mlp_bias=True,
)
QWEN3 = replace(SMALL, qk_norm=True, rope_theta=1e6)
MISTRAL = replace(SMALL, tied=False, window=5, pattern=("local",))
GEMMA3 = replace(
    SMALL,
    norm_position="sandwich",
    norm_plus_one=True,
    activation="gelu_tanh",
    qk_norm=True,
    window=5,
    pattern=("local", "global"),
    rope_local_theta=1e4,
    rope_theta=1e6,
    embed_scale=True,
    query_scale=16**-0.5,
)
MIXTRAL = replace(SMALL, tied=False, norm_eps=1e-5, experts=ExpertsConfig(8, 2))
QWEN3_MOE = replace(QWEN3, experts=ExpertsConfig(8, 3, mlp_dim=48))
BERT = replace(
    GPT2,
    family="encoder",
    norm_position="post",
    activation="gelu",
    token_types=2,
    embed_norm=True,
    head_transform=True,
    head_bias=True,
)
ROBERTA = replace(BERT, position_offset=2, token_types=1)
CLASSES = {
    "head_transform": False,
    "head_bias": False,
    "pooler": True,
    "tasks": (("label", 3),),
    "token_head": False,
}
T5 = replace(
    SMALL,
    family="encoder_decoder",
    encoder_layers=3,
    cross="plain",
    kv_heads=8,
    positions="relative",
    activation="gelu_tanh",
    query_scale=1.0,
    tied=False,
)
DECODERS = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "qwen3": QWEN3,
    "mistral": MISTRAL,
    "gemma3": GEMMA3,
    "mixtral": MIXTRAL,
    "qwen3 moe": QWEN3_MOE,
}
ENCODERS = {
    "bert": BERT,
    "bert, classes": replace(BERT, **CLASSES),
    "roberta": ROBERTA,
    "roberta, classes": replace(ROBERTA, **CLASSES),
}
CONFIGS = DECODERS | ENCODERS
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def random_tensors(
    config: ModelConfig, dtype: str = "float32", fused: bool = False
) -> dict[str, np.ndarray]:
    """Their tensors, or with all experts of a layer in one."""
    rng = np.random.default_rng(0)
    with layout(config=config) as laid:
        abstract = abstract_params(laid.model, PrecisionConfig())
        family = family_for(config)
        links = family.other_forms[0](config) if fused else family.links(config)
        found = places(links, config, laid.model.axes, abstract)
    shapes = {name: place.their_shape for place in found.values() for name in place.names}
    return {
        name: (0.1 * rng.standard_normal(shape)).astype(DTYPES[dtype])
        for name, shape in sorted(shapes.items())
    }


def write_folder(
    path: Path, config: ModelConfig, tensors: dict[str, np.ndarray], files: int = 1
) -> Path:
    """A folder of `tensors`, in several files if asked for."""
    path.mkdir(parents=True)
    family = family_for(config)
    dtype = str(next(iter(tensors.values())).dtype)
    keys: dict[str, Any] = {"architectures": [family.architecture], **family.write(config)}
    keys |= {"torch_dtype": dtype, "bos_token_id": 3, "transformers_version": "4.51.0"}
    (path / "config.json").write_text(json.dumps(keys))
    if files == 1:
        save_file(tensors, path / "model.safetensors")
        return path
    where = {}
    for number in range(files):
        name = f"model-{number + 1:05}-of-{files:05}.safetensors"
        some = dict(list(tensors.items())[number::files])
        save_file(some, path / name)
        where |= dict.fromkeys(some, name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return path


@contextmanager
def opened(path: Path, **sizes: Any) -> Iterator[Laid]:
    """Our model of a folder, on a mesh."""
    with layout(config=ModelConfig(**read_model(path, "--hf"), attention="xla"), **sizes) as laid:
        yield laid


def read(laid: Laid, config: ModelConfig, path: Path, precision=None) -> Any:
    """Its parameters."""
    precision = precision or PrecisionConfig()
    found = find_params(open_folder(path, "config.init_from"), config, laid.model, precision)
    return read_params(found, laid.model, precision, laid.mesh)


def write(laid: Laid, config: ModelConfig, params: Any, out: Path, **how: Any) -> str:
    """And back."""
    like = how.pop("like", None)
    folder = None if like is None else open_folder(like, "--like")
    return export_params(params, config, laid.model.axes, out, like=folder, **how)


def on_host(params: Any) -> Any:
    """NumPy copies."""
    return jax.tree.map(np.asarray, params)
