"""A config.json key by key: what is asked for, what is refused, what was never looked at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LONGEST = 120  # characters of a value in a message


class Keys:
    """The keys of a config.json, or of a mapping in it.

    Args:
      values: the mapping.
      where: names it in messages, such as `config.init_from = 'gpt2': config.json`.
      prefix: of nested keys, such as `rope_scaling.`.

    Attributes:
      seen: keys that were asked for: what they say is in the model's config. The others (ids of
        special tokens, settings of generation) are carried along by an export.
    """

    def __init__(self, values: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self.values, self.where, self.prefix = values, where, prefix
        self.seen: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """A value; `default` where it is absent or null."""
        self.seen.add(name)
        value = self.values.get(name)
        return default if value is None else value

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 1.

        Raises:
          ValueError: it is something else, or absent without a default.
        """
        value = self.get(name, default)
        if value is None:
            raise self.refused(name, "is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refused(name, "should be a whole number of at least 1")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number.

        Raises:
          ValueError: it is something else, or absent without a default.
        """
        value = self.get(name, default)
        if value is None:
            raise self.refused(name, "is missing")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refused(name, "should be a number")
        return float(value)

    def truth(self, name: str, default: bool) -> bool:
        """True or false.

        Raises:
          ValueError: it is something else.
        """
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.refused(name, "should be true or false")
        return value

    def choice(self, name: str, choices: Mapping[str, str], default: str | None = None) -> str:
        """Our word for theirs.

        Raises:
          ValueError: a word that `choices` does not have.
        """
        value = self.get(name, default)
        if not isinstance(value, str) or value not in choices:
            raise self.refused(name, f"not computed here; there is {', '.join(choices)}")
        return choices[value]

    def only(self, name: str, *allowed: Any) -> None:
        """Refuses what is not computed here; absent and null are always allowed.

        Raises:
          ValueError: another value than those.
        """
        value = self.get(name)
        if value is not None and value not in allowed:
            words = " or ".join(repr(one) for one in allowed) or "null"
            raise self.refused(name, f"not computed here; only {words} is")

    def inside(self, name: str) -> Keys | None:
        """The keys of a mapping in it, None where it is absent or null.

        Raises:
          ValueError: it is not a mapping.
        """
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.refused(name, "should be a mapping")
        return Keys(value, self.where, f"{self.prefix}{name}.")

    def refused(self, name: str, why: str) -> ValueError:
        """The error about one key."""
        value = repr(self.values.get(name))
        if len(value) > LONGEST:
            value = f"{value[:LONGEST]} ..."
        return ValueError(f"{self.where}: {self.prefix}{name} = {value}: {why}")
