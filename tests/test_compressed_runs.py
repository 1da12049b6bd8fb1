"""Compressed runs as a user has them: recipes, reports, exports, and training that goes on."""

from __future__ import annotations

import json
import shutil

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

import cli
import compress_recipe
import evaluate
import export
import train
from compress.__main__ import run as compress
from config_border import load_config, write_config
from tests.processes import ROOT
from tests.runs import arguments, saved_steps, write_texts

RECIPE = """
def get_config():
    return (
        ("factorize", {"rank": 4, "method": "svd"}),
        ("train", {"distill.teacher": "{dense}", "train.steps": STEPS}),
    )
"""


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """Keeps compiled programs with the tests, not with the user."""
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


def ended(call, *flags, **how) -> int:
    with pytest.raises(SystemExit) as stop:
        call(*flags, **how)
    return stop.value.code


def training(*flags) -> int:
    return ended(cli.run, train.main, name="train.py", about="", config_from="file", argv=flags)


def evaluated(capsys, *flags) -> dict:
    capsys.readouterr()
    how = dict(name="evaluate.py", about="", config_from="workdir or checkpoint")
    assert ended(cli.run, evaluate.main, flags=evaluate.FLAGS, argv=flags, **how) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("recipes")


@pytest.fixture(scope="module")
def texts(folder):
    return write_texts(folder / "texts")


@pytest.fixture(scope="module")
def dense(folder, texts):
    """A run of two steps on 8 devices."""
    workdir = folder / "dense"
    keys = dict(model__dropout=0.0, mesh__data=1, mesh__fsdp=2, mesh__tensor=4, train__steps=2)
    assert training(*arguments(workdir, texts, **keys)) == 0
    return workdir


@pytest.fixture(scope="module")
def thin(folder, dense):
    out = folder / "thin"
    flags = [f"--workdir={dense}", f"--out={out}", "--rank=4", "--method=svd"]
    assert ended(compress, ["factorize", *flags]) == 0
    return out


