"""train.py from the checkpoint of another run: a new head on a frozen trunk; refusals."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import SingleDeviceSharding

import cli
import train
from tests.runs import arguments, write_texts
from training.checkpoint import Checkpoints
from training.naming import named, nested

FROZEN = "embedding,stack/*,final_norm/*"
HEAD = dict(model__tied=False, init_new="head_*", optimizer__frozen=FROZEN)


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """Keeps compiled programs with the tests, not with the user."""
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


def run(capsys, *flags):
    """Exit code, stdout, stderr of train.py in this process."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.run(train.main, name="train.py", about="", argv=[*flags], config_from="file")
    return stop.value.code, *capsys.readouterr()


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("trunk") / "texts")


@pytest.fixture(scope="module")
def trunk(tmp_path_factory, texts):
    """A run of a step, its embedding the head, its layers one block, divided by two."""
    workdir = tmp_path_factory.mktemp("trunk") / "a"
    keys = dict(model__tied=True, model__dropout=0.0, model__distinct=1, train__steps=1)
    flags = arguments(workdir, texts, mesh__data=4, mesh__fsdp=2, **keys)
    with pytest.raises(SystemExit) as stop:
        cli.run(train.main, name="train.py", about="", argv=flags, config_from="file")
    assert stop.value.code == 0
    return workdir


def saved(workdir, step):
    """The state of a checkpoint by name, NumPy."""
    checkpoints, one = Checkpoints(workdir / "checkpoints"), SingleDeviceSharding(jax.devices()[0])
    _, tensors = checkpoints.tensors(step)
    wanted = {
        name: jax.ShapeDtypeStruct(tuple(t["shape"]), t["dtype"], sharding=one)
        for name, t in tensors.items()
    }
    _, state = checkpoints.restore(step, nested(wanted))
    return {name: np.asarray(array) for name, array in named(state).items()}


@pytest.mark.slow
def test_a_new_head_on_a_frozen_trunk(trunk, texts, tmp_path, capsys):
    workdir = tmp_path / "b"
    flags = arguments(workdir, texts, init_from=trunk, train__steps=1, **HEAD)
    code, out, err = run(capsys, *flags)
    assert code == 0, err
    assert "12,288 of them trained" in out  # 32 x 384
    config = json.loads((workdir / "config.json").read_text())
    assert config["model"]["distinct"] == 1  # the other run's
    assert config["model"]["dropout"] == 0.1  # its own
    code, out, err = run(capsys, *flags, "--config.train.steps=2")
    assert code == 0, err
    assert "continuing from step 1" in out

    before, after = saved(trunk, 1), saved(workdir, 2)
    names = [name for name in before if name.startswith("params/")]
    assert len(names) > 5
    for name in names:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    moments = [n for n in after if n.startswith("opt_state/direction/") and after[n].ndim]
    assert {name.rpartition("/")[2] for name in moments} == {"head_weight"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (dict(model__tied=False), ("has no head_weight, which is (32, 384)", "config.init_new")),
        (dict(model__distinct=0), ("(1, 32", "(2, 32", "config.init_drop and config.init_new")),
        (HEAD | dict(optimizer__frozen="trunk/*"), ("'trunk/*' names no parameter", "stack")),
    ],
    ids=["missing", "shape", "frozen"],
)
def test_what_does_not_fit_is_one_line_and_nothing_is_written(
    trunk, texts, tmp_path, capsys, keys, words
):
    workdir = tmp_path / "b"
    code, _, err = run(capsys, *arguments(workdir, texts, **dict(init_from=trunk) | keys))
    assert code == 2
    assert err.startswith("error: config.")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    assert not (workdir / "config.json").exists()
    assert not list(workdir.glob("checkpoints/*"))
