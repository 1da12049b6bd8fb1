"""A decoder small enough to compile in seconds, and a packed batch for it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from models.config import DecoderConfig
from parallel.mesh import MeshConfig, make_mesh
from parallel.pipeline import PipelineConfig
from parallel.remat import RematConfig
from parallel.rules import ParallelConfig, make_rules
from training.losses import LossConfig
from training.objectives import causal_lm
from training.state import Model

B, T = 8, 16

DECODER = DecoderConfig(
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


@dataclass(frozen=True)
class Laid:
    """A model and batches on one layout."""

    model: Model
    mesh: jax.sharding.Mesh

    def batch(self, seed: int = 0, **shape: int) -> dict[str, jax.Array]:
        sharding = NamedSharding(self.mesh, self.model.rules.spec("batch seq"))
        return {k: jax.device_put(v, sharding) for k, v in numpy_batch(seed, **shape).items()}

    def params(self, initial: Any) -> Any:
        """NumPy parameters, laid out at rest."""
        rules = self.model.rules

        def place(array: np.ndarray, names: str) -> jax.Array:
            return jax.device_put(
                array, NamedSharding(self.mesh, rules.at_rest(names, array.shape))
            )

        return jax.tree.map(place, initial, self.model.axes)


@functools.cache
def initial_params(config: DecoderConfig = DECODER) -> Any:
    """What the seed gives on one device, as NumPy; drawn once, since that takes seconds."""
    with layout(config=config) as laid:
        return jax.tree.map(np.asarray, jax.jit(laid.model.init)(jax.random.key(0)))


@contextmanager
def layout(
    *,
    zero: int = 0,
    sequence: bool = False,
    remat: str | RematConfig = "none",
    config: DecoderConfig = DECODER,
    rows: int = B,
    length: int = T,
    chunk: int = 16,
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    pipe: int = 1,
    pipeline: PipelineConfig | None = None,
    **changes: object,
) -> Iterator[Laid]:
    """The model of `config` with `changes`, on the first devices, inside `jax.set_mesh`."""
    config = replace(config, **changes)  # type: ignore[arg-type]
    sizes = MeshConfig(data=data, fsdp=fsdp, pipe=pipe, tensor=tensor)
    dims = config.dims() | {
        "batch": (rows, "config.data.batch_size"),
        "residual_seq": (length, "config.data.sequence_length"),
    }
    policy = RematConfig(policy=remat) if isinstance(remat, str) else remat
    mesh = make_mesh(sizes, jax.devices()[: data * fsdp * pipe * tensor])
    with jax.set_mesh(mesh):
        rows = True
        if pipeline is not None:
            schedule = pipeline.table(pipe)
            division = pipeline.division(schedule, config.layers, len(config.pattern))
            rows = division.in_rows(schedule)
        parallel = ParallelConfig(zero=zero, sequence=sequence)
        rules = make_rules(parallel, sizes.sizes(), dims, rows=rows)
        yield Laid(causal_lm(config, LossConfig(chunk=chunk), rules, policy, pipeline), mesh)
