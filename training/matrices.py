"""Parameters seen as stacks of matrices, by their logical names and never by their number of dims.

A leaf is [layers] x matrix(in, out): `"layers embed -> heads head_dim"` is a stack of matrices from
`embed` to `heads * head_dim`. A leaf without an arrow (a gain, a bias, stacked or not) is a vector.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from parallel.rules import STACKS

STACKED = (*STACKS, "experts")  # dims that count matrices and are in none
TABLES = ("vocab", "position", "token_type")  # of rows, each a token's: no matrices


def matrix_dims(axes: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The positions of a matrix's contracted dims and of its produced dims; None for a vector."""
    if "->" not in axes:
        return None
    contracted, produced = (half.split() for half in axes.split("->"))
    first = len(contracted)
    inside = tuple(i for i, name in enumerate(contracted) if name not in STACKED)
    return inside, tuple(range(first, first + len(produced)))


def decays(axes: str) -> bool:
    """Whether weight decay applies: to matrices, not to gains and biases."""
    return matrix_dims(axes) is not None


def orthogonalises(axes: str) -> bool:
    """Whether Muon applies: to matrices between features, not to tables, gains and biases."""
    names = axes.replace("->", " ").split()
    return decays(axes) and not any(name in TABLES for name in names)


class FactoredState(NamedTuple):
    """Second moments: {"row", "column"} of a matrix, {"full"} of a vector; as float32 as params."""

    step: Array
    moments: Any


def scale_by_factored_rms(
    axes: Any, *, decay: float = 0.8, eps: float = 1e-30, clip: float = 1.0
) -> optax.GradientTransformation:
    """Adafactor: divides by the root of a second moment kept as row and column means.

    Without Adafactor's scaling by the parameter's own size, so that a learning rate means what it
    means to Adam (as in Zhai et al. 2022, section 3.4, https://arxiv.org/abs/2106.04560). optax's
    version factors the two largest dims, which of a stack of layers may be any two.

    Args:
      axes: logical axes of every parameter.
      decay: update t keeps 1 - t**-decay of the moments.
      eps: added to the squared gradient.
      clip: the largest root mean square of one matrix's update.

    Source: Shazeer and Stern 2018, https://arxiv.org/abs/1804.04235.
    """

    def init(params: Any) -> FactoredState:
        def moments(p: Array, names: str) -> dict[str, Array]:
            zeros, dims = jnp.zeros_like(p), matrix_dims(names)
            if dims is None:
                return {"full": zeros}
            # Sums of zeros: of the right shape, and of the right sharding by their type.
            return {"row": jnp.sum(zeros, dims[1]), "column": jnp.sum(zeros, dims[0])}

        return FactoredState(jnp.zeros((), jnp.int32), jax.tree.map(moments, params, axes))

    def update(grads: Any, state: FactoredState, params: Any = None) -> tuple[Any, FactoredState]:
        del params
        step = state.step + 1
        kept = 1.0 - step.astype(jnp.float32) ** -decay

        def mean_square(g: Array, names: str, old: dict[str, Array]) -> dict[str, Array]:
            dims, square = matrix_dims(names), jnp.square(g) + eps
            if dims is None:
                new = {"full": square}
            else:
                new = {"row": jnp.mean(square, dims[1]), "column": jnp.mean(square, dims[0])}
            return {
                key: (kept * old[key] + (1.0 - kept) * new[key]).astype(old[key].dtype)
                for key in old
            }

        def scaled(g: Array, names: str, moments: dict[str, Array]) -> Array:
            dims = matrix_dims(names)
            if dims is None:
                g = g * jax.lax.rsqrt(moments["full"])
                whole = tuple(i for i, name in enumerate(names.split()) if name not in STACKED)
            else:
                inside, outside = dims
                row = jnp.expand_dims(moments["row"], outside)
                column = jnp.expand_dims(moments["column"], inside)
                row = row / jnp.mean(row, inside, keepdims=True)
                g = g * jax.lax.rsqrt(row) * jax.lax.rsqrt(column)
                whole = inside + outside
            rms = jnp.sqrt(jnp.mean(jnp.square(g), whole, keepdims=True))
            return g / jnp.maximum(1.0, rms / clip)

        # grads come first: a leaf of theirs meets the whole dict of its moments
        moments = jax.tree.map(mean_square, grads, axes, state.moments)
        return jax.tree.map(scaled, grads, axes, moments), FactoredState(step, moments)

    return optax.GradientTransformation(init, update)


def scale_by_muon(
    axes: Any, *, momentum: float, b1: float, b2: float, eps: float
) -> optax.GradientTransformation:
    """Muon's orthogonalised momentum for matrices, Adam for tables, gains and biases.

    A matrix's update is scaled by 0.2 * sqrt(max(in, out)), which gives it the root mean square of
    Adam's, so that both share a learning rate and a weight decay (Liu et al. 2025,
    https://arxiv.org/abs/2502.16982; Muon: https://kellerjordan.github.io/posts/muon/).
    """
    dims = jax.tree.map(
        lambda names: (
            optax.contrib.MuonDimensionNumbers(*(matrix_dims(names) or ()))
            if orthogonalises(names)
            else optax.MaskedNode()
        ),
        axes,
    )

    def scaled(update: Array, dims: optax.contrib.MuonDimensionNumbers) -> Array:
        sides = (math.prod(update.shape[i] for i in side) for side in dims)
        return update * (0.2 * math.sqrt(max(sides)))

    muon = optax.chain(
        optax.contrib.scale_by_muon(beta=momentum, eps=eps, weight_dimension_numbers=dims),
        optax.stateless(lambda updates, _: jax.tree.map(scaled, updates, dims)),
    )
    labels = jax.tree.map(lambda names: "muon" if orthogonalises(names) else "adam", axes)
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    return optax.partition({"muon": _with_auto_axes(muon), "adam": adam}, labels)


def _with_auto_axes(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Lets XLA choose the shardings inside `inner.update`; what leaves it is sharded as it came.

    optax's Muon multiplies and reshapes without saying how the result is sharded.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        specs = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, (updates, state))
        run = jax.sharding.auto_axes(lambda u, s: inner.update(u, s), out_sharding=specs)
        return run(updates, state)

    return optax.GradientTransformation(inner.init, update)
