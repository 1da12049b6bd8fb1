"""Attention over a cache: new keys and values are written where they belong, queries read them all.

All of it is local to a device, which has the heads and the rows of its part: no collective. A
donated cache is written in place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from models.attention import attention
from models.config import ModelConfig
from models.kv_cache import CacheShape, is_ring, repeats, to_int8
from models.masks import Mask, MaskArrays
from models.virtual_keys import VirtualKeys
from models.xla_attention import HIDDEN, LOWEST, TINY, Core
from parallel.contract import by_device
from parallel.rules import Rules

Arrays = dict[str, Array]
HEADS = "batch seq act_heads head_dim"
CROSS = "cross_"


class Places(NamedTuple):
    """Where the new tokens of a call belong, int32, divided as the batch is.

    Attributes:
      start_B: tokens that the cache has of each row, which is the position of the first new one.
      count_B: new tokens that are none of padding; 0 for a row that is not in use.
      row_B: the row of the cache, in its part of the batch, of each row of the call (one that there
        is not: nothing is written); None where those are the cache's, in order.
      table_BN: the blocks of each row, numbered in its part of the batch; None without a pool.
    """

    start_B: Array
    count_B: Array
    row_B: Array | None = None
    table_BN: Array | None = None


class LayerCache:
    """The cache of one layer while a call of the model is traced; `arrays` are then the new ones.

    Args:
      arrays: as `models.kv_cache.layer_kept` lists them.
      places: of the new tokens.
      fresh: the rows begin with this call: nothing of the cache is read.
      local: the layer sees a window.
    """

    def __init__(
        self,
        arrays: Arrays,
        config: ModelConfig,
        rules: Rules,
        shape: CacheShape,
        places: Places,
        *,
        fresh: bool,
        local: bool,
    ) -> None:
        self.arrays, self.config, self.rules = dict(arrays), config, rules
        self.places, self.fresh = places, fresh
        self.ring = is_ring(config, shape, local=local)
        self.paged = shape.block > 0 and not self.ring
        self.window = config.window if local and config.window else None
        scale = config.query_scale or config.head_dim**-0.5
        self.core = Core(Mask(), scale, config.attention_softcap or None, 0.0)

    def attend(
        self,
        q_BTNH: Array,
        k_BTKH: Array,
        v_BTKH: Array,
        mask: Mask,
        arrays: MaskArrays,
        bias: Array | None,
        before: VirtualKeys | None = None,
    ) -> Array:
        """Self-attention of new tokens, o_BTNH sharded as q.

        Args:
          mask, arrays: of the new tokens, where rows begin with them.
          bias: added to the scores, [N, T, T] where rows begin with these tokens, else
            [B, N, T, S]; None for none.
          before: keys and values that the cache does not have.
        """
        new = {"key": self._own_heads(k_BTKH), "value": self._own_heads(v_BTKH)}
        kept = {name: x for name, x in self.arrays.items() if not name.startswith(CROSS)}
        specs = _specs(kept)
        if not self.fresh:
            out = specs, self.rules.spec(HEADS)
            own = None if before is None else VirtualKeys(*map(self._own_heads, before))
            inputs = kept, new, q_BTNH, self.places, bias, own
            written, o_BTNH = _on_device(self._extend, out, *inputs)
            self.arrays |= written
            return o_BTNH
        self.arrays |= _on_device(self._write, specs, kept, new, self.places)
        if before is not None:
            k_BTKH, v_BTKH = before.joined(k_BTKH, v_BTKH)
            mask, arrays, bias = before.mask(mask, arrays, bias)
        return attention(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            mask,
            arrays,
            rules=self.rules,
            implementation=self.config.attention,
            scale=self.core.scale,
            softcap=self.core.softcap,
            bias_NTS=bias,
        )

    def attend_memory(
        self, q_BTNH: Array, project: Callable[[], list[Array]], seen_BS: Array | None
    ) -> Array:
        """Attention to a source or an image, whose keys and values are projected once.

        Args:
          project: makes them, [B, S, K, H] each.
          seen_BS: bool, what of it there is; None for all.
        """
        names = CROSS + "key", CROSS + "value"
        kept = {name: self.arrays[name] for name in names}
        if self.fresh:
            made = dict(zip(names, map(self._own_heads, project()), strict=True))
            self.arrays |= _on_device(_begin_rows, _specs(kept), kept, made, self.places)
            k, v = (jnp.swapaxes(made[name], 1, 2) for name in names)
        else:
            k, v = kept.values()

        def read(q: Array, k: Array, v: Array, seen_BS: Array | None) -> Array:
            seen_BTS = None if seen_BS is None else seen_BS[:, None]
            return attend_over(q, k, v, seen_BTS, self.core)

        return _on_device(read, self.rules.spec(HEADS), q_BTNH, k, v, seen_BS)

    def _own_heads(self, x_BTKH: Array) -> Array:
        """Heads as they are kept: where they are fewer than the parts, one for each part."""
        times = repeats(self.config, self.rules)
        B, T, K, H = x_BTKH.shape
        if times > 1:
            x = jnp.broadcast_to(x_BTKH[:, :, :, None], (B, T, K, times, H))
            x_BTKH = jnp.reshape(x, (B, T, K * times, H))
        return jax.reshard(x_BTKH, self.rules.spec(HEADS))

    # --- On one device ----------------------------------------------------------------------------

    def _extend(
        self,
        kept: Arrays,
        new: Arrays,
        q_BTNH: Array,
        places: Places,
        bias: Array | None,
        before: VirtualKeys | None,
    ) -> tuple[Arrays, Array]:
        """The written cache, and o_BTNH of queries that see it."""
        assert not self.ring or q_BTNH.shape[1] == 1, "the ring loses what earlier queries see"
        assert self.paged or places.row_B is None, "rows of a cache would be copied"
        kept = self._write(kept, new, places)
        read, dims = kept, "bcsh"
        if self.paged:
            assert places.table_BN is not None
            dims = "cbsh"
            read = {name: _rows_of_pool(x, places.table_BN) for name, x in kept.items()}
        q_time_BT = places.start_B[:, None] + jnp.arange(q_BTNH.shape[1])[None]
        slots = read["key"].shape[2]
        slot = jnp.arange(slots)[None, None]
        time = slot  # of the token in each slot, [1, 1, S] or [B, 1, S]
        if self.ring:
            last = (places.start_B + places.count_B - 1)[:, None, None]
            time = last - (last - slot) % slots
        seen_BTS = (time >= 0) & (time <= q_time_BT[:, :, None])
        if self.window is not None:
            seen_BTS &= q_time_BT[:, :, None] - time < self.window
        scales = read.get("key_scale"), read.get("value_scale")
        o_BTNH = attend_over(
            q_BTNH, read["key"], read["value"], seen_BTS, self.core, dims, bias, scales, before
        )
        return kept, o_BTNH

    def _write(self, kept: Arrays, new: Arrays, places: Places) -> Arrays:
        """The cache with new keys and values [B, T, C, H]."""
        if "key_scale" in kept:
            pairs = {name: to_int8(x) for name, x in new.items()}
            new = {name: whole for name, (whole, _) in pairs.items()}
            new |= {f"{name}_scale": scale for name, (_, scale) in pairs.items()}
        new = {name: x.astype(kept[name].dtype) for name, x in new.items()}
        if self.paged:
            return self._write_blocks(kept, new, places)
        if self.fresh:
            if self.ring:
                new = {n: _last_of(x, places.count_B, kept[n].shape[2]) for n, x in new.items()}
            return _begin_rows(kept, new, places)
        B, T = new["key"].shape[:2]
        index_BT = places.start_B[:, None] + jnp.arange(T)[None]
        slots = kept["key"].shape[2]
        if self.ring:
            index_BT = index_BT % slots
        index_BT = jnp.where(_real(places, T), index_BT, slots)  # of no slot: nothing is written
        row_B1 = jnp.arange(B)[:, None]
        return {
            name: x.at[row_B1, :, index_BT].set(new[name], mode="drop") for name, x in kept.items()
        }

    def _write_blocks(self, kept: Arrays, new: Arrays, places: Places) -> Arrays:
        assert places.table_BN is not None
        T = new["key"].shape[1]
        block, blocks = kept["key"].shape[2], kept["key"].shape[1]
        index_BT = places.start_B[:, None] + jnp.arange(T)[None]
        number_BT = jnp.minimum(index_BT // block, places.table_BN.shape[1] - 1)
        block_BT = jnp.take_along_axis(places.table_BN, number_BT, 1)
        block_BT = jnp.where(_real(places, T), block_BT, blocks)
        return {
            name: x.at[:, block_BT, index_BT % block].set(
                jnp.moveaxis(new[name], 2, 0), mode="drop"
            )
            for name, x in kept.items()
        }


def attend_over(
    q_BTNH: Array,
    k: Array,
    v: Array,
    seen_BTS: Array | None,
    core: Core,
    dims: str = "bcsh",
    bias_BNTS: Array | None = None,
    scales: tuple[Array | None, Array | None] = (None, None),
    before: VirtualKeys | None = None,
) -> Array:
    """o_BTNH of queries that see the slots of a cache, on one device.

    The softmax is in float32, as in `models.xla_attention`; products are in the dtype of q. Scales
    of int8 are applied to the scores and to the probabilities: the cache itself stays as it is.

    Args:
      k, v: in the order `dims` of their dims.
      seen_BTS: bool, [B or 1, T, S]; None where all is seen.
      scales: of k and v, float32, without the last dim.
      before: keys and values that every query sees, too, [B, P, C, H].
    """
    B, T, N, H = q_BTNH.shape
    C = k.shape[dims.index("c")]
    q_BCGTH = jnp.transpose(q_BTNH.reshape(B, T, C, N // C, H), (0, 2, 3, 1, 4))
    like = f"{dims}->bcs".replace("h", "")

    def scale_BCGTS(scale: Array) -> Array:
        return jnp.einsum(like, scale)[:, :, None, None]

    # XLA:CPU is faster with queries first, but would then transpose keys of a single head or row.
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    if C > 1 and B > 1:
        s = product(f"bcgth,{dims}->bcgts", q_BCGTH, k.astype(q_BTNH.dtype))
    else:
        s = jnp.moveaxis(product(f"{dims},bcgth->bcsgt", k.astype(q_BTNH.dtype), q_BCGTH), 2, 4)
    if scales[0] is not None:
        s = s * scale_BCGTS(scales[0])
    s = core.capped(s)
    if bias_BNTS is not None:
        s = s + bias_BNTS.reshape(B, C, N // C, *bias_BNTS.shape[2:])
    if seen_BTS is not None:
        s = jnp.where(seen_BTS[:, None, None], s, HIDDEN)
    if before is not None:
        s_BCGTP = product("bcgth,bpch->bcgtp", q_BCGTH, before.k_BPKH.astype(q_BTNH.dtype))
        s = jnp.concatenate([core.capped(s_BCGTP), s], -1)
    e = jnp.exp(s - jnp.maximum(jnp.max(s, -1, keepdims=True), LOWEST))
    p = e / jnp.maximum(jnp.sum(e, -1, keepdims=True), TINY)
    p_BCGTP, p = (None, p) if before is None else jnp.split(p, [before.k_BPKH.shape[1]], -1)
    if scales[1] is not None:
        p = p * scale_BCGTS(scales[1])
    o = jnp.einsum(f"bcgts,{dims}->bcgth", p.astype(q_BTNH.dtype), v.astype(q_BTNH.dtype))
    if before is not None and p_BCGTP is not None:
        own = before.v_BPKH.astype(q_BTNH.dtype)
        o = o + jnp.einsum("bcgtp,bpch->bcgth", p_BCGTP.astype(q_BTNH.dtype), own)
    return jnp.transpose(o, (0, 3, 1, 2, 4)).reshape(B, T, N, H)


def replaced_rows(kept: Array, new: Array | None, places: Places) -> Array:
    """Something of every row of the cache, [rows, ...], with that of the rows of a call."""

    def write(kept: Array, new: Array, places: Places) -> Array:
        return kept.at[_rows(places, len(kept))].set(new, mode="drop")

    return _on_device(write, _specs(kept), kept, new, places)


def _on_device(function: Callable[..., Any], out_specs: Any, *inputs: Any) -> Any:
    """`function` of each device's part of the inputs."""
    return by_device(function, _specs(inputs), out_specs, check_vma=False)(*inputs)


