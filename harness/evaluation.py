"""Tasks evaluated on a model: what lm-eval measures, its settings fixed."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from harness.lm import HarnessLM  # which imports lm-eval

# Resamples of metrics whose standard error has no closed form: good to 2%. (lm-eval's own 100,000
# take minutes of one core.)
RESAMPLES = 1000
SEED = 1234  # of few-shot examples, as lm-eval's command has it
NOT_METRICS = ("name", "alias", "sample_len", "sample_count")


def run_tasks(lm: HarnessLM, tasks: dict[str, Any], limit: int | None) -> dict[str, Any]:
    """Metrics of each task and group.

    Args:
      tasks: of `load_tasks`; run once, for they keep their requests.
      limit: documents of each task at most.

    Returns:
      Task -> `<metric>` and, where lm-eval knows it, `<metric>_stderr`; a metric after one of
      lm-eval's filters is `<metric>,<filter>`. `samples` is the number of documents.
    """
    from lm_eval.evaluator import evaluate

    random.seed(0)
    np.random.seed(SEED)
    for task in tasks["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
    found = evaluate(
        lm=lm, task_dict=tasks, limit=limit, bootstrap_iters=RESAMPLES, log_samples=False
    )
    metrics = {name: _metrics(values) for name, values in found["results"].items()}
    return {name: values for name, values in metrics.items() if values}  # groups may have none


def _metrics(values: Mapping[str, Any]) -> dict[str, Any]:
    known = {k: v for k, v in values.items() if k not in NOT_METRICS and v != "N/A"}
    metrics = {key.removesuffix(",none"): _plain(value) for key, value in known.items()}
    return metrics | ({"samples": values["sample_len"]} if "sample_len" in values else {})


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
