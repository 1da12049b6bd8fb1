"""What generate.py asks before it allocates: one line, and a refusal that says what would fit."""

from __future__ import annotations

import pytest

from config_border import load_config, override
from inference_plan import fits_here
from tests.runs import __file__ as SMALL

GENERATE = {"prompt_length": 8, "max_new_tokens": 8, "batch_size": 64}


def asked(**memory: object) -> tuple[list[str], object]:
    """The lines that it prints, and the row."""
    flags = [f"--config.generate.{key}={value}" for key, value in GENERATE.items()]
    flags += ["--config.data.path=none.txt"]  # nothing is read
    flags += [f"--config.memory.{key}={value}" for key, value in memory.items()]
    said: list[str] = []
    row = fits_here(override(load_config(SMALL), flags), 8, 0, said.append)
    return said, row


def test_what_fits_is_one_line():
    (line,), row = asked()
    assert row["fits"]
    assert line.startswith("plan: ")
    assert "64 x 16 tokens" in line


def test_a_cache_that_does_not_fit_is_refused_with_what_would():
    (_,), row = asked(check="off")
    budget = 0.7 * row["predicted"]["total_bytes"] / 2**30
    with pytest.raises(ValueError, match=r"does not fit: needs .*--config\.") as error:
        asked(budget_gib=budget)
    assert "config.memory.check=warn runs it all the same" in str(error.value)
    assert "\n" not in str(error.value)
    said, row = asked(budget_gib=budget, check="warn")
    assert said[1].startswith("warning: does not fit")
    assert not row["fits"]
