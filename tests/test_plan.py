"""plan.py as a user runs it: the grades side by side, its files, and one line for what is wrong.

What it shares with sweep.py (targets, extras that are not installed, layouts that do not divide) is
asked of both. `tests/memory/` holds the figures themselves.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from types import SimpleNamespace

import jax
import pytest

import cli
import compile_for
import memory.measured
import plan
import sweep
from parallel.targets import parse_target
from tests.runs import __file__ as SMALL
from tests.runs import finish, start

GIB = 2**30
PROGRAMS = {"plan.py": plan, "sweep.py": sweep}
# The planner reads no data: the file need not be there.
CONFIG = (f"--config={SMALL}", "--config.data.path=none.txt")


@pytest.fixture
def command(capsys):
    """`command("--json=...")` plans the small run on cpu:8: (exit code, stdout, stderr)."""

    def call(*argv, program="plan.py", target="cpu:8"):
        capsys.readouterr()
        module = PROGRAMS[program]
        with pytest.raises(SystemExit) as stop:
            cli.run(
                module.main,
                name=program,
                about="",
                config_from="file",
                flags=module.FLAGS,
                argv=[*CONFIG, f"--target={target}", *map(str, argv)],
                needs_workdir=False,
            )
        said = capsys.readouterr()
        return stop.value.code, said.out, said.err

    return call


@pytest.fixture
def planned(command, tmp_path):
    """`planned("--compile")` is what the command prints and the plan as `--json` holds it."""

    def call(*argv, **how):
        file = tmp_path / "plan.json"
        code, out, err = command(*argv, f"--json={file}", **how)
        assert (code, err) == (0, "")
        return out, json.loads(file.read_text())

    return call


@pytest.fixture
def refused(command):
    """Asserts that a command is refused in one line that has all of `words`: (stdout, it)."""

    def check(words, *argv, **how):
        code, out, err = command(*argv, **how)
        print(err)
        assert code == 2, err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        assert len(err) < 500, "nobody reads that"
        for word in words:
            assert word in err
        return out, err

    return check


@pytest.fixture
def compiler(monkeypatch):
    """Answers in place of the compiler: `compiler(total_bytes=..., status="ok")`."""

    def set_answer(status="ok", error=None, **sizes):
        answer = {"status": status, "error": error} | sizes
        monkeypatch.setattr(compile_for, "compile_for", lambda config, target: dict(answer))

    return set_answer


def table(out: str) -> dict[str, dict[str, float]]:
    """The table of a plan: grade -> component -> bytes."""
    lines = out.splitlines()
    first = next(i for i, line in enumerate(lines) if " per device " in line)
    unit = {"GiB": GIB, "MiB": 2**20}[lines[first].split()[0]]
    grades = lines[first].split("per device")[1].split()
    width = len(lines[first]) - 11 * len(grades)
    read: dict[str, dict[str, float]] = {grade: {} for grade in grades}
    for line in lines[first + 1 : lines.index("", first)]:
        for number, grade in enumerate(grades):
            cell = line[width + 11 * number :][:11].strip()
            if cell not in ("", "-"):
                read[grade][line[:width].strip()] = float(cell) * unit
    return read


# --- What it says ---------------------------------------------------------------------------------


def test_three_grades_stand_side_by_side(planned, compiler, monkeypatch):
    compiler(
        total_bytes=5 * 2**20,
        components={"state and batch": 2 * 2**20, "gradients": 3 * 2**20},
        seconds=0.5,
    )
    ran = {"total_bytes": 6 * 2**20, "seconds": 0.25, "tokens_per_second": 1024.0}
    monkeypatch.setattr(memory.measured, "measure_step", lambda job: ran)
    out, row = planned("--compile", "--measure")
    read = table(out)
    assert list(read) == ["predicted", "compiled", "measured"]
    assert read["compiled"] == {
        "state and batch": 2 * 2**20,
        "gradients": 3 * 2**20,
        "total": 5 * 2**20,
    }
    assert read["measured"] == {"total": 6 * 2**20}
    assert row["measured"] == ran
    assert row["compiled"]["total_bytes"] == 5 * 2**20
    # 8 rows of 32 tokens a step.
    assert "step, compiled: 500.0 ms, 512 tokens/s" in out
    assert "step, measured: 250.0 ms, 1,024 tokens/s" in out
    assert re.search(r"^step, predicted: .* tokens/s, MFU ", out, re.MULTILINE)


def test_buffers_that_share_memory_are_a_line_of_their_own(planned, compiler):
    """The compiler's total may be less than what is alive together by the text of its program."""
    sizes = {"state and batch": 900, "gradients": 800, "other": 4, "packing": -8}
    compiler(total_bytes=1696 * 1024, components={k: v * 1024 for k, v in sizes.items()})
    out, _ = planned("--compile")
    read = table(out)["compiled"]
    assert read["less buffers that share memory"] == pytest.approx(-8 * 1024, abs=600)
    assert read["the rest, all small"] == pytest.approx(4 * 1024, abs=600)
    total = read.pop("total")
    assert sum(read.values()) == pytest.approx(total, abs=2000)


