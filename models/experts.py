"""A mixture of experts: every token through a few of many feed-forwards, weighted and summed.

As Mixtral (https://arxiv.org/abs/2401.04088) and Qwen 3 (https://arxiv.org/abs/2505.09388) have
it. A token's weight is applied before its expert's last product, not after, which is the same sum:
the backward pass then reads no output of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from models.config import ModelConfig
from models.layers import ACTIVATION_RESIDUALS, ACTIVATIONS, normal, residual_std, weight
from models.router import Router, Sums, router_residuals, router_weights
from parallel.dispatch import FREE, SLOTS, SORTED, Way, collect, fill_slots, sort_rows, spread
from parallel.einsum import einsums
from parallel.footprint import Activation, Weight
from parallel.grouped import grouped
from parallel.remat import tag
from parallel.rules import Rules


class Experts(nnx.Module):
    """x_BTD -> (y_BTD, sums of the router's losses), both in the residual stream's layout."""

    def __init__(self, config: ModelConfig, rules: Rules, rngs: nnx.Rngs) -> None:
        D, F, E = config.embed_dim, config.feed_forward_dim, config.experts.number
        init = normal(config.init_std)
        init_down = normal(residual_std(config.init_std, config.layers))
        self.rules, self.activation, self.config = rules, config.activation, config.experts
        self.router = Router(config, rules, rngs)
        into, out_of = "experts embed -> mlp", "experts mlp -> embed"
        self.up = weight(rngs, (E, D, F), into, rules, init)
        self.gate = weight(rngs, (E, D, F), into, rules, init) if config.gated else None
        self.down = weight(rngs, (E, F, D), out_of, rules, init_down)

    def __call__(
        self, x_BTD: jax.Array, segments_BT: jax.Array, weights_BT: jax.Array | None
    ) -> tuple[jax.Array, Sums]:
        rules, config, (B, T, _) = self.rules, self.config, x_BTD.shape
        routing, sums = self.router(x_BTD, segments_BT, weights_BT)
        choice_BTK, weight_BTK = routing
        E, K = config.number, config.per_token

        product: Callable[..., list[jax.Array]]
        if config.capacity:
            where, slots = SLOTS, config.slots(T)
            index = fill_slots(choice_BTK, E, slots, rules)
            product = partial(einsums, "besx,exy->besy")
            if weights_BT is not None:
                filled = jnp.sum(index != FREE).astype(jnp.float32)
                routed = jnp.maximum(jnp.sum(choice_BTK < E).astype(jnp.float32), 1.0)
                sums["dropped_sum"] = (1.0 - filled / routed) * jnp.sum(weights_BT)
        else:
            where = SORTED
            index, sizes_GE = sort_rows(choice_BTK, E, rules)
            product = partial(grouped, sizes_GE)

        def spec(feature: str) -> P:
            return rules.spec(f"{where} {feature}")

        way = Way(rules, K)
        x_BTD = jax.reshard(x_BTD, rules.spec("batch seq slot_embed"))
        x = tag(spread(x_BTD, index, way), "expert_input")
        weight_BM1 = jnp.reshape(
            weight_BTK, (B, T * K, 1), out_sharding=rules.spec("batch seq choice")
        )
        scale = spread(weight_BM1, index, Way(rules, 1, "choice"))
        weights = [w.get_value() for w in (self.up, self.gate) if w is not None]
        act = spec("act_mlp")
        up, *gate = product(x, weights, [act] * len(weights), spec("act_embed"))
        up = tag(up, "mlp_up")
        nonlinearity = ACTIVATIONS[self.activation]
        h = nonlinearity(tag(gate[0], "mlp_gate")) * up if gate else nonlinearity(up)
        h = tag(h * scale.astype(h.dtype), "mlp_act")
        (y,) = product(h, [self.down.get_value()], [spec("slot_embed")])
        y_BTD = collect(y, index, (B, T), way)
        y_BTD = jax.reshard(y_BTD, rules.spec("batch residual_seq act_embed"))
        return tag(y_BTD, "mlp_projection"), sums


def at_experts(config: ModelConfig) -> str:
    """The logical dims of tokens at their experts, but for the last one."""
    return SLOTS if config.experts.capacity else SORTED


def experts_weights(config: ModelConfig) -> list[Weight]:
    """The weights of one `Experts`."""
    D, F, E = config.embed_dim, config.feed_forward_dim, config.experts.number
    into = Weight((E, D, F), "experts embed -> mlp")
    out_of = Weight((E, F, D), "experts mlp -> embed")
    return [*router_weights(config), *[into] * (2 if config.gated else 1), out_of]


def experts_residuals(config: ModelConfig) -> list[Activation]:
    """What its backward pass keeps without rematerialisation, as `feed_forward_residuals`; beside
    it the weights of rows, and h before it is weighted.
    """
    where = at_experts(config)
    wide = f"{where} act_mlp"
    inner = ACTIVATION_RESIDUALS[config.activation] + (3 if config.gated else 1)
    return [
        *router_residuals(),
        Activation("expert_index", where, "int32"),
        Activation("expert_scale", where, "float32"),
        Activation("expert_input", f"{where} act_embed", "product"),
        Activation("mlp_act", wide, "product"),
        *[Activation("mlp_gate" if config.gated else "mlp_up", wide)] * inner,
    ]
