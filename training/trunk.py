"""Parameters from a checkpoint of another run, the rest of the model drawn anew.

What both have, by canonical name and shape, is read onto this run's mesh, whatever the other's was.
What else there is on either side must be named: a new head on an old trunk is wanted, a trunk that
silently stays random because a name has changed is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax

from parallel.precision import PrecisionConfig
from training.checkpoint import Checkpoints
from training.naming import named, nested
from training.state import Model, Tree, drawn_params, placed_params

BRANCH = "params/"


def trunk_params(
    source: Checkpoints,
    where: str,
    model: Model,
    precision: PrecisionConfig,
    seed: int,
    mesh: jax.sharding.Mesh,
    *,
    new: Sequence[str] = (),
    drop: Sequence[str] = (),
) -> Callable[[], Tree]:
    """Reads and draws the parameters, once called; all is checked before.

    Args:
      source: of the other run; its newest undamaged step is taken.
      where: names it in messages, such as `config.init_from = 'runs/a'`.
      seed: of what is drawn; the values are those of a run that draws everything.
      new: patterns of canonical names that may be drawn (`config.init_new`).
      drop: of those in the checkpoint that may be left out (`config.init_drop`).

    Raises:
      ValueError: at once, naming the first parameter that is neither in both nor in a pattern.
    """
    step, tensors = source.tensors(None)
    there = {
        name.removeprefix(BRANCH): tuple(tensor["shape"])
        for name, tensor in tensors.items()
        if name.startswith(BRANCH)
    }
    placed = placed_params(model, precision, mesh)
    here = {name: tuple(leaf.shape) for name, leaf in named(placed).items()}
    for name in sorted({*here, *there}):
        _check(name, here.get(name), there.get(name), new, drop, f"{where}: step {step}")
    both = {name: leaf for name, leaf in named(placed).items() if there.get(name) == here[name]}
    drawn = [name for name in here if name not in both]
    left = [BRANCH + name for name in there if name not in both]

    def read() -> Tree:
        leaves: dict[str, Any] = {}
        if drawn:
            chosen = lambda params: {name: named(params)[name] for name in drawn}
            leaves |= drawn_params(model, precision, seed, chosen)
        if both:
            _, state = source.restore(step, {"params": nested(both)}, partial=True, left=left)
            leaves |= named(state["params"])
        return jax.tree.unflatten(jax.tree.structure(placed), [leaves[name] for name in here])

    return read


def _check(
    name: str,
    here: tuple[int, ...] | None,
    there: tuple[int, ...] | None,
    new: Sequence[str],
    drop: Sequence[str],
    where: str,
) -> None:
    """Refuses one parameter that is not the same on both sides and not named."""
    if here == there:
        return
    is_new, is_dropped = (any(fnmatchcase(name, p) for p in patterns) for patterns in (new, drop))
    if here is not None and there is not None:
        if not (is_new and is_dropped):
            raise ValueError(
                f"{where} has {name} as {there}, this run as {here}; give config.model the "
                f"values of the other run, or name it in config.init_drop and config.init_new"
            )
    elif here is not None and not is_new:
        raise ValueError(
            f"{where} has no {name}, which is {here} in this run; what is to be drawn anew is "
            f"named in config.init_new, by patterns such as 'heads/*'"
        )
    elif there is not None and not is_dropped:
        raise ValueError(
            f"{where} has {name} of shape {there}, which this run does not have; what is to be "
            f"left out is named in config.init_drop, by patterns such as 'head_weight'"
        )
