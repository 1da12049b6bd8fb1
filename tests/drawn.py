"""A decoder whose parameters are drawn by NumPy: gains and biases too, and nothing is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from models.config import ModelConfig
from models.decoder import Decoder
from models.encoder_decoder import EncoderDecoder
from parallel.remat import RematConfig
from tests.small import Laid

NO_REMAT = RematConfig()


def drawn_params(laid: Laid, config: ModelConfig) -> Any:
    """Float32 NumPy; at initial ones and zeros an error in gains and biases would be hidden."""
    rng = np.random.default_rng(0)

    def draw(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
        name = path[-1].key
        mean = 1.0 if name == "gain" and not config.norm_plus_one else 0.0
        std = 0.2 if name == "gain" or "bias" in name else 0.5 if name == "embedding" else 0.3
        return (mean + std * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree.map_with_path(draw, jax.eval_shape(laid.model.init, jax.random.key(0)))


def decoder_of(
    laid: Laid, config: ModelConfig, remat: RematConfig = NO_REMAT
) -> Callable[[Any], Decoder]:
    """params -> the decoder with these parameters."""
    kind = EncoderDecoder if config.family == "encoder_decoder" else Decoder
    build = lambda key: kind(config, laid.model.rules, remat, nnx.Rngs(params=key))
    graph, _ = nnx.split(nnx.eval_shape(build, jax.random.key(0)))
    return lambda params: nnx.merge(graph, params)


def put(laid: Laid, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """A batch on the devices, laid out as the model wants it."""
    sharding = NamedSharding(laid.mesh, laid.model.rules.spec("batch seq"))
    return {name: jax.device_put(a.astype(np.int32), sharding) for name, a in batch.items()}
