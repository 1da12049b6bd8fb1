"""Where the config of a command comes from: a file, a run's folder, a checkpoint of others.

A checkpoint (`config.init_from`, or `--hf`) stands between the two others: it fills `config.model`
and names its tokeniser over what a config file says; the command line has the last word. So does
another run, which `config.init_from` may name as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ml_collections import ConfigDict

from config_border import has_config, is_run, load_config, override, read_config, with_values
from config_types import plain
from configs import base

Source = Literal["file", "workdir", "workdir or checkpoint"]
TOKENIZER = "tokenizer.json"
# Sections that say what parameters there are, and in what form.
OF_THE_MODEL = ("model", "experts", "vision", "weights")


def config_of(
    options: argparse.Namespace, overrides: Sequence[str], source: Source, name: str
) -> ConfigDict:
    """The config of parsed flags, overridden.

    Args:
      options: with `config`, `workdir` and `hf` where the command has them.
      overrides: `--config.KEY=VALUE`.
      source: which of them it is.
      name: the command.

    Raises:
      ValueError: a flag that is missing or of no use, or a config that cannot be read.
    """
    if not hasattr(options, "workdir"):
        if options.config is None:
            raise ValueError("--config: missing; give --config=configs/tiny.py")
        return from_file(options.config, overrides)
    checkpoint = getattr(options, "hf", None)
    if options.workdir is None and checkpoint is None:
        raise ValueError("the following arguments are required: --workdir")
    if options.workdir == Path():
        raise ValueError(f"--workdir={options.workdir}: give the run's folder, such as runs/tiny")
    if options.workdir is not None and options.workdir.exists() and not options.workdir.is_dir():
        raise ValueError(f"--workdir={options.workdir}: a file; give the run's folder")
    given = getattr(options, "config", None)
    if checkpoint is not None:
        config = base.get_config() if given is None else load_config(given)
        return with_checkpoint(config, checkpoint, "--hf", overrides)
    if source == "file" and given is not None:
        return from_file(given, overrides)
    if given is not None:
        raise ValueError(
            f"--config={given}: {name} takes the config from --workdir; change it by "
            f"--config.KEY=VALUE"
        )
    if source == "file" and not has_config(options.workdir):
        raise ValueError(
            f"--config: missing, and --workdir={options.workdir} has no run to continue; "
            f"give --config=configs/tiny.py"
        )
    return override(read_config(options.workdir), overrides)


def from_file(where: str, overrides: Sequence[str]) -> ConfigDict:
    """The config of a file, its checkpoint put in if it names one, overridden."""
    loaded = load_config(where)
    config = override(loaded, overrides)
    if config.adapter.method and config.adapter.base and not config.init_from:
        folder = Path(config.adapter.base)
        check_base(folder)
        return with_run(loaded, folder, overrides, "config.adapter.base")
    if not config.init_from:
        for key in ("init_new", "init_drop"):
            if config[key]:
                raise ValueError(
                    f"config.{key} = {list(config[key])}: has no effect without config.init_from"
                )
        return config
    if is_run(config.init_from):
        return with_run(loaded, Path(config.init_from), overrides)
    for key in ("init_new", "init_drop"):
        if config[key]:
            raise ValueError(
                f"config.{key} = {list(config[key])}: for a run's folder alone, and "
                f"config.init_from = '{config.init_from}' is none (it has no checkpoints/)"
            )
    return with_checkpoint(loaded, Path(config.init_from), "config.init_from", overrides)


def with_checkpoint(
    config: ConfigDict, folder: Path, key: str, overrides: Sequence[str]
) -> ConfigDict:
    """The config with a checkpoint's model and tokeniser, overridden.

    Args:
      config: complete.
      folder: with config.json and perhaps tokenizer.json.
      key: what named it, for messages.
      overrides: `--config.KEY=VALUE`; what a checkpoint's weights cannot be is refused when they
        are read.

    Raises:
      ValueError: no such folder, or a model that is not computed here.
    """
    if is_run(folder):
        raise ValueError(f"{key} = '{folder}': a run's folder; evaluate it by --workdir={folder}")
    from hf.families import read_model  # here: it imports JAX
    from hf.family import OF_EXPERTS, OF_THE_RUN
    from models.experts_config import ExpertsConfig
    from training.objectives import OBJECTIVES

    defaults = plain(base.get_config().model)
    model: dict[str, Any] = defaults | read_model(folder, key)
    experts = model.pop("experts", ExpertsConfig())
    tasks, predicts = model.pop("tasks", ()), model.pop("token_head", True)
    values = {f"config.model.{k}": v for k, v in model.items() if k not in OF_THE_RUN}
    values |= {f"config.experts.{k}": getattr(experts, k) for k in OF_EXPERTS}
    encoder = model["family"] == "encoder"
    if encoder and config.objective.name not in OBJECTIVES["encoder"]:  # what its heads are for
        values["config.objective.name"] = "masked_lm" if predicts else "classification"
    if tasks and not config.objective.tasks:
        values["config.objective.tasks"] = dict(tasks)
    if (folder / TOKENIZER).is_file():
        values |= {"config.data.tokenizer": str(folder / TOKENIZER), "config.data.end_token": ""}
    return override(with_values(config, values), overrides)


def check_base(folder: Path) -> None:
    """Refuses a folder that adapters cannot be trained on.

    Raises:
      ValueError: it is no run, or a run of adapters itself.
    """
    where = f"config.adapter.base = '{folder}'"
    if not is_run(folder) or not has_config(folder):
        raise ValueError(
            f"{where}: no run's folder, with config.json and checkpoints/; give one that train.py "
            f"or compress wrote"
        )
    refuse_adapters(read_config(folder), folder, "config.adapter.base")


def refuse_adapters(other: ConfigDict, folder: Path, key: str) -> None:
    """Refuses a run whose checkpoints are not of a whole model.

    Raises:
      ValueError: it is one of adapters.
    """
    if other.adapter.method:
        raise ValueError(
            f"{key} = '{folder}': its checkpoints hold adapters alone ({other.adapter.method}); "
            f"merge them first, python -m compress merge --workdir={folder} --out=DIR, and give "
            f"that folder"
        )


def with_run(
    config: ConfigDict, folder: Path, overrides: Sequence[str], key: str = "config.init_from"
) -> ConfigDict:
    """The config with the model and the tokeniser of another run, overridden.

    What a run chooses for itself (`OF_THE_RUN`: dropout, form of attention) it keeps.

    Raises:
      ValueError: the folder has no config of a run.
    """
    from hf.family import OF_THE_RUN  # here: it imports JAX

    if not has_config(folder):
        raise ValueError(
            f"{key} = '{folder}': it has checkpoints/ and no config.json; give a folder that "
            f"train.py wrote"
        )
    other = read_config(folder)
    refuse_adapters(other, folder, key)
    values = {
        f"config.{section}.{name}": value
        for section in OF_THE_MODEL
        for name, value in plain(other[section]).items()
        if name not in OF_THE_RUN
    }
    tokenizer = other.data.tokenizer
    values["config.data.tokenizer"] = str(folder / TOKENIZER) if tokenizer == "bpe" else tokenizer
    values["config.data.end_token"] = other.data.end_token
    return override(with_values(config, values), overrides)
