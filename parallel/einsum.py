"""The one door for contractions with weights: it owns their layout, forward and backward.

Quantised and low-rank weights plug in here: the door is where a weight's form is known.

Two things are decided here instead of being left to the compiler. A weight divided over fsdp is
gathered where it is used, in the forward and again in the backward pass, and only the divided one
is kept in between. And where one input feeds several products (q, k and v; gate and up), the
partial gradients of the input are summed on each device before one reduction over `tensor`, not one
each.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from parallel.rules import FSDP
from parallel.zero import Twin, joined


def einsum(equation: str, x: jax.Array, w: jax.Array | Twin, out: P) -> jax.Array:
    """`jnp.einsum(equation, x, w)` in the dtype of `x`, laid out as `out`."""
    return einsums(equation, x, [w], [out])[0]


def einsums(
    equation: str, x: jax.Array, weights: Sequence[jax.Array | Twin], outs: Sequence[P]
) -> list[jax.Array]:
    """Several products of one input: `einsum(equation, x, w, out)` for every weight and layout."""
    arrays = [joined(w) for w in weights]
    for array in arrays:
        assert array.dtype == x.dtype, (equation, array.dtype, x.dtype)
    return _products(equation, tuple(outs), x, arrays)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _products(
    equation: str, outs: tuple[P, ...], x: jax.Array, weights: list[jax.Array]
) -> list[jax.Array]:
    return [
        jnp.einsum(equation, x, _gathered(w), out_sharding=out)
        for w, out in zip(weights, outs, strict=True)
    ]


def _forward(
    equation: str, outs: tuple[P, ...], x: jax.Array, weights: list[jax.Array]
) -> tuple[list[jax.Array], tuple[jax.Array, list[jax.Array]]]:
    return _products(equation, outs, x, weights), (x, weights)


def _backward(
    equation: str,
    outs: tuple[P, ...],
    residuals: tuple[jax.Array, list[jax.Array]],
    cotangents: list[jax.Array],
) -> tuple[jax.Array, list[jax.Array]]:
    x, weights = residuals
    inputs, result = equation.split("->")
    x_dims, w_dims = inputs.split(",")
    layout = jax.typeof(x).sharding.spec

    def aligned(g: jax.Array, out: P) -> jax.Array:
        # Dims that the input has too are laid out as there: sequence parallelism gathers here.
        spec = [
            layout[x_dims.index(d)] if d in x_dims else entry
            for d, entry in zip(result, out, strict=True)
        ]
        return jax.reshard(g, P(*spec))

    cotangents = [aligned(g, out) for g, out in zip(cotangents, outs, strict=True)]
    sums: dict[frozenset[str], jax.Array] = {}  # by the axes that the gradients are partial over
    for g, w, out in zip(cotangents, weights, outs, strict=True):
        over = _axes_of([d for d in result if d not in x_dims], result, out)
        spec = P(*layout, unreduced=set(over)) if over else layout
        dx = jnp.einsum(f"{result},{w_dims}->{x_dims}", g, _gathered(w), out_sharding=spec)
        sums[over] = sums[over] + dx if over in sums else dx
    reduced = [jax.reshard(dx, layout) for dx in sums.values()]
    dx = reduced[0]
    for other in reduced[1:]:
        dx = dx + other

    def dw(w: jax.Array, g: jax.Array) -> jax.Array:
        spec = jax.typeof(w).sharding.spec
        return jnp.einsum(f"{x_dims},{result}->{w_dims}", x, g, out_sharding=spec)

    return dx, [dw(w, g) for w, g in zip(weights, cotangents, strict=True)]


_products.defvjp(_forward, _backward)


def _axes_of(dims: list[str], all_dims: str, spec: P) -> frozenset[str]:
    """The mesh axes that divide some dims of an array; none if they are all of one device."""
    found: set[str] = set()
    for dim in dims:
        entry = spec[all_dims.index(dim)]
        found |= set(entry if isinstance(entry, tuple) else () if entry is None else (entry,))
    sizes = jax.sharding.get_abstract_mesh().shape
    return frozenset(found) if any(sizes[axis] > 1 for axis in found) else frozenset()


def _gathered(w: jax.Array) -> jax.Array:
    """The weight whole over fsdp."""

    def without(entry: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        axes = entry if isinstance(entry, tuple) else (entry,)
        left = tuple(axis for axis in axes if axis not in (FSDP, None))
        return left[0] if len(left) == 1 else (left or None)

    return jax.reshard(w, P(*map(without, jax.typeof(w).sharding.spec)))
