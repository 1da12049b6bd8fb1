"""The two commands at the top of the README do what it says, in a copy without anything built."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILT = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()] + [".git"]
STAMPS = ("installed", "installed-dev")  # left by the Makefile in an environment that is complete


def readme_commands() -> list[str]:
    """The `make` lines of the README's first bash block, without comments."""
    block = re.search(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert block is not None
    lines = [line.partition("#")[0].strip() for line in block[1].splitlines()]
    return [line for line in lines if line.startswith("make ")]


def shell(command: str, folder: Path, **run) -> subprocess.CompletedProcess[str]:
    """Runs a command as a user would: without the settings of this test session."""
    ours = ("JAX_", "XLA_", "PYTEST_", "MAKE", "MFLAGS", "TF_CPP_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return subprocess.run(
        command, shell=True, cwd=folder, env=env, capture_output=True, text=True, timeout=600, **run
    )


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("readme") / "clone"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*BUILT))
    return folder


@pytest.fixture(scope="module")
def variables(clone) -> str:
    """Of make. An environment that `make test` completed is used again: to get here it was built
    by the very commands under test. Any other is left alone, and the commands build theirs.
    """
    stamps = " ".join(f"{sys.prefix}/{stamp}" for stamp in STAMPS)
    complete = shell(f"make --question VENV={sys.prefix} {stamps}", clone).returncode == 0
    return f"VENV={sys.prefix}" if complete else f"PYTHON={sys.executable}"


def test_the_readme_starts_with_the_two_commands():
    assert readme_commands() == ["make quickstart", "make test"]


@pytest.mark.slow
def test_quickstart_trains_and_tells_the_next_command(clone, variables):
    done = shell(f"{readme_commands()[0]} STEPS=5 {variables}", clone)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    metrics = (clone / "runs/tiny/metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[0])["step"] == 1
    assert json.loads(metrics[-1])["step"] == 5

    next_command = done.stdout.rstrip().splitlines()[-1]
    assert "evaluate.py --workdir=runs/tiny" in next_command
    done = shell(next_command, clone)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert {"step", "loss", "perplexity", "bits_per_byte"} <= set(
        json.loads(done.stdout.splitlines()[-1])
    )


@pytest.mark.slow
def test_make_test_passes_tests(clone, variables):
    done = shell(f"{readme_commands()[1]} TESTS=tests/test_imports.py {variables}", clone)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout)


def test_the_map_names_every_file():
    rooms = ["parallel", "models", "data", "training", "generation", "memory", "hf", "harness"]
    rooms += ["compress", "configs", "benchmarks"]
    files = [*ROOT.glob("*.py"), *(f for room in rooms for f in (ROOT / room).glob("*.py"))]
    names = {str(f.relative_to(ROOT)) for f in files if f.name != "__init__.py"}
    mapped = re.findall(r"^\| `(\S+\.py)` \|", (ROOT / "README.md").read_text(), re.M)
    assert sorted(mapped) == sorted(names)