HALF = "--config.precision.params=bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "bits"),
    [
        ("quantize --form=int4:16 --method=gptq --rows=8", 5),
        (f"quantize --form=int8 --method=smoothquant --rows=8 {HALF}", None),
        ("quantize --mix=int8,int4:16,none --bits=7 --rows=8", None),
        ("quantize --form=int8+int8= --ranges=percentile --rows=8", None),
        (f"prune --pattern=2:4 --packed --method=sparsegpt --rows=8 {HALF}", 9),
        ("prune --sparsity=0.3 --method=wanda --rows=8", 32),
        (f"factorize --rank=4 --rows=8 {HALF}", None),
        ("shrink --mlp_dim=32 --heads=4 --kv_heads=4 --rows=8", 32),
    ],
)
def test_what_a_command_writes_every_mesh_restores(dense, tmp_path, capsys, command, bits):
    method, *flags = command.split()
    out = tmp_path / "out"
    capsys.readouterr()
    assert ended(compress, [method, f"--workdir={dense}", f"--out={out}", *flags]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    found = json.loads(printed[-1])["bits_per_matrix_weight"]
    assert found < 32 if bits is None else found == pytest.approx(bits, rel=1e-3)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # what waited in files is gone
    wanted = evaluated(capsys, f"--workdir={dense}")["loss"]
    other = ["--config.mesh.data=8", "--config.mesh.fsdp=1", "--config.mesh.tensor=1"]
    here, there = (evaluated(capsys, f"--workdir={out}", *mesh)["loss"] for mesh in ([], other))
    # Inputs in codes fall to either side with float32's last bit; bfloat16 is of masters alone.
    assert there == pytest.approx(here, rel=1e-4 if "+int8" in command else 1e-5)
    assert here == pytest.approx(wanted, rel=0.05)  # of two steps of training


@pytest.fixture
def here(monkeypatch):
    """Runs the stages in this process; what was run."""
    calls = []

    def run(command, stage):
        calls.append(stage.name)
        if "-m" in command:
            assert ended(compress, command[3:]) == 0
        else:
            assert training(*command[2:]) == 0

    monkeypatch.setattr(compress_recipe, "run", run)
    return calls


@pytest.mark.slow
def test_a_recipe_goes_on_where_it_stopped(dense, tmp_path, here, capsys):
    file, out = tmp_path / "recipe.py", tmp_path / "out"
    file.write_text(RECIPE.replace("STEPS", "2"))
    flags = ["recipe", f"--workdir={dense}", f"--out={out}", f"--recipe={file}"]
    assert ended(compress, [*flags, "--stage=1"]) == 0
    first = out / "1-factorize"
    (first / "config.json").unlink()  # as a kill before the end leaves it
    (first / "left").touch()
    assert ended(compress, flags) == 0
    assert here == ["factorize", "factorize", "train"]
    assert not (first / "left").exists()
    assert saved_steps(out / "2-train")[-1] == 2
    config = json.loads((out / "2-train" / "config.json").read_text())
    assert config["init_from"] == str(first)
    assert config["distill"]["teacher"] == str(dense)
    assert set(config["weights"]["forms"].values()) == {"rank:4"}
    assert config["mesh"]["tensor"] == 4  # the dense run's
    capsys.readouterr()
    assert ended(compress, flags) == 0
    assert len(here) == 3
    assert "stage 2 (train): " in capsys.readouterr().out
    (first / "config.json").unlink()
    assert ended(compress, flags) == 2  # it would not be what stage 2 began from
    assert f"{out}/2-train: was made of another stage 1" in capsys.readouterr().err
    file.write_text(RECIPE.replace("STEPS", "3"))
    assert ended(compress, flags) == 2
    assert "give another --out, or the recipe" in capsys.readouterr().err


def test_shipped_recipes_are_taken(tmp_path):
    config = load_config(str(ROOT / "benchmarks" / "dense.py"))
    write_config(tmp_path, config)
    files = sorted((ROOT / "configs" / "recipes").glob("*.py"))
    assert files
    for file in files:
        for stage in compress_recipe.read_stages(str(file)):
            compress_recipe.check(stage, config, tmp_path, str(file))


@pytest.mark.slow
def test_a_stage_that_failed_at_once_may_be_changed(dense, tmp_path, monkeypatch):
    file, tried = tmp_path / "recipe.py", []

    def run(command, stage):
        tried.append(stage.settings)
        raise ValueError("it fails")

    monkeypatch.setattr(compress_recipe, "run", run)
    stages = [("factorize", {"rank": 99}), ("factorize", {"rank": 4})]
    stages += [("train", {"train.steps": 1, "optimizer.name": name}) for name in ("lion", "sgd")]
    for n, (name, settings) in enumerate(stages):
        file.write_text(f"def get_config():\n    return [{(name, settings)}]\n")
        out = tmp_path / name
        flags = ["recipe", f"--workdir={dense}", f"--out={out}", f"--recipe={file}"]
        assert ended(compress, flags) == 2
        assert len(tried) == n + 1
    assert tried == [settings for _, settings in stages]
    config = json.loads((tmp_path / "train" / "1-train" / "config.json").read_text())
    assert config["optimizer"]["name"] == "sgd"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ('(("shrinc", {}),)', "stage 1 (shrinc): no such stage; choose train, quantize"),
        ('(("quantize", {"fom": "int8"}),)', "stage 1 (quantize): --fom: no such flag"),
        ('(("quantize", {"bits": "x"}),)', "invalid float value: 'x'"),
        ('(("train", {"train.step": 3}),)', "config.train.step: no such key"),
        ('(("train", {"train.steps": "x"}),)', "config.train.steps = 'x': should be a whole"),
        ('(("quantize", {"out": "x"}),)', "out: the recipe gives it; leave it out"),
        ("()", "get_config() should return stages such as"),
        ('{"stages": 1}', "get_config() should return stages such as"),
    ],
)
def test_a_wrong_recipe_is_one_line_and_nothing_is_run(
    dense, tmp_path, here, capsys, stages, words
):
    file, out = tmp_path / "recipe.py", tmp_path / "out"
    file.write_text(f"def get_config():\n    return {stages}\n")
    flags = ["recipe", f"--workdir={dense}", f"--out={out}", f"--recipe={file}"]
    capsys.readouterr()
    assert ended(compress, flags) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --recipe={file}: ")
    assert words in error
    assert error.count("\n") == 1
    assert here == []
    assert not out.exists()


