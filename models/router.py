"""Which experts a token goes to, with what weights, and the losses that keep experts in use.

In float32, as Switch (Fedus et al. 2021, https://arxiv.org/abs/2101.03961, section 2.4) does it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import ModelConfig
from models.experts_config import ExpertsConfig
from models.layers import normal, weight
from parallel.contract import by_device
from parallel.einsum import einsum
from parallel.footprint import Activation, Weight
from parallel.remat import tag
from parallel.rules import Rules

Sums = dict[str, jax.Array]


class Routing(NamedTuple):
    """Of every token: its experts, int32 [B, T, K], the number of experts where it has none; and
    their weights, float32 [B, T, K].
    """

    choice_BTK: jax.Array
    weight_BTK: jax.Array


class Router(nnx.Module):
    """x_BTD in the residual stream's layout -> where its tokens go, and the sums of the losses.

    The losses reach the loss of the step by `with_gradient`: a layer gives nothing but x_BTD, so
    that stages of a pipeline run it as any other.
    """

    def __init__(self, config: ModelConfig, rules: Rules, rngs: nnx.Rngs) -> None:
        D, E = config.embed_dim, config.experts.number
        self.config, self.rules = config.experts, rules
        self.router = weight(rngs, (D, E), "embed -> router", rules, normal(config.init_std))

    def __call__(
        self, x_BTD: jax.Array, segments_BT: jax.Array, weights_BT: jax.Array | None
    ) -> tuple[Routing, Sums]:
        """Routes tokens; those of segment 0 go nowhere.

        Args:
          weights_BT: float32, of tokens in the loss of the step; None: no losses of the router.
        """
        rules, config = self.rules, self.config
        table = jax.tree.map(lambda w: w.astype(jnp.float32), self.router.get_value())
        own = rules.spec("batch residual_seq act_router")
        logits_BTE = einsum("btd,de->bte", x_BTD.astype(jnp.float32), table, own)
        logits_BTE = jax.reshard(logits_BTE, rules.spec("batch seq act_router"))

        spec = rules.spec("batch seq choice")
        top = by_device(lambda a: jax.lax.top_k(a, config.per_token)[1], (spec,), spec)
        # Saved by every policy: computed again, a tie might fall otherwise, and rows that are kept
        # would be other tokens'.
        choice_BTK = tag(top(jax.lax.stop_gradient(logits_BTE)), "expert_choice")

        sums: Sums = {}
        if weights_BT is not None:
            losses, sums = router_losses(
                logits_BTE, choice_BTK, weights_BT, config.balance_loss, config.z_loss
            )
            logits_BTE = with_gradient(logits_BTE, losses)
        probs_BTE = jax.nn.softmax(logits_BTE)
        pick = by_device(
            lambda probs, choice: jnp.take_along_axis(probs, choice, axis=-1), (spec, spec), spec
        )
        weight_BTK = pick(probs_BTE, choice_BTK)
        if config.normalise:
            weight_BTK = weight_BTK / jnp.sum(weight_BTK, -1, keepdims=True)
        routed = jnp.expand_dims(segments_BT > 0, -1)
        choice_BTK = jnp.where(routed, choice_BTK, config.number)
        return Routing(choice_BTK, weight_BTK), sums


def router_losses(
    logits_BTE: jax.Array,
    choice_BTK: jax.Array,
    weights_BT: jax.Array,
    balance_loss: float,
    z_loss: float,
) -> tuple[jax.Array, Sums]:
    """The load-balancing loss and the z-loss of one layer, over the whole micro-step.

    balance: E sum_e f_e P_e, of the choices of e per token f_e and its mean probability P_e
    (Switch, equations 4 to 6; k choices as in transformers' `load_balancing_loss_func`, so that it
    is k where all experts are chosen alike). f has no gradient. z: the mean of logsumexp(logits)^2
    (ST-MoE, Zoph et al. 2022, equation 5, https://arxiv.org/abs/2202.08906).

    Args:
      weights_BT: float32; means are weighted by them, and sums have their sum as a factor, as that
        of the cross-entropy has: micro-steps add up, and the loss scale is in it.

    Returns:
      balance_loss * balance + z_loss * z, and without gradient `balance_sum` and `router_z_sum`.
    """
    E = logits_BTE.shape[-1]
    lse_BT1 = jax.nn.logsumexp(logits_BTE, axis=-1, keepdims=True)
    probs_BTE = jnp.exp(logits_BTE - lse_BT1)
    weights_BT1 = jnp.expand_dims(weights_BT, -1)
    chosen_BTE = sum(
        jnp.equal(
            choice_BTK[..., k : k + 1], jax.lax.broadcasted_iota(jnp.int32, (1, 1, E), 2)
        ).astype(jnp.float32)
        for k in range(choice_BTK.shape[-1])
    )
    total = jnp.maximum(jnp.sum(weights_BT), jnp.finfo(jnp.float32).tiny)
    share_E = jax.lax.stop_gradient(jnp.sum(weights_BT1 * chosen_BTE, (0, 1)) / total)
    balance = E * jnp.sum(share_E * jnp.sum(weights_BT1 * probs_BTE, (0, 1)))
    z = jnp.sum(weights_BT1 * jnp.square(lse_BT1))
    sums = {"balance_sum": balance, "router_z_sum": z}
    return balance_loss * balance + z_loss * z, jax.tree.map(jax.lax.stop_gradient, sums)


@jax.custom_vjp
def with_gradient(x: jax.Array, loss: jax.Array) -> jax.Array:
    """`x`, and in the backward pass the gradient of `loss`, as if it were added to the loss.

    The loss must hold its weight and the loss scale.
    """
    return x


with_gradient.defvjp(lambda x, loss: (x, None), lambda _, dx: (dx, jnp.float32(1)))


def router_sums(config: ExpertsConfig) -> tuple[str, ...]:
    """The names of what a layer of experts sums for the metrics."""
    names = ("balance_sum", "router_z_sum", "dropped_sum") if config.number else ()
    return names if config.capacity else names[:2]


def router_weights(config: ModelConfig) -> list[Weight]:
    """The weights of one `Router`."""
    return [Weight((config.embed_dim, config.experts.number), "embed -> router")]


def router_residuals() -> list[Activation]:
    """What its backward pass keeps: its input, probabilities of the choice and of both losses."""
    probs = Activation("router", "batch seq act_router", "float32")
    return [
        Activation("router input", "batch residual_seq act_embed", "float32"),
        *[probs] * 3,
        Activation("expert_choice", "batch seq choice", "int32"),
        *[Activation("router", "batch seq choice", "float32")] * 2,
    ]
