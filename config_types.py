"""From untyped config sections to the frozen dataclasses that the code uses, checking every key."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict

T = TypeVar("T")

WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    tuple: "a list such as ('a', 'b')",
    dict: "a mapping such as {'a': 1}",
    types.NoneType: "none",
}


def build(cls: type[T], section: Mapping[str, Any] | ConfigDict, name: str) -> T:
    """The dataclass `cls` made from a config section, e.g. `build(MeshConfig, config.mesh,
    "config.mesh")`.

    Whole numbers are taken where a float is wanted, lists become tuples, nested mappings dicts.
    A key that the section lacks takes the dataclass's default.

    Raises:
      ValueError: naming the key, its value and what would be right: a key that `cls` does not have,
        one that it wants and the section lacks, a value of another type, or whatever `cls` itself
        refuses.
    """
    assert dataclasses.is_dataclass(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    hints = typing.get_type_hints(cls)
    given = dict(section.items())
    for key in given:
        if key not in fields:
            raise ValueError(f"{name}.{key}: no such key{did_you_mean(key, fields, name)}")
    for key, field in fields.items():
        if (
            key not in given
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ):
            raise ValueError(f"{name}.{key}: missing; give it {wanted(hints[key])}")
    return typing.cast(
        T, cls(**{key: fit(value, hints[key], f"{name}.{key}") for key, value in given.items()})
    )


def fit(value: Any, hint: Any, key: str) -> Any:
    """The value as the type of a hint: int, float, bool, str, tuple, mapping, Literal, or unions of
    them.

    Raises:
      ValueError: it is of another type; the message starts with `key`.
    """
    wrong = ValueError(f"{key} = {plain(value)!r}: should be {wanted(hint)}")
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (Any, object):
        return plain(value)
    if origin in (typing.Union, types.UnionType):
        for arg in args:
            try:
                return fit(value, arg, key)
            except ValueError:
                continue
        raise wrong
    if origin is typing.Literal:
        if value in args:
            return value
        raise ValueError(f"{wrong}{did_you_mean(str(value), map(str, args), only_close=True)}")
    if dataclasses.is_dataclass(origin) and isinstance(value, typing.cast(type, origin)):
        return value
    if dataclasses.is_dataclass(origin) and isinstance(value, Mapping | ConfigDict):
        return build(typing.cast(type, origin), value, key)
    if origin is float and type(value) in (int, float):
        if not abs(value) < math.inf:  # NaN too: it passes every check of a range
            raise ValueError(f"{key} = {value}: should be a finite number")
        return float(value)
    if origin in (bool, int, float, str, types.NoneType) and type(value) is origin:
        return value
    if origin in (tuple, list) or _is_sequence(origin):
        if not isinstance(value, tuple | list):
            raise wrong
        if args and origin is tuple and args[-1] is not Ellipsis:
            if len(args) != len(value):
                raise wrong
            return tuple(
                fit(v, arg, f"{key}[{i}]")
                for i, (v, arg) in enumerate(zip(value, args, strict=True))
            )
        return tuple(fit(v, args[0] if args else Any, f"{key}[{i}]") for i, v in enumerate(value))
    if origin is dict or _is_mapping(origin):
        if not isinstance(value, Mapping | ConfigDict):
            raise wrong
        return {k: fit(v, args[1] if args else Any, f"{key}.{k}") for k, v in value.items()}
    raise wrong


def plain(value: Any) -> Any:
    """The value with ConfigDicts as dicts and lists as tuples, all the way down."""
    if isinstance(value, Mapping | ConfigDict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(plain(item) for item in value)
    return value


def wanted(hint: Any) -> str:
    """In words, what a hint accepts."""
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(wanted(arg) for arg in args)
    if origin is typing.Literal:
        return "one of " + ", ".join(repr(arg) for arg in args)
    if _is_mapping(origin):
        return WORDS[dict]
    return WORDS[tuple] if _is_sequence(origin) else WORDS.get(origin, str(hint))


def did_you_mean(
    name: str, names: Iterable[str], prefix: str = "", *, only_close: bool = False
) -> str:
    """The end of a message about an unknown name: the closest known one, else all of them."""
    names = list(names)
    dot = f"{prefix}." if prefix else ""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {dot}{close[0]}?"
    return "" if only_close else f"; there are {', '.join(names)}"


def _is_mapping(origin: Any) -> bool:
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _is_sequence(origin: Any) -> bool:
    return isinstance(origin, type) and issubclass(origin, typing.Sequence) and origin is not str
