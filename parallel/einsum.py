"""The one door for contractions with weights: it owns their layout, forward and backward.

Three things are decided here instead of being left to the compiler. A weight divided over fsdp (in
evaluation over the stages of a pipeline, too) is gathered where it is used, in the forward and
again in the backward pass, and only the divided one is kept in between. Its gradient leaves divided
as the weight (of a `Twin`, as its `part`), by one reduce-scatter. And where one input feeds several
products (q, k and v; gate and up), the partial gradients of the input are summed on each device
before one reduction over `tensor`, not one each.

Weights in other forms (`parallel/stored.py`) come through here, too: packed ones are made dense for
the product and again for the backward pass, and only the packed form is kept in between. They are
frozen, but for those that say what of them is trained. Composed ones say themselves how they
multiply; of those with an adapter (`parallel/adapted.py`) the bases are multiplied here, together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P

from parallel.adapted import Adapted
from parallel.code_products import multiply_codes
from parallel.contract import (
    axes_of,
    contract,
    contract_partial,
    gathered,
    reduce_partial,
    without,
)
from parallel.gather import gather
from parallel.mesh import PIPE
from parallel.rules import FSDP
from parallel.stored import Coded, Composed, Packed, Stored, computed, differentiable, usable
from parallel.twin import Twin

Weight = jax.Array | Twin | Stored


def einsum(equation: str, x: jax.Array, w: Weight, out: P, inside: P | None = None) -> jax.Array:
    """`jnp.einsum(equation, x, w)` in the dtype of `x`, laid out as `out`."""
    return einsums(equation, x, [w], [out], inside)[0]


def einsums(
    equation: str,
    x: jax.Array,
    weights: Sequence[Weight],
    outs: Sequence[P],
    inside: P | None = None,
) -> list[jax.Array]:
    """Several products of one input: `einsum(equation, x, w, out)` for every weight and layout.

    Args:
      equation: of one product; it contracts a dim of `x` with one of the weight.
      x: the input.
      weights: in the dtype of `x` or stored otherwise, perhaps divided over fsdp.
      outs: layout of each result.
      inside: the layout that `x` is brought to first. Its gradient comes back in the layout of `x`:
        under sequence parallelism the all-gather and the reduce-scatter of its gradient are here.
    """
    own = jax.typeof(x).sharding.spec
    inside = own if inside is None else inside
    adapted = [isinstance(w, Adapted) and not w.apart for w in weights]
    if any(adapted):
        bases = [w.frozen if a else w for w, a in zip(weights, adapted, strict=True)]  # type: ignore[union-attr]
        products = einsums(equation, x, bases, outs, inside)
        return [
            w.finished(einsum, equation, x, y, out, inside) if isinstance(w, Adapted) and a else y
            for w, a, y, out in zip(weights, adapted, products, outs, strict=True)
        ]
    pairs = list(zip(weights, outs, strict=True))
    together = [(w, out) for w, out in pairs if not isinstance(w, Composed)]
    found = iter(_together(equation, x, together, inside, own) if together else [])
    return [
        w.product(einsum, equation, x, out, inside) if isinstance(w, Composed) else next(found)
        for w, out in pairs
    ]


def _together(
    equation: str, x: jax.Array, pairs: Sequence[tuple[Any, P]], inside: P, own: P
) -> list[jax.Array]:
    """Products with arrays and packed weights: one sum of the input's partial gradients."""
    weights = [w for w, _ in pairs]
    differentiated = [differentiable(w) for w in weights]
    used = [computed(w) for w in weights]
    for w in used:
        assert isinstance(w, Packed) or w.dtype == x.dtype, (equation, w, x.dtype)
    static = _Static(
        equation,
        tuple(out for _, out in pairs),
        inside,
        own,
        tuple(None if d is None else jax.typeof(d).sharding.spec for d in differentiated),
    )
    return _products(static, x, used, differentiated)


class _Static(NamedTuple):
    equation: str
    outs: tuple[P, ...]
    inside: P
    input_gradient: P
    weight_gradients: tuple[P | None, ...]

    def usable(self, weight: Any, out: P, dtype: Any) -> jax.Array:
        """The array to compute with: whole over fsdp and stages, divided as what it meets."""
        if not isinstance(weight, Packed):
            return gathered(weight, FSDP, PIPE)
        inputs, result = self.equation.split("->")
        x_dims, w_dims = inputs.split(",")
        over = axes_of(self.inside[x_dims.index(d)] for d in x_dims if d not in result)
        wanted = [
            self.inside[x_dims.index(d)] if d in x_dims else without(out[result.index(d)], over)
            for d in w_dims
        ]
        return jax.reshard(usable(weight, dtype), P(*wanted))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _products(
    static: _Static, x: jax.Array, weights: list[Any], differentiated: list[jax.Array | None]
) -> list[jax.Array]:
    return _forward(static, x, weights, differentiated)[0]


def _forward(
    static: _Static, x: jax.Array, weights: list[Any], differentiated: list[jax.Array | None]
) -> tuple[list[jax.Array], tuple[jax.Array, list[Any]]]:
    x = gather(x, static.inside)
    products = [
        multiply_codes(static.equation, x, w, out)
        if isinstance(w, Coded) and w.inputs
        else contract(static.equation, x, static.usable(w, out, x.dtype), out)
        for w, out in zip(weights, static.outs, strict=True)
    ]
    return products, (x, weights)


def _backward(
    static: _Static,
    residuals: tuple[jax.Array, list[Any]],
    cotangents: list[jax.Array],
) -> tuple[jax.Array, None, list[jax.Array | None]]:
    x, weights = residuals
    inputs, result = static.equation.split("->")
    x_dims, w_dims = inputs.split(",")
    whole = [static.usable(w, out, x.dtype) for w, out in zip(weights, static.outs, strict=True)]

    def aligned(g: jax.Array, w: jax.Array) -> jax.Array:
        # As the input and the weight: where the product was scattered, this gathers.
        own = jax.typeof(w).sharding.spec
        spec = [
            static.inside[x_dims.index(d)] if d in x_dims else own[w_dims.index(d)] for d in result
        ]
        return jax.reshard(g, P(*spec))

    cotangents = [aligned(g, w) for g, w in zip(cotangents, whole, strict=True)]
    sums: dict[P, jax.Array] = {}  # partial gradients of the input, by what they are partial over
    for g, w in zip(cotangents, whole, strict=True):
        dx = contract_partial(f"{result},{w_dims}->{x_dims}", g, w, static.inside)
        spec = jax.typeof(dx).sharding.spec
        sums[spec] = sums[spec] + dx if spec in sums else dx
    first, *others = (reduce_partial(dx, static.input_gradient) for dx in sums.values())
    gradients = [
        None if spec is None else contract(f"{x_dims},{result}->{w_dims}", x, g, spec)
        for g, spec in zip(cotangents, static.weight_gradients, strict=True)
    ]
    return sum(others, first), None, gradients


_products.defvjp(_forward, _backward)
