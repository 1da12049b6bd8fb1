"""Flags of a method that only another choice reads."""

from __future__ import annotations

from typing import Any


def refuse_idle(how: Any, flag: str, chooser: str, choice: str) -> None:
    """Refuses a flag that was given and does nothing.

    Args:
      how: a dataclass of flags.
      flag: which is as it is by itself unless it was given.
      chooser: the flag that decides whether it is read, ...
      choice: ... and the value with which it is.

    Raises:
      ValueError: naming both.
    """
    value, chosen = getattr(how, flag), getattr(how, chooser)
    if chosen != choice and value != getattr(type(how), flag):
        raise ValueError(
            f"--{flag}={value}: has no effect with --{chooser}={chosen}; it is of {choice}"
        )