@pytest.mark.slow
def test_a_report_weighs_and_compares(dense, thin, tmp_path, capsys):
    out = tmp_path / "report"
    flags = ["report", f"--workdir={dense}", f"--out={out}", "--tokens=4", "--prompt=4"]
    assert ended(compress, [*flags, f"--runs={thin}"]) == 0
    whole, small = json.loads((out / "report.json").read_text())["rows"]
    for row, run in ((whole, dense), (small, thin)):
        assert row["device_bytes"] == row["compiled_argument_bytes"]
        assert row["loss"] == pytest.approx(evaluated(capsys, f"--workdir={run}")["loss"], rel=1e-6)
        assert row["decoding_tokens"] == 4 * 8
    assert whole["bits_per_parameter"] == whole["bits_per_matrix_weight"] == 32
    # Of 32 x 32 matrices 8 x 32 numbers stay, and of 32 x 64 ones 4 x 96.
    assert small["bits_per_matrix_weight"] == 32 * (4 * 4 * 64 + 3 * 4 * 96) / (4 * 1024 + 3 * 2048)
    assert small["loss_change"] == pytest.approx(100 * (small["loss"] / whole["loss"] - 1))
    table = (out / "report.md").read_text()
    assert table.count("\n| ") == 2 + 1  # rows, and the line below the head
    assert (out / "pareto.png").stat().st_size > 1000
    capsys.readouterr()
    assert ended(compress, ["report", *flags[2:], f"--workdir={thin}", f"--runs={thin}"]) == 2
    assert capsys.readouterr().err == (
        f"error: --out={out}: has a report of runs compared with --workdir={dense}; give that, or "
        f"another --out\n"
    )


@pytest.mark.slow
def test_a_report_wants_the_same_text(dense, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(dense, other)
    file = other / "checkpoints" / "2" / "metadata.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"data": "of other text"}))
    capsys.readouterr()
    flags = [f"--workdir={dense}", f"--runs={other}", f"--out={tmp_path / 'report'}"]
    assert ended(compress, ["report", *flags]) == 2
    assert capsys.readouterr().err == (
        "error: --tokens=32: with --prompt=16 more than config.model.max_length = 32\n"
    )
    assert ended(compress, ["report", *flags, "--tokens=8"]) == 2
    assert capsys.readouterr().err == (
        f"error: --runs={other}: its text or its tokenizer is not that of --workdir={dense}; runs "
        f"are compared on the same held-out rows\n"
    )


@pytest.mark.slow
def test_an_export_is_dense_and_computes_the_same(dense, thin, texts, tmp_path, capsys):
    out = tmp_path / "hf"
    flags = [f"--workdir={thin}", f"--out={out}"]
    how = dict(name="export.py", about="", config_from="workdir")
    capsys.readouterr()
    assert ended(cli.run, export.main, flags=export.FLAGS, argv=flags, **how) == 0
    assert f"note: {thin} is compressed (config.weights.forms), and {out} is dense" in (
        capsys.readouterr().out
    )
    # Products with two factors and with their product differ in the last bits of float32.
    wanted = evaluated(capsys, f"--workdir={thin}")["loss"]
    given = [flag for flag in arguments(tmp_path, texts) if not flag.startswith("--workdir")]
    found = evaluated(capsys, f"--hf={out}", *given, "--config.mesh.fsdp=2")["loss"]
    assert found == pytest.approx(wanted, abs=1e-5)


@pytest.mark.slow
def test_a_compressed_run_is_trained_in_another_workdir(thin, texts, tmp_path, capsys):
    keys = dict(model__dropout=0.0, mesh__data=1, mesh__fsdp=2, mesh__tensor=4, train__steps=1)
    capsys.readouterr()
    assert training(f"--workdir={thin}") == 2
    assert capsys.readouterr().err == (
        f"error: --workdir={thin}: python -m compress wrote it, without an optimizer's state; "
        f"train it in a new --workdir, with --config=FILE and --config.init_from={thin}\n"
    )
    flags = arguments(tmp_path / "tuned", texts, init_from=thin, **keys)
    assert training(*flags) == 0
    out = capsys.readouterr().out
    assert "step 1/1 | loss" in out
    assert "of them trained" not in out  # factors are trained, all of them