def test_a_run_out_of_memory_leaves_the_other_grades(planned, monkeypatch):
    def measure(job):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(memory.measured, "measure_step", measure)
    out, row = planned("--measure")
    assert list(table(out)) == ["predicted"]
    assert row["measured"] is None
    assert "note: --measure: the devices here ran out of memory" in out


def test_nothing_is_compiled_or_run_unless_asked_for(planned, monkeypatch):
    monkeypatch.setattr(compile_for, "compile_for", None)
    monkeypatch.setattr(memory.measured, "measure_step", None)
    out, row = planned()
    assert list(table(out)) == ["predicted"]
    assert row["compiled"] is None
    assert row["measured"] is None


@pytest.mark.parametrize(
    ("target", "keys"),
    [
        ("cpu:8", ()),
        ("gpu:h100:1x8", ("--config.mesh.fsdp=8", "--config.parallel.zero=2")),
        ("tpu:v5e:4x4", ("--config.data.batch_size=64", "--config.optimizer.offload=true")),
    ],
)
def test_the_components_of_a_plan_add_up_to_its_total(planned, target, keys):
    out, row = planned(*keys, target=target)
    grade = row["predicted"]
    assert sum(grade["components"].values()) == grade["total_bytes"]
    assert grade["total_bytes"] - max(grade["phases"].values()) > 0
    assert row["target"] == target
    assert row["fits"] is (grade["total_bytes"] <= row["limit_bytes"])
    shown = table(out)["predicted"]
    total = shown.pop("total")
    assert total == pytest.approx(grade["total_bytes"], abs=0.0005 * 2**20)  # three decimals of MiB
    host = shown.pop("in host memory", 0.0)
    assert host == pytest.approx(grade["host_bytes"], abs=0.0005 * 2**20)
    assert sum(shown.values()) == pytest.approx(total, abs=0.0005 * 2**20 * (len(shown) + 1))


def test_small_sizes_have_digits(command):
    code, out, _ = command("--budget_gib=0.001")
    assert code == 0
    assert "0.000 " not in out
    assert "does not fit: needs 0.0011 of 0.001 GiB" in out
    assert "saves 0.00 GiB" not in out


def test_the_page_is_one_file_that_loads_nothing(command, tmp_path):
    file = tmp_path / "new" / "folder" / "plan.html"
    code, out, err = command(f"--html={file}")
    assert (code, err) == (0, "")
    assert out.endswith(f"written: {file}\n")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]
    page = file.read_text()
    assert "cpu:8" in page
    assert "/*DATA*/" not in page
    loads = r"""(src|href)\s*=\s*["'](?!data:)|@import|url\(|fetch\(|XMLHttpRequest"""
    assert not re.search(loads, page)


def test_a_json_plan_holds_what_would_help(planned):
    _, row = planned("--budget_gib=0.0007")
    out, again = planned("--budget_gib=0.0007")
    assert row == again
    assert not row["fits"]
    assert row["status"] == "does not fit"
    assert row["limit_bytes"] == int(0.0007 * GIB)
    assert row["remedies"]
    assert all(f"  {line}\n" in out for line in row["remedies"])
    assert f"together, the least that fits:\n  {row['together']}\n" in out


# --- The compiler and the devices -----------------------------------------------------------------


def test_where_the_compiler_needs_more_so_does_what_would_help(planned, compiler):
    """Twice the prediction: what saves a third of it is not enough for three quarters of that."""
    total = planned()[1]["predicted"]["total_bytes"]
    compiler(total_bytes=2 * total, components={})
    budget = 1.5 * total
    out, row = planned("--compile", f"--budget_gib={budget / GIB}")
    assert "does not fit: needs" in out
    assert "(compiled)" in out
    assert row["remedies"]
    for line in [*row["remedies"], row["together"]]:
        flags, _, effect = line.partition(": ")
        assert flags, "a change that changes nothing"
        after = planned(*flags.split())[1]["predicted"]["total_bytes"]
        assert effect.endswith("fits") is (2 * after <= budget)


