"""Several LoRA adapters on one base, of which each row of a batch has its own.

Their factors stand side by side as one pair of as many columns as all ranks together, and of the
numbers between both products a row keeps those of its adapter: one product of a base for all rows,
as in S-LoRA (Sheng et al. 2023, https://arxiv.org/abs/2311.03285), and no weights that are copied
for each row. To generate with; nothing of it is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from parallel.adapted import Adapted, undivided
from parallel.lora import Lora
from parallel.low_rank import through
from parallel.stored import Door, Matrix

Tree = Any
NONE = -1  # of rows that have the base alone


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "into", "out_of", "kept"],
    meta_fields=["matrix", "owners"],
)
@dataclass(frozen=True)
class Several(Adapted):
    """A weight with the factors of several adapters.

    Attributes:
      into: [contracted dims, all ranks].
      out_of: [all ranks, the other dims], times alpha / r.
      owners: the adapter of each of those ranks.
      kept: [batch, all ranks], 1 where a row has that adapter; None until rows are known.
    """

    base: Any
    into: Any
    out_of: Any
    matrix: Matrix
    owners: tuple[int, ...]
    kept: Any = None
    own: ClassVar[tuple[str, ...]] = ("into", "out_of")

    def finished(
        self, door: Door, equation: str, x: jax.Array, y: jax.Array, out: P, inside: P
    ) -> jax.Array:
        """See `Adapted`."""
        assert self.kept is not None, "of_rows was not called"
        return y + through(door, equation, x, self.into, self.out_of, out, inside, self.kept)

    def merged(self) -> jax.Array:
        """There is no one array."""
        raise AssertionError("each row has its own adapter")


def side_by_side(base: Any, adapters: Sequence[tuple[int, Lora]]) -> Several:
    """A base and adapters by their numbers; all are stacked, or none is."""
    first, rank_axis = adapters[0][1], adapters[0][1].matrix.contracted
    stacked = jnp.ndim(first.into) - rank_axis - 1
    owners = [n for n, lora in adapters for _ in range(lora.into.shape[-1])]
    into = jnp.concatenate([undivided(lora.into) for _, lora in adapters], -1)
    scaled = [undivided(lora.out_of) * lora.scale for _, lora in adapters]
    return Several(base, into, jnp.concatenate(scaled, stacked), first.matrix, tuple(owners))


def of_rows(weights: Tree, adapter_B: jax.Array | None) -> Tree:
    """Weights whose `Several` know the adapter of each row, int32, `NONE` for none."""
    if adapter_B is None:
        return weights

    def known(node: Any) -> Any:
        if not isinstance(node, Several):
            return node
        kept = jnp.array(node.owners)[None] == adapter_B[:, None]
        return replace(node, kept=kept.astype(jnp.float32))

    return jax.tree.map(known, weights, is_leaf=lambda node: isinstance(node, Several))
