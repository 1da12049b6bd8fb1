"""`python -m compress recipe`: methods and training one after another, each stage a run of its own.

A recipe is a Python file whose `get_config()` returns the stages, `(name, settings)` each: a method
with its flags, or `train` with keys of the config. "{dense}" and "{previous}" in a text stand for
the first run's folder and for the last stage's.

Every stage is a process, so that nothing of it is left in memory.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

import cli
from config_border import has_config, read_config, run_config_file, with_values, write_config
from config_sources import with_run
from config_types import plain
from configs import base

FLAGS = (
    cli.Flag("out", Path, None, "the folder of all stages' runs", required=True),
    cli.Flag("recipe", str, None, "a file such as configs/recipes/small.py", required=True),
    cli.Flag("stage", int, None, "the last stage to make, from 1; default: all"),
)
ROOT = Path(__file__).parent
TRAIN = "train"
RECORD = "recipe.json"  # what was begun, in the folder of all stages


class Stage(NamedTuple):
    """A stage, its number from 1."""

    number: int
    name: str
    settings: dict[str, Any]

    def __str__(self) -> str:
        return f"stage {self.number} ({self.name})"

    def folder(self, out: Path) -> Path:
        return out / f"{self.number}-{self.name}"

    def given(self, dense: Path, previous: Path) -> dict[str, Any]:
        """The settings with the folders that stand in them."""
        words = {"{dense}": str(dense), "{previous}": str(previous)}

        def filled(value: Any) -> Any:
            for word, folder in words.items() if isinstance(value, str) else ():
                value = value.replace(word, folder)
            return value

        return {key: filled(value) for key, value in self.settings.items()}


def main(config: Any, workdir: Path, out: Path, recipe: str, stage: int | None) -> None:
    """Stages, all of them checked; then each that is not there yet."""
    import jax  # no device is touched: each stage wants all of them

    if jax.distributed.is_initialized():
        raise ValueError("--num_processes: a recipe starts its own processes; run it alone")
    stages = read_stages(recipe)
    last = len(stages) if stage is None else stage
    if not 1 <= last <= len(stages):
        raise ValueError(f"--stage={stage}: --recipe={recipe} has stages 1 to {len(stages)}")
    for each in stages:
        check(each, config, workdir, recipe)
    changed = changes(config, workdir)
    begun = read_record(out, workdir, stages, changed, recipe)
    previous = workdir
    for each in stages[:last]:
        folder = each.folder(out)
        if is_finished(each, folder):
            print(f"{each}: {folder} is there", flush=True)
        else:
            refuse_later(stages[each.number :], out, each)
            half = each.name != TRAIN or not has_begun(each, folder)
            if half and len(begun) >= each.number and folder.is_dir():
                shutil.rmtree(folder)  # a kill left it half written, or training failed at once
            begun[each.number - 1 :] = [[each.name, each.settings]]
            write_record(out, workdir, changed, begun)
            print(f"{each}: {folder}", flush=True)
            run(command(each, config, workdir, previous, folder, changed), each)
            if not is_finished(each, folder):
                raise ValueError(f"{each}: stopped; the same command continues")
        previous = folder
    print(json.dumps({"stages": [str(each.folder(out)) for each in stages[:last]]}))


def read_stages(file: str) -> list[Stage]:
    """The stages of a recipe's file.

    Raises:
      ValueError: it returns something else.
    """
    path, _, argument = file.partition(":")
    found = run_config_file(Path(path), [argument] if argument else [], f"--recipe={file}")
    if isinstance(found, ConfigDict):
        found = found.get("stages")
    right = isinstance(found, list | tuple) and all(
        isinstance(one, list | tuple)
        and len(one) == 2
        and isinstance(one[0], str)
        and isinstance(one[1], Mapping | ConfigDict)
        for one in found
    )
    if not right or not found:
        raise ValueError(
            f"--recipe={file}: get_config() should return stages such as "
            f'(("quantize", {{"form": "int4:128"}}),), or a ConfigDict with them as `stages`'
        )
    return [
        Stage(number, name, json.loads(json.dumps(plain_dict(settings))))
        for number, (name, settings) in enumerate(found, 1)
    ]


def plain_dict(settings: Any) -> dict[str, Any]:
    """A stage's settings as JSON has them."""
    return plain(settings) if isinstance(settings, ConfigDict) else dict(settings)


def check(stage: Stage, config: ConfigDict, dense: Path, recipe: str) -> None:
    """Refuses a stage that no command line would take.

    Raises:
      ValueError: no such stage, flag or key, or a value of another type.
    """
    from compress.__main__ import flags_of, methods

    known = methods()
    if stage.name not in (TRAIN, *known):
        raise ValueError(
            f"--recipe={recipe}: {stage}: no such stage; choose {TRAIN}, {', '.join(known)}"
        )
    settings = stage.given(dense, dense)
    try:
        if stage.name == TRAIN:
            with_values(config, {f"config.{key}": value for key, value in settings.items()})
            return
        for key in ("out", "step", "workdir", "debug"):
            if key in settings:
                raise ValueError(f"{key}: the recipe gives it; leave it out")
        arguments = [f"--workdir={dense}", f"--out={dense}", *as_flags(settings)]
        name = f"python -m compress {stage.name}"
        cli.parse(name, "", "workdir", flags_of(stage.name), arguments)
    except ValueError as error:
        raise ValueError(f"--recipe={recipe}: {stage}: {error}") from error


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings as a command line has them; a flag without a value is True."""
    found = []
    for key, value in settings.items():
        if value is True and not key.startswith("config."):
            found.append(f"--{key}")
        elif value is not None and (value is not False or key.startswith("config.")):
            several = isinstance(value, list | tuple) and not key.startswith("config.")
            text = ",".join(map(str, value)) if several else str(value)
            found.append(f"--{key}={text}")
    return found


def changes(config: ConfigDict, dense: Path) -> dict[str, Any]:
    """What the command line overrides in the dense run's config."""
    before, found = plain(read_config(dense)), {}
    for name, value in plain(config).items():
        pairs = value.items() if isinstance(value, dict) else ((None, value),)
        for key, inner in pairs:
            old = before[name] if key is None else before[name][key]
            if inner != old:
                found[f"config.{name}" + (f".{key}" if key else "")] = inner
    return found


