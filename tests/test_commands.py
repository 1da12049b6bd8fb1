"""The two command lines as a user types them: overrides, configs left out, errors, notes."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from tests.runs import arguments, finish, losses, rows, saved_steps, start, write_texts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The workdir of a run on 8 devices, as overrides have laid it out, and what it printed."""
    folder = tmp_path_factory.mktemp("commands")
    texts = write_texts(folder / "texts")
    keys = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2, "train__steps": 4}
    keys |= {"remat__policy": "custom", "remat__save": "query", "remat__offload": "attention_out"}
    keys |= {"parallel__sequence": True, "optimizer__offload": True}
    command = arguments(folder / "run", texts, **keys)
    compiled = folder / "compiled"
    out, err = finish(start("train.py", *command, devices=8, compiled=compiled))
    return SimpleNamespace(workdir=folder / "run", out=out, err=err, compiled=compiled)


def test_overrides_reach_training(trained):
    workdir = trained.workdir
    assert trained.err == ""
    assert "mesh data 2 x fsdp 2 x tensor 2, zero 3, sequence parallel, remat custom" in trained.out
    config = json.loads((workdir / "config.json").read_text())
    assert config["mesh"]["fsdp"] == 2
    assert config["remat"]["save"] == ["query"]
    assert config["train"]["steps"] == 4
    assert len(losses(workdir)) == 4
    assert saved_steps(workdir) == [4]


def test_what_has_no_effect_is_said(trained):
    for key in ("remat", "optimizer"):
        note = f"note: config.{key}.offload has no effect: XLA:CPU keeps everything in host memory"
        assert note in trained.out


def test_it_ends_with_the_next_command(trained):
    assert trained.out.splitlines()[-1].endswith(f"evaluate.py --workdir={trained.workdir}")


STAGES = (
    *("--config.mesh.fsdp=1", "--config.mesh.tensor=1", "--config.pipeline.microbatches=32"),
    *("--config.pipeline.layers=(1,2,2,1)", "--config.pipeline.orders=/no/such.py"),
)


@pytest.mark.parametrize(
    ("devices", "mesh", "shown"),
    [
        (8, (), "data 2 x fsdp 2 x tensor 2"),
        (
            4,
            ("--config.mesh.data=1", "--config.mesh.fsdp", "4", "--config.mesh.tensor=1"),
            "fsdp 4",
        ),
        # What the training would want of a schedule is not asked.
        (8, (*STAGES, "--config.mesh.data=4", "--config.mesh.pipe=2"), "pipe 2 x data 4"),
        (8, (*STAGES, "--config.mesh.data=2", "--config.mesh.pipe=4"), "pipe 4 x data 2"),
    ],
)
def test_overrides_reach_evaluation(trained, devices, mesh, shown):
    workdir = trained.workdir
    out, err = finish(start("evaluate.py", f"--workdir={workdir}", *mesh, devices=devices))
    assert err == ""
    assert f"{workdir}: step 4, mesh {shown}, " in out
    result = json.loads(out.splitlines()[-1])
    # Sums in another order.
    assert result["loss"] == pytest.approx(rows(workdir)[-1]["eval_loss"], rel=1e-6)


def test_without_config_a_workdir_continues_with_its_own(trained):
    workdir = trained.workdir
    flags = [f"--workdir={workdir}", "--config.train.steps=6"]
    out, err = finish(start("train.py", *flags, devices=8, compiled=trained.compiled))
    assert err == ""
    assert "mesh data 2 x fsdp 2 x tensor 2" in out
    assert "continuing from step 4\n" in out
    assert len(losses(workdir)) == 6


# program, arguments -> words of the line; WORKDIR is that of the run.
REFUSED = [
    ("train.py", ["--workdir=WORKDIR", "--config.mesh.dta=2"], "config.mesh.data?"),
    ("train.py", ["--workdir=WORKDIR/none"], "--config: missing"),
    ("train.py", ["--workdir=WORKDIR", "--config.mesh.data=3"], "needs 3 devices"),
    (
        "evaluate.py",
        ["--workdir=WORKDIR", "--config.mesh.data=1", "--step=3"],
        "no undamaged step 3",
    ),
    ("evaluate.py", ["--workdir=WORKDIR/none"], "no config.json in it"),
]


@pytest.mark.parametrize(("program", "flags", "words"), REFUSED)
def test_errors_are_one_line(trained, program, flags, words):
    workdir = trained.workdir
    flags = [flag.replace("WORKDIR", str(workdir)) for flag in flags]
    _, err = finish(start(program, *flags, "--config.mesh.fsdp=1", "--config.mesh.tensor=1"), 2)
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1


def test_debug_shows_where(trained):
    flags = [f"--workdir={trained.workdir}", "--step=3", "--debug"]
    _, err = finish(start("evaluate.py", *flags, devices=8), 2)
    assert err.startswith("Traceback")
    assert err.splitlines()[-1].startswith("error: --workdir: ")


def test_help_needs_no_config():
    for program in ("train.py", "evaluate.py"):
        out, err = finish(start(program, "--help"))
        assert err == ""
        assert f"python {program} --workdir" in out or f"python {program} --config" in out
        assert "--config.SECTION.KEY=VALUE" in out
