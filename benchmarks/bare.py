"""A GPT training step in plain JAX: what somebody writes who needs this one model and nothing else.

Plain functions on a dict of arrays, `optax.adamw` behind a clip, layers scanned or unrolled. It is
what our step is timed against in `step_time.py`, so it is written to be fast: q, k and v are one
product, attention is two einsums and a softmax, and nothing is computed that one document a row
does not need. Layouts are those of `jax.jit`: shardings of arguments, constraints on activations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import PartitionSpec as P

Params = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """The model and its batch; the defaults are the published benchmark's."""

    vocab: int = 32_000
    embed: int = 512
    layers: int = 8
    heads: int = 8
    mlp: int = 2048
    length: int = 512
    batch: int = 8


@dataclass(frozen=True)
class Layout:
    """Mesh axes that divide the batch; the weights (FSDP); heads, feed-forward and vocabulary."""

    batch: str | None = None
    fsdp: str | None = None
    tensor: str | None = None

    @property
    def divided(self) -> bool:
        return self != Layout()

    def constrain(self, x: Array, *spec: str | None) -> Array:
        return jax.lax.with_sharding_constraint(x, P(*spec)) if self.divided else x

    def specs(self) -> Params:
        """The partition of every parameter."""
        f, t = self.fsdp, self.tensor
        blocks = {
            "norm1_gain": P(None, f),
            "norm1_bias": P(None, f),
            "w_qkv": P(None, f, None, t, None),
            "b_qkv": P(None, None, t, f),
            "w_out": P(None, t, None, f),
            "b_out": P(None, f),
            "norm2_gain": P(None, f),
            "norm2_bias": P(None, f),
            "w_up": P(None, f, t),
            "b_up": P(None, t or f),
            "w_down": P(None, t, f),
            "b_down": P(None, f),
        }
        rest = {"w_vocab": P(t, f), "w_position": P(None, f), "gain": P(f), "bias": P(f)}
        return rest | {"blocks": blocks}


def norm(x: Array, gain: Array, bias: Array) -> Array:
    """LayerNorm."""
    x = x - jnp.mean(x, -1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * gain + bias


def block(x: Array, w: Params, layout: Layout) -> Array:
    """One layer, [B, T, D] -> [B, T, D]."""
    T, H = x.shape[1], w["w_qkv"].shape[-1]
    batch, tensor = layout.batch, layout.tensor
    h = norm(x, w["norm1_gain"], w["norm1_bias"])
    qkv = jnp.einsum("btd,dcnh->cbnth", h, w["w_qkv"]) + w["b_qkv"][:, None, :, None]
    q, k, v = layout.constrain(qkv, None, batch, tensor, None, None)
    scores = jnp.einsum("bnth,bnsh->bnts", q, k) * H**-0.5
    scores = jnp.where(jnp.tril(jnp.ones((T, T), bool)), scores, -1e30)
    out = jnp.einsum("bnts,bnsh->btnh", jax.nn.softmax(scores, -1), v)
    x = x + jnp.einsum("btnh,nhd->btd", out, w["w_out"]) + w["b_out"]
    h = norm(x, w["norm2_gain"], w["norm2_bias"])
    up = layout.constrain(h @ w["w_up"] + w["b_up"], batch, None, tensor)
    x = x + jax.nn.gelu(up, approximate=True) @ w["w_down"] + w["b_down"]
    return layout.constrain(x, batch, None, None)


def loss(params: Params, tokens: Array, targets: Array, layout: Layout, unrolled: bool) -> Array:
    """The mean loss of the next token."""
    T = tokens.shape[1]
    x = params["w_vocab"][tokens] + params["w_position"][:T]
    x = layout.constrain(x, layout.batch, None, None)
    if unrolled:
        layers = params["blocks"]["w_up"].shape[0]
        for i in range(layers):
            x = block(x, jax.tree.map(lambda a, i=i: a[i], params["blocks"]), layout)
    else:
        x, _ = jax.lax.scan(lambda x, w: (block(x, w, layout), None), x, params["blocks"])
    x = norm(x, params["gain"], params["bias"])
    logits = jnp.einsum("btd,vd->btv", x, params["w_vocab"])
    logits = layout.constrain(logits, layout.batch, None, layout.tensor)
    if layout.tensor:  # a gather over divided columns would collect them first
        here = jnp.arange(logits.shape[-1]) == targets[..., None]
        picked = jnp.sum(jnp.where(here, logits, 0.0), -1)
    else:
        picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - picked)


def optimizer(learning_rate: float, weight_decay: float, clip_norm: float) -> Any:
    """AdamW behind a clip by global norm; gains and biases do not decay."""

    def decays(params: Params) -> Params:
        return jax.tree.map_with_path(lambda path, _: path[-1].key.startswith("w_"), params)

    adamw = optax.adamw(learning_rate, b2=0.95, weight_decay=weight_decay, mask=decays)
    return optax.chain(optax.clip_by_global_norm(clip_norm), adamw)


def make_step(
    optimizer: Any, layout: Layout, unrolled: bool
) -> Callable[..., tuple[tuple[Params, Any], Array]]:
    """((params, state of the optimizer), tokens, targets) -> (the same, loss); donate the first."""

    def step(state: tuple[Params, Any], tokens: Array, targets: Array) -> Any:
        params, opt_state = state
        value, grads = jax.value_and_grad(loss)(params, tokens, targets, layout, unrolled)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    return step
