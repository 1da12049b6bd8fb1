"""A decoder whose layers attend to features of something else: a text, or an image.

Between its parts the residual stream is both: those features, which every layer reads, and x_BTD,
which every layer changes. So a pipeline's stages send them on with it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from models.block import RESIDUAL
from models.decoder import Decoder
from models.rows import Memory, rows_of
from parallel.rules import Rules

FEATURES = 2  # folded into the key of a batch, of which the decoder takes parts 0 and 1


class MemoryDecoder(Decoder):
    """A decoder of tokens [B, T] that attends to S features of its row, which a family makes."""

    @abstractmethod
    def features(self, batch: Mapping[str, jax.Array], key: jax.Array | None = None) -> jax.Array:
        """Those features [B, S, D], in the residual stream's layout."""

    @abstractmethod
    def segments(self, batch: Mapping[str, jax.Array]) -> jax.Array | None:
        """The segment of each, [B, S], which tokens of the same see; None where all do."""

    def embed(self, batch: Mapping[str, jax.Array], key: jax.Array | None = None) -> jax.Array:
        """The first residual stream: the features, and the embeddings of tokens."""
        features_key = None if key is None else jax.random.fold_in(key, FEATURES)
        features_BSD = self.features(batch, features_key)
        return joined_rows(features_BSD, super().embed(batch, key), self.rules)

    def run_and_keep(
        self,
        x_BTD: jax.Array,
        batch: Mapping[str, jax.Array],
        key: jax.Array | None = None,
        first: int | jax.Array | None = None,
        weights_BT: jax.Array | None = None,
        after: tuple[int, ...] = (),
    ) -> tuple[jax.Array, dict[str, jax.Array], tuple[jax.Array, ...]]:
        """As `Decoder.run_and_keep`, of both parts of the stream."""
        features_BSD, x_BTD = self._parts(x_BTD, batch)
        rows = rows_of(batch, weights_BT)
        rows = rows._replace(memory=Memory(features_BSD, self.segments(batch)))
        if self.relative is not None:
            rows = rows._replace(bias=self.relative.bias(x_BTD.shape[1]))
        x_BTD, sums, states = self.run_rows(x_BTD, rows, key, first, after)
        return joined_rows(features_BSD, x_BTD, self.rules), sums, states

    def finish(self, x_BTD: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Hidden features of the tokens."""
        return super().finish(self._parts(x_BTD, batch)[1], batch)

    def _parts(
        self, stream: jax.Array, batch: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        return parted_rows(stream, stream.shape[1] - batch["tokens"].shape[1], self.rules)


def joined_rows(first_BSD: jax.Array, second_BTD: jax.Array, rules: Rules) -> jax.Array:
    """One residual stream of two, [B, S + T, D].

    Where the sequence is divided, each device joins its parts of both: nothing is sent.
    """
    parts = rules.parts("residual_seq")
    batch, seq, embed = rules.spec(RESIDUAL)
    apart, spec = jax.P(batch, seq, None, embed), rules.spec(RESIDUAL)

    def divided(x_BTD: jax.Array) -> jax.Array:
        B, T, D = x_BTD.shape
        return jnp.reshape(x_BTD, (B, parts, T // parts, D), out_sharding=apart)

    both = jnp.concatenate([divided(first_BSD), divided(second_BTD)], axis=2)
    B, _, _, D = both.shape
    return jnp.reshape(both, (B, -1, D), out_sharding=spec)


def parted_rows(x_BTD: jax.Array, length: int, rules: Rules) -> tuple[jax.Array, jax.Array]:
    """The inverse of `joined_rows`, of which the first is of this length."""
    parts = rules.parts("residual_seq")
    batch, seq, embed = rules.spec(RESIDUAL)
    apart, spec = jax.P(batch, seq, None, embed), rules.spec(RESIDUAL)
    B, T, D = x_BTD.shape
    both = jnp.reshape(x_BTD, (B, parts, T // parts, D), out_sharding=apart)

    def whole(x: jax.Array) -> jax.Array:
        return jnp.reshape(x, (B, -1, D), out_sharding=spec)

    return whole(both[:, :, : length // parts]), whole(both[:, :, length // parts :])
