"""Which objective goes with which source and packing: refused before any file is read."""

from __future__ import annotations

from data.config import IMAGES, TEXTS, DataConfig
from data.images import DIGIT_TASKS
from data.objective import ObjectiveConfig
from data.stdlib import PACKAGE

SOURCES_OF = {
    "causal_lm": TEXTS,
    "prefix_lm": TEXTS,
    "masked_lm": TEXTS,
    "span_corruption": TEXTS,
    "seq2seq": ("docstrings", "jsonl"),
    "captioning": IMAGES,
    "classification": ("stdlib", "jsonl", *IMAGES),
}
LABELLED = ("stdlib", "jsonl", *IMAGES)
WITH_IMAGES = ("vision", "vision_language")  # families
WITH_SOURCE = ("span_corruption", "seq2seq")  # objectives whose rows have one


def check_source(data: DataConfig, objective: ObjectiveConfig, family: str) -> None:
    """Refuses data that the objective or the family cannot be learnt from.

    Raises:
      ValueError: naming the keys, their values and what would be right.
    """
    check_agreement(data, objective)
    if (data.source in IMAGES) != (family in WITH_IMAGES):
        right = ", ".join(IMAGES) if family in WITH_IMAGES else "a source of texts"
        raise ValueError(
            f"config.data.source = {data.source!r}: config.model.family = {family!r} takes {right}"
        )


def check_lengths(data: DataConfig, objective: ObjectiveConfig, longest: int) -> None:
    """Refuses rows longer than `config.model.max_length`.

    Raises:
      ValueError: naming the keys and their values.
    """
    for key in ("sequence_length", "source_length")[: 1 + (objective.name in WITH_SOURCE)]:
        length = getattr(data, key)
        if length > longest:
            raise ValueError(
                f"config.data.{key} = {length} is longer than config.model.max_length = {longest}; "
                f"shorten it, or raise max_length"
            )


def without_effect(data: DataConfig, objective: ObjectiveConfig) -> list[str]:
    """Keys that were set and are not read, a sentence each."""
    if objective.name in WITH_SOURCE or data.source_length == DataConfig.source_length:
        return []
    name = objective.name
    return [f"config.data.source_length has no effect: config.objective.name is {name!r}"]


def check_agreement(data: DataConfig, objective: ObjectiveConfig) -> None:
    """Refuses a source or a packing that does not suit the objective.

    Raises:
      ValueError: naming the keys, their values and what would be right.
    """
    name, source = objective.name, data.source
    shown = f"config.objective.name = {name!r}"
    if source not in SOURCES_OF[name]:
        raise ValueError(
            f"config.data.source = {source!r}: {shown} learns from {', '.join(SOURCES_OF[name])}"
        )
    if name == "seq2seq" and source == "jsonl" and not data.source_field:
        raise ValueError(
            f"config.data.source_field = '': {shown} makes the text of config.data.text_field from "
            f"another; name the field that holds it"
        )
    if data.source_field and name != "seq2seq":
        raise ValueError(
            f"config.data.source_field = {data.source_field!r}: {shown} reads no source; leave it "
            f"empty"
        )
    packings = packings_of(data, objective)
    if data.packing not in packings:
        of_one = f"{shown} has one example a row"
        if name in ("causal_lm", "masked_lm"):
            of_one = f"config.objective.tasks = {dict(objective.tasks)} have one label a row"
        raise ValueError(
            f"config.data.packing = {data.packing!r}: {of_one}; set it to {' or '.join(packings)}"
        )
    _check_tasks(data, objective)


def packings_of(data: DataConfig, objective: ObjectiveConfig) -> tuple[str, ...]:
    """The values of `config.data.packing` that the rows of an objective allow."""
    if objective.name in ("span_corruption", "seq2seq") or data.source in IMAGES:
        return ("none",)
    if objective.name in ("prefix_lm", "classification") or objective.tasks:
        return ("buckets", "none")
    return ("packed", "buckets", "none")


def _check_tasks(data: DataConfig, objective: ObjectiveConfig) -> None:
    tasks, source = dict(objective.tasks), data.source
    if not tasks:
        return
    shown = f"config.objective.tasks = {tasks}: config.data.source = {source!r}"
    if source not in LABELLED:
        raise ValueError(
            f"{shown} has no labels; choose {', '.join(LABELLED)}, or leave the tasks empty"
        )
    if objective.name in WITH_SOURCE:
        raise ValueError(
            f"{shown}, config.objective.name = {objective.name!r}: not built; leave the tasks empty"
        )
    if source == "stdlib" and set(tasks) != {PACKAGE}:
        raise ValueError(f"{shown} has one task, such as {{'{PACKAGE}': 8}}: the 8 largest")
    if source == "digits" and not tasks.items() <= DIGIT_TASKS.items():
        raise ValueError(f"{shown} has the tasks {DIGIT_TASKS}; choose among them")
