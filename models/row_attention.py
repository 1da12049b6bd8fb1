"""Attention one block of queries at a time, each against all the keys that it may see.

The loop is unrolled, so every block of queries has keys of its own length: what causality or a
window hides is never computed, and no softmax is carried from one block of keys to the next. The
program grows with the length, which suits a few blocks on CPU; `blocked_attention` is for the rest.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from models.masks import Mask, MaskArrays, key_range, visible
from models.xla_attention import HIDDEN, LOWEST, TINY, Core

Residuals = tuple[Array, Array, Array, MaskArrays, Array | None, Array, Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def row_attention(
    q_BTKGH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    arrays: MaskArrays,
    dropout_key: Array | None,
    core: Core,
    block: int,
) -> Array:
    """o_BTKGH. The residuals are q, k, v, "attention_out" and "attention_lse", nothing quadratic.

    Dropout draws from one key for each block of queries: another mask than in the other forms.
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
    q_BKGTH, (k_BKSH, v_BKSH) = _heads_first(q_BTKGH), map(_heads_first, (k_BSKH, v_BSKH))
    outs, lses = [], []
    for number, (rows, keys) in enumerate(_blocks(core.mask, q_BTKGH, k_BSKH, block)):
        s = core.scores(q_BKGTH[..., rows, :], k_BKSH[..., keys, :])
        s = _hide(s, core.mask, arrays, rows, keys)
        top = jnp.maximum(jnp.max(s, -1, keepdims=True, initial=LOWEST), LOWEST)
        e = jnp.exp(s - top)
        total = jnp.maximum(jnp.sum(e, -1, keepdims=True), TINY)
        e = core.dropper(_key(dropout_key, number), e)(e).astype(v_BSKH.dtype)
        outs.append(_product("bkgqc,bkch->bkgqh", e, v_BKSH[..., keys, :]) / total)
        lses.append((top + jnp.log(total))[..., 0])
    o_BTKGH = _heads_last(outs).astype(q_BTKGH.dtype)
    o_BTKGH = core.named(o_BTKGH, "out")
    lse_BKGT = core.named(jnp.concatenate(lses, -1), "lse")
    return o_BTKGH, (q_BTKGH, k_BSKH, v_BSKH, arrays, dropout_key, o_BTKGH, lse_BKGT)


def _backward(
    core: Core, block: int, residuals: Residuals, do_BTKGH: Array
) -> tuple[Array, Array, Array, None, None]:
    q_BTKGH, k_BSKH, v_BSKH, arrays, dropout_key, o_BTKGH, lse_BKGT = residuals
    dtype = q_BTKGH.dtype
    q_BKGTH, do_BKGTH, k_BKSH, v_BKSH = map(_heads_first, (q_BTKGH, do_BTKGH, k_BSKH, v_BSKH))
    # sum over keys of p dp, without the keys: Dao 2023, section 3.1.2
    delta = jnp.sum(o_BTKGH.astype(jnp.float32) * do_BTKGH.astype(jnp.float32), -1)
    delta_BKGT = jnp.transpose(delta, (0, 2, 3, 1))
    dqs = []
    # The gradients of keys lie with H before S: a product that contracts its larger operand's rows
    # would first transpose it.
    like = functools.partial(jnp.zeros_like, dtype=jnp.float32)
    dk_BKHS, dv_BKHS = (like(jnp.swapaxes(x, -1, -2)) for x in (k_BKSH, v_BKSH))
    for number, (rows, keys) in enumerate(_blocks(core.mask, q_BTKGH, k_BSKH, block)):
        q, do, k, v = (
            x[..., at, :]
            for x, at in ((q_BKGTH, rows), (do_BKGTH, rows), (k_BKSH, keys), (v_BKSH, keys))
        )
        s = core.scores(q, k)
        p = jnp.exp(_hide(s, core.mask, arrays, rows, keys) - lse_BKGT[..., rows, None])
        drop = core.dropper(_key(dropout_key, number), p)
        dv = _product("bkgqh,bkgqc->bkhc", do, drop(p).astype(dtype))
        dp = drop(_product("bkgqh,bkch->bkgqc", do, v))
        ds = core.through_scores(p * (dp - delta_BKGT[..., rows, None]), s).astype(dtype)
        dqs.append(_product("bkgqc,bkch->bkgqh", ds, k))
        dk_BKHS = dk_BKHS.at[..., keys].add(_product("bkgqh,bkgqc->bkhc", q, ds))
        dv_BKHS = dv_BKHS.at[..., keys].add(dv)
    dk, dv = (jnp.transpose(x, (0, 3, 1, 2)).astype(dtype) for x in (dk_BKHS, dv_BKHS))
    return _heads_last(dqs).astype(dtype), dk, dv, None, None


row_attention.defvjp(_forward, _backward)


def _blocks(mask: Mask, q_BTKGH: Array, k_BSKH: Array, block: int) -> list[tuple[slice, slice]]:
    """Every block of queries, and the keys outside which it sees nothing."""
    T, S = q_BTKGH.shape[1], k_BSKH.shape[1]
    rows = [slice(start, min(start + block, T)) for start in range(0, T, block)]
    return [(row, slice(*key_range(mask, row.start, row.stop, S))) for row in rows]


def _hide(s_BKGQC: Array, mask: Mask, arrays: MaskArrays, rows: slice, keys: slice) -> Array:
    q_segments, k_segments, prefix_B = arrays
    here = MaskArrays(
        None if q_segments is None else q_segments[:, rows],
        None if k_segments is None else k_segments[:, keys],
        prefix_B,
    )
    q_index, k_index = (jnp.arange(at.start, at.stop) for at in (rows, keys))
    return jnp.where(visible(mask, q_index, k_index, here)[:, :, None], s_BKGQC, HIDDEN)


def _heads_first(x: Array) -> Array:
    """[B, T, heads.., H] to [B, heads.., T, H]: every product reads rows that lie together."""
    return jnp.moveaxis(x, 1, -2)


def _heads_last(blocks: list[Array]) -> Array:
    return jnp.moveaxis(jnp.concatenate(blocks, -2), -2, 1)


def _product(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _key(dropout_key: Array | None, number: int) -> Array | None:
    return None if dropout_key is None else jax.random.fold_in(dropout_key, number)
