"""The config between command line, workdir and code: load, complete, override, keep, compare.

A config file defines `get_config()`, which returns an `ml_collections.ConfigDict`; what it leaves
out has the value in `configs/base.py`, which lists every key there is. Overrides are read by
ml_collections' own flags, but only after the keys were checked here: left alone, those flags end a
misspelt key in a stack trace, take a missing file for an empty config, and read `a,b` as a list of
one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from config_types import did_you_mean, fit, plain, wanted
from configs import base

FILE = "config.json"
NOT_EXPERIMENTS = ("__init__", "base")

# What may differ between a run and its continuation: how long, how often, and where bytes lie. All
# else changes what is learnt, and belongs in a workdir of its own.
FREE_SECTIONS = (
    *("checkpoint", "eval", "generate", "logging", "memory"),
    *("mesh", "parallel", "pipeline", "remat"),
)
FREE_KEYS = (
    "config.adapter.base",  # a fingerprint says which it is
    "config.data.cache",
    "config.data.eval_path",
    "config.data.prefetch_mib",
    "config.distill.teacher",  # a folder that moved: train.py compares what is in it
    "config.distill.teacher_step",
    "config.layout",
    "config.loss.chunk",
    "config.model.attention",
    "config.model.unroll",
    "config.optimizer.offload",
    "config.train.grad_accumulation",
    "config.train.log_every",
    "config.train.max_skipped",
    "config.train.steps",
)


def load_config(where: str) -> ConfigDict:
    """The complete config of `configs/x.py`; `configs/x.py:arg` calls its `get_config("arg")`.

    Raises:
      ValueError: no such file, no `get_config` in it, an error while running it (with its line), a
        key that `configs/base.py` does not have, or a value of another type than there.
    """
    path, _, argument = where.partition(":")
    given = run_config_file(Path(path), [argument] if argument else [], f"--config={where}")
    if not isinstance(given, ConfigDict | dict):
        kind = type(given).__name__
        raise ValueError(f"--config={where}: get_config() should return a ConfigDict, not {kind}")
    return complete(plain(given))


def complete(given: dict[str, Any]) -> ConfigDict:
    """`configs/base.py` with the values of `given`, locked.

    Raises:
      ValueError: a key that is not in the base config, or a value of another type than there.
    """
    config = base.get_config().unlock()
    for name, value in given.items():
        key = f"config.{name}"
        _check_key(config, key)
        if isinstance(config[name], ConfigDict):
            for inner, item in fit(value, dict, key).items():
                _check_key(config, f"{key}.{inner}")
                _set(config, f"{key}.{inner}", item)
        else:
            _set(config, key, value)
    return config.lock()


def override(config: ConfigDict, arguments: Sequence[str]) -> ConfigDict:
    """The config with `--config.SECTION.KEY=VALUE` arguments applied; the last of one key wins.

    Lists are written `a,b` or `('a', 'b')`, mappings `{'a': 1}`; a truth `true`, `false` or
    nothing.

    Raises:
      ValueError: an unknown key, a whole section, a missing value or one of another type.
    """
    config = complete(plain(config))
    for argument in arguments:
        key, _, text = argument.removeprefix("--no").lstrip("-").partition("=")
        _check_key(config, key)
        kind = type(plain(_get(config, key)))
        if kind is dict and key.count(".") == 1:
            some = ", ".join(f"{key}.{inner}" for inner in list(_get(config, key))[:3])
            raise ValueError(f"{key} = {text!r}: a whole section; set its keys, such as {some}")
        if kind is tuple and not text.startswith(("(", "[")):
            argument = f"--{key}={_read_list(text)!r}"
        values = flags.FlagValues()
        try:
            config_flags.DEFINE_config_dict(
                "config", config, flag_values=values, sys_argv=["", argument]
            )
            values(["", argument])
        except (flags.Error, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{key} = {text!r}: should be {wanted(kind)}") from error
        config = values.config
    return complete(plain(config))


def with_values(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """The config with `{"config.section.key": value}` put in.

    Raises:
      ValueError: an unknown key, or a value of another type.
    """
    changed = config.copy_and_resolve_references()
    for key, value in values.items():
        _check_key(changed, key)
        _set(changed, key, value)
    return changed


def write_config(workdir: str | os.PathLike[str], config: ConfigDict) -> None:
    """Makes the workdir and writes its `config.json`, keys sorted, in one atomic step."""
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{FILE}.{os.getpid()}"
    temporary.write_text(json.dumps(plain(config), indent=2, sort_keys=True) + "\n")
    os.replace(temporary, folder / FILE)


def has_config(workdir: str | os.PathLike[str]) -> bool:
    """Whether a run was begun in this workdir."""
    return (Path(workdir) / FILE).is_file()


def is_run(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is a workdir with checkpoints, and none of a checkpoint of others."""
    return (Path(folder) / "checkpoints").is_dir()


