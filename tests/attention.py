"""Inputs, a float64 reference and a comparison for every form of attention."""

from __future__ import annotations

import jax
import numpy as np

from models.attention import attention
from models.masks import Mask
from parallel.mesh import MeshConfig
from parallel.rules import ParallelConfig, Rules, make_rules

B, T, N, H = 2, 20, 4, 8
SEGMENTS = np.array([[1] * 9 + [2] * 8 + [0] * 3, [1] * 3 + [2] * 17], np.int32)
PREFIX = np.array([7, 0], np.int32)
FORMS = ["xla", "rows", "blocked"]


def rules_for(batch: int = B, heads: int = N, kv_heads: int = N, **sizes: int) -> Rules:
    dims = {
        "batch": (batch, "batch"),
        "heads": (heads, "heads"),
        "kv_heads": (kv_heads, "kv_heads"),
    }
    return make_rules(ParallelConfig(), MeshConfig(**({"data": 1} | sizes)).sizes(), dims)


def inputs(batch=B, q_length=T, k_length=T, heads=N, kv_heads=N, head_dim=H, dtype=np.float32):
    """q, k, v and the gradient of the output."""
    random = np.random.default_rng(0)
    q_shape, k_shape = (
        (batch, q_length, heads, head_dim),
        (batch, k_length, kv_heads, head_dim),
    )
    return [random.normal(size=s).astype(dtype) for s in (q_shape, k_shape, k_shape, q_shape)]


def reference(q, k, v, do, seen, softcap=None, scale=None, bias=None):
    """o, dq, dk, dv in float64, from the definition, and the gradient of a bias [N, T, S] if there
    is one; `seen` is [B, T, S].
    """
    q, k, v, do = (np.asarray(x, np.float64) for x in (q, k, v, do))
    group = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, group, 2), np.repeat(v, group, 2)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s = np.einsum("btnh,bsnh->bnts", q, k) * scale
    slope = np.ones_like(s)
    if softcap is not None:
        s, slope = softcap * np.tanh(s / softcap), 1 / np.cosh(s / softcap) ** 2
    if bias is not None:
        s = s + bias
    e = np.exp(s) * seen[:, None]
    total = e.sum(-1, keepdims=True)
    p = e / np.where(total == 0, 1, total)
    o = np.einsum("bnts,bsnh->btnh", p, v)
    dp = np.einsum("btnh,bsnh->bnts", do, v)
    dbias = p * (dp - (p * dp).sum(-1, keepdims=True))
    ds = dbias * slope * scale
    dq = np.einsum("bnts,bsnh->btnh", ds, k)
    dk = np.einsum("bnts,btnh->bsnh", ds, q)
    dv = np.einsum("bnts,btnh->bsnh", p, do)
    shape = (*k.shape[:2], -1, group, k.shape[-1])
    found = o, dq, dk.reshape(shape).sum(3), dv.reshape(shape).sum(3)
    return found if bias is None else (*found, dbias.sum(0))


def with_gradients(mask: Mask, rules: Rules, **options):
    """A jitted (q, k, v, do, arrays) -> (o, dq, dk, dv)."""

    def run(q, k, v, do, arrays):
        core = lambda q, k, v: attention(q, k, v, mask, arrays, rules=rules, **options)
        o, pull = jax.vjp(core, q, k, v)
        return (o, *pull(do))

    return jax.jit(run)


def assert_near(got, want, tolerance):
    """Each of o, dq, dk, dv to `tolerance` of its norm."""
    for name, x, y in zip(("o", "dq", "dk", "dv"), got, want, strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y), name
