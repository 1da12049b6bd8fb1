"""What a stage of a pipeline must hold on each device, exact, from shapes, layout and table.

One program runs on all stages, so buffers are as large on each as on the one that needs most: slots
of the fullest stage, layers of the largest chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from memory.job import Job
from memory.rings import kept, pending
from memory.tables import Table, table_for
from memory.terms import Terms
from models.block import RESIDUAL
from parallel.footprint import ITEM, Activation, Weight
from parallel.mesh import PIPE


@dataclass(frozen=True)
class Stages:
    """The terms that a pipeline adds to `terms`, or has in place of its own."""

    terms: Terms

    @property
    def job(self) -> Job:
        return self.terms.job

    @cached_property
    def table(self) -> Table:
        return table_of(self.job)

    @property
    def division(self) -> tuple[int, ...]:
        """Layers of each chunk, in the model's order."""
        assert self.job.pipeline is not None
        return self.job.pipeline.layers

    @property
    def rows(self) -> int:
        """Layers of the largest chunk."""
        return max(self.division)

    @property
    def layers(self) -> int:
        """Layers for which every stage has room."""
        return self.rows * self.table.chunks

    # --- weights and gradients ------------------------------------------------------------------

    @property
    def moved(self) -> bool:
        """Whether layers are elsewhere at rest than on the stage that runs them."""
        return not self.job.rules.rows

    def _own(self, where: str) -> int:
        """Elements of the layers of one stage; shared blocks are outside of them."""
        if self.job.model.distinct:
            return 0
        return self.layers * self.terms.laid_out(self.terms.block, where)

    @cached_property
    def outside(self) -> list[Weight]:
        """Embedding, head and shared blocks: whole on every stage."""
        stacked, outside = self.terms.weights
        return stacked + outside if self.job.model.distinct else outside

    def _outside(self, where: str) -> int:
        """Elements of those."""
        return self.terms.laid_out(self.outside, where)

    @cached_property
    def own_copy(self) -> int:
        """The stage's layers as products read them; 0 where that is the master copy."""
        terms, precision = self.terms, self.job.precision
        gathers = self.job.parallel.zero in (1, 2) and self.job.sizes["fsdp"] > 1
        same = precision.params == terms.product and not gathers and not self.moved
        return 0 if same else self._own("in_model") * terms.product_item

    @cached_property
    def outside_copy(self) -> int:
        """What is outside, as every stage has it."""
        return self._outside("in_model") * self.terms.item

    @cached_property
    def own_sums(self) -> int:
        return self._own("in_stage") * self.accumulate

    @cached_property
    def outside_sums(self) -> int:
        return self._outside("in_stage") * self.accumulate

    @property
    def head_gradient(self) -> int:
        """The gradient of the head's table, before it is added to the sums."""
        return self.terms.laid_out(self.terms.weights[1][:1], "in_stage") * self.terms.item

    @property
    def at_rest_gradients(self) -> int:
        """What the update is given."""
        return self.terms.summed

    @property
    def accumulate(self) -> int:
        return ITEM[self.job.precision.accumulate]

    # --- buffers --------------------------------------------------------------------------------

    @cached_property
    def stream(self) -> int:
        """One micro-batch of the residual stream, as it is sent, features of a source included."""
        return self.bytes_of([Activation("", RESIDUAL)]) + self.terms.memory

    @cached_property
    def kept(self) -> int:
        """What F keeps of one layer."""
        if self.job.remat.policy == "none":
            form, cross_form = self.terms.form, self.terms.cross_form
            tensors = kept(self.job.model, form, self.divided, cross_form)
            # Of the source's features each layer keeps its own copy, gathered or not.
            return self.bytes_of(tensors) + self.terms.memory * (not self.divided)
        return self.stream + self.bytes_of(self.terms.saved_names)

    @cached_property
    def pending(self) -> int:
        """What B leaves of one layer for W."""
        return self.bytes_of(pending(self.job.model, self.divided))

    @property
    def divided(self) -> bool:
        """Whether the residual stream's sequence is divided."""
        return self.job.rules.parts("residual_seq") > 1

    @cached_property
    def rings(self) -> dict[str, int]:
        """Buffer -> bytes of all its slots."""
        each = {
            "input": self.stream,
            "cotangent": self.stream,
            "residual": self.rows * self.kept,
            "pending": self.rows * self.pending,
        }
        return {name: self.table.capacity[name] * size for name, size in each.items()}

    def bytes_of(self, tensors: list[Activation]) -> int:
        """Of activations of one layer and one micro-batch, none in the dtype of products alone."""
        return self.terms.bytes_of([t._replace(dtype=_held(t.dtype)) for t in tensors])


def _held(dtype: str) -> str:
    return "compute" if dtype == "product" else dtype


def table_of(job: Job) -> Table:
    """The figures of a job's schedule.

    Raises:
      ValueError: the schedule is none for these stages and micro-batches.
    """
    assert job.pipeline is not None
    return table_for(job.pipeline, job.sizes[PIPE], job.micro_steps)
