"""What a model is trained to predict: `config.objective`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

NAMES = (
    "causal_lm",
    "prefix_lm",
    "masked_lm",
    "span_corruption",
    "seq2seq",
    "captioning",
    "classification",
)
READ_BY = {"mask_rate": ("masked_lm", "span_corruption"), "span_length": ("span_corruption",)}


@dataclass(frozen=True)
class ObjectiveConfig:
    """The objective (`config.objective`); docs/objectives.md has a table of all.

    Attributes:
      name: `causal_lm`: every token predicts the next; `prefix_lm`: those after a prefix do, which
        sees itself whole; `masked_lm`: tokens that were masked are predicted; `span_corruption`:
        spans that were left out are; `seq2seq`: a text from another; `captioning`: a text from an
        image; `classification`: labels of an image or a text.
      mask_rate: the share of tokens that is masked or left out, in (0, 1).
      span_length: tokens of a span, on average (span_corruption).
      tasks: what is classified, by name: the number of classes. Each has a head of its own. Other
        objectives may have tasks beside them.
      task_weight: of each task's loss, beside the objective's.

    Sources: masked_lm: Devlin et al. 2019, https://arxiv.org/abs/1810.04805; prefix_lm and
    span_corruption: Raffel et al. 2020, https://arxiv.org/abs/1910.10683, sections 3.2.1 and 3.1.4.
    """

    name: str = "causal_lm"
    mask_rate: float = 0.15
    span_length: float = 3.0
    tasks: Mapping[str, int] = field(default_factory=dict, hash=False)
    task_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(
                f"config.objective.name = {self.name!r}: choose one of {', '.join(NAMES)}"
            )
        if not 0 < self.mask_rate < 1:
            raise ValueError(
                f"config.objective.mask_rate = {self.mask_rate}: a share between 0 and 1"
            )
        if self.span_length < 1:
            raise ValueError(
                f"config.objective.span_length = {self.span_length}: tokens, at least 1"
            )
        if self.task_weight <= 0:
            raise ValueError(
                f"config.objective.task_weight = {self.task_weight}: above 0; without tasks, leave "
                f"config.objective.tasks empty"
            )
        for task, classes in self.tasks.items():
            if not task.isidentifier():
                raise ValueError(
                    f"config.objective.tasks = {dict(self.tasks)}: {task!r} should be a name of "
                    f"letters, digits and _"
                )
            if classes < 2:
                raise ValueError(
                    f"config.objective.tasks.{task} = {classes}: the number of classes, at least 2"
                )
        if self.name == "classification" and not self.tasks:
            raise ValueError(
                "config.objective.tasks = {}: config.objective.name = 'classification' wants some, "
                "such as {'digit': 10}"
            )

    def without_effect(self) -> list[str]:
        """Keys that were set and are not read, a sentence each."""
        notes = []
        for key, names in READ_BY.items():
            given = getattr(self, key)
            if self.name not in names and given != getattr(ObjectiveConfig, key):
                notes.append(
                    f"config.objective.{key} has no effect: config.objective.name is {self.name!r}"
                )
        weighted = self.task_weight != ObjectiveConfig.task_weight
        if weighted and not self.tasks:
            notes.append("config.objective.task_weight has no effect: there are no tasks")
        if weighted and self.name == "classification":
            notes.append(
                "config.objective.task_weight has no effect: config.objective.name is "
                "'classification', which has no other loss"
            )
        return notes
