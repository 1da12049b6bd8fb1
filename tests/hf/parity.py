"""Both sides of a comparison with `transformers`: its model in a folder, ours from that folder."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hf.exporting import export_params
from hf.families import family_for, read_model
from hf.files import open_folder
from hf.importing import find_params, read_params
from hf.layout import places
from models.config import ModelConfig
from models.decoder import Decoder
from parallel.mesh import MeshConfig, make_mesh
from parallel.precision import PrecisionConfig
from parallel.remat import RematConfig
from parallel.rules import ParallelConfig, make_rules
from tests.small import all_count, objective_of
from training.losses import LossConfig
from training.naming import named
from training.objectives import make_model
from training.state import Model, abstract_params

ROWS, LENGTH = 2, 24
LOGITS = LOSS = GRADIENTS = 1e-4  # absolute, in float32: rounding in another order
ROUND_TRIP = 1e-6  # the same weights in the same program
SEEDS = (0, 1, 2)
TEXT = Path(np.__file__).read_text()


def tokens(seed: int, vocab_size: int, rows: int = ROWS, length: int = LENGTH) -> np.ndarray:
    """Bytes of real text, [rows, length + 1]."""
    data = np.frombuffer(TEXT.encode(), np.uint8)
    starts = np.random.default_rng(seed).integers(0, len(data) - length - 1, rows)
    return np.stack([data[s : s + length + 1] for s in starts]).astype(np.int32) % vocab_size


class Result(NamedTuple):
    """What our side says of a batch: gradients by canonical name, means over tokens and layers."""

    logits: np.ndarray
    loss: float
    gradients: dict[str, np.ndarray]
    means: dict[str, float]


@dataclass(frozen=True)
class Laid:
    """Our model on a mesh, and its parameters from and to folders."""

    config: ModelConfig
    model: Model
    mesh: jax.sharding.Mesh

    def read(self, folder: Path) -> Any:
        """The parameters of a folder."""
        precision = PrecisionConfig()
        found = find_params(open_folder(folder, "--hf"), self.config, self.model, precision)
        return read_params(found, self.model, precision, self.mesh)

    def write(self, params: Any, out: Path, like: Path | None, **how: Any) -> str:
        """Their folder, as that of `like`."""
        opened = None if like is None else open_folder(like, "--like")
        return export_params(params, self.config, self.model.axes, out, like=opened, **how)

    def run(self, params: Any, tokens_BT1: np.ndarray) -> Result:
        """Logits of whole rows, one document each; their mean loss and its gradients."""
        logits, ((loss, sums), gradients) = self._compiled(params, batch_of(tokens_BT1))
        by_name = {name: np.asarray(g) for name, g in named(gradients).items()}
        means = {name.removesuffix("_sum"): float(x) for name, x in sums.items()}
        return Result(np.asarray(logits), float(loss), by_name, means)

    @functools.cached_property
    def _compiled(self) -> Any:
        build = lambda: Decoder(self.config, self.model.rules, RematConfig(), nnx.Rngs(params=0))
        graph, _ = nnx.split(nnx.eval_shape(build))
        cap = self.config.logit_softcap

        def logits(params, batch):
            decoder = nnx.merge(graph, params)
            head = decoder.head()
            table = head.weight if head.axes.startswith("vocab") else head.weight.T
            out = jnp.einsum("btd,vd->btv", decoder(batch), table)
            return (cap * jnp.tanh(out / cap) if cap else out)[..., : self.config.vocab_size]

        def mean(params, batch):
            tokens = batch["tokens"]
            # Their sum is 1, as the losses of routers want it.
            weights = jax.tree.map(lambda w: w / tokens.size, all_count(tokens.shape))
            return self.model.loss(params, batch, weights, None)

        def both(params, batch):
            return logits(params, batch), jax.value_and_grad(mean, has_aux=True)(params, batch)

        return jax.jit(both)

    def in_our_layout(self, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Their tensors by our canonical names, stacked and padded as ours."""
        return in_layout_of(self.model, self.config, tensors)


def in_layout_of(
    model: Model, config: ModelConfig, tensors: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Their tensors by the canonical names of a model of ours, stacked and padded as its."""
    links = family_for(config).links_of(config, tensors)
    abstract = abstract_params(model, PrecisionConfig())
    found = {}
    for name, place in places(links, config, model.axes, abstract).items():
        parts = [place.ours(tensors[n]) for n in place.names]
        array = np.stack(parts).reshape(*place.lead, *place.dims)
        padding = [(0, n - had) for n, had in zip(place.shape, array.shape, strict=True)]
        found[name] = np.pad(array, padding)
    return found


@contextmanager
def ours(folder: Path, balance_loss: float = 0.0, **sizes: int) -> Iterator[Laid]:
    """The model of a folder on a mesh of the first devices."""
    config = ModelConfig(**read_model(folder, "--hf"), attention="xla")
    config = replace(config, experts=replace(config.experts, balance_loss=balance_loss))
    mesh_config = MeshConfig(**({"data": 1} | sizes))
    count = math.prod(mesh_config.sizes().values())
    mesh = make_mesh(mesh_config, jax.devices()[:count])
    dims = config.dims() | {"batch": (ROWS, "batch"), "residual_seq": (LENGTH, "length")}
    with jax.set_mesh(mesh):
        rules = make_rules(ParallelConfig(), mesh_config.sizes(), dims)
        loss, remat = LossConfig(chunk=16), RematConfig()
        yield Laid(config, make_model(config, objective_of(config), loss, rules, remat), mesh)


def batch_of(tokens_BT1: np.ndarray) -> dict[str, jax.Array]:
    """A batch of whole rows, one document each."""
    rows, length = tokens_BT1.shape[0], tokens_BT1.shape[1] - 1
    index = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    batch = {
        "tokens": tokens_BT1[:, :-1],
        "targets": tokens_BT1[:, 1:],
        "segments": np.ones_like(index),
        "positions": index,
    }
    return {name: jnp.asarray(np.ascontiguousarray(value)) for name, value in batch.items()}
