"""sweep.py as a user runs it: what it writes, that it goes on where it stopped, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import cli
import compile_for
import sweep
from tests.runs import __file__ as SMALL
from tests.runs import finish, start, write_texts

GIB = 2**30


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("sweep") / "texts")


@pytest.fixture
def command(texts, tmp_path, capsys):
    """`command("--mode=...")` sweeps the small run on cpu:8: (exit code, stdout, stderr)."""

    def call(*argv, target="cpu:8", out=tmp_path / "out"):
        capsys.readouterr()
        given = [f"--config={SMALL}", f"--config.data.path={texts}"]
        given += [f"--target={target}", f"--out={out}"]
        with pytest.raises(SystemExit) as stop:
            cli.run(
                sweep.main,
                name="sweep.py",
                about="",
                config_from="file",
                flags=sweep.FLAGS,
                argv=[*given, *argv],
                needs_workdir=False,
            )
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return call


@pytest.fixture
def compiler(monkeypatch):
    """Answers in place of the compiler, the prediction with 3% more; the configs it was given."""
    asked: list[dict] = []

    def answer(config, target, **_):
        asked.append(config)
        if config["remat"]["policy"] == "dots":
            return {"status": "failed", "error": "the compiler died"}
        size = 2**20 if config["remat"]["policy"] == "full" else 2**22
        return {"status": "ok", "error": None, "total_bytes": size}

    monkeypatch.setattr(compile_for, "compile_for", answer)
    return asked


def rows(out: Path, mode: str) -> list[dict]:
    """The rows of one mode that a sweep left."""
    lines = (out / "sweep.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["mode"] == mode]


def test_predict_ranks_all_layouts(command, tmp_path):
    code, out, err = command("--top=3")
    assert (code, err) == (0, "")
    found = rows(tmp_path / "out", "predict")
    assert len(found) > 60
    best = min(found, key=lambda row: row["predicted"]["seconds"])
    lines = out.splitlines()
    assert f"best: {best['name']}" in lines
    assert lines[2].endswith(best["name"])
    assert "MFU" in lines[lines.index(f"best: {best['name']}") + 1]
    flags = next(line for line in lines if "--config.mesh.fsdp=" in line)
    for key, value in best["overrides"].items():
        assert f"--{key}={value}" in flags.split()
    for name in ("sweep.md", "sweep.html"):
        assert best["name"] in (tmp_path / "out" / name).read_text()


def test_a_budget_leaves_out_what_is_larger(command, tmp_path):
    command()
    found = rows(tmp_path / "out", "predict")
    sizes = sorted(row["predicted"]["total_bytes"] for row in found)
    budget = sizes[len(sizes) // 4]
    code, out, _ = command(f"--budget_gib={budget / GIB}", out=tmp_path / "small")
    assert code == 0
    best = next(line for line in out.splitlines() if line.startswith("best: "))
    row = next(row for row in found if row["name"] == best.removeprefix("best: "))
    assert row["predicted"]["total_bytes"] <= budget
    faster = [r for r in found if r["predicted"]["seconds"] < row["predicted"]["seconds"]]
    assert faster
    assert all(r["predicted"]["total_bytes"] > budget for r in faster)
    assert f"{len(faster)} faster layouts do not fit" in out


def test_a_grid_keeps_what_fails(command, tmp_path):
    grid = ("--grid=config.mesh.fsdp=2,3", "--grid=config.remat.policy=none,full")
    code, out, err = command(*grid)
    assert (code, err) == (0, "")
    found = rows(tmp_path / "out", "predict")
    assert [row["name"] for row in found] == [
        "fsdp 2, remat none",
        "fsdp 2, remat full",
        "fsdp 3, remat none",
        "fsdp 3, remat full",
    ]
    assert [row["status"] for row in found] == ["ok", "ok", "failed", "failed"]
    assert "the other axes (fsdp 3) do not divide the 8 devices" in found[2]["error"]
    assert "failed  fsdp 3, remat none: config.mesh.data = -1" in out
    for name in ("sweep.md", "sweep.html"):
        assert "fsdp 3, remat full" in (tmp_path / "out" / name).read_text()


def test_compile_goes_on_where_it_stopped(command, compiler, tmp_path):
    grid = "--grid=config.remat.policy=none,dots,full"
    code, _, err = command("--mode=compile", grid)
    assert (code, err) == (0, "")
    found = {row["name"]: row for row in rows(tmp_path / "out", "compile")}
    assert {name: row["status"] for name, row in found.items()} == {
        "remat none": "ok",
        "remat dots": "failed",
        "remat full": "ok",
    }
    assert found["remat dots"]["error"] == "the compiler died"
    assert found["remat full"]["compiled"]["total_bytes"] == 2**20
    assert len(compiler) == 3

    # A kill tears the last line: that row alone is done again.
    file = tmp_path / "out" / "sweep.jsonl"
    whole = file.read_text()
    last = json.loads(whole.splitlines()[-1])["name"]
    file.write_text(whole[:-9])
    assert command("--mode=compile", grid)[0] == 0
    assert len(compiler) == 4
    assert sorted(row["name"] for row in rows(tmp_path / "out", "compile")) == sorted(found)
    assert compiler[-1]["remat"]["policy"] == last.split()[-1]

    # The same rows against a smaller budget: nothing is compiled again.
    code, out, _ = command("--mode=compile", grid, f"--budget_gib={2**21 / GIB}")
    assert code == 0
    assert len(compiler) == 4
    assert "best: remat full" in out
    assert "remat none  (does not fit)" in out
    assert "remat dots  (failed)" in out


def test_compile_searches(command, compiler, tmp_path):
    code, out, err = command("--mode=compile", f"--budget_gib={2**21 / GIB}", "--top=60")
    assert (code, err) == (0, "")
    assert 0 < len(compiler) <= 60
    best = next(line for line in out.splitlines() if line.startswith("best: "))
    assert "remat full" in best

    code, _, err = command("--mode=compile", f"--budget_gib={2**21 / GIB}", "--top=2")
    assert code == 2
    assert "nothing fits of the 2 layouts compiled" in err
    assert "(raise --top)" in err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--mode=guess"], ["--mode", "'guess'", "predict", "compile", "run"]),
        (["--budget_gib=1e-6"], ["--budget_gib=1e-06: nothing fits; the least is", "GiB with"]),
        (["--budget_gib=1e-6", "--mode=run"], ["nothing fits; the least is"]),
        (["--budget_gib=1e-6", "--mode=compile"], ["nothing fits; the least is"]),
        (["--budget_gib=-1"], ["--budget_gib=-1.0: GiB per device, above 0"]),
        (["--budget_gib=nan"], ["--budget_gib=nan: GiB per device, above 0"]),
        (["--budget_gib=inf"], ["--budget_gib=inf: GiB per device, above 0"]),
        (["--top=0"], ["--top=0: at least 1"]),
        (["--grid=fsdp=1"], ["--grid=fsdp=1", "config.SECTION.KEY=VALUE"]),
        (["--grid=config.mesh.fsdq=1"], ["config.mesh.fsdq", "did you mean config.mesh.fsdp?"]),
        (["--grid=config.mesh.fsdp=1,two"], ["config.mesh.fsdp = 'two'", "whole number"]),
        (["--grid=config.mesh.fsdp=3"], ["fsdp 3", "do not divide the 8 devices"]),
        (["--grid=config.mesh.tensor=8", "--config.model.heads=4"], ["heads"]),
        (["--grid=config.seed=1", "--grid=config.seed=2"], ["config.seed is given twice"]),
        (["--precision=float9"], ["config.precision.params = 'float9'"]),
        (["--grid=config.seed=1", "--precision=float32"], ["--precision=float32", "grid"]),
        (["--config.data.batch_size=0"], ["config.data.batch_size = 0"]),
        (["--workdir=w"], ["--workdir: no such flag of sweep.py"]),
    ],
)
def test_bad_input(command, compiler, argv, words):
    code, _, err = command(*argv)
    assert (code, len(err.splitlines())) == (2, 1), err
    assert err.startswith("error: ")
    assert all(word in err for word in words), err
    assert not compiler


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("gpu:h1000:1x8", ["--target=gpu:h1000:1x8", "no such gpu", "h100"]),
        ("tpu:v5e:3x5", ["--target=tpu:v5e:3x5"]),
        ("cpu:0", ["--target=cpu:0"]),
    ],
)
def test_unknown_target(command, target, words, tmp_path):
    code, _, err = command(target=target)
    assert (code, len(err.splitlines())) == (2, 1), err
    assert all(word in err for word in words), err
    assert not (tmp_path / "out").exists()


def test_another_config_or_target_is_refused_and_nothing_lost(command, tmp_path):
    grid = "--grid=config.mesh.fsdp=2,4"
    command(grid)
    before = (tmp_path / "out" / "sweep.jsonl").read_bytes()
    for argv, target in (((grid, "--config.seed=1"), "cpu:8"), ((grid,), "cpu:4")):
        code, _, err = command(*argv, target=target)
        assert code == 2
        assert "give another --out" in err
    assert (tmp_path / "out" / "sweep.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("", "--out=.: give a folder of its own, such as runs/sweep"),
        (".", "--out=.: give a folder of its own, such as runs/sweep"),
        ("FOLDER/file", "--out=FOLDER/file: a file; give a folder"),
        ("FOLDER/file/x", "--out=FOLDER/file/x: Not a directory; give a folder that you may write"),
        ("/proc/x", "--out=/proc/x: No such file or directory; give a folder that you may write"),
    ],
)
def test_where_nothing_can_be_kept(command, monkeypatch, tmp_path, out, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    words = words.replace("FOLDER", str(tmp_path))
    found = command("--grid=config.seed=0", out=out.replace("FOLDER", str(tmp_path)))
    assert found == (2, "", f"error: {words}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("submit", [(), ("--submit=local",)])
def test_run_trains_each_in_its_own_workdir(texts, tmp_path, submit):
    out = tmp_path / "out"
    argv = (
        f"--config={SMALL}",
        f"--config.data.path={texts}",
        "--config.train.steps=4",
        "--config.eval.batches=1",
        "--target=cpu:8",
        f"--out={out}",
        "--mode=run",
        # The second is found out by train.py alone: the planner reads no data.
        f"--grid=config.data.path={texts},{tmp_path}/none.txt",
        *submit,
    )
    finish(start("sweep.py", *argv, devices=1))
    good, bad = rows(out, "run")
    assert (good["status"], bad["status"]) == ("ok", "failed")
    assert "none.txt" in bad["error"]
    assert good["measured"]["seconds"] > 0
    assert good["measured"]["tokens_per_second"] > 0
    assert good["measured"]["loss"] < 6
    workdirs = sorted((out / "runs").iterdir())
    assert len(workdirs) == 2
    assert sum((workdir / "metrics.jsonl").exists() for workdir in workdirs) == 1

    before = (out / "sweep.jsonl").read_bytes()
    finish(start("sweep.py", *argv, devices=1))
    assert (out / "sweep.jsonl").read_bytes() == before
