"""Moments of matrices in few dimensions: GaLore and APOLLO. Adam for all else.

A gradient G [m, n] is seen through r vectors of its smaller side: R = P^T G, [r, n], and both
moments are R's. What is projected are the matrices between features, by their logical names, whose
smaller side is above r; tables, gains, biases and smaller matrices have Adam's own moments.

Moments and projection are divided as the dims are that they keep, and r as those that are gone.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import PartitionSpec

from training.matrices import matrix_dims, orthogonalises
from training.naming import named

Tree = Any

SKETCHED = 8  # vectors more than the rank that the range finder follows, and
POWERS = 2  # how often it multiplies by G G^T: Halko et al. 2011 find both enough


@dataclass(frozen=True)
class Sides:
    """The dims of a stack of matrices: those that count matrices, of the smaller side, the other.

    Attributes:
      shape: of the stack.
      stack, small, large: positions in it.
      rank: of the projection of the smaller side.
    """

    shape: tuple[int, ...]
    stack: tuple[int, ...]
    small: tuple[int, ...]
    large: tuple[int, ...]
    rank: int

    @property
    def projection(self) -> tuple[int, ...]:
        """The shape of P."""
        return (*(self.shape[i] for i in self.stack + self.small), self.rank)

    @property
    def moment(self) -> tuple[int, ...]:
        """The shape of R and of its moments."""
        before, after = ([self.shape[i] for i in side] for side in (self.stack, self.large))
        return (*before, self.rank, *after)

    def divided(
        self, entries: tuple[Any, ...], size: Callable[[Any], int]
    ) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The partitions of P and of the moments, from that of the matrix.

        Args:
          entries: of its PartitionSpec, one for each dim.
          size: entry -> the number of its parts.
        """
        stack, small, large = (
            tuple(entries[i] for i in side) for side in (self.stack, self.small, self.large)
        )

        def rank(gone: tuple[Any, ...]) -> Any:
            axes = [a for e in gone for a in ((e,) if isinstance(e, str) else tuple(e or ()))]
            entry = axes[0] if len(axes) == 1 else (tuple(axes) or None)
            return entry if self.rank % size(entry) == 0 else None

        return (*stack, *small, rank(large)), (*stack, rank(small), *large)

    def matrices(self, array: Array) -> Array:
        """[matrices, small, large]."""
        sides = (math.prod(self.shape[i] for i in side) for side in (self.stack, self.small))
        return array.transpose(self._order).reshape(*sides, -1)

    def whole(self, matrices: Array) -> Array:
        """The stack again."""
        lying = matrices.reshape([self.shape[i] for i in self._order])
        return lying.transpose([self._order.index(i) for i in range(len(self.shape))])

    @property
    def _order(self) -> tuple[int, ...]:
        return self.stack + self.small + self.large


def smaller_side(axes: str, shape: tuple[int, ...]) -> int:
    """The size of the smaller side of one matrix of a stack."""
    dims = matrix_dims(axes)
    assert dims is not None, axes
    return min(math.prod(shape[i] for i in side) for side in dims)


def sides_of(axes: str, shape: tuple[int, ...], rank: int) -> Sides | None:
    """The sides of a matrix that is projected; None for all else."""
    dims = matrix_dims(axes)
    if dims is None or not orthogonalises(axes) or smaller_side(axes, shape) <= rank:
        return None
    small, large = sorted(dims, key=lambda side: math.prod(shape[i] for i in side))
    stack = tuple(i for i in range(len(shape)) if i not in small + large)
    return Sides(shape, stack, small, large, rank)


class LowRankState(NamedTuple):
    """{"projection"} of GaLore, and moments {"mu", "nu"}, of R or of the whole; dtype as params."""

    step: Array
    moments: Tree


