"""Attention block by block with an online softmax: memory linear in the sequence length.

FlashAttention-2 (Dao 2023, https://arxiv.org/abs/2307.08691) as one `lax.scan` over the pairs of a
query block and a key block that can see each other. The table of pairs is made by plain Python, so
what causality or a window hides is never computed, and the program does not grow with the length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from models.masks import Mask, MaskArrays, key_range, visible
from models.xla_attention import HIDDEN, LOWEST, TINY, Core

BLOCK = 128  # on CPU as fast as 64; 256 and 512 are slower and compute more that is masked away

# Dims of blocked arrays: i query blocks of Q queries (`q_iBKGQH`), j key blocks of C keys
# (`k_jBKCH`).
Carry = tuple[Array, Array, Array]
Residuals = tuple[Array, Array, Array, MaskArrays, Array | None, Array, Array]


def block_pairs(mask: Mask, q_length: int, k_length: int, block: int) -> np.ndarray:
    """The pairs (query block, key block) that can see each other, int32 [pairs, 2], query-major."""
    pairs = []
    for i, start in enumerate(range(0, q_length, block)):
        first, stop = key_range(mask, start, min(start + block, q_length), k_length)
        pairs += [(i, j) for j in range(first // block, -(-stop // block))]
    return np.asarray(pairs, np.int32).reshape(-1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def blocked_attention(
    q_BTKGH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    arrays: MaskArrays,
    dropout_key: Array | None,
    core: Core,
    block: int = BLOCK,
) -> Array:
    """o_BTKGH. The residuals are q, k, v, "attention_out" and "attention_lse", nothing quadratic.

    Dropout draws from one key for each pair of blocks: another mask than that of `xla_attention`.
    """
    return _forward(q_BTKGH, k_BSKH, v_BSKH, arrays, dropout_key, core, block)[0]


def _forward(
    q_BTKGH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    arrays: MaskArrays,
    dropout_key: Array | None,
    core: Core,
    block: int,
) -> tuple[Array, Residuals]:
    T, S = q_BTKGH.shape[1], k_BSKH.shape[1]
    q_iBKGQH, k_jBKCH, v_jBKCH = (_to_blocks(x, block) for x in (q_BTKGH, k_BSKH, v_BSKH))
    see = _see(core, arrays, block, S)

    def step(carry: Carry, pair: Array) -> tuple[Carry, None]:
        o_iBKGQH, top_iBKGQ, total_iBKGQ = carry
        i, j = pair[0], pair[1]
        s = see(core.scores(_at(q_iBKGQH, i), _at(k_jBKCH, j)), i, j)
        old_top = _at(top_iBKGQ, i)
        top = jnp.maximum(old_top, jnp.max(s, -1))
        shrink = jnp.exp(old_top - top)
        e = jnp.exp(s - top[..., None])
        total = _at(total_iBKGQ, i) * shrink + jnp.sum(e, -1)
        e = core.dropper(_key(dropout_key, i, j), e)(e).astype(v_BSKH.dtype)
        o = _at(o_iBKGQH, i) * shrink[..., None] + _product("bkgqc,bkch->bkgqh", e, _at(v_jBKCH, j))
        return (_put(o_iBKGQH, o, i), _put(top_iBKGQ, top, i), _put(total_iBKGQ, total, i)), None

    zeros_o = jnp.zeros_like(q_iBKGQH, dtype=jnp.float32)
    zeros = jnp.zeros_like(q_iBKGQH[..., 0], dtype=jnp.float32)
    # Made when they are wanted: of a program of many layers XLA would make all of theirs at once.
    zeros_o, zeros, q_iBKGQH = lax.optimization_barrier((zeros_o, zeros, q_iBKGQH))
    pairs = jnp.asarray(block_pairs(core.mask, T, S, block))
    (o_iBKGQH, top_iBKGQ, total_iBKGQ), _ = lax.scan(step, (zeros_o, zeros + LOWEST, zeros), pairs)
    total_iBKGQ = jnp.maximum(total_iBKGQ, TINY)
    o_BTKGH = _from_blocks((o_iBKGQH / total_iBKGQ[..., None]).astype(q_BTKGH.dtype), T)
    o_BTKGH = core.named(o_BTKGH, "out")
    lse_iBKGQ = core.named(top_iBKGQ + jnp.log(total_iBKGQ), "lse")
    return o_BTKGH, (q_BTKGH, k_BSKH, v_BSKH, arrays, dropout_key, o_BTKGH, lse_iBKGQ)


def _backward(
    core: Core, block: int, residuals: Residuals, do_BTKGH: Array
) -> tuple[Array, Array, Array, None, None]:
    q_BTKGH, k_BSKH, v_BSKH, arrays, dropout_key, o_BTKGH, lse_iBKGQ = residuals
    T, S, dtype = q_BTKGH.shape[1], k_BSKH.shape[1], q_BTKGH.dtype
    q_iBKGQH, k_jBKCH, v_jBKCH, o_iBKGQH, do_iBKGQH = (
        _to_blocks(x, block) for x in (q_BTKGH, k_BSKH, v_BSKH, o_BTKGH, do_BTKGH)
    )
    # sum over keys of p dp, without the keys: Dao 2023, section 3.1.2
    delta_iBKGQ = jnp.sum(o_iBKGQH.astype(jnp.float32) * do_iBKGQH.astype(jnp.float32), -1)
    see = _see(core, arrays, block, S)

    def step(carry: Carry, pair: Array) -> tuple[Carry, None]:
        dq_iBKGQH, dk_jBKHC, dv_jBKHC = carry
        i, j = pair[0], pair[1]
        q, do, k, v = _at(q_iBKGQH, i), _at(do_iBKGQH, i), _at(k_jBKCH, j), _at(v_jBKCH, j)
        s = core.scores(q, k)
        p = jnp.exp(see(s, i, j) - _at(lse_iBKGQ, i)[..., None])
        drop = core.dropper(_key(dropout_key, i, j), p)
        # dk and dv lie with H before C here: contracting the rows of the larger operand, p or ds,
        # takes twice as long on CPU.
        dv = _product("bkgqh,bkgqc->bkhc", do, drop(p).astype(dtype))
        dp = drop(_product("bkgqh,bkch->bkgqc", do, v))
        ds = p * (dp - _at(delta_iBKGQ, i)[..., None])
        ds = core.through_scores(ds, s).astype(dtype)
        dq = _at(dq_iBKGQH, i) + _product("bkgqc,bkch->bkgqh", ds, k)
        dk = _at(dk_jBKHC, j) + _product("bkgqh,bkgqc->bkhc", q, ds)
        dv = _at(dv_jBKHC, j) + dv
        return (_put(dq_iBKGQH, dq, i), _put(dk_jBKHC, dk, j), _put(dv_jBKHC, dv, j)), None

    like = functools.partial(jnp.zeros_like, dtype=jnp.float32)
    zeros_k = like(jnp.swapaxes(k_jBKCH, -1, -2))
    zeros = (like(q_iBKGQH), zeros_k, zeros_k)
    pairs = jnp.asarray(block_pairs(core.mask, T, S, block))
    (dq, dk, dv), _ = lax.scan(step, zeros, pairs)
    dk, dv = jnp.swapaxes(dk, -1, -2), jnp.swapaxes(dv, -1, -2)
    dq, dk, dv = (
        _from_blocks(g.astype(dtype), length) for g, length in ((dq, T), (dk, S), (dv, S))
    )
    return dq, dk, dv, None, None


blocked_attention.defvjp(_forward, _backward)


def _see(
    core: Core, arrays: MaskArrays, block: int, k_length: int
) -> Callable[[Array, Array, Array], Array]:
    """The function that hides what query block i may not see of key block j."""
    q_segments_iBQ, k_segments_jBC = (
        None if x is None else _to_blocks(x, block) for x in arrays[:2]
    )

    def see(s_BKGQC: Array, i: Array, j: Array) -> Array:
        q_index, k_index = i * block + jnp.arange(block), j * block + jnp.arange(block)
        here = MaskArrays(
            None if q_segments_iBQ is None else _at(q_segments_iBQ, i),
            None if k_segments_jBC is None else _at(k_segments_jBC, j),
            arrays.prefix_B,
        )
        seen = visible(core.mask, q_index, k_index, here)
        if k_length % block:  # the last block of keys was filled up
            seen = seen & (k_index < k_length)[None, None, None, :]
        return jnp.where(seen[:, :, None], s_BKGQC, HIDDEN)

    return see


def _to_blocks(x: Array, block: int) -> Array:
    """[B, T, ...] to [T / block, B, ..., block(, H)], the last one filled up with zeros.

    Heads come before time, so that every matrix product reads rows that lie together.
    """
    B, T = x.shape[:2]
    count = -(-T // block)
    x = jnp.pad(x, [(0, 0), (0, count * block - T)] + [(0, 0)] * (x.ndim - 2))
    spec = jax.typeof(x).sharding.spec
    shape, spec = (B, count, block, *x.shape[2:]), P(spec[0], None, None, *spec[2:])
    x = jnp.reshape(x, shape, out_sharding=spec)
    x = jnp.moveaxis(x, 1, 0)
    return jnp.moveaxis(x, 2, -2) if x.ndim > 3 else x


def _from_blocks(x: Array, length: int) -> Array:
    """The inverse of `_to_blocks` for arrays that end in H."""
    x = jnp.moveaxis(jnp.moveaxis(x, -2, 2), 0, 1)
    B, count, block = x.shape[:3]
    spec = jax.typeof(x).sharding.spec
    shape, spec = (B, count * block, *x.shape[3:]), P(spec[0], None, *spec[3:])
    return jnp.reshape(x, shape, out_sharding=spec)[:, :length]


def _product(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _at(x: Array, i: Array) -> Array:
    return lax.dynamic_index_in_dim(x, i, 0, keepdims=False)


def _put(x: Array, block: Array, i: Array) -> Array:
    return lax.dynamic_update_index_in_dim(x, block, i, 0)


def _key(dropout_key: Array | None, i: Array, j: Array) -> Array | None:
    if dropout_key is None:
        return None
    return jax.random.fold_in(jax.random.fold_in(dropout_key, i), j)
