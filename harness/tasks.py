"""Tasks by name, of a folder of one's own or of lm-eval, checked before a model is read.

A task file is lm-eval's (its docs/task_guide.md). What is added here: paths of local data are taken
from the file's own folder, a file that is no YAML is an error rather than passed over, and nothing
is asked of the network unless HF_HUB_OFFLINE and HF_DATASETS_OFFLINE say 0.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
LOCAL = ("json", "csv", "text", "parquet", "arrow")  # values of dataset_path that read files


def load_tasks(names: Sequence[str], folder: Path | None, *, generates: bool) -> dict[str, Any]:
    """What `lm_eval.evaluator.evaluate` takes.

    Args:
      names: of tasks, groups and tags, or patterns of them such as `mmlu_*`.
      folder: with task files, under it at any depth; theirs go before lm-eval's.
      generates: whether text can be generated.

    Raises:
      ValueError: naming the flag and the file: no lm-eval, no such folder or task, a task file or
        its data that cannot be read, a task that is not run here.
    """
    if not names or not all(names):
        raise ValueError(f"--tasks={','.join(names)}: give names with a comma between them")
    _prepare()
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--tasks: {str(error.name).partition('.')[0]} is not installed; "
            f"run pip install -e '.[tasks]'"
        ) from error

    manager = None
    if folder is not None:
        _check_folder(folder)
        manager = TaskManager(include_path=str(folder), include_defaults=False)
    if manager is None or not _complete(manager, names):
        # Read only where they are wanted: there are 13,000 files, which takes 20 s.
        manager = TaskManager(include_path=None if folder is None else str(folder))
    found: list[str] = []
    for name in names:
        matches = manager.match_tasks([name])
        if not matches:
            raise ValueError(_unknown(name, folder, manager.all_tasks))
        found += matches
    files = {} if folder is None else _localize(manager.task_index, found, folder)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name in dict.fromkeys(found):
        for kind, items in _load(manager, name, files.get(name)).items():
            loaded[kind] |= items
    for name, task in loaded["tasks"].items():
        _check_task(name, task, generates)
    return loaded


def _prepare() -> None:
    """Settings that libraries read when they are imported; the user's own stay."""
    for name in OFFLINE:
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # Its bootstrap would fork this process, whose threads JAX has started.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what it says is raised, too


def _check_folder(folder: Path) -> None:
    """Reads every task file: lm-eval would pass over those that it cannot read."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if not folder.is_dir():
        raise ValueError(f"--task_folder={folder}: no such folder; give one with task files")
    files = sorted(folder.glob("**/*.yaml"))
    if not files:
        raise ValueError(f"--task_folder={folder}: no *.yaml in it; give a folder with task files")
    for file in files:
        try:
            load_yaml(file, resolve_func=False)
        except Exception as error:  # YAML's, an include that is missing, not a mapping
            what = " ".join(str(error).split())
            raise ValueError(f"--task_folder={folder}: {file} cannot be read: {what}") from error


def _members(entry: Any) -> list[str]:
    """The names that a group or a tag stands for; none of a task.

    What a group has that is no name is a mapping with one, as `task` or `group`.
    """
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    listed = (entry.cfg or {}).get("task") if entry.kind.name == "GROUP" else None
    if not isinstance(listed, list):
        return []
    names = [i if isinstance(i, str) else i.get("task", i.get("group")) for i in listed]
    return [name for name in names if isinstance(name, str)]


def _reached(index: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    """These names and those that they stand for, each once, whether or not they are there."""
    left, seen = list(names), set()
    while left:
        name = left.pop()
        if name in seen:
            continue
        seen.add(name)
        yield name
        if name in index:
            left += _members(index[name])


def _complete(manager: Any, names: Sequence[str]) -> bool:
    """Whether the folder alone has all that is asked for."""
    found = [match for name in names for match in manager.match_tasks([name])]
    return all(manager.match_tasks([name]) for name in names) and all(
        name in manager.task_index for name in _reached(manager.task_index, found)
    )


def _unknown(name: str, folder: Path | None, known: Sequence[str]) -> str:
    where = "lm-eval has none of that name" + (
        f", nor has --task_folder={folder}" if folder is not None else ""
    )
    close = difflib.get_close_matches(name, known, n=1)
    more = "give --task_folder=DIR for tasks of your own" if folder is None else "give another"
    return f"--tasks={name}: {where}; {f'did you mean {close[0]}?' if close else more}"


def _localize(index: dict[str, Any], names: Sequence[str], folder: Path) -> dict[str, Path]:
    """Puts the whole path of local data into the tasks of the folder; their files."""
    from lm_eval.tasks._yaml_loader import load_yaml

    found: dict[str, Path] = {}
    for name in [name for name in _reached(index, names) if name in index]:
        entry = index[name]
        file = entry.yaml_path
        if file is None or entry.kind.name != "TASK" or not file.is_relative_to(folder):
            continue
        try:
            config = load_yaml(file)  # this time with the functions that it names
        except Exception as error:
            raise ValueError(f"--tasks={name}: {file}: {_words(error)}") from error
        how = config.get("dataset_kwargs") or {}
        if config.get("dataset_path") in LOCAL and "data_files" in how:
            files = _whole(how["data_files"], file, name)
            config["dataset_kwargs"] = {**how, "data_files": files}
        index[name], found[name] = replace(entry, yaml_path=None, cfg=config), file
    return found


def _whole(files: Any, file: Path, name: str) -> Any:
    """`data_files` as it was given, its paths taken from the folder of the task file."""
    if isinstance(files, Mapping):
        return {split: _whole(some, file, name) for split, some in files.items()}
    if isinstance(files, list):
        return [_whole(one, file, name) for one in files]
    if "://" in str(files):
        return files
    path = file.parent.absolute() / str(files)
    if not path.is_file() and not any(path.parent.glob(path.name)):
        raise ValueError(
            f"--tasks={name}: {file}: data_files: no such file '{path}'; relative paths are taken "
            f"from the folder of the task file"
        )
    return str(path)


def _load(manager: Any, name: str, file: Path | None) -> dict[str, Any]:
    try:
        return manager.load([name])
    except Exception as error:  # of lm-eval, datasets, or a function of the task file
        where, words = f"{file}: " if file is not None else "", _words(error)
        offline = "offline" in words.lower()
        hint = f"; set {OFFLINE[0]}=0 and {OFFLINE[1]}=0 to fetch it" if offline else ""
        raise ValueError(f"--tasks={name}: {where}{words}{hint}") from error


def _words(error: BaseException) -> str:
    """What went wrong in a line, from where it began."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def _check_task(name: str, task: Any, generates: bool) -> None:
    """Refuses what would fail after hours."""
    kind = task.get_config("output_type")
    if kind == "generate_until" and not generates:
        raise ValueError(
            f"--tasks={name}: it generates text (output_type: generate_until), which is not built "
            f"here; choose tasks of loglikelihood, loglikelihood_rolling or multiple_choice"
        )
    if getattr(task, "UNSAFE_CODE", False):
        raise ValueError(f"--tasks={name}: it runs code that a model writes; not run here")
    if getattr(task, "MULTIMODAL", False):
        raise ValueError(f"--tasks={name}: it reads images or sound; not built here")
    if task.get_config("process_results") is None:
        for metric, function in getattr(task, "_metric_fn_list", {}).items():
            if function is None:
                raise ValueError(
                    f"--tasks={name}: metric '{metric}' is none of lm-eval's own; those of the "
                    f"evaluate library are not read here"
                )
