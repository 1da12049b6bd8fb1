"""What is installed and pinned agrees with what is there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins(version: str) -> dict[str, str]:
    lines = (ROOT / f"constraints-{version}.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    assert all(len(pair) == 2 for pair in pairs), "a line is not name==version"
    return dict(pairs)


def wanted(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", requirement)[0].lower() for requirement in requirements}


def test_every_module_and_package_is_installed():
    modules = {path.stem for path in ROOT.glob("*.py")}
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert set(PROJECT["tool"]["setuptools"]["py-modules"]) == modules
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages - {"tests"}


@pytest.mark.parametrize("version", ["3.11", "3.12"])
def test_every_requirement_is_pinned(version):
    extras = PROJECT["project"]["optional-dependencies"]
    optional = extras["dev"] + extras["hf"] + extras["tasks"]
    needed = wanted(PROJECT["project"]["dependencies"] + optional)
    assert needed <= set(pins(version))


@pytest.mark.parametrize("version", ["3.11", "3.12"])
def test_the_compiler_for_gpus_is_tested_with_its_jax(version):
    pinned = pins(version)
    for package in ("jaxlib", "jax-cuda12-plugin", "jax-cuda12-pjrt"):
        assert pinned[package] == pinned["jax"]
    assert not [name for name in pinned if name.startswith("nvidia")], "it compiles without them"
    extras = PROJECT["project"]["optional-dependencies"]
    assert [line.partition(";")[0] for line in extras["dev"] if "cuda" in line] == extras[
        "gpu-target"
    ]


def test_hints_install_extras_that_there_are():
    """From this folder, where the commands are run: the package is on no index."""
    extras = {*PROJECT["project"]["optional-dependencies"], "{extra}"}
    found = set()
    for pattern in ("*.py", "*/*.py", "*.md", "*/*.md"):
        for file in ROOT.glob(pattern):
            hints = re.findall(r"pip install(.*?)\[([\w-]+|{extra})\]", file.read_text())
            assert {before[-6:] for before, _ in hints} <= {" -e '."}, file
            found |= {extra for _, extra in hints}
    assert {"gpu-target", "slurm", "wandb", "hf", "{extra}"} <= found <= extras