def command(
    stage: Stage,
    config: ConfigDict,
    dense: Path,
    previous: Path,
    folder: Path,
    changed: Mapping[str, Any],
) -> list[str]:
    """What makes a stage; the config of one that trains is written for it."""
    settings = stage.given(dense, previous)
    cache = config.data.cache or str(dense / "cache")  # one for all: the texts are the same
    if stage.name == TRAIN:
        if not has_config(folder):
            write_config(folder, training_config(config, previous, settings, cache))
        return [sys.executable, str(ROOT / "train.py"), f"--workdir={folder}"]
    given = as_flags({**changed, "config.data.cache": cache} | settings)
    method = [sys.executable, "-m", "compress", stage.name]
    return [*method, f"--workdir={previous}", f"--out={folder}", *given]


def training_config(
    config: ConfigDict, previous: Path, settings: Mapping[str, Any], cache: str
) -> ConfigDict:
    """The dense run's config with the last stage's model, and what a stage sets.

    Where the dense run itself began, and whom it learnt from, is not repeated.
    """
    fresh = plain(base.get_config())
    values: dict[str, Any] = {f"config.distill.{k}": v for k, v in fresh["distill"].items()}
    values |= {f"config.{name}": fresh[name] for name in ("init_new", "init_drop")}
    own = {f"config.{key}": value for key, value in settings.items()}
    start = own.get("config.adapter.base") or own.get("config.init_from") or str(previous)
    on_base = "config.adapter.base" in own
    values |= {"config.init_from": "" if on_base else start, "config.data.cache": cache}
    return with_values(with_run(with_values(config, values), Path(start), ()), own)


def refuse_later(stages: list[Stage], out: Path, again: Stage) -> None:
    """Refuses to make a stage of which a later one has been made already.

    Raises:
      ValueError: naming the folder.
    """
    for stage in stages:
        if stage.folder(out).exists():
            raise ValueError(
                f"{stage.folder(out)}: was made of another {again}, which is not there; remove it"
            )


def is_finished(stage: Stage, folder: Path) -> bool:
    """Whether all of a stage is there: what is written last."""
    if not has_config(folder):
        return False
    if stage.name != TRAIN:
        return True
    steps = read_config(folder).train.steps
    return (folder / "checkpoints" / str(steps)).is_dir()


def has_begun(stage: Stage, folder: Path) -> bool:
    """Whether there is anything of a stage to keep; else it failed at once, and may be another."""
    if stage.name != TRAIN:
        return folder.exists()
    return any(step.name.isdigit() for step in (folder / "checkpoints").glob("*"))


def read_record(
    out: Path, dense: Path, stages: list[Stage], changed: Mapping[str, Any], recipe: str
) -> list[Any]:
    """The stages that were begun in the folder.

    Raises:
      ValueError: the folder is no recipe's, or one of another run or of other stages.
    """
    file = out / RECORD
    if not file.is_file():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"--out={out}: is there already; give a folder that is not")
        return []
    record = json.loads(file.read_text())
    if record["dense"] != str(dense.absolute()):
        raise ValueError(f"--out={out}: was begun with --workdir={record['dense']}; give that")
    if record["changed"] != json.loads(json.dumps(changed)):
        raise ValueError(
            f"--out={out}: was begun with {' '.join(as_flags(record['changed'])) or 'no'} "
            f"overrides; give the same, or another --out"
        )
    for stage, (name, settings) in zip(stages, record["begun"], strict=False):
        first = Stage(stage.number, name, settings)
        if has_begun(first, first.folder(out)) and (stage.name, stage.settings) != (name, settings):
            raise ValueError(
                f"--recipe={recipe}: {stage} is {stage.settings}, and --out={out} has {name} "
                f"{settings} there; give another --out, or the recipe that it was begun with"
            )
    return list(record["begun"])


def write_record(out: Path, dense: Path, changed: Mapping[str, Any], begun: list[Any]) -> None:
    """In one atomic step."""
    out.mkdir(parents=True, exist_ok=True)
    record = {"dense": str(dense.absolute()), "changed": dict(changed), "begun": begun}
    temporary = out / f"{RECORD}.{os.getpid()}"
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, out / RECORD)


def run(arguments: list[str], stage: Stage) -> None:
    """Runs a process to its end; SIGTERM and Ctrl-C are for it to end well.

    Raises:
      ValueError: it failed; what it said is on stderr.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(arguments, env=os.environ | {"PYTHONPATH": path})
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        code = process.wait()
    except KeyboardInterrupt:  # the terminal has sent it to both
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if code:
        raise ValueError(f"{stage}: failed with exit code {code}; see above")
