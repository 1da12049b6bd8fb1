"""What every loss-and-gradients has in common: what counts, parts of a batch, means."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

Batch = dict[str, jax.Array]


class Weights(NamedTuple):
    """What counts in a loss, float32: tokens, and rows where whole rows are classified.

    Each of the two sums to the loss scale over a step's batch.
    """

    tokens_BT: jax.Array
    rows_B: jax.Array


def counted(batch: Batch) -> Weights:
    """1 for every token and row that counts.

    A token does where `counted` says so, or without that where it is no padding; a row does where
    it has such a token. Of images alone a row counts, with all patches, that has a label, which -1
    is not.
    """
    if "segments" not in batch:
        label_B = next(array for name, array in batch.items() if name.startswith("label_"))
        rows_B, patches = (label_B >= 0).astype(jnp.float32), batch["patches"].shape[1]
        return Weights(jnp.broadcast_to(rows_B[:, None], (len(rows_B), patches)), rows_B)
    given = batch["counted"] if "counted" in batch else batch["segments"]
    tokens_BT = (given > 0).astype(jnp.float32)
    return Weights(tokens_BT, jnp.max(batch["segments"] > 0, axis=1).astype(jnp.float32))


def loss_weights(batch: Batch, scale: jax.Array) -> tuple[Weights, jax.Array]:
    """(weights that sum to the loss scale, float32 number of tokens that count)."""
    ones = counted(batch)
    # Scaled before the gradient is cast to compute dtype.
    weights = [one / jnp.maximum(jnp.sum(one), 1.0) * scale for one in ones]
    return Weights(*weights), jnp.sum(ones.tokens_BT)


def split(array: jax.Array, parts: int) -> jax.Array:
    """[B, ...] -> [parts, B / parts, ...] without moving a row to another device."""
    B, *rest = array.shape
    spec = jax.typeof(array).sharding.spec
    rows = jax.P(spec[0], None, *spec[1:])
    parted = jnp.reshape(array, (B // parts, parts, *rest), out_sharding=rows)
    return jnp.moveaxis(parted, 1, 0)


def means(
    total: jax.Array, aux: dict[str, jax.Array], scale: jax.Array, tokens: jax.Array
) -> dict[str, jax.Array]:
    """What a step reports, from sums that are weighted by `loss_weights`."""
    parts = {name.removesuffix("_sum"): value / scale for name, value in aux.items()}
    return {"loss": total / scale} | parts | {"tokens": tokens}
