"""Flags that several methods of `python -m compress` have."""

from __future__ import annotations

import cli

ONLY = cli.Flag("only", str, "stack/*", "a pattern of the matrices' names; the others stay")
TEXT = (
    cli.Flag("rows", int, 64, "rows of the run's training text to calibrate on"),
    cli.Flag("seed", int, 0, "which rows those are"),
)
