"""train.py with a teacher: resumed bit for bit, a teacher that moved or changed; refusals."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import cli
import evaluate
import train
from config_border import load_config, with_values, write_config
from experiment import read_experiment
from tests.runs import arguments, losses, rows, write_texts
from tests.test_init_from_run import saved
from training.naming import TRAINING_ONLY

TAUGHT = dict(
    model__layers=1,
    model__embed_dim=16,
    distill__temperature=2.0,
    distill__hidden_weight=0.1,
    distill__layers="1:1",
)


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """Keeps compiled programs with the tests, not with the user."""
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


def run(capsys, *flags, main=train.main, name="train.py", config_from="file"):
    """Exit code, stdout, stderr of a command in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.run(main, name=name, about="", argv=[*map(str, flags)], config_from=config_from)
    return stop.value.code, *capsys.readouterr()


@pytest.mark.slow
def test_a_run_with_a_teacher_is_resumed_bit_for_bit_wherever_its_teacher_is(tmp_path, capsys):
    texts = write_texts(tmp_path / "texts")
    teacher, mesh = tmp_path / "teacher", dict(mesh__data=8)
    one = dict(train__steps=1)
    code, _, err = run(capsys, *arguments(teacher, texts, model__layers=1, **mesh, **one))
    assert code == 0, err
    given = dict(**mesh, **TAUGHT, distill__teacher=teacher)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    code, out, err = run(capsys, *arguments(whole, texts, **given, train__steps=4))
    assert code == 0, err
    assert f"teacher: {teacher}: step 1, " in out
    code, _, err = run(capsys, *arguments(parts, texts, **given, train__steps=2))
    assert code == 0, err

    moved = shutil.copytree(teacher, tmp_path / "moved")
    there = given | dict(distill__teacher=moved, train__steps=4)
    code, out, err = run(capsys, *arguments(parts, texts, **there))
    assert code == 0, err
    assert "continuing from step 2" in out
    assert losses(parts) == losses(whole)
    first, second = saved(whole, 4), saved(parts, 4)
    assert first.keys() == second.keys()
    for name, array in first.items():
        np.testing.assert_array_equal(second[name], array, err_msg=name)

    seen = rows(whole)
    assert seen[-1]["loss"] < seen[0]["loss"]
    assert min(row[name] for row in seen for name in ("kl", "hidden")) > 0

    # The projection is trained and kept, the teacher is not; an evaluation asks for neither.
    assert first[f"params/{TRAINING_ONLY}/projection"].shape == (16, 32)
    assert not any(array.shape[-1:] == (384,) and 32 in array.shape for array in first.values())
    shutil.rmtree(moved)
    code, out, err = run(
        capsys, f"--workdir={parts}", main=evaluate_main, name="evaluate.py",
        config_from="workdir or checkpoint",
    )  # fmt: skip
    assert code == 0, err
    row = json.loads((parts / "metrics.jsonl").read_text().splitlines()[-1])
    assert json.loads(out.splitlines()[-1])["loss"] == pytest.approx(row["eval_loss"], rel=1e-6)

    # Another teacher of the same shape, or none: other weights than those that were learnt from.
    manifest = teacher / "checkpoints" / "1" / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    for other, words in ((teacher, "has learnt from step 1 "), ("", f"run has '{moved}'")):
        flags = arguments(parts, texts, **given | dict(distill__teacher=other, train__steps=5))
        code, _, err = run(capsys, *flags)
        assert code == 2
        assert err.startswith(f"error: config.distill.teacher = '{other}': ")
        assert words in err
        assert err.count("\n") == 1


def evaluate_main(config, workdir, hf=None):
    return evaluate.main(config, workdir, None, hf=hf)


def small():
    """The small run's config; no text is read with it."""
    return with_values(load_config("tests/runs.py"), {"config.data.path": "texts/*.txt"})


@pytest.fixture
def teacher(tmp_path):
    """A workdir whose checkpoints are empty: its config alone is looked at first."""

    def make(**values):
        folder = tmp_path / "teacher"
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        keys = {f"config.{key.replace('__', '.')}": value for key, value in values.items()}
        write_config(folder, with_values(small(), keys))
        return folder

    return make


REFUSED = {
    "vocabulary": (dict(model__vocab_size=300), {}, ("has 300 tokens", "vocab_size = 257")),
    "objective": (
        dict(objective__name="prefix_lm", data__packing="none"),
        {},
        ("trained for prefix_lm", "config.objective.name = 'causal_lm'"),
    ),
    "heads": (
        dict(model__heads=2, model__kv_heads=2),
        {"config.mesh.data": 1, "config.mesh.tensor": 4, "config.mesh.fsdp": 2},
        ("config.model.heads = 2 does not divide", "config.mesh.tensor = 4"),
    ),
    "length": (dict(model__max_length=16), {}, ("config.model.max_length = 16",)),
    "stages": (
        {},
        {"config.mesh.data": 4, "config.mesh.pipe": 2, "config.pipeline.microbatches": 2},
        ("config.mesh.pipe = 2", "set it to 1"),
    ),
    "layers": (
        {},
        {"config.distill.hidden_weight": 1.0, "config.distill.layers": ("2:9",)},
        ("config.distill.layers = ['2:9']", "teacher's 0 to 2"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_teacher_that_cannot_teach_is_one_line(teacher, name):
    values, changes, words = REFUSED[name]
    keys = {"config.distill.teacher": str(teacher(**values))} | changes
    with pytest.raises(ValueError) as error:
        read_experiment(with_values(small(), keys), 8)
    line = str(error.value)
    assert line.startswith("config.distill.")
    assert "\n" not in line
    for word in words:
        assert word in line


def test_no_such_teacher(tmp_path):
    config = small()
    for folder, words in ((tmp_path / "none", "no such folder"), (tmp_path, "no config.json")):
        keys = {"config.distill.teacher": str(folder)}
        with pytest.raises(ValueError, match=rf"config\.distill\.teacher = .*{words}"):
            read_experiment(with_values(config, keys), 8)
    # What is trained no longer needs no teacher.
    assert read_experiment(with_values(config, keys), 8, training=False).teacher is None


def test_other_tokens_are_refused(teacher, tmp_path, capsys):
    texts = write_texts(tmp_path / "texts")
    flags = dict(distill__teacher=teacher(), data__tokenizer="bpe", model__vocab_size=257)
    code, _, err = run(capsys, *arguments(tmp_path / "run", texts, **flags))
    assert code == 2
    assert err.startswith("error: config.distill.teacher = ")
    assert "its tokens are those of bytes, and config.data.tokenizer = 'bpe' makes others" in err
    assert not (tmp_path / "run" / "config.json").exists()