def read_config(workdir: str | os.PathLike[str], key: str = "--workdir") -> ConfigDict:
    """The config that `write_config` left; keys that are newer than it have their default.

    Raises:
      ValueError: there is none, or it is not JSON, or not a config of this code.
    """
    file = Path(workdir) / FILE
    if not file.is_file():
        raise ValueError(f"{key}={workdir}: no {FILE} in it; give a folder that train.py wrote")
    try:
        given = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(
            f"{file}: damaged, not JSON ({error}); remove it and give train.py --config"
        ) from error
    if not isinstance(given, dict):
        raise ValueError(f"{file}: should hold a JSON object; remove it and give train.py --config")
    return complete(given)


def check_same_run(old: ConfigDict, new: ConfigDict) -> None:
    """Refuses to continue a run with a config that would learn something else.

    The mesh, the layout, the number of steps and what is logged, saved and evaluated may change
    (`FREE_SECTIONS`, `FREE_KEYS`); model, data, optimizer, precision and seed may not.

    Raises:
      ValueError: naming the first key that differs, and both values.
    """
    before = dict(_values(old))
    for key, value in _values(new):
        free = key in FREE_KEYS or key.split(".")[1] in FREE_SECTIONS
        if key == "config.distill.teacher":
            free = bool(value) == bool(before[key])  # with one or without: that is learnt
        if not free and value != before[key]:
            raise ValueError(
                f"{key} = {value!r}: this workdir's run has {before[key]!r}; give that value, "
                f"or another --workdir for a new run"
            )


def keys_named(name: str) -> list[str]:
    """All keys `config.section.name`."""
    return [key for key, _ in _values(base.get_config()) if key.endswith(f".{name}")]


def run_config_file(file: Path, arguments: list[str], shown: str) -> Any:
    """What a file's `get_config(*arguments)` returns; its errors become one line with the place."""
    if not file.is_file():
        near = [str(p) for p in sorted(file.parent.glob("*.py")) if _is_experiment(p)]
        end = did_you_mean(str(file), near, only_close=True) or "; give one such as configs/tiny.py"
        raise ValueError(f"{shown}: {'a folder' if file.is_dir() else 'no such file'}{end}")
    spec = importlib.util.spec_from_file_location("experiment", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{shown}: not a Python file; give one such as configs/tiny.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if hasattr(module, "get_config"):
            return module.get_config(*arguments)
    except SyntaxError as error:
        raise ValueError(f"{shown}: {error.filename}, line {error.lineno}: {error.msg}") from error
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == module.__file__]
        place = f"{file}, line {lines[-1]}" if lines else str(file)
        raise ValueError(f"{shown}: {place}: {type(error).__name__}: {error}") from error
    raise ValueError(f"{shown}: {file} defines no get_config(); it returns the experiment's config")


def _is_experiment(file: Path) -> bool:
    return file.stem not in NOT_EXPERIMENTS and b"def get_config" in file.read_bytes()


def _check_key(config: ConfigDict, key: str) -> None:
    """Refuses a dotted key that the config does not have, with the likeliest one that it has."""
    value: Any = config
    for name in key.split(".")[1:]:
        if not isinstance(value, ConfigDict) or name not in value:
            known = [known for known, _ in _values(config)]
            same_name = [k for k in known if k.endswith(f".{name}")]
            end = f"; did you mean {same_name[0]}?" if same_name else did_you_mean(key, known)
            raise ValueError(f"{key}: no such key{end}")
        value = value[name]


def _values(config: ConfigDict) -> Iterator[tuple[str, Any]]:
    """All `("config.section.key", value)`; a mapping such as `parallel.rules` is one value."""
    for name, section in config.items():
        if isinstance(section, ConfigDict):
            yield from ((f"config.{name}.{key}", plain(value)) for key, value in section.items())
        else:
            yield f"config.{name}", plain(section)


def _get(config: ConfigDict, key: str) -> Any:
    value: Any = config
    for name in key.split(".")[1:]:
        value = value[name]
    return value


def _set(config: ConfigDict, key: str, value: Any) -> None:
    """Sets a key to a value of the type it has; a mapping is replaced, not merged."""
    section = _get(config, key.rpartition(".")[0])
    name = key.rpartition(".")[2]
    value = fit(value, type(plain(section[name])), key)
    with section.unlocked():
        section[name] = ConfigDict(value) if isinstance(value, dict) else value


def _read_list(text: str) -> tuple[Any, ...]:
    """`a,b` as ("a", "b") and `128,256` as (128, 256)."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return tuple(int(part) if part.isdecimal() else part for part in parts)
