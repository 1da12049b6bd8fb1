"""Scaled dot-product attention: one function for every mask, head layout and backend."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from models.masks import Mask, MaskArrays, visible
from parallel.rules import Rules

IMPLEMENTATIONS = ("auto", "xla")
HIDDEN = -1e30  # a hidden score: finite, so that a row that sees nothing gives 0 and not NaN


def attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    mask: Mask,
    arrays: MaskArrays = MaskArrays(),
    *,
    rules: Rules,
    implementation: str = "auto",
    scale: float | None = None,
    softcap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
) -> Array:
    """Attention with grouped K/V heads (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762;
    Ainslie et al. 2023, https://arxiv.org/abs/2305.13245).

    Matrix products are in the dtype of q, the softmax in float32. Queries that see nothing give 0.

    Args:
      q_BTNH: queries, sharded as `"batch seq act_heads head_dim"`.
      k_BSKH: keys, sharded as `"batch seq act_kv_heads head_dim"`; K divides N. Query head n reads
        K/V head n // (N / K).
      v_BSKH: values, as the keys.
      mask: which keys are seen.
      arrays: the segments and prefix lengths that the mask asks for.
      rules: the layout.
      implementation: `xla` keeps the probabilities, quadratic in T.
      scale: of the scores; default 1 / sqrt(H).
      softcap: scores are `softcap * tanh(score / softcap)` (Gemma Team 2024,
        https://arxiv.org/abs/2408.00118); None for none.
      dropout_rate: share of the probabilities that are dropped.
      dropout_key: needed where the rate is not 0; equal keys drop equally on every mesh.

    Returns:
      o_BTNH, sharded as q.

    Raises:
      ValueError: an implementation that does not exist.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"config.model.attention = {implementation!r}: choose one of {', '.join(IMPLEMENTATIONS)}"
        )
    assert (dropout_rate == 0.0) or dropout_key is not None
    scale = 1 / math.sqrt(q_BTNH.shape[-1]) if scale is None else scale
    q_BTKGH, k_BSKH, v_BSKH = _group_heads(q_BTNH, k_BSKH, v_BSKH, rules)
    o_BTKGH = _xla(
        q_BTKGH, k_BSKH, v_BSKH, mask, arrays, scale, softcap, dropout_rate, dropout_key, rules
    )
    spec = rules.spec("batch seq act_heads head_dim")
    return jnp.reshape(o_BTKGH, q_BTNH.shape, out_sharding=spec)


def _group_heads(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, rules: Rules
) -> tuple[Array, Array, Array]:
    """Splits the query heads into [K, G], K sharded as the query heads were.

    Replicated K/V heads, fewer than the parts of the query heads, are first repeated to one for each
    part: every device cuts out the one head that its query heads read.
    """
    B, T, N, H = q_BTNH.shape
    batch, seq, heads, head_dim = rules.spec("batch seq act_heads head_dim")
    if rules.axes("act_kv_heads") != rules.axes("act_heads"):
        repeats = max(1, rules.parts("act_heads") // k_BSKH.shape[2])
        spec = P(batch, seq, heads, head_dim)
        k_BSKH, v_BSKH = (jax.reshard(_repeat_heads(x, repeats), spec) for x in (k_BSKH, v_BSKH))
    K = k_BSKH.shape[2]
    assert N % K == 0, (N, K)
    spec = P(batch, seq, heads, None, head_dim)
    return jnp.reshape(q_BTNH, (B, T, K, N // K, H), out_sharding=spec), k_BSKH, v_BSKH


def _repeat_heads(x_BSKH: Array, repeats: int) -> Array:
    B, S, K, H = x_BSKH.shape
    x = jnp.broadcast_to(x_BSKH[:, :, :, None, :], (B, S, K, repeats, H))
    return jnp.reshape(x, (B, S, K * repeats, H))


def _xla(
    q_BTKGH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    mask: Mask,
    arrays: MaskArrays,
    scale: float,
    softcap: float | None,
    dropout_rate: float,
    dropout_key: Array | None,
    rules: Rules,
) -> Array:
    T, S = q_BTKGH.shape[1], k_BSKH.shape[1]
    seen = None if mask.sees_all else visible(mask, jnp.arange(T), jnp.arange(S), arrays)
    p_BKGTS = _probabilities(q_BTKGH, k_BSKH, seen, scale, softcap)
    if dropout_rate > 0.0:
        assert dropout_key is not None
        batch, seq, heads, _ = rules.spec("batch seq act_heads head_dim")
        keep = jax.random.bernoulli(
            dropout_key,
            1.0 - dropout_rate,
            p_BKGTS.shape,
            out_sharding=P(batch, heads, None, seq, None),
        )
        p_BKGTS = jnp.where(keep, p_BKGTS / (1.0 - dropout_rate), 0.0)
    return jnp.einsum("bkgts,bskh->btkgh", p_BKGTS, v_BSKH)


def scores(q_BTKGH: Array, k_BSKH: Array, scale: float, softcap: float | None) -> Array:
    """The scaled, capped scores in float32, [B, K, G, T, S]."""
    s = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)
    s = s * scale
    return s if softcap is None else softcap * jnp.tanh(s / softcap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _probabilities(
    q_BTKGH: Array, k_BSKH: Array, seen: Array | None, scale: float, softcap: float | None
) -> Array:
    """softmax(scores) in the dtype of q.

    The gradient is written out so that the quadratic residual is the probabilities alone, in the
    compute dtype and under their name, and so that its matrix products are in the compute dtype too.
    """
    s_BKGTS = scores(q_BTKGH, k_BSKH, scale, softcap)
    if seen is not None:
        s_BKGTS = jnp.where(seen[:, :, None], s_BKGTS, HIDDEN)
    # Half of HIDDEN as the least maximum: where nothing is seen, exp(HIDDEN - maximum) is 0.
    top = jnp.maximum(jnp.max(s_BKGTS, -1, keepdims=True), HIDDEN / 2)
    e_BKGTS = jnp.exp(s_BKGTS - top)
    total = jnp.maximum(jnp.sum(e_BKGTS, -1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return checkpoint_name((e_BKGTS / total).astype(q_BTKGH.dtype), "attention_probs")


def _probabilities_forward(q_BTKGH, k_BSKH, seen, scale, softcap):
    p_BKGTS = _probabilities(q_BTKGH, k_BSKH, seen, scale, softcap)
    return p_BKGTS, (q_BTKGH, k_BSKH, p_BKGTS)


def _probabilities_backward(scale, softcap, residuals, dp_BKGTS):
    q_BTKGH, k_BSKH, p_BKGTS = residuals
    p, dp = p_BKGTS.astype(jnp.float32), dp_BKGTS.astype(jnp.float32)
    ds = p * (dp - jnp.sum(p * dp, -1, keepdims=True))
    if softcap is not None:  # d/ds of softcap * tanh(s / softcap)
        ds = ds * (1.0 - jnp.square(scores(q_BTKGH, k_BSKH, scale, softcap) / softcap))
    ds = (ds * scale).astype(q_BTKGH.dtype)
    dq_BTKGH = jnp.einsum("bkgts,bskh->btkgh", ds, k_BSKH)
    dk_BSKH = jnp.einsum("bkgts,btkgh->bskh", ds, q_BTKGH)
    return dq_BTKGH, dk_BSKH, None


_probabilities.defvjp(_probabilities_forward, _probabilities_backward)