def test_the_compiler_decides_whether_it_fits(planned, compiler):
    total = planned()[1]["predicted"]["total_bytes"]
    compiler(total_bytes=total // 2, components={})
    out, row = planned("--compile", f"--budget_gib={0.75 * total / GIB}")
    assert row["fits"]
    assert row["status"] == "ok"
    assert "\nfits: " in out
    assert "what would help" not in out


def test_that_the_compiler_refused_it_is_an_answer(planned, compiler):
    compiler("does not fit", "Ran out of memory in memory space hbm", total_bytes=8 * GIB)
    out, row = planned("--compile", "--budget_gib=4")
    assert not row["fits"]
    assert "does not fit: needs 8.00 of 4.00 GiB (compiled)" in out
    assert row["error"] == "Ran out of memory in memory space hbm"


def test_a_compiler_that_fails_is_an_error_after_the_plan(refused, compiler, tmp_path):
    compiler("failed", "the compiler died")
    words = ("--compile", "--target=cpu:8 failed: the compiler died")
    out, _ = refused(words, "--compile", f"--json={tmp_path}/plan.json")
    assert "(predicted)" in out
    row = json.loads((tmp_path / "plan.json").read_text())
    assert (row["status"], row["error"]) == ("failed", "the compiler died")
    assert row["predicted"]["total_bytes"] > 0


@pytest.mark.slow
def test_compiling_adds_what_xla_allocates(planned, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sizes = ("data", "fsdp", "tensor")
    out, row = planned("--compile", *(f"--config.mesh.{axis}=2" for axis in sizes))
    compiled = row["compiled"]
    assert row["status"] == compiled["status"] == "ok"
    # The metrics are new arrays, and no component of the peak.
    metrics = compiled["outputs"] - compiled["aliases"]
    assert 0 <= metrics < 2**10
    assert sum(compiled["components"].values()) + metrics == compiled["total_bytes"]
    shown = table(out)["compiled"]
    assert shown["total"] == pytest.approx(compiled["total_bytes"], abs=0.0005 * 2**20)
    assert shown["state and batch"] == pytest.approx(compiled["arguments"], abs=0.0005 * 2**20)
    # Counters and the loss scale are not predicted; the rest of what goes in is exact.
    inward = sum(
        size
        for name, size in row["predicted"]["components"].items()
        if name == "batch" or name.startswith(("weights (", "optimizer"))
    )
    assert 0 <= compiled["arguments"] - inward <= 64
    assert f"of {row['limit_bytes'] / GIB:.2f} GiB (compiled)" in out


@pytest.mark.slow
def test_measuring_runs_the_step_on_the_devices_here(planned):
    out, row = planned("--measure", "--config.mesh.fsdp=4")
    measured, parts = row["measured"], row["predicted"]["components"]
    assert list(table(out)) == ["predicted", "measured"]
    assert measured["total_bytes"] is None  # XLA:CPU's allocator counts nothing
    assert measured["seconds"] > 0
    assert measured["seconds"] * measured["tokens_per_second"] == pytest.approx(8 * 32)
    state = sum(size for name, size in parts.items() if name.startswith(("weights (", "optimizer")))
    assert 0 <= measured["state_bytes"] - state <= 64  # counters and the loss scale
    assert f"step, measured: {measured['seconds'] * 1e3:.1f} ms" in out


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("cpu:4", ("there are 8 x cpu", "leave --measure out", "JAX_NUM_CPU_DEVICES=4")),
        ("gpu:h100:1x8", ("there are 8 x cpu", "leave --measure out")),
        ("tpu:v5e:2x4", ("there are 8 x cpu", "leave --measure out")),
    ],
)
def test_measuring_wants_the_targets_devices(refused, target, words):
    words = (f"--measure: --target={target} is not here", *words)
    out, _ = refused(words, "--measure", target=target)
    assert out == ""