def scale_by_low_rank(
    axes: Tree,
    *,
    method: str,
    rank: int,
    refresh: int,
    scale: float,
    b1: float,
    b2: float,
    eps: float,
) -> optax.GradientTransformation:
    """Directions from moments of rank r.

    galore: `scale * P adam(R)`, where P are the leading left singular vectors of a gradient (of its
    smaller side), found anew every `refresh` updates by a randomized range finder (Halko et al.
    2011, https://arxiv.org/abs/0909.4061). Moments stay as they are when P changes.

    apollo: `scale * G diag(s)`, where s is by how much Adam scales each column of R, |adam(R)| /
    |R|, and P is random: N(0, 1/r), of a key by the name of the parameter and by update //
    refresh, so that nothing of it is kept. Rank 1 is APOLLO-Mini: one s for a matrix. All layers of
    a stack share P. Without the paper's limit of how fast a norm may grow: gradients are clipped.

    Args:
      axes: logical axes of every parameter.
      method: "galore" or "apollo".
      rank, refresh, scale: as above.
      b1, b2, eps: of Adam.

    Sources: Zhao et al. 2024 (GaLore), https://arxiv.org/abs/2403.03507; Zhu et al. 2024 (APOLLO),
    https://arxiv.org/abs/2412.05270.
    """
    keeps = method == "galore"

    def init(params: Tree) -> LowRankState:
        def empty(p: Array, names: str) -> dict[str, Array]:
            sides = sides_of(names, p.shape, rank)
            if sides is None:
                return {"mu": jnp.zeros_like(p), "nu": jnp.zeros_like(p)}
            of_projection, of_moment = sides.divided(_entries(p), _sizes(p))
            make = lambda shape, entries: jnp.zeros(shape, p.dtype, out_sharding=_spec(p, entries))
            kept = {"projection": make(sides.projection, of_projection)} if keeps else {}
            return kept | {key: make(sides.moment, of_moment) for key in ("mu", "nu")}

        return LowRankState(jnp.zeros((), jnp.int32), jax.tree.map(empty, params, axes))

    def update(grads: Tree, state: LowRankState, params: Tree = None) -> tuple[Tree, LowRankState]:
        del params

        def adam(g: Array, kept: dict[str, Array], before: Array) -> tuple[Array, dict[str, Array]]:
            steps = (before + 1).astype(jnp.float32)
            mu, nu = (kept[key].astype(jnp.float32) for key in ("mu", "nu"))
            mu = b1 * mu + (1.0 - b1) * g
            nu = b2 * nu + (1.0 - b2) * jnp.square(g)
            root = jnp.sqrt(nu / (1.0 - b2**steps)) + eps
            new = {"mu": mu, "nu": nu}
            return mu / (1.0 - b1**steps) / root, {
                k: a.astype(kept[k].dtype) for k, a in new.items()
            }

        def projected(
            g: Array, kept: dict[str, Array], before: Array, sides: Sides, name: str
        ) -> tuple[Array, dict[str, Array]]:
            """In shapes [matrices, ...]; XLA divides what is in between."""
            key = jax.random.fold_in(jax.random.key(zlib.crc32(name.encode())), before // refresh)
            g_Smn = sides.matrices(g).astype(jnp.float32)
            count, m = g_Smn.shape[:2]
            if keeps:
                old = kept["projection"].reshape(count, m, rank)
                find = lambda g_mn: leading(g_mn, rank, key).astype(old.dtype)
                fresh = before % refresh == 0
                p_Smr = jax.lax.cond(fresh, lambda: jax.lax.map(find, g_Smn), lambda: old)
                new = {"projection": p_Smr.reshape(sides.projection)}
                p_Smr = p_Smr.astype(jnp.float32)
            else:
                p_mr = jax.random.normal(key, (m, rank)) / math.sqrt(rank)
                p_Smr, new = jnp.broadcast_to(p_mr, (count, m, rank)), {}
            r_Srn = jnp.einsum("smr,smn->srn", p_Smr, g_Smn)
            flat = {key: kept[key].reshape(r_Srn.shape) for key in ("mu", "nu")}
            step_Srn, flat = adam(r_Srn, flat, before)
            new |= {key: a.reshape(sides.moment) for key, a in flat.items()}
            if keeps:
                step_Smn = jnp.einsum("smr,srn->smn", p_Smr, step_Srn)
            else:
                over = (1, 2) if rank == 1 else 1
                norms = [jnp.sum(a * a, over, keepdims=True) for a in (step_Srn, r_Srn)]
                ratio = jnp.sqrt(norms[0] / jnp.where(norms[1] > 0, norms[1], 1.0))
                step_Smn = g_Smn * ratio
            return sides.whole(scale * step_Smn), new

        def one(
            g: Array, names: str, kept: dict[str, Array], name: str
        ) -> tuple[Array, dict[str, Array]]:
            sides = sides_of(names, g.shape, rank)
            if sides is None:
                step, new = adam(g.astype(jnp.float32), kept, state.step)
                return step.astype(g.dtype), new

            def run(
                g: Array, kept: dict[str, Array], before: Array
            ) -> tuple[Array, dict[str, Array]]:
                with jax.default_matmul_precision("float32"):
                    step, new = projected(g, kept, before, sides, name)
                return step.astype(g.dtype), new

            if jax.typeof(g).sharding.mesh.empty:
                return run(g, kept, state.step)
            specs = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, (g, kept))
            return jax.sharding.auto_axes(run, out_sharding=specs)(g, kept, state.step)

        leaves = jax.tree.leaves(grads)
        structure: Any = jax.tree.structure(grads)
        of_leaves = (structure.flatten_up_to(tree) for tree in (axes, state.moments))
        found = [one(*of) for of in zip(leaves, *of_leaves, named(grads), strict=True)]
        steps, moments = (structure.unflatten([f[i] for f in found]) for i in range(2))
        return steps, LowRankState(optax.safe_increment(state.step), moments)

    return optax.GradientTransformation(init, update)


def leading(g_mn: Array, rank: int, key: Array) -> Array:
    """The leading left singular vectors of a matrix, [m, rank], float32."""
    m, n = g_mn.shape
    g_mn = g_mn / jnp.maximum(jnp.max(jnp.abs(g_mn)), jnp.finfo(jnp.float32).tiny)
    y_ms = g_mn @ jax.random.normal(key, (n, min(rank + SKETCHED, m)))
    for _ in range(POWERS):
        y_ms = g_mn @ (g_mn.T @ jnp.linalg.qr(y_ms)[0])
    q_ms = jnp.linalg.qr(y_ms)[0]
    b_sn = q_ms.T @ g_mn
    vectors = jnp.linalg.eigh(b_sn @ b_sn.T)[1]  # rising eigenvalues
    return q_ms @ vectors[:, ::-1][:, :rank]


def _entries(array: Array) -> tuple[Any, ...]:
    spec = tuple(jax.typeof(array).sharding.spec)
    return spec + (None,) * (array.ndim - len(spec))


def _sizes(array: Array) -> Callable[[Any], int]:
    sizes = jax.typeof(array).sharding.mesh.shape
    return lambda e: math.prod(sizes[a] for a in ((e,) if isinstance(e, str) else tuple(e or ())))


def _spec(array: Array, entries: tuple[Any, ...]) -> PartitionSpec | None:
    return None if jax.typeof(array).sharding.mesh.empty else PartitionSpec(*entries)
