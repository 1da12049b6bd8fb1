"""What the planner needs of generation: a decoder, its layout, its cache, and its two programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import NamedSharding

from data.objective import ObjectiveConfig
from models.config import ModelConfig
from models.decode import Cache, Decoding, abstract_weights, make_decoding
from models.kv_cache import CacheShape, Kept, cache_kept
from parallel.mesh import MeshConfig
from parallel.precision import PrecisionConfig
from parallel.remat import RematConfig
from parallel.rules import Rules
from training.batch_arrays import BatchArray, abstract_batch, batch_arrays, batch_spec
from training.losses import LossConfig
from training.objectives import make_model
from training.state import abstract_params

DONATED = 1  # the cache, of both programs
PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class InferenceJob:
    """Generation by one config on one mesh; `mesh` is resolved.

    Attributes:
      rules: the layout, without a divided residual stream.
      shape: of the cache, whose rows are the batch.
      prompt: tokens of the longest prompt, without those of an image.
    """

    model: ModelConfig
    mesh: MeshConfig
    precision: PrecisionConfig
    objective: ObjectiveConfig
    rules: Rules
    shape: CacheShape
    prompt: int

    @property
    def sizes(self) -> dict[str, int]:
        """Mesh axis -> its size."""
        return self.mesh.sizes()

    @property
    def compute(self) -> str:
        return self.precision.compute

    @property
    def new_tokens(self) -> int:
        """Tokens that a row has room for beside its prompt."""
        return self.shape.slots - self.prompt - self.model.image_tokens

    @property
    def cache(self) -> list[dict[str, Kept]]:
        """The arrays of the cache, by layer and name."""
        return cache_kept(self.model, self.shape, self.rules, self.compute)

    @property
    def batch_arrays(self) -> dict[str, BatchArray]:
        """What prefill reads beside weights and cache."""
        arrays = batch_arrays(self.model, self.objective, self.prompt, self.shape.source)
        read = ("tokens", "patches", "source_tokens", "source_segments", "source_positions")
        return {name: array for name, array in arrays.items() if name in read}

    @property
    def row_arrays(self) -> dict[str, BatchArray]:
        """What says of each row where it is: its count, and its blocks of a pool."""
        arrays = {"count": BatchArray((), "int32", self.shape.slots)}
        if self.shape.block:
            arrays["table"] = BatchArray((self.shape.row_blocks,), "int32", self.shape.blocks)
        return arrays

    def programs(self, mesh: jax.sharding.Mesh) -> dict[str, tuple[Callable[..., Any], list[Any]]]:
        """Phase -> (what runs, the shapes that it runs on); call it inside `jax.set_mesh`.

        The argument number `DONATED` of each is written in place.
        """
        prefix = self.objective.name == "prefix_lm"
        decoding = make_decoding(self.model, self.rules, self.shape, self.compute, prefix=prefix)
        given = self._given(mesh.abstract_mesh)
        weights, cache = self._weights(mesh.abstract_mesh), self._cache(decoding, mesh)
        token = abstract_batch(
            {"tokens": BatchArray((1,), "int32", 1), "start": BatchArray((), "int32", 1)},
            self.shape.rows,
            self.rules,
            mesh.abstract_mesh,
        )
        count, table = given.pop("count"), given.pop("table", None)
        ways = count, None, table
        return {
            "prefill": (decoding.begin, [weights, cache, given, *ways]),
            "decode": (decoding.go_on, [weights, cache, token["tokens"], token["start"], *ways]),
        }

    def _given(self, mesh: Any) -> dict[str, jax.ShapeDtypeStruct]:
        arrays = self.batch_arrays | self.row_arrays
        return abstract_batch(arrays, self.shape.rows, self.rules, mesh)

    def _weights(self, mesh: Any) -> Any:
        model = make_model(self.model, self.objective, LossConfig(), self.rules, RematConfig())
        params = abstract_params(model, self.precision)
        return abstract_weights(params, model.axes, self.rules, self.compute, mesh)

    def _cache(self, decoding: Decoding, mesh: jax.sharding.Mesh) -> Cache:
        abstract = mesh.abstract_mesh
        layers: list[Any] = [
            {
                name: jax.ShapeDtypeStruct(
                    kept.shape,
                    kept.dtype,
                    sharding=NamedSharding(abstract, self.rules.spec(kept.dims)),
                )
                for name, kept in layer.items()
            }
            for layer in self.cache
        ]
        segments: Any = None
        if self.model.family == "encoder_decoder":
            sizes = self.shape.rows, self.shape.source
            sharding = NamedSharding(abstract, batch_spec(self.rules, 2))
            segments = jax.ShapeDtypeStruct(sizes, "int32", sharding=sharding)
        return Cache(layers, segments)

    def resized(self, *, rows: int | None = None, slots: int | None = None) -> InferenceJob:
        """The same with other rows, or with room for other tokens, prompts of which are as much
        longer or shorter (beside a source: what is generated); a pool of as many blocks as all rows
        need.
        """
        shape = replace(self.shape, rows=rows or self.shape.rows, slots=slots or self.shape.slots)
        if shape.block:
            parts = self.rules.parts("batch")
            shape = replace(shape, blocks=shape.rows // parts * shape.row_blocks)
        fixed = self.model.family == "encoder_decoder"
        prompt = self.prompt if fixed else self.prompt + shape.slots - self.shape.slots
        return replace(self, shape=shape, prompt=prompt)
