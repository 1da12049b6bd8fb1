"""Attention as two matrix products and a softmax; the gradient reads the probabilities."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from models.masks import Mask, MaskArrays, visible

HIDDEN = -1e30  # a hidden score: finite, so that a row that sees nothing gives 0 and not NaN
LOWEST = HIDDEN / 2  # the least maximum of a row: exp(HIDDEN - LOWEST) is 0
TINY = float(jnp.finfo(jnp.float32).tiny)


@dataclass(frozen=True)
class Core:
    """What one attention computes, statically; see `models.attention.attention` for the fields."""

    mask: Mask
    scale: float
    softcap: float | None
    dropout_rate: float
    sublayer: str = "attention"

    def named(self, x: Array, what: str) -> Array:
        """A value under its name for rematerialisation (`parallel.remat.NAMES`)."""
        return checkpoint_name(x, f"{self.sublayer}_{what}")

    def scores(self, q_BKGTH: Array, k_BKSH: Array) -> Array:
        """The scaled and capped scores in float32, [B, K, G, T, S]."""
        s = jnp.einsum("bkgth,bksh->bkgts", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32)
        return self.capped(s)

    def capped(self, s: Array) -> Array:
        """Products `q . k` scaled, and capped."""
        s = s * self.scale
        return s if self.softcap is None else self.softcap * jnp.tanh(s / self.softcap)

    def through_scores(self, ds: Array, s: Array) -> Array:
        """The gradient of `q . k`, from that of the capped scores `s` (hidden ones have ds = 0)."""
        if self.softcap is not None:  # the derivative of softcap * tanh(x / softcap)
            ds = ds * (1.0 - jnp.square(s / self.softcap))
        return ds * self.scale

    def dropper(self, key: Array | None, like: Array) -> Callable[[Array], Array]:
        """The function that drops some of an array of this shape and scales up the rest.

        It is linear and its own transpose: what drops the probabilities drops their gradient.
        """
        if self.dropout_rate == 0.0:
            return lambda p: p
        assert key is not None
        # Drawn in the global view: the same mask on every mesh.
        spec, kept = jax.typeof(like).sharding.spec, 1.0 - self.dropout_rate
        keep = jax.random.bernoulli(key, kept, like.shape, out_sharding=spec)
        return lambda p: jnp.where(keep, p / kept, 0.0)


def xla_attention(
    q_BTKGH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    arrays: MaskArrays,
    dropout_key: Array | None,
    core: Core,
    bias_NTS: Array | None = None,
) -> Array:
    """o_BTKGH, named "attention_out". The residuals are q, k, v and "attention_probs", in the dtype
    of q. The bias is added to the scores.
    """
    q_BKGTH = jnp.transpose(q_BTKGH, (0, 2, 3, 1, 4))
    k_BKSH, v_BKSH = (jnp.transpose(x, (0, 2, 1, 3)) for x in (k_BSKH, v_BSKH))
    seen = None
    if not core.mask.sees_all:
        q_index, k_index = jnp.arange(q_BKGTH.shape[3]), jnp.arange(k_BKSH.shape[2])
        seen = visible(core.mask, q_index, k_index, arrays)
    bias_KGTS = None
    if bias_NTS is not None:
        K, G = q_BKGTH.shape[1:3]
        heads, *rest = jax.typeof(bias_NTS).sharding.spec
        spec = jax.P(heads, None, *rest)
        bias_KGTS = jnp.reshape(bias_NTS, (K, G, *bias_NTS.shape[1:]), out_sharding=spec)
    p_BKGTS = _probabilities(q_BKGTH, k_BKSH, bias_KGTS, seen, core)
    p_BKGTS = core.dropper(dropout_key, p_BKGTS)(p_BKGTS)
    o_BKGTH = jnp.einsum("bkgts,bksh->bkgth", p_BKGTS, v_BKSH)
    return core.named(jnp.transpose(o_BKGTH, (0, 3, 1, 2, 4)), "out")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _probabilities(
    q_BKGTH: Array, k_BKSH: Array, bias_KGTS: Array | None, seen: Array | None, core: Core
) -> Array:
    """softmax(scores) in the dtype of q.

    The gradient is written out so that its one quadratic residual is the probabilities, under their
    name and in the compute dtype, and so that its matrix products are in the compute dtype too.
    """
    return _forward(q_BKGTH, k_BKSH, bias_KGTS, seen, core)[0]


def _forward(
    q_BKGTH: Array, k_BKSH: Array, bias_KGTS: Array | None, seen: Array | None, core: Core
) -> tuple[Array, tuple[Array, Array, Array, Array | None]]:
    s_BKGTS = core.scores(q_BKGTH, k_BKSH)
    if bias_KGTS is not None:
        s_BKGTS = s_BKGTS + bias_KGTS[None]
    if seen is not None:
        s_BKGTS = jnp.where(seen[:, :, None], s_BKGTS, HIDDEN)
    top = jnp.maximum(jnp.max(s_BKGTS, -1, keepdims=True), LOWEST)
    e_BKGTS = jnp.exp(s_BKGTS - top)
    total = jnp.maximum(jnp.sum(e_BKGTS, -1, keepdims=True), TINY)
    p_BKGTS = core.named((e_BKGTS / total).astype(q_BKGTH.dtype), "probs")
    return p_BKGTS, (q_BKGTH, k_BKSH, p_BKGTS, bias_KGTS)


def _backward(
    core: Core, residuals: tuple[Array, Array, Array, Array | None], dp_BKGTS: Array
) -> tuple[Array, Array, Array | None, None]:
    q_BKGTH, k_BKSH, p_BKGTS, bias_KGTS = residuals
    p, dp = p_BKGTS.astype(jnp.float32), dp_BKGTS.astype(jnp.float32)
    ds = p * (dp - jnp.sum(p * dp, -1, keepdims=True))
    dbias_KGTS = None if bias_KGTS is None else jnp.sum(ds, 0)
    # The scores are computed again only where their cap's derivative asks for them.
    s = ds if core.softcap is None else core.scores(q_BKGTH, k_BKSH)
    ds = core.through_scores(ds, s).astype(q_BKGTH.dtype)
    dq_BKGTH = jnp.einsum("bkgts,bksh->bkgth", ds, k_BKSH)
    # Contracting the rows of ds, the larger operand, takes twice as long on CPU.
    dk_BKHS = jnp.einsum("bkgth,bkgts->bkhs", q_BKGTH, ds)
    return dq_BKGTH, jnp.swapaxes(dk_BKHS, -1, -2), dbias_KGTS, None


_probabilities.defvjp(_forward, _backward)
