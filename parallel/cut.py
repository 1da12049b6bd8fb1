"""A model that can be cut between layers, and what one stage of a pipeline has of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax import lax

from parallel.zero import Tree, together

Sums = tuple[jax.Array, dict[str, jax.Array]]
Lists = tuple[list[jax.Array], list[jax.Array]]  # of `Parts.divide`


@dataclass(frozen=True)
class Cut:
    """A model that can be cut between layers: pure functions on the tree of its parameters.

    Each gets the whole tree, in which the stacked arrays may be those of a few layers. The key is
    that of the micro-batch, or None.

    Attributes:
      embed: (params, batch, key) -> x_BTD; reads nothing stacked.
      blocks: (params, x_BTD, batch, key, number of the first layer, weights) -> x_BTD; reads
        what is stacked and what `parallel.rules.is_shared` names.
      loss: (params, x_BTD, batch, weights) -> (float32 sum, float32 sums); reads nothing stacked.
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
      batch, weights: trees of arrays [micro-batches, B, ...]; weights say what counts in the loss.
      key: of the step, or None.
    """

    own: list[jax.Array]
    outside: list[jax.Array]
    own_copy: list[jax.Array]
    outside_copy: list[jax.Array]
    batch: Tree
    weights: Tree
    key: jax.Array | None

    @property
    def microbatches(self) -> int:
        """How many there are."""
        return len(jax.tree.leaves(self.weights)[0])


@dataclass(frozen=True)
class Parts:
    """A tree of parameters as two lists: the layers of a stage, and what is outside of them.

    Attributes:
      tree: its structure.
      stacked: of its leaves, which are layers.
      shared: of those outside, which the layers read.
    """

    tree: Any
    stacked: list[bool]
    shared: list[bool]

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

    def read_by_layers(self, own: list[Any], outside: list[Any]) -> list[Any]:
        """What layers read of two lists: the first one, and the shared ones of the other."""
        return own + [a for a, shared in zip(outside, self.shared, strict=False) if shared]

    @property
    def stacked_of_read(self) -> list[bool]:
        """Of that list: which are of this stage's layers, and not of all."""
        return [True] * sum(self.stacked) + [False] * sum(self.shared)

    def replaced(self, read: list[Any], outside: list[Any]) -> tuple[list[Any], list[Any]]:
        """Both lists, with what layers read in its places; empty ones stay empty."""
        count = len(read) - sum(self.shared) if read else 0
        shared = iter(read[count:])
        new = [next(shared) if s else a for a, s in zip(outside, self.shared, strict=False)]
        return read[:count], new


@dataclass(frozen=True)
class StageModel:
    """The parts of the model as functions of what is differentiated; the rest is `arrays`.

    `index` is a micro-batch's number.
    """

    cut: Cut
    parts: Parts
    arrays: Arrays

    def microbatch(self, index: jax.Array) -> tuple[Tree, Tree, jax.Array | None]:
        """Batch, weights and key of a micro-batch."""
        key = self.arrays.key
        batch, weights = jax.tree.map(
            lambda a: lax.dynamic_index_in_dim(a, index, 0, keepdims=False),
            (self.arrays.batch, self.arrays.weights),
        )
        if key is not None and self.arrays.microbatches > 1:
            key = jax.random.fold_in(key, index)
        return batch, weights, key

    def params(self, lists: Lists, copies: Lists) -> Tree:
        """What the model takes, of both lists and of their copies, which may be empty."""
        whole = self.parts.join(*copies) if copies[1] else None
        return together(self.parts.join(*lists), whole)

    def outer(self, outside: list[jax.Array]) -> Tree:
        """The same for what reads nothing stacked."""
        arrays = self.arrays
        return self.params((arrays.own, outside), (arrays.own_copy, arrays.outside_copy))

    def embed(self, outside: list[jax.Array], index: jax.Array) -> jax.Array:
        """The first x_BTD."""
        batch, _, key = self.microbatch(index)
        return self.cut.embed(self.outer(outside), batch, key)

    def unit(
        self,
        weights: list[jax.Array],
        copies: list[jax.Array],
        x_BTD: jax.Array,
        number: jax.Array,
        index: jax.Array,
    ) -> jax.Array:
        """A few layers, of which `number` is the first; `weights` as `Parts.read_by_layers`."""
        batch, counted, key = self.microbatch(index)
        params = self.params(
            self.parts.replaced(weights, self.arrays.outside),
            self.parts.replaced(copies, self.arrays.outside_copy),
        )
        return self.cut.blocks(params, x_BTD, batch, key, number, counted)

    def loss(self, outside: list[jax.Array], x_BTD: jax.Array, index: jax.Array) -> Sums:
        """The loss's sums."""
        batch, weights, _ = self.microbatch(index)
        return self.cut.loss(self.outer(outside), x_BTD, batch, weights)
