"""What weights need on each device, exact, from shapes and the layout alone.

State, the copy that the step computes with, gradients (Rajbhandari et al. 2020,
https://arxiv.org/abs/1910.02054, by ZeRO level), and one layer's weights where they are used, of
the arrays that `memory/arrays.py` finds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

from memory.arrays import Array, Arrays, arrays_of
from memory.job import Job
from memory.moments import moments
from models.weights import model_weights
from parallel.chips import Chip
from parallel.footprint import ITEM, Weight, elements
from parallel.rules import Rules


@lru_cache(maxsize=2**14)
def _laid_out(weight: Weight, where: str, rules: Rules, tiled: bool) -> int:
    """Elements of one weight; a search asks for the same ones again and again."""
    spec = {
        "at_rest": rules.at_rest,
        "in_model": rules.in_model,
        "in_stage": rules.in_stage,
        "of_gradient": rules.of_gradient,
        "gathered": rules.gathered,
    }[where]
    return elements(weight, spec(weight.axes, weight.shape), rules, tiled=tiled)


def of_experts(weight: Weight) -> bool:
    """Whether the expert axis divides a weight."""
    return "experts" in weight.axes.split()


@dataclass(frozen=True)
class WeightTerms:
    """The single terms of weights, bytes on one device like `chip`."""

    job: Job
    chip: Chip

    # --- what there is --------------------------------------------------------------------------

    @cached_property
    def compute(self) -> str:
        return self.job.precision.compute

    @cached_property
    def item(self) -> int:
        return ITEM[self.compute]

    @cached_property
    def product(self) -> str:
        """The dtype in which products read. JAX's default precision for float32 on TPU is one
        bfloat16 pass, and XLA keeps what only products read, weights too, in that.
        """
        tpu = self.chip.kind == "tpu"
        return "bfloat16" if tpu and self.compute == "float32" else self.compute

    @cached_property
    def product_item(self) -> int:
        return ITEM[self.product]

    @cached_property
    def block(self) -> list[Weight]:
        """The weights of one layer, as arrays of one form."""
        return model_weights(self.job.model)[0]

    @cached_property
    def weights(self) -> tuple[list[Weight], list[Weight]]:
        """The same of all blocks stacked, and of what stands outside the stack."""
        model, outside = self.job.model, model_weights(self.job.model)[1] + self.job.projection
        return [weight.stacked(model.blocks, model.stack) for weight in self.block], outside

    @cached_property
    def arrays(self) -> Arrays:
        """What the model really has."""
        return arrays_of(self.job)

    @cached_property
    def every(self) -> tuple[Array, ...]:
        return self.arrays.stacked + self.arrays.outside

    @cached_property
    def trained(self) -> tuple[list[Array], list[Array]]:
        """Of stacked arrays and of the others those that have gradients and moments."""
        stacked, outside = self.arrays.stacked, self.arrays.outside
        return [a for a in stacked if a.trained], [a for a in outside if a.trained]

    @property
    def uses(self) -> float:
        """Layers that share a block, on average: how often a stacked weight is used."""
        return self.job.model.layers / self.job.model.blocks

    def laid_out(self, weights: Iterable[Weight], where: str) -> int:
        """Elements on one device: a method of `Rules` by name."""
        tiled = self.chip.kind == "tpu"
        return sum(_laid_out(weight, where, self.job.rules, tiled) for weight in weights)

    def as_kept(self, arrays: Iterable[Array], where: str) -> int:
        """Bytes in the dtypes that they are kept in."""
        return sum(self.laid_out([a.weight], where) * ITEM[a.dtype] for a in arrays)

    def as_used(self, arrays: Iterable[Array], where: str) -> int:
        """The same in those that the model takes, which gradients are in, too."""
        return sum(self.laid_out([a.weight], where) * ITEM[a.used] for a in arrays)

    def as_read(self, arrays: Iterable[Array], where: str) -> int:
        """The same in those in which products read them."""
        return sum(self.laid_out([a.weight], where) * ITEM[self._read(a)] for a in arrays)

    def _read(self, array: Array) -> str:
        return self.product if array.used == self.compute else array.used

    # --- the state ------------------------------------------------------------------------------

    @cached_property
    def master(self) -> int:
        return self.as_kept(self.every, "at_rest")

    @cached_property
    def updated(self) -> int:
        """Of that what is trained."""
        return self.as_kept([*self.trained[0], *self.trained[1]], "at_rest")

    @cached_property
    def moments(self) -> dict[str, tuple[int, int]]:
        """Moment -> (bytes of the stacked weights, bytes of the others)."""
        of = [self._moments(arrays) for arrays in self.trained]
        return {name: (of[0][name], of[1][name]) for name in of[0]}

    def _moments(self, arrays: list[Array]) -> dict[str, int]:
        """Of arrays that may be in several dtypes: an adapter's gains stay in float32."""
        found: dict[str, int] = {}
        for dtype in sorted({self.job.precision.params, *(a.dtype for a in arrays)}):
            weights = [a.weight for a in arrays if a.dtype == dtype]
            parts = moments(self.job, weights, dtype, lambda w: self.laid_out(w, "at_rest"))
            found = {name: found.get(name, 0) + size for name, size in parts.items()}
        return found

    @cached_property
    def offloaded_state(self) -> int:
        """Bytes of moments that live in the memory of the host: those of the stacked weights."""
        if not self.job.optimizer.offload or self.chip.kind == "cpu":
            return 0
        return sum(stacked for stacked, _ in self.moments.values())

    # --- what the model is given and gives back ---------------------------------------------------

    @property
    def gathers_layers(self) -> bool:
        """Whether each layer's weights are gathered where they are used, and not all at once."""
        return self.job.parallel.zero == 3 and self.job.sizes["fsdp"] > 1

    @property
    def gathers_all(self) -> bool:
        """Whether all weights are gathered once a step."""
        return self.job.parallel.zero in (1, 2) and self.job.sizes["fsdp"] > 1

    @cached_property
    def copy(self) -> int:
        """The arrays as products read them; 0 of those that are so at rest."""
        if self.gathers_all:
            return self.as_read(self.every, "in_model")
        # A cast that nobody asked for (`product`) is of what the layers' loops read.
        stacked = [a for a in self.arrays.stacked if {a.used, self._read(a)} != {a.dtype}]
        outside = [a for a in self.arrays.outside if a.used != a.dtype]
        return self.as_read(stacked + outside, "in_model")

    @cached_property
    def gathered_copy(self) -> int:
        """The weights of the layers that are gathered all at once, at ZeRO level 1 and 2."""
        return self.as_read(self.arrays.stacked, "in_model") if self.gathers_all else 0

    @cached_property
    def cut(self) -> int:
        """The layers' weights of whole periods of a pattern, where it does not divide the layers:
        cutting the rest off copies them.
        """
        model = self.job.model
        periods, rest = divmod(model.layers, len(model.pattern))
        if not rest or model.distinct:
            return 0
        whole = self.as_read(self.arrays.stacked, "in_model")
        return whole * periods * len(model.pattern) // model.layers

    @cached_property
    def layer_gradients(self) -> int:
        return self.as_used(self.trained[0], "of_gradient")

    @cached_property
    def outer_gradients(self) -> int:
        """Of the embedding, the head and what else stands outside the stack."""
        return self.as_used(self.trained[1], "of_gradient")

    @cached_property
    def shared_gradients(self) -> int:
        """Of all weights but those of experts."""
        shared = [a for a in self.trained[0] + self.trained[1] if not of_experts(a.weight)]
        return self.as_used(shared, "of_gradient")

    @cached_property
    def accumulated(self) -> int:
        """The buffer that sums gradients over micro-steps."""
        return self.summed if self.job.micro_steps > 1 else 0

    @cached_property
    def summed(self) -> int:
        """All gradients as they are summed."""
        weights = [a.weight for a in self.trained[0] + self.trained[1]]
        return self.laid_out(weights, "of_gradient") * ITEM[self.job.precision.accumulate]

    # --- where they are used ----------------------------------------------------------------------

    @cached_property
    def layer_read(self) -> int:
        """One layer's arrays as products read them, gathered over fsdp."""
        return self.as_read(self.arrays.stacked, "gathered") // self.job.model.blocks

    @cached_property
    def layer_made(self) -> int:
        """One layer's weights that are made where they are used."""
        return self.laid_out(self.arrays.made, "gathered") * self.product_item

    @cached_property
    def layer_differentiated(self) -> int:
        """Gradients of one layer's arrays, whole. Stages ask for those of frozen ones, too."""
        staged = self.job.pipeline is not None
        arrays = self.arrays.stacked if staged else self.trained[0]
        return self.as_used(arrays, "gathered") // self.job.model.blocks

    @property
    def table(self) -> int:
        """Elements of the head's table while it is used."""
        model = self.job.model
        return model.padded_vocab // self.job.rules.parts("act_vocab") * model.table_dim

    @property
    def looked_up(self) -> int:
        """Elements of the embedding's gradient; the table is the first weight outside the stack."""
        return self.table * self._differentiated(self.weights[1][0])

    @property
    def head_gradient(self) -> int:
        """Elements of the gradient of the head's table, whole."""
        own = [w for w in self.weights[1] if w.axes.endswith("-> vocab")]
        return self.table * self._differentiated(*own or self.weights[1][:1])

    def _differentiated(self, weight: Weight) -> bool:
        """Whether a gradient of it is made. Stages ask for those of frozen weights, too."""
        staged = self.job.pipeline is not None
        return staged or any(a.trained and a.weight == weight for a in self.arrays.outside)
