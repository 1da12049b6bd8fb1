"""The one door for contractions with weights: it owns their layout, forward and backward.

Three things are decided here instead of being left to the compiler. A weight divided over fsdp (in
evaluation over the stages of a pipeline, too) is gathered where it is used, in the forward and
again in the backward pass, and only the divided one is kept in between. Its gradient leaves divided
as the weight (of a `Twin`, as its `part`), by one reduce-scatter. And where one input feeds several
products (q, k and v; gate and up), the partial gradients of the input are summed on each device
before one reduction over `tensor`, not one each.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
from jax.sharding import PartitionSpec as P

from parallel.contract import contract, contract_partial, gathered, reduce_partial, without
from parallel.gather import gather
from parallel.mesh import PIPE
from parallel.rules import FSDP
from parallel.zero import Twin


def einsum(equation: str, x: jax.Array, w: jax.Array | Twin, out: P) -> jax.Array:
    """`jnp.einsum(equation, x, w)` in the dtype of `x`, laid out as `out`."""
    return einsums(equation, x, [w], [out])[0]


def einsums(
    equation: str,
    x: jax.Array,
    weights: Sequence[jax.Array | Twin],
    outs: Sequence[P],
    inside: P | None = None,
) -> list[jax.Array]:
    """Several products of one input: `einsum(equation, x, w, out)` for every weight and layout.

    Args:
      equation: of one product; it contracts a dim of `x` with one of the weight.
      x: the input.
      weights: in the dtype of `x`, perhaps divided over fsdp.
      outs: layout of each result.
      inside: the layout that `x` is brought to first. Its gradient comes back in the layout of `x`:
        under sequence parallelism the all-gather and the reduce-scatter of its gradient are here.
    """
    used = [w.whole if isinstance(w, Twin) else w for w in weights]
    differentiated = [w.part if isinstance(w, Twin) else w for w in weights]
    for array in used:
        assert array.dtype == x.dtype, (equation, array.dtype, x.dtype)
    own = jax.typeof(x).sharding.spec
    static = _Static(
        equation,
        tuple(outs),
        own if inside is None else inside,
        own,
        tuple(jax.typeof(w).sharding.spec for w in differentiated),
    )
    return _products(static, x, used, differentiated)


class _Static(NamedTuple):
    equation: str
    outs: tuple[P, ...]
    inside: P
    input_gradient: P
    weight_gradients: tuple[P, ...]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _products(
    static: _Static, x: jax.Array, weights: list[jax.Array], differentiated: list[jax.Array]
) -> list[jax.Array]:
    return _forward(static, x, weights, differentiated)[0]


def _forward(
    static: _Static, x: jax.Array, weights: list[jax.Array], differentiated: list[jax.Array]
) -> tuple[list[jax.Array], tuple[jax.Array, list[jax.Array]]]:
    x = gather(x, static.inside)
    products = [
        contract(static.equation, x, gathered(w, FSDP, PIPE), out)
        for w, out in zip(weights, static.outs, strict=True)
    ]
    return products, (x, weights)


def _backward(
    static: _Static,
    residuals: tuple[jax.Array, list[jax.Array]],
    cotangents: list[jax.Array],
) -> tuple[jax.Array, None, list[jax.Array]]:
    x, weights = residuals
    inputs, result = static.equation.split("->")
    x_dims, w_dims = inputs.split(",")

    def aligned(g: jax.Array, w: jax.Array) -> jax.Array:
        # As the input and the weight: where the product was scattered, this gathers.
        own = jax.typeof(w).sharding.spec
        spec = [
            static.inside[x_dims.index(d)]
            if d in x_dims
            else without(own[w_dims.index(d)], (FSDP, PIPE))
            for d in result
        ]
        return jax.reshard(g, P(*spec))

    cotangents = [aligned(g, w) for g, w in zip(cotangents, weights, strict=True)]
    sums: dict[P, jax.Array] = {}  # partial gradients of the input, by what they are partial over
    for g, w in zip(cotangents, weights, strict=True):
        whole = gathered(w, FSDP, PIPE)
        dx = contract_partial(f"{result},{w_dims}->{x_dims}", g, whole, static.inside)
        spec = jax.typeof(dx).sharding.spec
        sums[spec] = sums[spec] + dx if spec in sums else dx
    first, *others = (reduce_partial(dx, static.input_gradient) for dx in sums.values())
    gradients = [
        contract(f"{x_dims},{result}->{w_dims}", x, g, spec)
        for g, spec in zip(cotangents, static.weight_gradients, strict=True)
    ]
    return sum(others, first), None, gradients


_products.defvjp(_forward, _backward)
