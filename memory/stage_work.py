"""What the actions of a pipeline's table do: products, bytes streamed, collectives in a stage.

As `memory/roofline.py` has it of a whole step; of one micro-batch and the layers of one chunk.
Collectives over `fsdp` and `data` are there once for each micro-batch, as with micro-steps, those
over `pipe` once a tick.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from memory.job import Job
from memory.stages import Stages
from memory.terms import Terms
from models.block import block_residuals
from models.flops import attention_flops_per_token, flops_per_token, matrix_parameters
from parallel.footprint import Weight
from parallel.mesh import PIPE
from parallel.targets import Target

# Of what all that is no product reads and writes in a layer, the parts of F, B and W.
STREAMED = {"F": 2 / 7, "B": 3 / 7, "W": 2 / 7}


@dataclass(frozen=True)
class Work:
    """FLOPs, bytes that are streamed, and seconds of links at full rate by mesh axis."""

    flops: float = 0.0
    streamed: float = 0.0
    links: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: Work) -> Work:
        axes = {**self.links, **other.links}
        links = {axis: self.links.get(axis, 0.0) + other.links.get(axis, 0.0) for axis in axes}
        return Work(self.flops + other.flops, self.streamed + other.streamed, links)

    def __mul__(self, times: float) -> Work:
        links = {axis: times * seconds for axis, seconds in self.links.items()}
        return Work(times * self.flops, times * self.streamed, links)


@dataclass(frozen=True)
class Actions:
    """What the actions of a table are made of, for one micro-batch on one device."""

    job: Job
    target: Target
    again_share: float  # FLOPs of a layer that its policy computes again, of forward and backward

    @cached_property
    def stages(self) -> Stages:
        return Stages(Terms(self.job, self.target.chip))

    def of(self, kind: str, position: int) -> Work:
        """An action of the chunk at a position: a kind of `memory.tables.KINDS`."""
        last = position == len(self.stages.division) - 1
        layers = self.stages.division[position]
        total = self.loss if last and kind == "F" else Work()
        if position == 0 and kind != "W":
            total += self.embedding if kind == "F" else self.lookup
        if kind == "F":
            return total + self.layer("F") * layers
        each = self.layer("again")
        if kind != "W":
            each += self.layer("B")
        if kind != "B":
            each += self.layer("W")
        return total + each * layers

    def layer(self, part: str) -> Work:
        """F, B or W of one layer, or what is computed `again` before B and before a W alone."""
        return self._layer[part]

    @cached_property
    def _layer(self) -> dict[str, Work]:
        job, stages = self.job, self.stages
        terms, model = stages.terms, job.model
        tokens = job.tokens / job.rules.parts("act_mlp")
        head = model.embed_dim * model.vocab_size
        products = 2 * (matrix_parameters(model) - head) / model.layers * tokens
        core = attention_flops_per_token(model, job.sequence_length) / 3 / model.layers * tokens
        passes = 7 if job.remat.policy in ("none", "full") else 5.5
        streamed = passes * terms.bytes_of(block_residuals(model, terms.form))
        sums = terms.laid_out(terms.block, "in_stage")
        gathers = {"fsdp": self._moved("fsdp", self._gathered(terms.block), 1)}
        narrow = terms.narrow
        sequence = job.parallel.sequence
        none = job.remat.policy in ("none", "full")
        inner = 0 if none else 2 if self._keeps_projection else 3
        again = inner if sequence else 2 * (inner == 3)
        parts = {
            "F": Work(products + core, streamed * STREAMED["F"], self._tensor(narrow, 4) | gathers),
            "B": Work(
                products + 2 * core, streamed * STREAMED["B"], self._tensor(narrow, 4) | gathers
            ),
            "W": Work(
                products,
                streamed * STREAMED["W"] + sums * (2 * stages.accumulate + terms.item),
                self._reduced(terms.block),
            ),
        }
        whole = flops_per_token(model, job.sequence_length) / model.layers * tokens
        parts["again"] = Work(self.again_share * whole, 0.0, self._tensor(narrow, again))
        if job.remat.policy == "full":
            parts["again"] = parts["F"]
        return parts

    @cached_property
    def embedding(self) -> Work:
        """The lookup of the first stage."""
        terms = self.stages.terms
        gathers = {"fsdp": self._moved("fsdp", self._gathered(terms.weights[1][:1]), 1)}
        half = 3 if self.job.parallel.sequence else 2  # of embedding and loss head together
        return Work(0.0, 2 * terms.narrow, self._tensor(terms.narrow, half / 2) | gathers)

    @cached_property
    def lookup(self) -> Work:
        """The gradient of the lookup."""
        terms = self.stages.terms
        half = 3 if self.job.parallel.sequence else 2
        links = self._tensor(terms.narrow, half / 2) | self._reduced(terms.weights[1][:1])
        return Work(0.0, 2 * terms.narrow + 2 * self.stages.outside_sums, links)

    @cached_property
    def loss(self) -> Work:
        """Logits, loss and both gradients of the head, on the last stage."""
        job, terms = self.job, self.stages.terms
        parts = job.rules.parts("act_vocab")
        flops = 6 * job.model.embed_dim * job.model.vocab_size * job.tokens / parts
        logits = 6 * 4 * job.tokens * job.model.padded_vocab // parts
        table = terms.weights[1][:1]
        half = 3 if job.parallel.sequence else 2
        links = Work(links=self._reduced(table)) + Work(
            links=self._tensor(terms.narrow, half)
            | {"fsdp": self._moved("fsdp", self._gathered(table), 1)}
        )
        return Work(flops, logits + 2 * self.stages.outside_sums, links.links)

    @cached_property
    def border(self) -> Work:
        """Once a step: tables to all stages and back, layers to where they are run, the update."""
        job, stages = self.job, self.stages
        terms = stages.terms
        _, outside = terms.weights
        arrive = terms.laid_out(outside, "in_model") * terms.item
        pipe = self._moved(PIPE, arrive, 1) + self._moved(PIPE, stages.outside_sums, 2)
        if stages.moved:
            own = stages.own_copy + stages.own_sums
            pipe += self._moved(PIPE, own, 1)
        links = {PIPE: pipe}
        if job.parallel.zero in (1, 2):
            whole = stages.own_copy + arrive
            links["fsdp"] = self._moved("fsdp", whole, 1)
        moments = sum(sum(parts) for parts in terms.moments.values())
        update = 2 * (terms.master + moments) + 2 * stages.at_rest_gradients
        return Work(0.0, update, links)

    @cached_property
    def transfers(self) -> float:
        """Seconds of all that ticks send, at the links' full rate."""
        table = self.stages.table
        moved = table.ticks * table.transfers * self.stages.stream
        return moved / self.target.hop(self.job.sizes, PIPE)

    @property
    def _keeps_projection(self) -> bool:
        names = {tensor.name for tensor in self.stages.terms.saved_names}
        return "attention_projection" in names

    def _gathered(self, weights: list[Weight]) -> float:
        """Bytes of weights as they are used, where they are gathered for each use."""
        terms = self.stages.terms
        each_time = self.job.parallel.zero == 3
        return terms.laid_out(weights, "gathered") * terms.item * each_time

    def _reduced(self, weights: list[Weight]) -> dict[str, float]:
        """The gradients of weights, of one micro-batch."""
        terms, zero = self.stages.terms, self.job.parallel.zero
        whole = terms.laid_out(weights, "gathered") * terms.item
        parted = terms.laid_out(weights, "in_stage") * terms.item
        return {
            "fsdp": self._moved("fsdp", whole, 1 if zero >= 2 else 2),
            "data": self._moved("data", parted, 2),
        }

    def _tensor(self, whole: float, rounds: float) -> dict[str, float]:
        return {"tensor": self._moved("tensor", whole, rounds)}

    def _moved(self, axis: str, whole: float, rounds: float) -> float:
        """Seconds of gathers or scatters (`rounds` of them) in a ring."""
        n = self.job.sizes[axis]
        if n == 1:
            return 0.0
        bandwidth = self.target.bandwidth(self.job.sizes, (axis,))
        return whole * (n - 1) / n * rounds / bandwidth
