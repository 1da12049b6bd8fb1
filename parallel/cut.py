"""A model that can be cut between layers, and what one stage of a pipeline has of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax import lax

from parallel.zero import Tree, together

Sums = tuple[jax.Array, dict[str, jax.Array]]


@dataclass(frozen=True)
class Cut:
    """A model that can be cut between layers: pure functions on the tree of its parameters.

    Each gets the whole tree, in which the stacked arrays may be those of a few layers. The key is
    that of the micro-batch, or None.

    Attributes:
      embed: (params, batch, key) -> x_BTD; reads nothing stacked.
      blocks: (params, x_BTD, batch, key, number of the first layer) -> x_BTD; reads nothing else.
      loss: (params, x_BTD, batch, weights_BT) -> (float32 sum, float32 sums); reads nothing
        stacked.
      layers: how many there are.
      period: of the pattern of layer kinds; a chunk has whole ones.
    """

    embed: Callable[..., jax.Array]
    blocks: Callable[..., jax.Array]
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
    layers: int
    period: int = 1


class Arrays(NamedTuple):
    """What a stage is given; lists of arrays as `Parts.divide` makes them.

    Attributes:
      own, outside: what is differentiated: the stacked arrays of this stage's layers, and the rest.
      own_copy, outside_copy: the whole copies at ZeRO level 2, else empty.
      batch, weights: arrays [micro-batches, B, T].
      key: of the step, or None.
    """

    own: list[jax.Array]
    outside: list[jax.Array]
    own_copy: list[jax.Array]
    outside_copy: list[jax.Array]
    batch: Tree
    weights: jax.Array
    key: jax.Array | None


@dataclass(frozen=True)
class Parts:
    """A tree of parameters as two lists: what is stacked, and what is not."""

    tree: Any
    stacked: list[bool]

    def divide(self, tree: Tree | None) -> tuple[list[Any], list[Any]]:
        """The lists of a tree like that of the parameters; of None, empty ones."""
        if tree is None:
            return [], []
        arrays = list(zip(self.tree.flatten_up_to(tree), self.stacked, strict=True))
        return [a for a, own in arrays if own], [a for a, own in arrays if not own]

    def join(self, own: list[Any], outside: list[Any]) -> Tree:
        """The tree of two lists."""
        lists = iter(own), iter(outside)
        return self.tree.unflatten([next(lists[0 if own else 1]) for own in self.stacked])


@dataclass(frozen=True)
class StageModel:
    """The parts of the model as functions of what is differentiated; the rest is `arrays`.

    `index` is a micro-batch's number.
    """

    cut: Cut
    parts: Parts
    arrays: Arrays

    def microbatch(self, index: jax.Array) -> tuple[Tree, jax.Array, jax.Array | None]:
        """Batch, weights and key of a micro-batch."""
        key = self.arrays.key
        batch, weights = jax.tree.map(
            lambda a: lax.dynamic_index_in_dim(a, index, 0, keepdims=False),
            (self.arrays.batch, self.arrays.weights),
        )
        if key is not None and len(self.arrays.weights) > 1:
            key = jax.random.fold_in(key, index)
        return batch, weights, key

    def params(self, own: list[jax.Array], outside: list[jax.Array], copy: list[jax.Array]) -> Tree:
        """What the model takes; `copy` is that of `own`."""
        whole = self.parts.join(copy, self.arrays.outside_copy) if copy else None
        return together(self.parts.join(own, outside), whole)

    def outer(self, outside: list[jax.Array]) -> Tree:
        """The same for what reads nothing stacked."""
        return self.params(self.arrays.own, outside, self.arrays.own_copy)

    def embed(self, outside: list[jax.Array], index: jax.Array) -> jax.Array:
        """The first x_BTD."""
        batch, _, key = self.microbatch(index)
        return self.cut.embed(self.outer(outside), batch, key)

    def unit(
        self,
        own: list[jax.Array],
        copy: list[jax.Array],
        x_BTD: jax.Array,
        number: jax.Array,
        index: jax.Array,
    ) -> jax.Array:
        """A few layers, of which `number` is the first."""
        batch, _, key = self.microbatch(index)
        return self.cut.blocks(
            self.params(own, self.arrays.outside, copy), x_BTD, batch, key, number
        )

    def loss(self, outside: list[jax.Array], x_BTD: jax.Array, index: jax.Array) -> Sums:
        """The loss's sums."""
        batch, weights_BT, _ = self.microbatch(index)
        return self.cut.loss(self.outer(outside), x_BTD, batch, weights_BT)
