"""What every loss-and-gradients has in common: the weights of tokens, parts of a batch, means."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Batch = dict[str, jax.Array]


def token_weights(batch: Batch, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(float32 weights_BT that sum to the loss scale, float32 number of tokens that count)."""
    counted = (batch["segments"] > 0).astype(jnp.float32)
    tokens = jnp.maximum(jnp.sum(counted), 1.0)
    # Scaled before the gradient is cast to compute dtype.
    return counted / tokens * scale, jnp.sum(counted)


def split(array_BT: jax.Array, parts: int) -> jax.Array:
    """[B, T] -> [parts, B / parts, T] without moving a row to another device."""
    B, *rest = array_BT.shape
    spec = jax.typeof(array_BT).sharding.spec
    rows = jax.P(spec[0], None, *spec[1:])
    rows_MBT = jnp.reshape(array_BT, (B // parts, parts, *rest), out_sharding=rows)
    return jnp.moveaxis(rows_MBT, 1, 0)


def means(
    total: jax.Array, aux: dict[str, jax.Array], scale: jax.Array, tokens: jax.Array
) -> dict[str, jax.Array]:
    """What a step reports, from sums that are weighted by `token_weights`."""
    parts = {name.removesuffix("_sum"): value / scale for name, value in aux.items()}
    return {"loss": total / scale} | parts | {"tokens": tokens}
