"""A checkpoint folder: what is in it without reading it, one tensor at a time, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from hf.files import open_folder

TENSORS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.arange(5).astype(ml_dtypes.bfloat16),
    "c": np.full((2, 2), 0.5, np.float16),
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


def sharded(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    save_file({"a": TENSORS["a"]}, folder / "one.safetensors")
    save_file({"b": TENSORS["b"], "c": TENSORS["c"]}, folder / "two.safetensors")
    where = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    write_index(folder, where)
    return folder


def write_index(folder: Path, where: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize("shards", [False, True])
def test_lists_and_reads_every_dtype(folder, shards):
    opened = open_folder(sharded(folder) if shards else folder, "--hf")
    assert opened.config == {"model_type": "x"}
    assert opened.tensors.keys() == TENSORS.keys()
    for name, expected in TENSORS.items():
        stored = opened.tensors[name]
        assert (stored.shape, stored.dtype) == (expected.shape, expected.dtype)
        assert stored.nbytes == expected.nbytes
        np.testing.assert_array_equal(np.asarray(stored.map()), expected)


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(ValueError) as error:
        open_folder(folder, "--hf")
    text = str(error.value)
    assert text.startswith("--hf = '")
    assert "\n" not in text
    for word in words:
        assert word in text


def test_no_folder(tmp_path):
    refused(tmp_path / "none", "no such folder", "none")


def test_no_config(folder):
    (folder / "config.json").unlink()
    refused(folder, "no config.json")


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_a_config_that_is_none(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, "config.json", "JSON")


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, "no model.safetensors and no model.safetensors.index.json")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "tf_model.h5"])
def test_nothing_unpickles(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    refused(folder, name, "not read", "save the model as safetensors")


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1])
def test_truncated(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, "model.safetensors", "truncated or corrupt")


@pytest.mark.parametrize("change", ["header", "offsets", "more"])
def test_corrupt(folder, change):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    changed = {
        "header": content[:8] + b"\xff" * 16 + content[24:],
        "offsets": content.replace(b'"data_offsets":[0,', b'"data_offsets":[9,'),
        "more": content + b"\0" * 16,
    }[change]
    assert changed != content
    file.write_bytes(changed)
    refused(folder, "truncated or corrupt")


def test_an_index_of_files_that_are_not_there(folder):
    (sharded(folder) / "two.safetensors").unlink()
    refused(folder, "names 'two.safetensors', which is not there")


def test_an_index_of_tensors_that_are_not_there(folder):
    write_index(sharded(folder), {"a": "one.safetensors", "d": "two.safetensors"})
    refused(folder, "'d' is in 'two.safetensors', and it is not")


def test_an_index_points_nowhere_else(folder):
    save_file({"a": TENSORS["a"]}, folder.parent / "other.safetensors")
    write_index(sharded(folder), {"a": "../other.safetensors"})
    refused(folder, "'../other.safetensors', which is not there")


@pytest.mark.parametrize("where", [None, [], {}])
def test_an_index_without_a_map(folder, where):
    write_index(sharded(folder), where)
    refused(folder, "no weight_map")