def test_measuring_wants_the_targets_model_of_device(refused, monkeypatch):
    there = [SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")] * 8
    monkeypatch.setattr(jax, "devices", lambda: there)
    words = ("--target=gpu:a100:1x8 is not here", "there are 8 x NVIDIA H100 80GB HBM3")
    refused(words, "--measure", target="gpu:a100:1x8")
    plan.check_here(parse_target("gpu:h100:1x8"))


@pytest.mark.slow
def test_a_terminal_gets_one_line_too():
    flags = [*CONFIG, "--target=cpu:8", "--measure"]
    out, err = finish(start("plan.py", *flags, devices=2), 2)
    assert out == ""
    assert err == (
        "error: --measure: --target=cpu:8 is not here: there are 2 x cpu; leave --measure out, "
        "or set JAX_NUM_CPU_DEVICES=8\n"
    )


# --- What is wrong --------------------------------------------------------------------------------

BAD_TARGETS = {
    "": ("no such platform ''", "targets are"),
    "npu:910b:1x8": ("no such platform 'npu'", "targets are"),
    "gpu": ("gpu wants a model and a shape", "gpu:h100:1x8"),
    "gpu:h1000:1x8": ("no such gpu 'h1000', there are a100, h200, h100, b200",),
    "gpu:v5e:1x8": ("no such gpu 'v5e'",),
    "gpu:h100:0x8": ("'0x8' is not a shape", "hosts x GPUs on each"),
    "gpu:h100:8": ("a shape of GPUs is HOSTSxGPUS, not '8'",),
    "gpu:h100:1x9": ("9 GPUs on a host: 1 to 8 are right",),
    "gpu:h100:1x8x2": ("a shape of GPUs is HOSTSxGPUS, not '1x8x2'",),
    "tpu:v5e:3x5": ("sides of a slice are even, or 1, not '3x5'",),
    "tpu:v5e:4x4x4": ("a slice of v5e has 2 sides of at most 16, not '4x4x4'",),
    "tpu:v5p:4x4": ("a slice of v5p has 3 sides of at most 24, not '4x4'",),
    "tpu:v6e:32x2": ("a slice of v6e has 2 sides of at most 16, not '32x2'",),
    "cpu:0": ("a number of devices follows cpu", "cpu:8"),
    "cpu:8:2": ("a number of devices follows cpu",),
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("target", BAD_TARGETS)
def test_targets_that_do_not_exist(refused, tmp_path, program, target):
    flags = {"plan.py": ["--json"], "sweep.py": ["--out"]}[program]
    words = (f"error: --target={target}: ", *BAD_TARGETS[target])
    refused(words, f"{flags[0]}={tmp_path}/out", program=program, target=target)
    assert not (tmp_path / "out").exists()


# Arguments, and words of the line: the key, its value, what would be right.
BAD_PLANS = {
    "--config.mesh.data=3": ("config.mesh = data 3 needs 3 devices", "there are 8", "axis to -1"),
    "--config.mesh.fsdp=3": ("config.mesh.data = -1", "(fsdp 3)", "product divides 8"),
    "--config.mesh.tensor=8 --config.model.heads=4 --config.model.kv_heads=4": (
        "config.model.heads = 4 does not divide by config.mesh.tensor = 8",
        "choose a multiple of 8",
    ),
    "--config.mesh.tensor=4 --config.model.mlp_dim=66": ("config.model.mlp_dim = 66", "of 4"),
    "--config.mesh.context=2": ("config.mesh.context = 2", "not built yet; only 1 is right"),
    "--config.data.batch_size=12": (
        "config.data.batch_size = 12 does not divide by config.mesh.data = 8",
        "choose a multiple of 8",
    ),
    "--config.train.grad_accumulation=3": ("config.train.grad_accumulation = 3", "multiple of 3"),
    "--config.mesh.dta=2": ("config.mesh.dta: no such key", "did you mean config.mesh.data?"),
    "--config.model.layers=2.5": ("config.model.layers = '2.5'", "a whole number"),
    "--config.model.layers=0": ("config.model.layers = 0: at least 1",),
    "--config.layout=best": ("config.layout = 'best'", "choose one of given, auto"),
    "--config.memory.check=perhaps": ("config.memory.check = 'perhaps'", "refuse, warn, off"),
    "--config.memory.budget_gib=-1": ("config.memory.budget_gib = -1.0", "or 0 for all"),
    "--config.memory.budget_gib=inf": ("config.memory.budget_gib = inf", "a finite number"),
    "--budget_gib=0": ("--budget_gib=0.0: GiB per device, above 0",),
    "--budget_gib=-4": ("--budget_gib=-4.0: GiB per device, above 0",),
    "--budget_gib=nan": ("--budget_gib=nan: GiB per device, above 0",),
    "--budget_gib=inf": ("--budget_gib=inf: GiB per device, above 0",),
    "--budget_gib=12GB": ("--budget_gib: ", "'12GB'"),
    "--compile=true": ("--compile: takes no value; give --compile, or leave it out\n",),
    "--debug=1": ("--debug: takes no value; give --debug, or leave it out\n",),
    "--json": ("--json: expected one argument",),
    "--json=FOLDER": ("--json=FOLDER: a folder; give a file",),
    "--html=FOLDER": ("--html=FOLDER: a folder; give a file",),
    "--json=FOLDER/file/plan.json": ("--json=FOLDER/file/plan.json: ", "give a file that you may"),
    "--html=/proc/plan.html": ("--html=/proc/plan.html: ", "give a file that you may write"),
    "--workdir=FOLDER": ("--workdir: no such flag of plan.py",),
    "--measured": ("--measured: no such flag of plan.py", "did you mean --measure?"),
    "--batch_size=8": ("--batch_size: no such flag", "did you mean --config.data.batch_size?"),
}


@pytest.mark.parametrize("bad", BAD_PLANS)
def test_bad_plans(refused, tmp_path, bad):
    (tmp_path / "file").write_text("mine")
    words = (word.replace("FOLDER", str(tmp_path)) for word in BAD_PLANS[bad])
    refused(words, *bad.replace("FOLDER", str(tmp_path)).split())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_plan_without_target_or_config(capsys):
    for given, words in ((CONFIG, "--target"), (("--target=cpu:8",), "--config: missing")):
        with pytest.raises(SystemExit) as stop:
            cli.run(
                plan.main,
                name="plan.py",
                about="",
                config_from="file",
                flags=plan.FLAGS,
                argv=given,
                needs_workdir=False,
            )
        err = capsys.readouterr().err
        assert stop.value.code == 2
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert words in err


@pytest.mark.parametrize("target", ["cpu:8", "gpu:h100:1x8", "tpu:v5e:2x4"])
def test_a_budget_that_nothing_fits_is_told_the_least_that_would(refused, planned, target):
    words = ("--budget_gib=1e-05: nothing that this planner knows fits", "or more devices")
    out, err = refused(words, "--budget_gib=1e-5", target=target)
    assert "does not fit: needs" in out
    found = re.search(r"the least is ([0-9.e-]+) GiB with (--.*); take that", err)
    assert found is not None
    budget, flags = float(found[1]), found[2].split()
    out, row = planned(*flags, f"--budget_gib={budget}", target=target)
    assert row["fits"]
    assert "\nfits: " in out
    # It is said with five decimals: one less, and it is too little.
    _, err = refused(["nothing that"], *flags, f"--budget_gib={budget - 1e-5:.5f}", target=target)
    assert f"the least is {budget} GiB with this config" in err


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    ("target", "module", "extra"),
    [
        ("tpu:v5e:2x4", "libtpu", "tpu-target"),
        ("gpu:h100:1x8", "jax_plugins.xla_cuda12", "gpu-target"),
    ],
)
def test_a_compiler_that_is_not_installed(
    refused, monkeypatch, tmp_path, program, target, module, extra
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *_: None if name == module else find(name, *_)
    )
    argv, instead = {
        "plan.py": (["--compile"], "leave --compile out"),
        "sweep.py": (
            ["--mode=compile", f"--out={tmp_path}/out", "--grid=config.seed=0"],
            "take --mode=predict",
        ),
    }[program]
    line = (
        f"--target={target}: its compiler is not installed; run pip install -e '.[{extra}]', "
        f"or {instead}\n"
    )
    refused([line], *argv, program=program, target=target)


def test_submitting_wants_submitit(refused, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "submitit", None)  # as where it is not installed
    words = ("--submit=local: submitit is not installed; run pip install -e '.[slurm]'\n",)
    flags = ["--mode=run", "--submit=local", "--grid=config.seed=0", f"--out={tmp_path}/out"]
    refused(words, *flags, program="sweep.py")
    assert not (tmp_path / "out" / "runs").exists()


# What tests/test_sweep.py does not ask.
BAD_SWEEPS = {
    "--submit=pbs": ("--submit: invalid choice: 'pbs'", "slurm", "local"),
    "--top=some": ("--top: 'some' should be a whole number",),
    "--budget_gib=12GB": ("--budget_gib: ", "'12GB'"),
    "--grid=config.mesh.context=2": ("config.mesh.context = 2", "not built yet; only 1 is right"),
    "--grid=config.mesh.data=3": ("config.mesh = data 3 needs 3 devices", "there are 8"),
    "--grid=config.mesh.tensor=8 --config.model.heads=4 --config.model.kv_heads=4": (
        "config.model.heads = 4 does not divide by config.mesh.tensor = 8",
        "choose a multiple of 8",
    ),
    "--grid=config.seed=": ("config.seed = ''", "a whole number"),
    "--grid=config.mesh=1": ("config.mesh = '1': a whole section", "set its keys"),
    "--html=x.html": ("--html: no such flag of sweep.py",),
}


@pytest.mark.parametrize("bad", BAD_SWEEPS)
def test_bad_sweeps(refused, tmp_path, bad):
    refused(BAD_SWEEPS[bad], *bad.split(), f"--out={tmp_path}/out", program="sweep.py")
    assert not (tmp_path / "out").exists()


def test_a_sweep_that_no_layout_divides(refused, tmp_path):
    line = (
        "error: config.data.batch_size = 8 does not divide by data x fsdp = 7; choose a multiple "
        "of 7, or other devices (nor does tensor help: config.model.vocab_size (padded to a "
        "multiple of 128) = 384 does not divide by config.mesh.tensor = 7)\n"
    )
    flag = f"--out={tmp_path}/out"
    assert refused([line], flag, program="sweep.py", target="cpu:7") == ("", line)
    assert not (tmp_path / "out").exists()

    # What is wrong on every mesh is said alone.
    argv = (flag, "--config.optimizer.name=adamx")
    _, err = refused(["config.optimizer.name"], *argv, program="sweep.py", target="cpu:7")
    assert "batch_size" not in err


# --- Evaluation and generation --------------------------------------------------------------------


def test_generation_is_planned_with_what_fits(planned):
    out, row = planned("--mode=generate", "--config.generate.prompt_length=8",
                       "--config.generate.max_new_tokens=8")  # fmt: skip
    assert row["mode"] == "generate"
    assert set(row["predicted"]["phases"]) == {"prefill", "decode"}
    parts = row["predicted"]["components"]
    assert sum(parts.values()) == row["predicted"]["total_bytes"]
    assert parts["KV cache: full layers"] > 0
    assert row["fits"]
    assert row["largest"]["batch_size"] >= 8
    assert "largest batch that fits at this length" in out
    assert "largest length that fits at this batch" in out


def test_evaluation_is_planned(planned):
    out, row = planned("--mode=evaluate")
    assert row["mode"] == "evaluate"
    assert not any(name.startswith("optimizer") for name in row["predicted"]["components"])
    assert "loss" in row["predicted"]["phases"]
    assert "evaluation: " in out


def test_the_mode_reaches_the_compiler(planned, monkeypatch):
    asked = []

    def answer(config, target, *, mode):
        asked.append(mode)
        sizes = {"total_bytes": 2**20, "arguments": 2**19}
        return {"status": "ok", "error": None, "programs": {"prefill": sizes}} | sizes

    monkeypatch.setattr(compile_for, "compile_for", answer)
    short = "--config.generate.prompt_length=8", "--config.generate.max_new_tokens=8"
    out, row = planned("--mode=generate", "--compile", *short)
    assert asked == ["generate"]
    assert row["compiled"]["total_bytes"] == 2**20
    assert "0.00098 compiled" in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--mode=draw",), ("--mode", "draw", "generate")),
        (("--mode=generate", "--measure"), ("--measure", "--mode=generate")),
        (
            ("--mode=generate", "--config.generate.max_new_tokens=100000"),
            ("config.generate.max_new_tokens = 100000", "config.model.max_length"),
        ),
        (
            ("--mode=generate", "--config.mesh.data=4", "--config.mesh.pipe=2"),
            ("config.mesh.pipe = 2",),
        ),
        (
            ("--mode=generate", "--config.generate.batch_size=3"),
            ("config.generate.batch_size = 3", "choose a multiple of 8"),
        ),
        (
            ("--mode=generate", "--budget_gib=0.0001", "--config.generate.max_new_tokens=8"),
            ("--budget_gib=0.0001", "this config needs"),
        ),
    ],
)
def test_a_mode_that_cannot_be_is_one_line(refused, argv, words):
    refused(words, *argv)
