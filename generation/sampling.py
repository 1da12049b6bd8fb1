"""The next token of each row: the likeliest, or drawn from some of the likeliest."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from parallel.contract import by_device
from parallel.rules import Rules


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: `config.generate`'s keys of these names, applied in this order."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def kept(self, logits_BV: Array) -> Array:
        """Logits over the temperature, float32 [B, V]; -inf for tokens that are not drawn from.

        Tokens that are as likely as the last one that is kept are kept, too.
        """
        logits_BV = logits_BV / self.temperature
        V = logits_BV.shape[1]
        if 0 < self.top_k < V:
            least_BK = jax.lax.top_k(logits_BV, self.top_k)[0]
            logits_BV = _from(logits_BV, least_BK[:, -1:])
        if self.top_p < 1:
            sorted_BV = jnp.sort(logits_BV, axis=1, descending=True)
            p_BV = jax.nn.softmax(sorted_BV, axis=1)
            before_BV = jnp.cumsum(p_BV, axis=1) - p_BV
            number_B1 = jnp.sum(before_BV < self.top_p, axis=1, keepdims=True)
            least_B1 = jnp.take_along_axis(sorted_BV, jnp.maximum(number_B1 - 1, 0), 1)
            logits_BV = _from(logits_BV, least_B1)
        if self.min_p > 0:
            most_B1 = jnp.max(logits_BV, axis=1, keepdims=True)
            logits_BV = _from(logits_BV, most_B1 + jnp.log(jnp.float32(self.min_p)))
        return logits_BV


def sample(
    logits_BV: Array,
    key: Array,
    number_B: Array,
    position_B: Array,
    sampling: Sampling,
    rules: Rules,
) -> Array:
    """The next token of each row, int32 [B], divided as the batch is.

    Args:
      logits_BV: float32, whole on every device of a row.
      key: of the seed.
      number_B: of each row's text, among all prompts ...
      position_B: ... and of the token in it, from 0: with the seed they decide what is drawn,
        whatever the layout and whatever other rows there are.
    """

    def local(logits_BV: Array, key: Array, number_B: Array, position_B: Array) -> Array:
        if sampling.temperature == 0:
            return jnp.argmax(logits_BV, axis=1).astype(jnp.int32)

        def draw(logits_V: Array, number: Array, position: Array) -> Array:
            own = jax.random.fold_in(jax.random.fold_in(key, number), position)
            return jax.random.categorical(own, logits_V)

        drawn_B = jax.vmap(draw)(sampling.kept(logits_BV), number_B, position_B)
        return drawn_B.astype(jnp.int32)

    batch, spec = rules.spec("batch"), rules.spec("batch act_embed")
    specs = (spec, jax.P(), batch, batch)
    return by_device(local, specs, batch, check_vma=False)(logits_BV, key, number_B, position_B)


def _from(logits_BV: Array, least_B1: Array) -> Array:
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
