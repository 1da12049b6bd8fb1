"""A folder of Hugging Face as a teacher: its parameters, its tokens, what it is told by."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from config_border import load_config, with_values
from data.tokens import ByteTokenizer, JsonTokenizer, train_bpe
from experiment import read_experiment
from parallel.mesh import make_mesh
from teacher import open_teacher
from tests.hf import synthetic

CONFIG = replace(synthetic.QWEN3, vocab_size=300, layers=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "checkpoint"
    synthetic.write_folder(path, CONFIG, synthetic.random_tensors(CONFIG))
    train_bpe(["mesh shard tensor loss gradient step"] * 20, 290, path / "tokenizer.json")
    return path


def opened(folder, tokenizer, **changes):
    """The teacher of a small student on fsdp 4 x tensor 2, and its experiment."""
    keys = {
        "config.data.path": "texts/*.txt",
        "config.data.tokenizer": str(folder / "tokenizer.json"),
        "config.model.vocab_size": 300,
        "config.mesh.data": 1,
        "config.mesh.fsdp": 4,
        "config.mesh.tensor": 2,
        "config.distill.teacher": str(folder),
    }
    config = with_values(load_config("tests/runs.py"), keys | changes)
    experiment = read_experiment(config, 8)
    mesh = make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        model = experiment.build_model()
        return open_teacher(config, experiment, model, tokenizer, mesh), experiment


@pytest.mark.slow
def test_its_parameters_are_read_onto_the_students_mesh(folder):
    tokenizer = JsonTokenizer(folder / "tokenizer.json")
    (_, arguments, fingerprint, line), experiment = opened(
        folder, tokenizer, **{"config.distill.teacher_compute": "bfloat16"}
    )
    assert "parameters in bfloat16" in line
    assert experiment.teacher.model.qk_norm
    assert not experiment.model.qk_norm
    with synthetic.opened(folder) as laid:
        want = synthetic.on_host(synthetic.read(laid, CONFIG, folder))
    (got,) = arguments
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert mine.dtype == "bfloat16"
        assert len(mine.sharding.device_set) == 8
        np.testing.assert_array_equal(np.asarray(mine), theirs.astype(mine.dtype))

    tensors = load_file(folder / "model.safetensors")
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] + 1}, folder / "model.safetensors")
    again, _ = opened(folder, tokenizer)
    assert again.fingerprint != fingerprint


def test_other_tokens_and_steps_are_refused(folder):
    with pytest.raises(ValueError, match=r"its tokens are those of .*tokenizer\.json"):
        opened(folder, ByteTokenizer(), **{"config.data.tokenizer": "bytes"})
    with pytest.raises(ValueError, match=r"config\.distill\.teacher_step = 3: .* has no steps"):
        opened(folder, ByteTokenizer(), **{"config.distill.teacher_step": 3})
