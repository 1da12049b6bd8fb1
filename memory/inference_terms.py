"""What generation must hold on each device, exact, from shapes and the layout alone.

Weights in compute dtype as decoding lays them out, the cache by kind, what a call is given, and
logits; and the tensors of which `memory/inference_parts.py` says how many live at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from jax.sharding import PartitionSpec

from memory.inference_job import InferenceJob
from memory.stream import Stream
from models.beside import encoder_beside
from models.config import ModelConfig
from models.kv_cache import POOL as POOL_DIMS
from models.kv_cache import SCALE, Kept, is_ring
from models.weights import model_weights
from parallel.chips import Chip
from parallel.footprint import ITEM, Weight, elements, tiled_size
from parallel.rules import is_stacked
from training.batch_arrays import BatchArray

CROSS, POOL, RING, FULL = (
    "cross-attention cache",
    "KV cache: paged pool",
    "KV cache: windows",
    "KV cache: full layers",
)


@dataclass(frozen=True)
class InferenceTerms:
    """The single terms of one prediction, bytes on one device like `chip`."""

    job: InferenceJob
    chip: Chip

    # --- arguments --------------------------------------------------------------------------------

    @cached_property
    def weights(self) -> int:
        """Of all blocks, and of what stands outside the stack, as decoding lays them out."""
        return self.block_weights + sum(map(self._laid_out, self.weight_list[1]))

    @cached_property
    def weight_list(self) -> tuple[list[Weight], list[Weight]]:
        """Those of one block, and those outside the stack."""
        return model_weights(self.job.model)

    @property
    def tiled(self) -> bool:
        """Whether two dims of an array are padded to tiles."""
        return self.chip.kind == "tpu"

    @cached_property
    def cache(self) -> dict[str, int]:
        """Kind -> bytes of it in all layers."""
        job, kinds = self.job, self.job.model.pattern
        found: dict[str, int] = {}
        for number, layer in enumerate(job.cache):
            local = kinds[number % len(kinds)] == "local"
            if is_ring(job.model, job.shape, local=local):
                own = RING
            else:
                own = POOL if job.shape.block else FULL
            for name, kept in layer.items():
                kind = CROSS if name.startswith("cross_") else own
                kind += ", scales" * (kept.dtype == SCALE and name.endswith("_scale"))
                found[kind] = found.get(kind, 0) + self.of_kept(kept)
        if job.model.family == "encoder_decoder":
            segments = job.shape.rows // job.rules.parts("batch") * job.shape.source * 4
            found[CROSS] = found.get(CROSS, 0) + segments
        return found

    def of_kept(self, kept: Kept) -> int:
        """Bytes of one array of a cache."""
        spec = self.job.rules.spec(kept.dims)
        return self.of_array(kept.shape, spec, kept.dtype)

    def of_array(self, shape: Iterable[int], spec: PartitionSpec, dtype: str) -> int:
        """Bytes of an array divided so."""
        own = list(shape)
        for dim, entry in enumerate(spec):
            axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
            own[dim] //= self.job.rules.size(axes)
        return (tiled_size(own) if self.tiled else math.prod(own)) * ITEM[dtype]

    def inputs(self, phase: str) -> int:
        """What a call is given of its rows: tokens, sources, images, places, tables."""
        job = self.job
        step = {"tokens": BatchArray((1,), "int32", 1), "start": BatchArray((), "int32", 1)}
        arrays = job.row_arrays | (job.batch_arrays if phase == "prefill" else step)
        return sum(
            self.rows * math.prod(array.dims) * ITEM[array.dtype] for array in arrays.values()
        )

    @property
    def rows(self) -> int:
        """Rows of the batch on one device."""
        return self.job.shape.rows // self.job.rules.parts("batch")

    @property
    def logits(self) -> int:
        """float32, whole on every device of a row: what a program gives back beside the cache."""
        return self.rows * self.job.model.padded_vocab * 4

    # --- tensors of one call ----------------------------------------------------------------------

    @cached_property
    def item(self) -> int:
        return ITEM[self.job.compute]

    @property
    def gathers(self) -> bool:
        """Whether weights are gathered where they are used."""
        return self.job.rules.zero == 3 and self.fsdp > 1

    @property
    def fsdp(self) -> int:
        return self.job.mesh.fsdp

    @cached_property
    def layer_weights(self) -> int:
        """One layer's weights as they are used."""
        rules = self.job.rules
        return self.item * sum(
            elements(w, rules.gathered(w.axes, w.shape), rules, tiled=self.tiled)
            for w in self.weight_list[0]
        )

    @property
    def table(self) -> int:
        """A table of the vocabulary as it is used."""
        model = self.job.model
        parts = self.job.rules.parts("act_vocab")
        return model.padded_vocab // parts * model.table_dim * self.item

    @cached_property
    def kept_scores(self) -> int:
        """Scores of one token of each row over the slots of the cache, float32."""
        model, rules, shape = self.job.model, self.job.rules, self.job.shape
        heads = model.heads // rules.parts("act_heads")
        return self.rows * heads * max(shape.slots, shape.source) * 4

    @cached_property
    def largest_read(self) -> Read:
        """What one layer reads out of a pool, of the layer that reads most."""
        shape = self.job.shape
        if not shape.block:
            return Read(0, 0)
        pools = [layer["key"] for layer in self.job.cache if layer["key"].dims == POOL_DIMS]
        if not pools:
            return Read(0, 0)
        heads = pools[0].shape[0] // self.job.rules.parts("act_heads")
        sizes = self.rows * shape.row_blocks * shape.block, heads, self.job.model.head_dim
        minor = -(-sizes[-1] // 128) * 128 if self.tiled else sizes[-1]
        elements = 2 * math.prod(sizes[:-1]) * minor  # keys and values
        return Read(elements * ITEM[pools[0].dtype], elements * (pools[0].dtype == "int8"))

    @property
    def unaligned(self) -> bool:
        """Whether the parts of a table that are gathered are no whole tiles of a TPU."""
        return self.tiled and self.job.model.table_dim // self.fsdp % 128 > 0

    @cached_property
    def recast(self) -> int:
        """An encoder's stacked weights as the loop over its layers reads them on a TPU, which
        multiplies float32 in one pass of bfloat16.
        """
        if not (self.tiled and self.job.compute == "float32"):
            return 0
        stacked = [w for w in self.weight_list[1] if is_stacked(w.axes)]
        return sum(map(self._laid_out, stacked)) // 2

    @cached_property
    def block_weights(self) -> int:
        """Of all blocks, as decoding lays them out."""
        return self.job.model.blocks * sum(map(self._laid_out, self.weight_list[0]))

    @cached_property
    def largest_weight(self) -> int:
        """The largest matrix of a block."""
        return max(map(self._laid_out, self.weight_list[0]))

    def _laid_out(self, weight: Weight) -> int:
        """Bytes of a weight on one device, as decoding lays it out."""
        rules = self.job.rules
        spec = rules.in_model(weight.axes, weight.shape)
        return ITEM[self.job.compute] * elements(weight, spec, rules, tiled=self.tiled)

    def stream(self, length: int | None = None) -> Stream:
        """The tensors of a layer for rows of `length` tokens; default: the prompt and its image."""
        length = self.job.prompt + self.job.model.image_tokens if length is None else length
        return self._stream(self.job.model, length)

    @cached_property
    def beside(self) -> Stream | None:
        """The same of an encoder beside the decoder."""
        model = encoder_beside(self.job.model)
        if model is None:
            return None
        vision = self.job.model.family == "vision_language"
        return self._stream(model, model.vision.patches if vision else self.job.shape.source)

    def _stream(self, model: ModelConfig, length: int) -> Stream:
        rows, compute = self.job.shape.rows, self.job.compute
        return Stream(model, length, rows, self.job.rules, compute, self.chip.kind)


class Read(NamedTuple):
    """Keys and values of one layer out of a pool: bytes, and elements that are int8."""

    pooled: int
    int8: int
