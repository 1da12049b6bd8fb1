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
    needed = wanted(PROJECT["project"]["dependencies"] + extras["dev"] + extras["hf"])
    assert needed <= set(pins(version))
