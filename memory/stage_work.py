"""What the actions of a pipeline's table do: products, bytes streamed, collectives in a stage.

As `memory/roofline.py` has it of a whole step; of one micro-batch and the layers of one chunk.
Collectives over `fsdp` and `data` are there once for each micro-batch, as with micro-steps, those
over `pipe` once a tick.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from memory.experts_exchange import exchanged, over_tensor
from memory.job import Job
from memory.stages import Stages
from memory.terms import Terms
from memory.weight_terms import of_experts
from models.beside import BESIDE
from models.flops import (
    embed_parameters,
    empty_slots,
    flops_before_stack,
    flops_by_layer,
    head_flops,
    stream_share,
)
from parallel.footprint import Weight
from parallel.mesh import PIPE
from parallel.rules import EXPERT
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
    again: float  # FLOPs of one token that the policy of the layers computes again

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
        stream = tokens * stream_share(model, job.sequence_length)
        layers = sum(flops_by_layer(model, job.sequence_length, job.source_length))
        products = (layers - job.attention_flops_per_token) / 3 / model.layers * tokens
        products += empty_slots(model, job.stream_length) / 3 / model.layers * stream
        core = job.attention_flops_per_token / 3 / model.layers * tokens
        passes = 7 if job.remat.policy in ("none", "full") else 5.5
        streamed = passes * terms.bytes_of(terms.residuals)
        sums = terms.laid_out(terms.block, "in_stage")
        gathers = {"fsdp": self._moved("fsdp", self._gathered(terms.block), 1)}
        narrow = terms.narrow
        there = self._experts_exchange() if model.experts.number else {}
        sequence = job.parallel.sequence
        none = job.remat.policy in ("none", "full")
        inner = 0 if none else 2 if self._keeps_projection else 3
        again = inner if sequence else 2 * (inner == 3)
        sublayers = 3 if model.cross != "none" else 2
        way = Work(links=self._tensor(narrow, 2 * sublayers)) + Work(links=gathers)
        way += Work(links=there)
        memory = terms.whole_memory  # gathered where it is divided; its gradient
        parts = {
            "F": Work(products + core, streamed * STREAMED["F"])
            + way
            + Work(links=self._tensor(memory, sequence)),
            "B": Work(products + 2 * core, streamed * STREAMED["B"])
            + way
            + Work(links=self._tensor(memory, 1 if sequence else 2)),
            "W": Work(
                products, streamed * STREAMED["W"] + sums * (2 * stages.accumulate + terms.item)
            )
            + Work(links=self._reduced(terms.block))
            + self._bias_reduced(terms),
        }
        repeated = self.again / model.layers * tokens
        parts["again"] = Work(repeated, 0.0, self._tensor(narrow, again * sublayers / 2))
        if job.remat.policy == "full":
            parts["again"] = parts["F"]
        return parts

    @cached_property
    def embedding(self) -> Work:
        """The lookup of the first stage, and what a source or an image goes through before."""
        terms = self.stages.terms
        gathers = {"fsdp": self._moved("fsdp", self._gathered(terms.weights[1][:1]), 1)}
        half = 3 if self.job.parallel.sequence else 2  # of embedding and loss head together
        links = self._tensor(terms.narrow, half / 2) | gathers
        own = Work(2 * self._projected + self._before / 3, 2 * terms.narrow, links)
        return own + self._encoder("F")

    @property
    def _projected(self) -> float:
        """Products of a factorised embedding, which `tensor` divides where it does the sequence."""
        job = self.job
        return embed_parameters(job.model) * job.tokens / job.rules.parts("residual_seq")

    @cached_property
    def lookup(self) -> Work:
        """The gradient of the lookup; what was before the stack is computed again for its own."""
        terms = self.stages.terms
        half = 3 if self.job.parallel.sequence else 2
        links = self._tensor(terms.narrow, half / 2) | self._reduced(terms.weights[1][:1])
        again = 1 if self.job.remat.policy == "none" else 4 / 3
        streamed = 2 * terms.narrow + 2 * self.stages.outside_sums
        own = Work(4 * self._projected + again * self._before, streamed, links)
        return own + self._encoder("F") + self._encoder("B") + self._encoder("W")

    def _encoder(self, part: str) -> Work:
        """What the encoder beside the decoder streams and sends in a pass, products left out."""
        terms = self.stages.terms.encoder
        if terms is None:
            return Work()
        layers = [w for w in self.stages.terms.weights[1] if w.axes.split()[0] == BESIDE]
        number = terms.job.model.layers
        passes = 7 if self.job.remat.policy in ("none", "full") else 5.5
        streamed = passes * number * terms.bytes_of(terms.residuals) * STREAMED[part]
        if part == "W":
            return Work(streamed=streamed, links=self._reduced(layers)) + (
                self._bias_reduced(terms) * number
            )
        gathers = {"fsdp": self._moved("fsdp", self._gathered(layers), 1)}
        links = self._tensor(terms.narrow, 4 * number) | gathers
        return Work(streamed=streamed, links=links)

    def _bias_reduced(self, terms: Terms) -> Work:
        """The gradient of what positions add to the scores of one layer."""
        links = {axis: self._moved(axis, terms.bias, 2) for axis in ("data", "fsdp")}
        return Work(links=links)

    @property
    def _before(self) -> float:
        """FLOPs of a micro-batch up to the stack, forward and backward."""
        row = flops_before_stack(self.job.model, self.job.source_length)
        return row * self.job.rows / self.job.rules.parts("act_mlp")

    @cached_property
    def loss(self) -> Work:
        """Logits, loss and both gradients of the head, on the last stage."""
        job, terms = self.job, self.stages.terms
        parts = job.rules.parts("act_vocab")
        flops = head_flops(job.model, job.sequence_length) * job.tokens / parts
        columns = job.model.padded_vocab * job.model.token_head
        logits = 6 * 4 * job.tokens * columns // parts
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
        arrive = terms.laid_out(stages.outside, "in_model") * terms.item
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

    def _experts_exchange(self) -> dict[str, float]:
        """One way through the experts of a layer, or the way of the gradients back."""
        terms = self.stages.terms
        links = {EXPERT: self._moved(EXPERT, exchanged(terms), 0.5)}
        dense = 4 * terms.narrow
        return links | self._tensor(dense + over_tensor(terms) / 2, 1)

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
        shared = [weight for weight in weights if not of_experts(weight)]
        reduced = terms.laid_out(shared, "in_stage") * terms.item
        return {
            "fsdp": self._moved("fsdp", whole, 1 if zero >= 2 else 2),
            "data": self._moved("data", parted, 2),
            EXPERT: self._moved(EXPERT, reduced, 2),
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
