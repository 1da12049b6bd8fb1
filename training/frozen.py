"""Parameters that a run does not train: no gradient, no optimizer state, the same bits at the end.

They are chosen by canonical name. What is differentiated and updated is the tree of the parameters
with None for the frozen ones (`Model.trained`): to JAX those are nothing at all, so no gradient of
theirs is asked for, and the optimizer never sees them. In the stages of a pipeline, which sum their
gradients as one list, theirs are asked for, too, and left out of the update.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from training.naming import named
from training.state import Model


def freeze(model: Model, patterns: Sequence[str]) -> Model:
    """The model with the parameters frozen that `config.optimizer.frozen` names.

    Raises:
      ValueError: a pattern that names none, or patterns that leave nothing to train.
    """
    frozen = matching(patterns, named(model.axes))
    return replace(model, frozen=model.frozen | frozen)


def matching(patterns: Sequence[str], names: Iterable[str]) -> frozenset[str]:
    """The names that some pattern matches, as a shell would: `*` for any letters, slashes too.

    Raises:
      ValueError: as `freeze`.
    """
    key, names = f"config.optimizer.frozen = {list(patterns)}", list(names)
    found: set[str] = set()
    for pattern in patterns:
        new = [name for name in names if fnmatchcase(name, pattern)]
        if not new:
            tops = ", ".join(dict.fromkeys(name.partition("/")[0] for name in names))
            raise ValueError(
                f"{key}: {pattern!r} names no parameter; they begin with {tops}, and a pattern is "
                f"such as 'stack/*'"
            )
        found.update(new)
    if found and len(found) == len(names):
        raise ValueError(f"{key}: nothing is left to train; leave a parameter out")
    return frozenset(found)
