"""A small dense model with calibration text, and what compression makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress.calibration import Calibration
from models.config import ModelConfig
from parallel.forms import read_form
from parallel.remat import FORWARD, RematConfig
from parallel.zero import for_model
from tests.small import DECODER, Laid, initial_params, layout
from training.micro_batches import loss_weights
from training.naming import named
from training.stored import WeightsConfig, stored

PLAIN = replace(DECODER, dropout=0.0)
LAYOUTS = [dict(fsdp=8), dict(data=2, tensor=4)]


@dataclass(frozen=True)
class Walked:
    """A model on one layout, with its parameters and calibration text."""

    laid: Laid
    config: ModelConfig
    params: Any
    text: Calibration

    def forms(self, name: str, only: str = "stack/") -> dict[str, Any]:
        """One form for all matrices of the stack whose names have `only` in them."""
        from compress.walk import matrices_of

        form = read_form(name, "form")
        layers = self.config.layers
        return {n: [form] * layers for n in matrices_of(self.laid.model) if only in n}

    def stored(self, forms: dict[str, str]) -> Laid:
        """The model of a result."""
        return replace(self.laid, model=stored(self.laid.model, WeightsConfig(forms)))


@contextmanager
def walked(config: ModelConfig = PLAIN, seed: int = 1, **sizes: int) -> Iterator[Walked]:
    remat = RematConfig(FORWARD)
    with layout(config=config, remat=remat) as alone:
        batches = [alone.batch(seed + i) for i in range(2)]
        text = Calibration(alone.model, alone.mesh, batches)
    with layout(config=config, remat=remat, **sizes) as laid:
        yield Walked(laid, config, laid.params(initial_params(config)), text)


def loss_of(laid: Laid, params: Any, seed: int = 0) -> float:
    """The mean loss of a batch, without a gradient."""
    model = laid.model

    @jax.jit
    def loss(params: Any, batch: Any) -> jax.Array:
        leaves, build = for_model(params, model.axes, model.rules, "float32")
        weights, _ = loss_weights(batch, jnp.float32(1))
        return model.loss(build(leaves), batch, weights, None)[0]

    return float(loss(params, laid.batch(seed)))


def numpy_of(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in named(tree).items()}
