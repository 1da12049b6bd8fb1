"""Tokens to their experts and back, over the expert axis of the mesh.

That axis divides the experts, and the batch too: outside of the experts it is one more `data` axis.
Two forms, each the transpose of its way back:

| form | there | back | rows on a device |
| --- | --- | --- | --- |
| slots (GShard, https://arxiv.org/abs/2006.16668) | all-to-all | all-to-all | experts x slots |
| sorted (MegaBlocks, https://arxiv.org/abs/2211.15841) | all-gather | reduce-scatter | worst case |

Slots are as many for every expert, so what is sent is known, and tokens without a slot are dropped.
The sorted form drops none: all choices of all tokens may fall on one device, and its shapes allow
for that. A padded all-to-all would have to send every token to every device for the same reason; a
gather brings each token once, however many of a device's experts want it, and its partial sums
leave by one reduction. For e devices, E experts, k choices and N tokens on each, the rows are
e N min(k, E / e), of which k N are used on average: with e = 8, E = 8, k = 2 a quarter.

Between the two, features are divided over `tensor` ("slot_embed"), so that no two devices send the
same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from parallel.contract import by_device
from parallel.rules import EXPERT, Rules

FREE = 2**30  # in an index: no choice stands here
SORTED, SLOTS = "groups rows", "group_batch act_experts slots"  # dims of an index, by form


def sort_rows(choice_BTK: jax.Array, experts: int, rules: Rules) -> tuple[jax.Array, jax.Array]:
    """Which choice stands in each row where rows are sorted by expert, on the expert's device.

    Args:
      choice_BTK: int32, the experts of every token ("batch seq choice"); those from `experts` on
        are none.
      experts: E, over all devices.

    Returns:
      index_GR, int32 ("groups rows"): the number of the choice among those of the devices that
      exchange tokens, or `FREE`; and sizes_GE, int32: rows of each of a device's experts. G is the
      number of parts of the batch.
    """
    here, rows = experts // rules.parts("act_experts"), row_count(choice_BTK.shape, experts, rules)

    def local(choice_BTK: jax.Array) -> tuple[jax.Array, jax.Array]:
        first = jnp.int32(0)
        if rules.size((EXPERT,)) > 1:
            choice_BTK = lax.all_gather(choice_BTK, EXPERT, axis=0, tiled=True)
            first = lax.axis_index(EXPERT) * here
        own = choice_BTK.reshape(-1) - first
        own = jnp.where((own >= 0) & (own < here), own, here)
        order = jnp.argsort(own, stable=True).astype(jnp.int32)[:rows]
        sizes = jnp.zeros(here, jnp.int32).at[own].add(1, mode="drop")
        used = jnp.arange(rows, dtype=jnp.int32) < jnp.sum(sizes)
        return jnp.where(used, order, FREE)[None], sizes[None]

    return by_device(
        local,
        (rules.spec("batch seq choice"),),
        (rules.spec(SORTED), rules.spec("groups rows")),
        check_vma=False,
    )(choice_BTK)


def row_count(shape: tuple[int, ...], experts: int, rules: Rules) -> int:
    """Rows on one device in the sorted form that no routing can exceed, for choices [B, T, K]."""
    B, T, K = shape
    tokens = B * T // rules.parts("group_batch")
    return tokens * min(K, experts // rules.parts("act_experts"))


def fill_slots(choice_BTK: jax.Array, experts: int, slots: int, rules: Rules) -> jax.Array:
    """Which choice stands in each of an expert's slots; the others are dropped.

    Slots belong to a row of the batch, so what is dropped depends on no layout. All first choices
    come before all second ones, earlier tokens before later ones (GShard).

    Returns:
      index_BES, int32 ("batch experts slots" before the exchange): the number of the choice among
      those of the device, or `FREE`.
    """

    def row(choice_TK: jax.Array) -> jax.Array:
        T, K = choice_TK.shape
        expert_M = choice_TK.T.reshape(-1)
        order_M = jnp.argsort(expert_M, stable=True).astype(jnp.int32)
        sorted_M = expert_M[order_M]
        rank_M = jnp.arange(K * T) - jnp.searchsorted(sorted_M, sorted_M)
        slot_M = jnp.where(rank_M < slots, sorted_M * slots + rank_M, experts * slots)
        number_M = order_M % T * K + order_M // T
        free = jnp.full(experts * slots, -1, jnp.int32)
        return free.at[slot_M].set(number_M, mode="drop").reshape(experts, slots)

    def local(choice_BTK: jax.Array) -> jax.Array:
        index_BES = jax.vmap(row)(choice_BTK)
        B, T, K = choice_BTK.shape
        own = index_BES + (jnp.arange(B, dtype=jnp.int32) * (T * K))[:, None, None]
        return jnp.where(index_BES >= 0, own, FREE)

    spec = rules.spec("batch seq choice")
    return by_device(local, (spec,), spec, check_vma=False)(choice_BTK)


@dataclass(frozen=True)
class Way:
    """How values of tokens travel.

    Attributes:
      rules: the layout.
      choices: of one token; 1 for values that each choice has its own of.
      feature: logical name of the last dim, "slot_embed" for features of tokens.
    """

    rules: Rules
    choices: int
    feature: str = "slot_embed"

    def at_home(self) -> P:
        """The partition of values where tokens are."""
        return self.rules.spec(f"batch seq {self.feature}")

    def away(self, index: jax.Array) -> P:
        """That of rows or slots at experts."""
        return self.rules.spec(f"{SORTED if index.ndim == 2 else SLOTS} {self.feature}")

    def index(self, index: jax.Array) -> P:
        """That of the index."""
        return self.rules.spec("groups rows" if index.ndim == 2 else "batch seq choice")

    @property
    def exchanges(self) -> bool:
        """Whether experts are on several devices."""
        return self.rules.size((EXPERT,)) > 1


def spread(values_BNX: jax.Array, index: jax.Array, way: Way) -> jax.Array:
    """What tokens have, at the rows or slots of their experts; zero where no token is.

    Args:
      values_BNX: one of each token (N = T), or with `choices` 1 one of each choice (N = T K).
      index: of choices, from `sort_rows` or `fill_slots`.

    Returns:
      [G, R, X] ("groups rows ...") or [B, E, S, X] ("group_batch act_experts slots ...").
    """
    return _spread(way, values_BNX.shape, values_BNX, index)


def collect(rows: jax.Array, index: jax.Array, tokens: tuple[int, int], way: Way) -> jax.Array:
    """The sum of each token's rows or slots, [B, T, X] for tokens (B, T): `spread` transposed."""
    return _collect(way, (*tokens, rows.shape[-1]), rows, index)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _spread(way: Way, shape: tuple[int, ...], values_BNX: jax.Array, index: jax.Array) -> jax.Array:
    def local(values_BNX: jax.Array, index: jax.Array) -> jax.Array:
        if way.exchanges and index.ndim == 2:
            values_BNX = lax.all_gather(values_BNX, EXPERT, axis=0, tiled=True)
        flat = values_BNX.reshape(-1, values_BNX.shape[-1])
        rows = flat.at[index // way.choices].get(mode="fill", fill_value=0)
        if way.exchanges and index.ndim == 3:
            rows = lax.all_to_all(rows, EXPERT, split_axis=1, concat_axis=0, tiled=True)
        return rows

    specs = way.at_home(), way.index(index)
    return by_device(local, specs, way.away(index), check_vma=False)(values_BNX, index)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _collect(way: Way, shape: tuple[int, ...], rows: jax.Array, index: jax.Array) -> jax.Array:
    B = shape[0] // way.rules.parts("batch")

    def local(rows: jax.Array, index: jax.Array) -> jax.Array:
        count, scattered = B, way.exchanges and index.ndim == 2
        if scattered:
            count *= way.rules.size((EXPERT,))
        elif way.exchanges:
            rows = lax.all_to_all(rows, EXPERT, split_axis=0, concat_axis=1, tiled=True)
        X = rows.shape[-1]
        sums = jnp.zeros((count * shape[1], X), rows.dtype)
        sums = sums.at[index // way.choices].add(rows, mode="drop").reshape(count, shape[1], X)
        return lax.psum_scatter(sums, EXPERT, tiled=True) if scattered else sums

    specs = way.away(index), way.index(index)
    return by_device(local, specs, way.at_home(), check_vma=False)(rows, index)


_spread.defvjp(
    lambda way, shape, values_BNX, index: (_spread(way, shape, values_BNX, index), index),
    lambda way, shape, index, d_rows: (_collect(way, shape, d_rows, index), None),
)
_collect.defvjp(
    lambda way, shape, rows, index: (_collect(way, shape, rows, index), index),
    lambda way, shape, index, d_sums: (_spread(way, shape, d_sums, index), None),
)
