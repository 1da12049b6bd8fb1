"""A decoder small enough to compile in seconds, and a packed batch for it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from data.objective import ObjectiveConfig
from models.config import ModelConfig
from models.experts_config import ExpertsConfig
from parallel.mesh import MeshConfig, make_mesh
from parallel.pipeline import PipelineConfig
from parallel.remat import RematConfig
from parallel.rules import ParallelConfig, make_rules
from training.batch_arrays import batch_spec
from training.losses import LossConfig
from training.micro_batches import Weights
from training.objectives import make_model
from training.state import Model

B, T = 8, 16
CAUSAL_LM = ObjectiveConfig()

DECODER = ModelConfig(
    vocab_size=250,  # padded to 256
    layers=3,
    embed_dim=32,
    mlp_dim=64,
    heads=8,
    kv_heads=2,  # replicated where tensor is 4 or 8
    head_dim=8,
    dropout=0.1,
    qkv_bias=True,
    mlp_bias=True,
    attention_out_bias=True,
    qk_norm=True,
    attention="xla",
    init_std=0.1,  # gradients of the first step are far from rounding noise
)

EXPERTS = ExpertsConfig(number=8, per_token=2, mlp_dim=48, balance_loss=0.1, z_loss=0.01)
MIXTURE = replace(DECODER, mlp_bias=False, experts=EXPERTS)
SLOTS = replace(MIXTURE, experts=replace(EXPERTS, capacity=1.25))  # some tokens are dropped


def objective_of(config: ModelConfig) -> ObjectiveConfig:
    """What a config is trained for where nothing else is said."""
    if config.family == "encoder":
        tasks = dict(config.tasks)
        return ObjectiveConfig("masked_lm" if config.token_head else "classification", tasks=tasks)
    return ObjectiveConfig("seq2seq") if config.family == "encoder_decoder" else CAUSAL_LM


def numpy_batch(seed: int = 0, rows: int = B, length: int = T) -> dict[str, np.ndarray]:
    """Rows of two documents and some padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, DECODER.vocab_size, (rows, length + 1))
    cut = rng.integers(2, length - 2, (rows, 1))
    end = rng.integers(length - 2, length + 1, (rows, 1))
    index = np.arange(length)[None]
    segments = np.where(index < cut, 1, 2) * (index < end)
    positions = np.where(index < cut, index, index - cut)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    batch |= {"segments": segments, "positions": positions}
    return {name: np.ascontiguousarray(array, np.int32) for name, array in batch.items()}


def all_count(shape: tuple[int, int], **out: Any) -> Weights:
    """Weights of 1 for every token and row."""
    return Weights(jnp.ones(shape, **out), jnp.ones(shape[:1]))


@dataclass(frozen=True)
class Laid:
    """A model and batches on one layout."""

    model: Model
    mesh: jax.sharding.Mesh

    def batch(self, seed: int = 0, **shape: int) -> dict[str, jax.Array]:
        return self.placed(numpy_batch(seed, **shape))

    def placed(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """A NumPy batch, laid out as the model wants it."""
        rules = self.model.rules
        return {
            name: jax.device_put(a, NamedSharding(self.mesh, batch_spec(rules, a.ndim)))
            for name, a in batch.items()
        }

    def params(self, initial: Any) -> Any:
        """NumPy parameters, laid out at rest."""
        rules = self.model.rules

        def place(array: np.ndarray, names: str) -> jax.Array:
            return jax.device_put(
                array, NamedSharding(self.mesh, rules.at_rest(names, array.shape))
            )

        return jax.tree.map(place, initial, self.model.axes)


@functools.cache
def initial_params(config: ModelConfig = DECODER, objective: ObjectiveConfig = CAUSAL_LM) -> Any:
    """What the seed gives on one device, as NumPy; drawn once, since that takes seconds."""
    with layout(config=config, objective=objective) as laid:
        return jax.tree.map(np.asarray, jax.jit(laid.model.init)(jax.random.key(0)))


@contextmanager
def layout(
    *,
    zero: int = 0,
    sequence: bool = False,
    remat: str | RematConfig = "none",
    config: ModelConfig = DECODER,
    objective: ObjectiveConfig | None = None,
    rows: int = B,
    length: int = T,
    source_length: int = 3 * T // 2,
    chunk: int = 16,
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    expert: int = 1,
    pipe: int = 1,
    pipeline: PipelineConfig | None = None,
    **changes: object,
) -> Iterator[Laid]:
    """The model of `config` with `changes`, on the first devices, inside `jax.set_mesh`."""
    config = replace(config, **changes)  # type: ignore[arg-type]
    sizes = MeshConfig(data=data, fsdp=fsdp, pipe=pipe, expert=expert, tensor=tensor)
    dims = config.dims() | config.row_dims(length, source_length)
    dims["batch"] = rows, "config.data.batch_size"
    policy = RematConfig(policy=remat) if isinstance(remat, str) else remat
    mesh = make_mesh(sizes, jax.devices()[: data * fsdp * pipe * expert * tensor])
    with jax.set_mesh(mesh):
        rows = True
        if pipeline is not None:
            schedule = pipeline.table(pipe)
            division = pipeline.division(schedule, config.layers, len(config.pattern))
            rows = division.in_rows(schedule)
        parallel = ParallelConfig(zero=zero, sequence=sequence)
        rules = make_rules(parallel, sizes.sizes(), dims, rows=rows)
        loss = LossConfig(chunk=chunk)
        chosen = objective or objective_of(config)
        yield Laid(make_model(config, chosen, loss, rules, policy, pipeline), mesh)
