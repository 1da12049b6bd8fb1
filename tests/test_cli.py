"""The border: what is mistyped ends in one line that names it, good flags reach the code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cli
import config_border as border
import parallel.distributed
from config_types import plain
from configs import base

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "configs" / "tiny.py")


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """`command("--config=...")` runs a main that only listens: (exit code, stderr, what it got)."""
    monkeypatch.chdir(tmp_path)
    started: list[tuple] = []
    monkeypatch.setattr(parallel.distributed, "start", lambda *args: started.append(args))

    def call(*arguments, config_from="file", main=None, flags=()):
        got: dict[str, Any] = {}

        def remember(config, workdir, **others):
            got.update(config=config, workdir=workdir, started=started, **others)

        with pytest.raises(SystemExit) as stop:
            cli.run(
                main or remember,
                name="train.py" if config_from == "file" else "evaluate.py",
                about="A test.",
                config_from=config_from,
                flags=flags,
                argv=arguments,
            )
        return stop.value.code, capsys.readouterr().err, got

    return call


@pytest.fixture
def workdir(tmp_path):
    """A workdir with the tiny config in it."""
    border.write_config(tmp_path / "run", border.load_config(TINY))
    return tmp_path / "run"


def config_file(folder: Path, text: str) -> str:
    (folder / "mine.py").write_text(text)
    return "mine.py"


def test_overrides_reach_main(command):
    code, err, got = command(
        f"--config={TINY}",
        "--workdir=runs/x",
        "--config.mesh.data=2",
        "--config.train.steps",
        "10",
        "--config.optimizer.learning_rate=1",
        "--config.parallel.sequence",
        "--noconfig.logging.tensorboard",
        "--config.remat.save=query,key",
        "--config.data.buckets=64,128",
        "--config.parallel.rules={'embed': ['fsdp']}",
        "--config.data.path=two words",
        "--config.mesh.fsdp",
        "-1",
    )
    assert (code, err) == (0, "")
    config = got["config"]
    assert got["workdir"] == Path("runs/x")
    assert (config.mesh.data, config.mesh.fsdp, config.train.steps) == (2, -1, 10)
    assert config.optimizer.learning_rate == 1.0
    assert type(config.optimizer.learning_rate) is float
    assert config.parallel.sequence is True
    assert config.logging.tensorboard is False
    assert plain(config.remat.save) == ("query", "key")
    assert plain(config.data.buckets) == (64, 128)
    assert plain(config.parallel.rules) == {"embed": ("fsdp",)}
    assert config.data.path == "two words"
    assert config.model.layers == border.load_config(TINY).model.layers


def test_flags_of_several_processes_and_of_the_command(command):
    step = cli.Flag("step", int, None, "which step")
    code, _, got = command(
        f"--config={TINY}",
        "--workdir=w",
        "--step=3",
        "--coordinator=host:1",
        "--num_processes=2",
        "--process_id=1",
        flags=[step],
    )
    assert code == 0
    assert got["step"] == 3
    assert got["started"] == [("host:1", 2, 1)]


# What is wrong, after --workdir=w --config=configs/tiny.py -> words of the one line.
BAD_FLAGS = {
    "--config.mesh.dta=2": ("config.mesh.dta: no such key", "did you mean config.mesh.data?"),
    "--config.msh.data=2": ("config.msh.data: no such key", "did you mean config.mesh.data?"),
    "--config.train.batch_size=8": ("config.train.batch_size", "config.data.batch_size?"),
    "--config.mesh.data.x=2": ("config.mesh.data.x: no such key",),
    "--config.mesh.data=two": ("config.mesh.data = 'two'", "a whole number"),
    "--config.mesh.data=1.5": ("config.mesh.data = '1.5'", "a whole number"),
    "--config.mesh.data": ("config.mesh.data = ''", "a whole number"),
    "--config.optimizer.learning_rate=fast": ("learning_rate = 'fast'", "should be a number"),
    "--config.model.tied=maybe": ("config.model.tied = 'maybe'", "true or false"),
    "--config.parallel.rules=3": ("config.parallel.rules = '3'", "a mapping"),
    "--config.mesh=2": ("config.mesh = '2'", "a whole section", "config.mesh.data"),
    "--config.=2": ("config.: no such key",),
    "--wrkdir=x": ("--wrkdir: no such flag of train.py", "did you mean --workdir?"),
    "--quux": ("--quux: no such flag of train.py", "--help"),
    "configs/tiny.py": ("did you mean --config=configs/tiny.py?",),
    "--num_processes=two": ("--num_processes: 'two'", "a whole number"),
    "--workdir": ("--workdir", "expected one argument"),
}


@pytest.mark.parametrize("bad", BAD_FLAGS)
def test_a_bad_flag_is_one_line(command, bad):
    code, err, got = command("--workdir=w", f"--config={TINY}", bad)
    assert (code, got) == (2, {})
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for words in BAD_FLAGS[bad]:
        assert words in err


# Contents of a config file -> words of the one line.
BAD_FILES = {
    "x = 1": ("mine.py defines no get_config()",),
    "def get_config(:": ("mine.py, line 1",),
    "\nimport no_such_module": ("mine.py, line 2: ModuleNotFoundError", "no_such_module"),
    "def get_config():\n    return 1 / 0": ("mine.py, line 2: ZeroDivisionError",),
    "def get_config(): pass": ("should return a ConfigDict, not NoneType",),
    "def get_config(which): pass": ("mine.py", "which"),
    "def get_config(): return {'sed': 1}": ("config.sed: no such key", "config.seed?"),
    "def get_config(): return {'mesh': {'dta': 1}}": ("config.mesh.dta", "config.mesh.data?"),
    "def get_config(): return {'mesh': 8}": ("config.mesh = 8: should be a mapping",),
    "def get_config(): return {'seed': 'a'}": ("config.seed = 'a': should be a whole number",),
    "def get_config(): return {'model': {'tied': 1}}": ("config.model.tied = 1", "true or"),
    "from configs import base\nc = base.get_config()\nc.model.layrs = 2": ("line 3", "layrs"),
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_bad_config_file_is_one_line(command, tmp_path, text):
    code, err, got = command("--workdir=w", f"--config={config_file(tmp_path, text)}")
    assert (code, got) == (2, {})
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for words in BAD_FILES[text]:
        assert words in err


@pytest.mark.parametrize(
    ("where", "words"),
    [("none.py", "--config=none.py: no such file; give one"), ("min.py", "did you mean mine.py?")],
)
def test_a_missing_config_file_is_one_line(command, tmp_path, where, words):
    if where == "min.py":
        config_file(tmp_path, "def get_config(): pass")
    code, err, _ = command("--workdir=w", f"--config={where}")
    assert code == 2
    assert words in err
    assert err.count("\n") == 1


def test_a_config_file_with_an_argument(command, tmp_path):
    file = config_file(
        tmp_path,
        "def get_config(n='1'): return {'train': {'steps': int(n)}, 'remat': {'save': ['a']}}",
    )
    assert command("--workdir=w", f"--config={file}:7")[2]["config"].train.steps == 7
    config = command("--workdir=w", f"--config={file}")[2]["config"]
    assert config.train.steps == 1
    assert config.remat.save == ("a",)
    assert config.mesh == base.get_config().mesh


def test_without_config_a_run_continues_with_its_own(command, workdir):
    code, err, got = command(f"--workdir={workdir}", "--config.mesh.data=2")
    assert (code, err) == (0, "")
    assert got["config"].mesh.data == 2
    assert got["config"].model.layers == border.load_config(TINY).model.layers


def test_without_config_a_new_workdir_is_refused(command):
    code, err, _ = command("--workdir=w", "--config.mesh.data=2")
    assert code == 2
    assert "--config: missing" in err
    assert err.count("\n") == 1


def test_evaluate_overrides_the_config_of_the_workdir(command, workdir):
    code, _, got = command(f"--workdir={workdir}", "--config.mesh.fsdp=4", config_from="workdir")
    assert code == 0
    assert got["config"].mesh.fsdp == 4
    code, err, _ = command(f"--workdir={workdir}", "--config.mesh.fdsp=4", config_from="workdir")
    assert code == 2
    assert "did you mean config.mesh.fsdp?" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workdir=none"], "no config.json in it"),
        (["--workdir=file"], "--workdir=file: a file"),
        (["--workdir=damaged"], "config.json: damaged, not JSON"),
        (["--workdir=number"], "should hold a JSON object"),
        (["--workdir=run", f"--config={TINY}"], "evaluate.py takes the config from --workdir"),
        ([], "--workdir"),
    ],
)
def test_a_bad_workdir_is_one_line(command, workdir, tmp_path, arguments, words):
    (tmp_path / "file").write_text("")
    for name, text in (("damaged", '{"seed": '), ("number", "3")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    code, err, got = command(*arguments, config_from="workdir")
    assert (code, got) == (2, {})
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("config.a = 1: wrong"), 2, "error: config.a = 1: wrong\n"),
        (FileNotFoundError(2, "No such file", "x"), 2, "error: [Errno 2] No such file: 'x'\n"),
        (ValueError("first\nsecond"), 2, "error: first (more with --debug)\n"),
        (
            KeyError("k"),
            1,
            "error: (internal) KeyError: 'k'; run again with --debug for the stack\n",
        ),
        (
            KeyboardInterrupt(),
            130,
            "interrupted; the same command continues from the last checkpoint\n",
        ),
    ],
)
def test_errors_of_main_are_one_line(command, error, code, line):
    def main(config, workdir):
        raise error

    assert command(f"--config={TINY}", "--workdir=w", main=main)[:2] == (code, line)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([f"--config={TINY}", "--goal=a", "--goal=b", "--config.seed=3"], "3 ['a', 'b']"),
        (["--goal=a"], "error: --config: missing; give --config=configs/tiny.py"),
        ([f"--config={TINY}"], "error: the following arguments are required: --goal"),
        ([f"--config={TINY}", "--goal=a", "--workdir=w"], "error: --workdir: no such flag"),
    ],
)
def test_a_program_that_is_no_run_takes_no_workdir(monkeypatch, capsys, argv, line):
    def main(config, goal):
        print(config.seed, goal)

    def start(*_):
        raise AssertionError("it joins no other processes")

    monkeypatch.setattr(parallel.distributed, "start", start)
    goal = cli.Flag("goal", str, None, "one of several", several=True, required=True)
    with pytest.raises(SystemExit) as stop:
        cli.run(
            main,
            name="sweep.py",
            about="",
            config_from="file",
            flags=[goal],
            argv=argv,
            needs_workdir=False,
        )
    out, err = capsys.readouterr()
    assert (out + err).startswith(line)
    assert len((out + err).splitlines()) == 1
    assert stop.value.code == (2 if err else 0)


def test_debug_shows_the_stack(command):
    def main(config, workdir):
        raise KeyError("k")

    code, err, _ = command(f"--config={TINY}", "--workdir=w", "--debug", main=main)
    assert code == 1
    assert "Traceback" in err
    assert err.endswith("error: (internal) KeyError: 'k'\n")


@pytest.mark.parametrize(
    ("devices", "said"), [(["null", "tty"], ""), (["nvidiactl"], "extension\nplug-in\n")]
)
def test_without_a_gpu_its_plugin_is_not_loaded(tmp_path, devices, said):
    """A plug-in in the real one's place: JAX finds it, and would call it."""
    for name, text in (
        ("jax_cuda12_plugin", "print('extension', file=sys.stderr)"),
        ("jax_plugins/xla_cuda12", "def initialize(): print('plug-in', file=sys.stderr)"),
    ):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "__init__.py").write_text(f"import sys\n{text}\n")
    program = (
        "import os, cli\n"
        "from parallel.targets import parse_target\n"
        "listdir = os.listdir\n"
        f"os.listdir = lambda folder: {devices} if folder == '/dev' else listdir(folder)\n"
        "def main(config):\n"
        "    import jax\n"
        "    parse_target('gpu:h100:1x8').check_compiler()\n"
        "    print(jax.devices()[0].platform)\n"
        "cli.run(main, name='plan.py', about='', config_from='file', needs_workdir=False)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, f"--config={TINY}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "cpu\n", done.stderr
    assert done.stderr == said


def test_a_bad_flag_is_found_before_jax_is_imported(tmp_path):
    program = (
        "import sys, cli\n"
        "try:\n"
        "    cli.run(print, name='train.py', about='', config_from='file')\n"
        "finally:\n"
        "    print([m for m in ('jax', 'flax', 'orbax') if m in sys.modules])\n"
    )
    flags = ["--workdir=w", f"--config={TINY}", "--config.mesh.data=two"]
    done = subprocess.run(
        [sys.executable, "-c", program, *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stdout == "[]\n"
    assert done.stderr == "error: config.mesh.data = 'two': should be a whole number\n"
