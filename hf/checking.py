"""Whether a checkpoint folder is of a model: every tensor there, of the right shape, no other."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from hf.families import fields_of
from hf.family import Family, Link, computed, config_key
from hf.files import DTYPES, CheckpointFolder, Stored
from hf.layout import Place
from models.config import ModelConfig
from training.naming import named
from training.state import Tree

LISTED = 2  # of each kind of what is wrong


def located(
    folder: CheckpointFolder, family: Family, config: ModelConfig, places: Mapping[str, Place]
) -> dict[str, Stored]:
    """Their name -> where it is, of all tensors that the model wants.

    Raises:
      ValueError: tensors that are missing, unexpected, of another shape, or of a dtype that is not
        read: all are counted, some named; and the keys of config.model that differ.
    """
    wanted = {name: place.their_shape for place in places.values() for name in place.names}
    there = _full_names(folder, family)
    missing = [name for name in wanted if name not in there]
    left = [name for name in there if name not in wanted and not _harmless(name, family, config)]
    common = [name for name in wanted if name in there]
    shapes = [
        f"{name} is {list(there[name].shape)} and should be {list(wanted[name])}"
        for name in common
        if there[name].shape != wanted[name]
    ]
    kinds = [
        f"{name} is {there[name].kind}, read are {', '.join(DTYPES)}"
        for name in common
        if there[name].kind not in DTYPES
    ]
    said = [
        *_counted(missing, "missing"),
        *_counted(left, "unexpected"),
        *_counted(shapes, "of another shape"),
        *_counted(kinds, "of another dtype"),
    ]
    if said:
        end = _differing(folder, config)
        raise ValueError(f"{folder.key} = '{folder.path}': tensors {'; '.join(said)}{end}")
    return {name: there[name] for name in wanted}


def check_heads(folder: CheckpointFolder, config: ModelConfig) -> None:
    """Refuses a checkpoint whose heads predict something else.

    Raises:
      ValueError: naming config.objective.
    """
    where = f"{folder.key} = '{folder.path}'"
    theirs = ModelConfig(**fields_of(folder.config, where))

    def heads(config: ModelConfig) -> tuple[bool, list[int]]:
        return config.token_head, [classes for _, classes in config.tasks]

    if heads(theirs) != heads(config):
        tasks = f"config.objective.tasks = {dict(theirs.tasks)}"
        predicts = "predicts tokens" if theirs.token_head else "classifies rows alone"
        raise ValueError(
            f"{where}: {folder.config['architectures'][0]} {predicts}, with {tasks}; "
            f"config.objective asks for other heads"
        )


def check_names(
    folder: CheckpointFolder, config: ModelConfig, links: Sequence[Link], axes: Tree
) -> None:
    """Refuses a model with parameters that the family has not, or without some that it has.

    Args:
      links: of the family.
      axes: `Model.axes`.

    Raises:
      ValueError: naming some of them.
    """
    ours, theirs = named(axes).keys(), {link.ours for link in links}
    said = _counted(sorted(ours - theirs), "without a place in it")
    said += _counted(sorted(theirs - ours), "it has beside config.model's")
    if said:
        end = _differing(folder, config)
        raise ValueError(f"{folder.key} = '{folder.path}': parameters {'; '.join(said)}{end}")


def _full_names(folder: CheckpointFolder, family: Family) -> dict[str, Stored]:
    """What is in the folder, by today's names; the prefix is put back where all are without."""
    there = {_today(name, family): at for name, at in folder.tensors.items()}
    prefix, copies = family.prefix, dict(family.copies)
    if any(name.startswith(prefix) for name in there):
        return there
    return {name if name in copies else prefix + name: at for name, at in there.items()}


def _today(name: str, family: Family) -> str:
    """A name whose ending may be an old one."""
    for old, new in family.old_names:
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _harmless(name: str, family: Family, config: ModelConfig) -> bool:
    if config.tied and name in dict(family.copies):
        return True
    return any(re.fullmatch(pattern, name) for pattern in family.ignored)


def _counted(names: list[str], what: str) -> list[str]:
    if not names:
        return []
    more = ", ..." if len(names) > LISTED else ""
    return [f"{what}, {len(names)}: {', '.join(names[:LISTED])}{more}"]


def _differing(folder: CheckpointFolder, config: ModelConfig) -> str:
    """What config.model says otherwise than config.json, for the end of a message."""
    where = f"{folder.key} = '{folder.path}'"
    theirs = computed(ModelConfig(**fields_of(folder.config, where)))
    mine = computed(config)
    words = [
        f"{config_key(name)} = {mine[name]!r} ({theirs[name]!r} there)"
        for name in mine
        if mine[name] != theirs[name]
    ]
    return f". It is of another model: {', '.join(words[:LISTED])}" if words else ""
