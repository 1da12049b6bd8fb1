"""What losses over a vocabulary have in common: its parts on devices, and tokens in chunks.

A head's table is gathered over FSDP's axes and stays divided over those of `act_vocab`; a chunk of
C tokens has its logits formed, its loss's gradient to them pulled back at once, and nothing of
[C, V] outlives it. Everything here runs on one device's part, inside `jax.shard_map`.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from parallel.rules import Rules
from training.features import HeadWeights

MASKED = -1e30  # a padded column's logit: its exponential is zero, and no infinity is subtracted

Extra = list[tuple[int, tuple[str, ...]]]  # dims and mesh axes


@dataclass(frozen=True)
class LossHead:
    """What is static about a loss head; see `training.losses.cross_entropy`."""

    rules: Rules
    vocab_size: int
    table_axes: str
    softcap: float | None

    @property
    def vocab_dim(self) -> int:
        return self.table_axes.replace("->", " ").split().index("vocab")

    def divided(self, name: str) -> tuple[str, ...]:
        """The mesh axes of a logical name, without those of size one (no collective is needed)."""
        return tuple(axis for axis in self.rules.axes(name) if self.rules.size((axis,)) > 1)

    def first_column(self, columns: int) -> Array | int:
        """The number in the vocabulary of the first of this device's columns."""
        axes = self.divided("act_vocab")
        return lax.axis_index(axes) * columns if axes else 0

    def logits(self, x_CD: Array, weights: HeadWeights) -> tuple[Array, Array]:
        """Float32 logits of this device's columns [C, V]: after the softcap, and the same with
        padded columns masked.
        """
        table, *bias = weights
        v = self.vocab_dim
        logits_CV = lax.dot_general(
            x_CD, table, (((1,), (1 - v,)), ((), ())), preferred_element_type=jnp.float32
        )
        for bias_V in bias:
            logits_CV += bias_V.astype(jnp.float32)[None]
        capped_CV = logits_CV
        if self.softcap is not None:
            capped_CV = logits_CV = self.softcap * jnp.tanh(logits_CV / self.softcap)
        columns = table.shape[v]
        if columns * self.rules.size(self.divided("act_vocab")) > self.vocab_size:
            column_CV = lax.broadcasted_iota(jnp.int32, logits_CV.shape, 1)
            real_CV = column_CV < self.vocab_size - self.first_column(columns)
            logits_CV = jnp.where(real_CV, logits_CV, MASKED)
        return capped_CV, logits_CV

    def of_targets(
        self, capped_CV: Array, logits_CV: Array, targets_C: Array
    ) -> tuple[Array, Array, Array]:
        """Each token's largest logit of the whole vocabulary; its target's column here; and the
        target's logit where that is on this device, else 0, to be summed over devices.
        """
        axes, columns = self.divided("act_vocab"), logits_CV.shape[1]
        max_C = jnp.max(logits_CV, axis=1)
        max_C = lax.pmax(max_C, axes) if axes else max_C
        target_C = targets_C - self.first_column(columns)
        here_C = (target_C >= 0) & (target_C < columns)
        index_C1 = jnp.clip(target_C, 0, columns - 1)[:, None]
        found_C = jnp.take_along_axis(capped_CV, index_C1, axis=1)[:, 0]
        return max_C, target_C, jnp.where(here_C, found_C, 0.0)

    def pull_back(
        self, d_logits_CV: Array, capped_CV: Array, x_CD: Array, weights: HeadWeights
    ) -> tuple[Array, HeadWeights]:
        """The gradient of logits as that of features, and float32 ones of the weights."""
        table, *bias = weights
        v = self.vocab_dim
        if self.softcap is not None:
            d_logits_CV *= 1.0 - jnp.square(capped_CV / self.softcap)
        d_bias = [jnp.sum(d_logits_CV, axis=0) for _ in bias]
        d_logits_CV = d_logits_CV.astype(x_CD.dtype)
        d_x_CD = lax.dot_general(d_logits_CV, table, (((1,), (v,)), ((), ())))
        left, right = (d_logits_CV, x_CD) if v == 0 else (x_CD, d_logits_CV)
        d_table = lax.dot_general(
            left, right, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        return d_x_CD, (d_table, *d_bias)

    def extra_axes(self, specs: tuple[P, ...]) -> list[Extra]:
        """Of table and bias (dim, mesh axes) that divide them at rest but not while used."""
        of = zip(specs, (self.vocab_dim, 0), strict=False)
        return [self._extra_axes(spec, vocab_dim) for spec, vocab_dim in of]

    def _extra_axes(self, spec: P, vocab_dim: int) -> Extra:
        extra = []
        for dim, entry in enumerate(spec):
            axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
            axes = tuple(axis for axis in axes if self.rules.size((axis,)) > 1)
            used = self.divided("act_vocab") if dim == vocab_dim else ()
            assert axes[: len(used)] == used, (spec, used)
            assert set(axes[len(used) :]) <= set(self.divided("batch")), (spec, axes)
            if axes[len(used) :]:
                extra.append((dim, axes[len(used) :]))
        return extra

    def used(self, weights: HeadWeights, specs: tuple[P, ...]) -> HeadWeights:
        """The weights as products read them: this device's columns, whole in every other dim."""

        def whole(weight: Array, extra: Extra) -> Array:
            for dim, axes in extra:
                weight = lax.all_gather(weight, axes, axis=dim, tiled=True)
            return weight

        return tuple(map(whole, weights, self.extra_axes(specs)))

    def reduced(
        self, gradients: HeadWeights, used: HeadWeights, specs: tuple[P, ...]
    ) -> HeadWeights:
        """Gradients of `used`, summed over the batch and divided as the weights, in their dtype."""
        batch = self.divided("batch")

        def one(gradient: Array, weight: Array, extra: Extra) -> Array:
            for dim, axes in extra:
                gradient = lax.psum_scatter(gradient, axes, scatter_dimension=dim, tiled=True)
            scattered = {axis for _, axes in extra for axis in axes}
            left = tuple(axis for axis in batch if axis not in scattered)
            return psum(gradient, left).astype(weight.dtype)

        return tuple(map(one, gradients, used, self.extra_axes(specs)))


@dataclass(frozen=True)
class Chunks:
    """B rows of T tokens as even chunks of at most `chunk`; fewer than `number` are padding."""

    B: int
    T: int
    chunk: int

    @property
    def number(self) -> int:
        return -(-self.B * self.T // self.chunk)

    @property
    def size(self) -> int:
        return -(-self.B * self.T // self.number)

    def split(self, a: Array) -> Array:
        """[B, T, ...] -> [chunks, C, ...], zeros last."""
        count = self.B * self.T
        a = a.reshape(count, *a.shape[2:])
        a = jnp.pad(a, [(0, self.number * self.size - count)] + [(0, 0)] * (a.ndim - 1))
        return a.reshape(self.number, self.size, *a.shape[1:])

    def merge(self, a: Array) -> Array:
        """The inverse of `split`."""
        count, (B, T) = self.B * self.T, (self.B, self.T)
        return a.reshape(-1, *a.shape[2:])[:count].reshape(B, T, *a.shape[2:])


def psum(x: Array, axes: tuple[str, ...]) -> Array:
    """The sum over mesh axes; no collective where there are none."""
    return lax.psum(x, axes) if axes else x
