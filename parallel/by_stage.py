"""A function of each stage of a pipeline by itself: only `pipe` is Manual, all else stays Explicit.

`jax.shard_map` tells the compiler of its arguments and results the Manual axes alone, and where the
others are Explicit it closes the partition over them: what fsdp or tensor divide is gathered at the
border, a stage's weights and gradients on every one of its devices. Where the others are Auto the
partition stays open. So they are Auto at the border, and Explicit again inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from parallel.contract import axes_of, without
from parallel.mesh import PIPE


def by_stage(function: Callable[..., Any], out_specs: Any, *args: Any) -> Any:
    """`function(*args)` on each stage.

    Args:
      function: gets of every array what is the stage's, laid out over other axes as it is.
      out_specs: tree of the partitions of the results, over all axes. A result that `pipe` does not
        divide is the same on all stages.
      args: trees of arrays; `pipe` divides them as their types say.
    """
    others = tuple(axis for axis in jax.sharding.get_abstract_mesh().axis_names if axis != PIPE)
    specs = jax.tree.map(lambda array: jax.typeof(array).sharding.spec, args)
    inside = jax.sharding.explicit_axes(function, axes=others, in_sharding=_each(specs, _others))
    run = jax.shard_map(
        inside,
        in_specs=_each(specs, _pipe),
        out_specs=_each(out_specs, _pipe),
        axis_names={PIPE},
        check_vma=False,
    )
    return jax.sharding.auto_axes(run, axes=others, out_sharding=out_specs)(*args)


def _each(specs: Any, function: Callable[[P], P]) -> Any:
    return jax.tree.map(function, specs, is_leaf=lambda spec: isinstance(spec, P))


def _others(spec: P) -> P:
    return P(*(without(entry, (PIPE,)) for entry in spec))


def _pipe(spec: P) -> P:
    return P(*(PIPE if PIPE in axes_of([entry]) else None for entry in spec))
