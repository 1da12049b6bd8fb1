"""From parameters, however they are laid out, to a folder that `transformers` loads.

The folder is written beside its place and renamed when it is complete. On the host there is never
more than one tensor.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from hf.families import differences, family_for, family_of
from hf.family import Family, computed
from hf.files import CONFIG, CheckpointFolder
from hf.keys import Keys
from hf.layout import Place, places
from hf.writing import Written, write_weights
from models.config import ModelConfig
from parallel.mesh import NO_MESH
from training.naming import named
from training.state import Tree

GB = 10**9


class Source(NamedTuple):
    """What a tensor of theirs, or a part of it, is made of: `array[at]`."""

    array: jax.Array
    place: Place
    at: tuple[int, ...]


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def export_params(
    params: Tree,
    config: ModelConfig,
    axes: Tree,
    out: Path,
    *,
    like: CheckpointFolder | None = None,
    dtype: str | None = None,
    shard_bytes: int = 5 * GB,
    special: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> str:
    """Writes a folder with config.json and safetensors.

    Args:
      params: of one process, in any layout.
      config: the model.
      axes: `Model.axes`.
      out: a folder that is not there yet.
      like: the checkpoint that the model came from: its family, names, dtypes and other keys of
        config.json are taken, and its tokeniser copied.
      dtype: float32, bfloat16 or float16; None is that of `like`, or float32.
      shard_bytes: of a file, at most, where no tensor is larger.
      special: more keys of config.json, such as ids of special tokens; without `like`.
      files: more files by name, such as a tokeniser's.

    Returns:
      The architecture.

    Raises:
      ValueError: `out` is there already, or no family (or not that of `like`) computes the model.
    """
    refuse_existing(out)
    family = family_for(config) if like is None else _family_like(like, config)
    written = _config(family, config, like, dtype, special or {})
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    links = family.links_of(config, () if like is None else like.tensors)
    found = places(links, config, axes, abstract)
    tensors = _tensors(named(params), found, family, config, like, dtype)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.parent / f".{out.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir()
        write_weights(temporary, tensors, shard_bytes)
        (temporary / CONFIG).write_text(json.dumps(written, indent=2) + "\n")
        if like is not None:
            for name in TOKENIZER_FILES:
                if (like.path / name).is_file():
                    shutil.copyfile(like.path / name, temporary / name)
        for name, content in (files or {}).items():
            (temporary / name).write_bytes(content)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return family.architecture


def refuse_existing(out: Path) -> None:
    """Refuses a folder, or a file, that is there already."""
    if out.exists():
        raise ValueError(f"--out={out}: is there already; give a folder that is not")


def _family_like(like: CheckpointFolder, config: ModelConfig) -> Family:
    family = family_of(like.config, f"{like.key} = '{like.path}': config.json")
    wrong = differences(family, config)
    if wrong:
        raise ValueError(
            f"{like.key} = '{like.path}': {family.architecture} does not compute config.model: it "
            f"has {'; '.join(wrong[:3])}; leave {like.key} out to look for another family"
        )
    return family


def _config(
    family: Family,
    config: ModelConfig,
    like: CheckpointFolder | None,
    dtype: str | None,
    special: Mapping[str, Any],
) -> dict[str, Any]:
    """config.json: that of `like` where it says the same, else ours and its other keys."""
    ours = {"architectures": [family.architecture], **family.write(config)}
    if like is None:
        # Left out, the ids are those of each family's first tokeniser, whatever this model's is.
        unknown = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        return {"torch_dtype": dtype or "float32", **unknown, **special, **ours}
    keys = Keys(like.config, str(like.path))
    if computed(ModelConfig(**family.read(keys))) == computed(config):
        written = dict(like.config)
    else:
        others = {name: value for name, value in like.config.items() if name not in keys.seen}
        written = others | ours
    if dtype is not None:
        written["dtype" if "dtype" in written else "torch_dtype"] = dtype
    return written


def _tensors(
    params: dict[str, jax.Array],
    found: dict[str, Place],
    family: Family,
    config: ModelConfig,
    like: CheckpointFolder | None,
    dtype: str | None,
) -> dict[str, Written]:
    """Their tensors, not made yet; parts of one are put together."""
    parts: dict[str, list[Source]] = {}
    for ours, place in found.items():
        for index, name in zip(place.indices, place.names, strict=True):
            parts.setdefault(name, []).append(Source(params[ours], place, index))
    there = {} if like is None else like.tensors
    for copy, ours in family.copies if config.tied else ():
        if copy in there:
            parts[copy] = parts[found[ours].names[0]]
    bare = bool(there) and not any(name.startswith(family.prefix) for name in there)
    tensors = {}
    for name, sources in parts.items():
        full = name.removeprefix(family.prefix) if bare else name
        kind = np.dtype(dtype or (there[full].dtype if full in there else np.float32))
        tensors[full] = Written(sources[0].place.their_shape, kind, partial(_value, sources))
    return tensors


def _value(sources: Sequence[Source]) -> np.ndarray:
    """Their tensor, in the dtype of the parameter."""
    whole = np.empty(sources[0].place.their_shape, sources[0].array.dtype)
    for source in sources:
        view = source.place.ours(whole)
        assert np.may_share_memory(view, whole), source.place
        copy_to(view, source.array, source.at)
    return whole


def copy_to(out: np.ndarray, array: jax.Array, index: tuple[int, ...]) -> None:
    """Copies `array[index]`, less its padding, from the devices' parts of it."""
    assert array.is_fully_addressable
    done, lead = set(), len(index)
    for shard in array.addressable_shards:
        region = tuple(
            part.indices(n)[:2] for part, n in zip(shard.index, array.shape, strict=True)
        )
        if region in done:  # a copy of a part that was read
            continue
        done.add(region)
        outer, inner = region[:lead], region[lead:]
        if not all(start <= i < stop for i, (start, stop) in zip(index, outer, strict=True)):
            continue
        at = tuple(i - start for i, (start, _) in zip(index, outer, strict=True))
        with jax.set_mesh(NO_MESH):
            part = np.asarray(shard.data[at] if at else shard.data)
        into = out[tuple(slice(*span) for span in inner)]
        into[...] = part[tuple(slice(size) for size in into.shape)]
