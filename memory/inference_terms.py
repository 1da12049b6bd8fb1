"""What generation must hold on each device, exact, from shapes and the layout alone.

Weights in compute dtype as decoding lays them out, the cache by kind, what a call is given, and
logits; and the tensors of which `memory/inference_parts.py` says how many live at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from jax.sharding import PartitionSpec

from memory.inference_job import InferenceJob
from models.attention import form_for
from models.beside import encoder_beside
from models.experts import at_experts
from models.kv_cache import SCALE, Kept, is_ring
from models.weights import model_weights
from parallel.chips import Chip
from parallel.dispatch import row_count
from parallel.footprint import ITEM, Activation, Weight, activation_bytes, elements, tiled_size
from parallel.rules import Rules
from training.batch_arrays import BatchArray

ITEMS = ITEM | {"int8": 1}
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
        block, outside = self.weight_list
        rules, item = self.job.rules, ITEM[self.job.compute]
        number = self.job.model.blocks

        def laid_out(weight: Weight) -> int:
            spec = rules.in_model(weight.axes, weight.shape)
            return elements(weight, spec, rules, tiled=self.tiled)

        return item * (number * sum(map(laid_out, block)) + sum(map(laid_out, outside)))

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
        return (tiled_size(own) if self.tiled else math.prod(own)) * ITEMS[dtype]

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
