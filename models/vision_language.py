"""A decoder that reads an image: as tokens before its text, or by attention of each layer.

Before the text, after PaliGemma (Beyer et al. 2024, https://arxiv.org/abs/2407.07726): the image's
tokens see each other and are seen by all text, one caption a row. By cross-attention, after
Flamingo (Alayrac et al. 2022, https://arxiv.org/abs/2204.14198): `config.model.cross`. Either way
they are no tokens of the batch: its rows are the text alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.beside import BESIDE, encoder_beside
from models.block import RESIDUAL
from models.config import ModelConfig
from models.decoder import Decoder, decoder_weights
from models.layers import broadcast_to_rank, constant, dropout, gathered, normal, weight
from models.memory_decoder import FEATURES, MemoryDecoder
from models.vision import ViT, vit_weights
from parallel.einsum import einsum
from parallel.footprint import Weight
from parallel.remat import RematConfig
from parallel.rules import Rules

WHOLE = "batch seq act_embed"


class Affine(nnx.Module):
    """x [B, P, K] -> [B, P, D], the sequence whole on every device of `tensor`."""

    def __init__(self, inputs: int, config: ModelConfig, rules: Rules, rngs: nnx.Rngs) -> None:
        D, init = config.embed_dim, normal(config.init_std)
        self.rules = rules
        self.weight = weight(rngs, (inputs, D), "feature -> embed", rules, init)
        self.bias = weight(rngs, (D,), "norm", rules, constant(0.0))

    def __call__(self, x_BPK: jax.Array) -> jax.Array:
        y_BPD = einsum("bpk,kd->bpd", x_BPK, self.weight.get_value(), self.rules.spec(WHOLE))
        return y_BPD + broadcast_to_rank(gathered(self.bias, self.rules), 3)


class Projector(nnx.Module):
    """Features of the ViT -> tokens of the decoder."""

    def __init__(self, config: ModelConfig, rules: Rules, rngs: nnx.Rngs) -> None:
        features, hidden = config.vision.embed_dim, config.vision.projector == "mlp"
        self.hidden = Affine(features, config, rules, rngs) if hidden else None
        self.out = Affine(config.embed_dim if hidden else features, config, rules, rngs)

    def __call__(self, features_BPK: jax.Array) -> jax.Array:
        if self.hidden is not None:
            features_BPK = jax.nn.gelu(self.hidden(features_BPK), approximate=False)
        return self.out(features_BPK)


class Images(nnx.Module):
    """patches [B, P, K] -> as many tokens of the decoder [B, P, D], whole rows."""

    def __init__(
        self, config: ModelConfig, rules: Rules, remat: RematConfig, rngs: nnx.Rngs
    ) -> None:
        vit = encoder_beside(config)
        assert vit is not None
        self.vit = ViT(vit, rules, remat, rngs, BESIDE)
        self.projector = Projector(config, rules, rngs)

    def __call__(self, patches_BPK: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return self.projector(self.vit(patches_BPK, key))


class CrossVisionLanguage(MemoryDecoder):
    """(patches [B, P, K], tokens [B, T]) -> hidden x_BTD after the final norm; every layer of the
    decoder attends to the image.
    """

    def __init__(
        self, config: ModelConfig, rules: Rules, remat: RematConfig, rngs: nnx.Rngs
    ) -> None:
        super().__init__(config, rules, remat, rngs)
        self.images = Images(config, rules, remat, rngs)

    def features(self, batch: Mapping[str, jax.Array], key: jax.Array | None = None) -> jax.Array:
        """The tokens of the image."""
        return jax.reshard(self.images(batch["patches"], key), self.rules.spec(RESIDUAL))

    def segments(self, batch: Mapping[str, jax.Array]) -> None:
        """None: a row has one image, whole."""


class VisionLanguage(Decoder):
    """(patches [B, P, K], tokens [B, T]) -> hidden x_BTD of the text after the final norm.

    The residual stream is [B, P + T, D]; positions go on from the image through the text.
    """

    def __init__(
        self, config: ModelConfig, rules: Rules, remat: RematConfig, rngs: nnx.Rngs
    ) -> None:
        super().__init__(config, rules, remat, rngs)
        self.images = Images(config, rules, remat, rngs)

    def embed(self, batch: Mapping[str, jax.Array], key: jax.Array | None = None) -> jax.Array:
        """The first residual stream: image, then text."""
        config, rules = self.config, self.rules
        text_key, image_key = None, None
        if key is not None:
            text_key, image_key = jax.random.split(key)[0], jax.random.fold_in(key, FEATURES)
        image_BPD = self.images(batch["patches"], image_key)
        text_BTD = self.look_up(batch["tokens"])
        # Joined whole: a device of `tensor` would hold other tokens of each part than of both.
        parts = [jax.reshard(x, rules.spec(WHOLE)) for x in (image_BPD, text_BTD)]
        x_BTD = jax.reshard(jnp.concatenate(parts, 1), rules.spec(RESIDUAL))
        x_BTD = self.add_positions(x_BTD, self.in_stream(batch)["positions"])
        return dropout(x_BTD, config.dropout, text_key, rules, RESIDUAL)

    def run_and_keep(
        self,
        x_BTD: jax.Array,
        batch: Mapping[str, jax.Array],
        key: jax.Array | None = None,
        first: int | jax.Array | None = None,
        weights_BT: jax.Array | None = None,
        after: tuple[int, ...] = (),
    ) -> tuple[jax.Array, dict[str, jax.Array], tuple[jax.Array, ...]]:
        """As `Decoder.run_and_keep`, of the whole stream; the states are the text's."""
        if weights_BT is not None:  # no token of an image counts
            weights_BT = self._before(weights_BT, jnp.zeros)
        stream = self.in_stream(batch)
        x_BTD, sums, states = super().run_and_keep(x_BTD, stream, key, first, weights_BT, after)
        return x_BTD, sums, tuple(map(self._text, states))

    def finish(self, x_BTD: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Hidden features of the text, of the residual stream after the last block."""
        return super().finish(self._text(x_BTD), batch)

    def _text(self, x_BTD: jax.Array) -> jax.Array:
        """The text's part of a residual stream."""
        x_BTD = jax.reshard(x_BTD, self.rules.spec(WHOLE))[:, self.config.image_tokens :]
        return jax.reshard(x_BTD, self.rules.spec(RESIDUAL))

    def in_stream(self, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Segments and positions of the whole stream, and its prefix: the image."""
        segments, P = batch["segments"], self.config.image_tokens
        index = jax.lax.broadcasted_iota(
            jnp.int32, (len(segments), P), 1, out_sharding=self.rules.spec("batch seq")
        )
        return {
            "segments": self._before(segments, jnp.ones),
            "positions": jnp.concatenate([index, P + batch["positions"]], 1),
            "prefix": jnp.full(len(segments), P, jnp.int32, out_sharding=self.rules.spec("batch")),
        }

    def _before(self, array_BT: jax.Array, value: Any) -> jax.Array:
        """An array of the stream's tokens from one of the text's; `value` makes the image's."""
        shape = len(array_BT), self.config.image_tokens
        image = value(shape, array_BT.dtype, out_sharding=self.rules.spec("batch seq"))
        return jnp.concatenate([image, array_BT], 1)


def vision_language_weights(config: ModelConfig) -> tuple[list[Weight], list[Weight]]:
    """The weights of either: those of one block of the decoder, and all others."""
    block, outside = decoder_weights(config)
    vit = encoder_beside(config)
    assert vit is not None
    vit_block, vit_outside = vit_weights(vit)
    affine = [config.vision.embed_dim]
    if config.vision.projector == "mlp":
        affine.append(config.embed_dim)
    projector = [
        weight
        for inputs in affine
        for weight in (
            Weight((inputs, config.embed_dim), "feature -> embed"),
            Weight((config.embed_dim,), "norm"),
        )
    ]
    stacked = [weight.stacked(vit.layers, BESIDE) for weight in vit_block]
    return block, outside + stacked + vit_outside + projector
