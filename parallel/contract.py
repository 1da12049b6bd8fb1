"""A contraction whose sum over devices is written down, not inferred.

Where the sum over an axis ends in a result divided over that very axis (sequence parallelism,
gradients of FSDP), one reduce-scatter does both. Left to itself XLA reduces the whole array
everywhere and keeps a slice: twice the traffic, and the whole array in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P


def contract(equation: str, a: jax.Array, b: jax.Array, spec: P, dtype: Any = None) -> jax.Array:
    """`jnp.einsum(equation, a, b)` laid out as `spec`.

    Contracted dims must be divided alike in `a` and `b`, and the dims that stay as in `spec`, up to
    the axes that are summed over. `dtype` is that of the sums, where it is not that of `a` and `b`.
    """
    return reduce_partial(contract_partial(equation, a, b, spec, dtype), spec)


def contract_partial(
    equation: str, a: jax.Array, b: jax.Array, spec: P, dtype: Any = None
) -> jax.Array:
    """The same before its sum over devices: each holds its own share, and the type says so.

    Within a stage of a pipeline the shares are stacked in a new first dim, one a device: XLA's
    partitioner has no arrays that are both unreduced and in a Manual region.
    """
    inputs, result = equation.split("->")
    a_dims, _ = inputs.split(",")
    a_spec = jax.typeof(a).sharding.spec
    over = axes_of(a_spec[i] for i, dim in enumerate(a_dims) if dim not in result)
    einsum = partial(jnp.einsum, equation, preferred_element_type=dtype)
    if not over:
        return einsum(a, b, out_sharding=spec)
    kept = [without(entry, over) for entry in spec]
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.manual_axes:
        return einsum(a, b, out_sharding=P(*kept, unreduced=over))
    shares = tuple(axis for axis in mesh.axis_names if axis in over)
    return by_device(
        lambda a, b: einsum(a, b)[None],
        (a_spec, jax.typeof(b).sharding.spec),
        P(shares, *kept),
    )(a, b)


def reduce_partial(shares: jax.Array, spec: P) -> jax.Array:
    """Sums a partial array over devices and leaves it as `spec`."""
    had = jax.typeof(shares).sharding.spec
    stacked = len(had) > len(spec)
    over = set(had.unreduced) | (axes_of(had[:1]) if stacked else frozenset())
    scattered = [
        (axis, dim) for dim, entry in enumerate(spec) for axis in _names(entry) if axis in over
    ]
    if not scattered and not stacked:
        return jax.reshard(shares, spec)

    def local(x: jax.Array) -> jax.Array:
        x = jnp.squeeze(x, 0) if stacked else x
        for axis, dim in scattered:
            x = lax.psum_scatter(x, axis, scatter_dimension=dim, tiled=True)
        rest = tuple(sorted(over - {axis for axis, _ in scattered}))
        return lax.psum(x, rest) if rest else x

    return by_device(local, (had,), spec)(shares)


def by_device(
    function: Callable[..., Any], in_specs: Any, out_specs: Any, *, check_vma: bool = True
) -> Callable[..., Any]:
    """`function` on every device, Manual over each mesh axis that is not Manual already."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.shard_map(
        function,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
        check_vma=check_vma,
    )


def axes_of(entries: Iterable[str | tuple[str, ...] | None]) -> frozenset[str]:
    """The mesh axes in some entries of a spec."""
    return frozenset(axis for entry in entries for axis in _names(entry))


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def without(
    entry: str | tuple[str, ...] | None, axes: Iterable[str]
) -> str | tuple[str, ...] | None:
    """An entry of a spec without some mesh axes."""
    left = tuple(axis for axis in _names(entry) if axis not in axes)
    return left[0] if len(left) == 1 else (left or None)


def gathered(array: jax.Array, *axes: str) -> jax.Array:
    """The array whole over some mesh axes."""
    spec = jax.typeof(array).sharding.spec
    return jax.reshard(array, P(*(without(entry, axes) for entry in spec)))