def _specs(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree)


def _real(places: Places, T: int) -> Array:
    """Which new tokens are none of padding, bool [B, T]."""
    return jnp.arange(T)[None] < places.count_B[:, None]


def _begin_rows(kept: Arrays, new: Arrays, places: Places) -> Arrays:
    """Rows of a cache whose first slots are new tokens [B, T, C, ...], padding too."""
    T = next(iter(new.values())).shape[1]
    return {
        name: x.at[_rows(places, len(x)), :, :T].set(
            jnp.swapaxes(new[name], 1, 2).astype(x.dtype), mode="drop"
        )
        for name, x in kept.items()
    }


def _rows(places: Places, rows: int) -> Array:
    """The rows of a cache that a call begins; no row of it where nothing is to be kept."""
    count_B, row_B = places.count_B, places.row_B
    return jnp.where(count_B > 0, jnp.arange(len(count_B)) if row_B is None else row_B, rows)


def _last_of(x_BT: Array, count_B: Array, slots: int) -> Array:
    """The last tokens of each row as they lie in a ring: token t in slot t % slots."""
    last_B1 = count_B[:, None] - 1
    time_BS = jnp.maximum(last_B1 - (last_B1 - jnp.arange(slots)[None]) % slots, 0)
    return jnp.take_along_axis(x_BT, jnp.expand_dims(time_BS, tuple(range(2, x_BT.ndim))), 1)


def _rows_of_pool(x: Array, table_BN: Array) -> Array:
    """[C, blocks, block, ...] -> [C, B, N * block, ...], the blocks of each row."""
    rows = x[:, table_BN]
    C, B, N, block, *rest = rows.shape
    return rows.reshape(C, B, N * block, *rest)
