"""Bytes per device of a training step in closed form: no trace, no compiler, milliseconds.

A step passes through phases; each holds the state, the saved activations and its own buffers, and
the largest phase decides (docs/memory.md derives the terms):

    loss        the head's table, its gradient, the logits of a chunk
    gather      ZeRO 1 and 2: weights as they arrive and as they are used
    backward    gradients of the layers as they fill, and one layer's own tensors and weights
    embedding   the gradient of the lookup, whole before it is divided
    update      gradients and what the optimizer makes of them

What is stored is exact: weights, master copy, moments, gradients, and what remat saves (Korthikanti
et al. 2022, https://arxiv.org/abs/2205.05198, count the same tensors; Rajbhandari et al. 2020,
https://arxiv.org/abs/1910.02054, the state by ZeRO level). What the compiler adds while it works
has one factor a term and platform, `memory/constants.py`, fitted on compiled programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from memory.constants import CONSTANTS, Constants
from memory.job import Job
from models.attention import form_for
from models.block import RESIDUAL, block_residuals
from models.decoder import decoder_weights
from parallel.chips import Chip
from parallel.footprint import ITEM, Activation, Weight, activation_bytes, elements
from parallel.remat import PRESETS, TENSORS
from training.matrices import matrix_dims, orthogonalises

INT32 = ITEM["int32"]


@dataclass(frozen=True)
class Prediction:
    """Bytes per device.

    Attributes:
      components: component -> bytes, of the state and of the phase that needs most.
      phases: phase -> bytes of its temporaries.
      arguments: state and batch.
      host_bytes: what is offloaded, in the memory of the host.
    """

    components: dict[str, int]
    phases: dict[str, int]
    arguments: int
    host_bytes: int

    @property
    def temporaries(self) -> int:
        return max(self.phases.values())

    @property
    def total_bytes(self) -> int:
        return self.arguments + self.temporaries


def predict(job: Job, chip: Chip) -> Prediction:
    """What a step of `job` needs on each device, if it ran on devices like `chip`."""
    return Terms(job, chip, CONSTANTS[chip.kind]).prediction()


@dataclass(frozen=True)
class Terms:
    """The single terms of one prediction, bytes on one device."""

    job: Job
    chip: Chip
    constants: Constants

    # --- what there is --------------------------------------------------------------------------

    @cached_property
    def compute(self) -> str:
        return self.job.precision.compute

    @cached_property
    def item(self) -> int:
        return ITEM[self.compute]

    @cached_property
    def form(self) -> str:
        """The form of attention that will run."""
        model = self.job.model
        return form_for(
            model.attention,
            self.chip.kind,
            self.job.sequence_length,
            model.head_dim,
            self.compute,
            softcap=model.attention_softcap > 0,
            dropped=model.attention_dropout > 0,
        )

    @cached_property
    def weights(self) -> tuple[list[Weight], list[Weight]]:
        """Of all layers stacked, and of what stands outside the stack."""
        block, outside = decoder_weights(self.job.model)
        return [weight.stacked(self.job.model.layers) for weight in block], outside

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Logical dim -> size of one micro-step over all devices."""
        model, length = self.job.model, self.job.sequence_length
        return {
            "batch": self.job.batch_size // self.job.micro_steps,
            "seq": length,
            "keys": length,
            "residual_seq": length,
            "act_embed": model.embed_dim,
            "act_heads": model.heads,
            "act_kv_heads": model.kv_heads,
            "head_dim": model.head_dim,
            "act_mlp": model.mlp_dim,
        }

    def bytes_of(self, tensors: list[Activation]) -> int:
        """Of activations of one layer."""
        return activation_bytes(tensors, self.sizes, self.job.rules, self.compute)

    def laid_out(self, weights: list[Weight], where: str) -> int:
        """Elements on one device: at_rest, in_model, of_gradient or gathered."""
        rules = self.job.rules
        spec = {
            "at_rest": rules.at_rest,
            "in_model": rules.in_model,
            "of_gradient": rules.of_gradient,
            "gathered": rules.gathered,
        }[where]
        tiled = self.chip.kind == "tpu"
        return sum(
            elements(weight, spec(weight.axes, weight.shape), rules, tiled=tiled)
            for weight in weights
        )

    # --- the state ------------------------------------------------------------------------------

    @cached_property
    def master(self) -> int:
        stacked, outside = self.weights
        return self.laid_out(stacked + outside, "at_rest") * ITEM[self.job.precision.params]

    @cached_property
    def moments(self) -> dict[str, tuple[int, int]]:
        """Moment -> (bytes of the stacked weights, bytes of the others)."""
        item = ITEM[self.job.precision.params]
        parts = [self.laid_out(weights, "at_rest") * item for weights in self.weights]
        whole = (parts[0], parts[1])
        name, momentum = self.job.optimizer.name, self.job.optimizer.momentum
        if name == "adamw":
            return {"first moment": whole, "second moment": whole}
        if name == "lion" or (name == "sgd" and momentum):
            return {"momentum": whole}
        if name == "sgd":
            return {}
        if name == "adafactor":
            factored = [sum(self._factored(weight) * item for weight in ws) for ws in self.weights]
            return {"factored second moment": (factored[0], factored[1])}
        assert name == "muon", name
        adam = [
            self.laid_out([w for w in ws if not orthogonalises(w.axes)], "at_rest") * item
            for ws in self.weights
        ]
        return {"momentum": whole, "second moment of vectors and tables": (adam[0], adam[1])}

    def _factored(self, weight: Weight) -> int:
        dims = matrix_dims(weight.axes)
        kept = [weight] if dims is None else [_without(weight, gone) for gone in (dims[1], dims[0])]
        # A factor is divided as its dims are in the whole weight.
        spec = list(self.job.rules.at_rest(weight.axes, weight.shape))
        total = 0
        for factor, gone in zip(kept, ((),) if dims is None else (dims[1], dims[0]), strict=True):
            entries = [entry for i, entry in enumerate(spec) if i not in gone]
            parts = 1
            for entry in entries:
                axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
                parts *= self.job.rules.size(axes)
            total += factor.size // parts
        return total

    @cached_property
    def offloaded_state(self) -> int:
        """Bytes of moments that live in the memory of the host: those of the stacked weights."""
        if not self.job.optimizer.offload or self.chip.kind == "cpu":
            return 0
        return sum(stacked for stacked, _ in self.moments.values())

    @cached_property
    def batch(self) -> int:
        """Tokens, targets, segments and positions of the whole step."""
        return 4 * INT32 * self.job.rows * self.job.micro_steps * self.job.sequence_length

    # --- what the model is given and gives back ---------------------------------------------------

    @cached_property
    def copy(self) -> int:
        """The weights in compute dtype, as the model sees them; 0 where that is the master copy."""
        cast = self.job.precision.params != self.compute
        gathers = self.job.parallel.zero in (1, 2) and self.job.sizes["fsdp"] > 1
        if not cast and not gathers:
            return 0
        stacked, outside = self.weights
        return self.laid_out(stacked + outside, "in_model") * self.item

    @cached_property
    def copied_whole(self) -> int:
        """The weights of the layers that are gathered all at once, at ZeRO level 1 and 2."""
        if self.job.parallel.zero not in (1, 2) or self.job.sizes["fsdp"] == 1:
            return 0
        return self.laid_out(self.weights[0], "in_model") * self.item

    @cached_property
    def layer_gradients(self) -> int:
        return self.laid_out(self.weights[0], "of_gradient") * self.item

    @cached_property
    def outer_gradients(self) -> int:
        """Of the embedding, the head and what else stands outside the stack."""
        return self.laid_out(self.weights[1], "of_gradient") * self.item

    @cached_property
    def accumulated(self) -> int:
        """The buffer that sums gradients over micro-steps."""
        if self.job.micro_steps == 1:
            return 0
        stacked, outside = self.weights
        item = ITEM[self.job.precision.accumulate]
        return self.laid_out(stacked + outside, "of_gradient") * item

    # --- what remat keeps -------------------------------------------------------------------------

    @cached_property
    def saved(self) -> dict[str, int]:
        """Tensor -> bytes that all layers keep on the device for the backward pass."""
        return self._saved()[0]

    @cached_property
    def offloaded(self) -> dict[str, int]:
        """Tensor -> bytes that all layers keep in the memory of the host."""
        return self._saved()[1]

    def _saved(self) -> tuple[dict[str, int], dict[str, int]]:
        remat, layers = self.job.remat, self.job.model.layers
        tensors = [*block_residuals(self.job.model, self.form)]
        offloaded: list[Activation] = []
        if remat.policy != "none":
            names = remat.save if remat.policy == "custom" else PRESETS[remat.policy]
            tensors = [Activation("block input", RESIDUAL), *self._named(names or ())]
            offloaded = self._named(remat.offload)
        sums: tuple[dict[str, int], dict[str, int]] = ({}, {})
        for kept, into in zip((tensors, offloaded), sums, strict=True):
            for tensor in kept:
                size = layers * self.bytes_of([tensor])
                into[tensor.name] = into.get(tensor.name, 0) + size
        return sums

    def _named(self, names: tuple[str, ...]) -> list[Activation]:
        """The tensors of a policy that this model has and whose value the backward pass reads."""
        model = self.job.model
        absent = {"mlp_gate"} if not model.gated else set()
        if self.form != "xla":
            absent.add("attention_probs")
        else:
            absent.add("attention_lse")
        if self.form == "cudnn":  # a kernel that nobody tags the inside of
            absent |= {"attention_lse", "attention_out"}
        if model.norm_position != "sandwich":
            absent.add("mlp_projection")  # goes into a sum, whose derivative needs no value
        return [
            Activation(name, TENSORS[name], "float32" if name == "attention_lse" else "compute")
            for name in names
            if name not in absent
        ]

    # --- what the compiler adds -------------------------------------------------------------------

    @cached_property
    def layer_weights(self) -> int:
        """One layer's weights as they are used: gathered over fsdp."""
        return self.laid_out(self.weights[0], "gathered") // self.job.model.layers * self.item

    @cached_property
    def wide(self) -> int:
        """One tensor [tokens, F] of the feed-forward."""
        return self.bytes_of([Activation("", "batch seq act_mlp")])

    @cached_property
    def narrow(self) -> int:
        """One tensor [tokens, D]."""
        return self.bytes_of([Activation("", "batch seq act_embed")])

    @cached_property
    def heads(self) -> int:
        """One tensor [tokens, heads, head_dim]."""
        return self.bytes_of([Activation("", "batch seq act_heads head_dim")])

    @cached_property
    def scores(self) -> int:
        """What attention holds that is quadratic: scores (xla), or cuDNN's bias."""
        if self.form == "xla":
            return self.bytes_of([Activation("", "batch act_heads seq keys", "float32")])
        if self.form == "cudnn":
            return self.bytes_of([Activation("", "batch seq keys")])
        return 0

    @cached_property
    def table(self) -> int:
        """Elements of the head's table on one device while it is used."""
        model = self.job.model
        return model.padded_vocab // self.job.rules.parts("act_vocab") * model.embed_dim

    @cached_property
    def logits(self) -> int:
        """One chunk of logits, float32."""
        tokens = min(self.job.tokens, self.job.loss.chunk)
        return tokens * self.job.model.padded_vocab // self.job.rules.parts("act_vocab") * 4

    def prediction(self) -> Prediction:
        """All terms together."""
        k, job = self.constants, self.job
        fsdp = job.sizes["fsdp"] > 1
        stored = dict(self.saved)
        gathered = self.layer_weights if fsdp and job.parallel.zero == 3 else 0
        twins = self.copied_whole if job.parallel.zero == 2 else 0
        always = {
            "weights in compute dtype": self.copy + int(k.twin * twins),
            "summed gradients": int(k.accumulated * self.accumulated),
        }
        kept = always | {f"saved: {name}": size for name, size in stored.items()}
        head_gathered = self.table * self.item if fsdp and job.parallel.zero == 3 else 0
        # Layers of one period of a pattern are one iteration of the loop: what one of them computes
        # again may live beside what the others do.
        together = 1 + k.period * (len(job.model.pattern) - 1)
        phases: dict[str, dict[str, int]] = {
            "gather": kept
            | {"weights before they are transposed": int(k.regathered * self.copied_whole)},
            "loss": kept
            | {
                "loss head: table": head_gathered,
                "loss head: its gradient": self.table * 4,
                "loss head: logits": int(k.logits * self.logits),
                "hidden states": int(k.loss_narrow * self.narrow),
            },
            "backward": kept
            | {
                "gradients": self.layer_gradients + self.outer_gradients,
                "gathered weights": int(k.gathered * together * gathered),
                "gradients of one layer": int(k.layer_gradient * together * self.layer_weights),
                "one layer: feed-forward": int(k.wide * together * self.wide),
                "one layer: residual stream": int(k.narrow * together * self.narrow),
                "one layer: attention": int(
                    together * k.heads * self.heads + k.scores * self.scores
                ),
            },
            "embedding": always
            | {
                "gradients": self.layer_gradients + self.outer_gradients,
                "gradient of the lookup": int(k.lookup * self.table * self.item),
                "hidden states": int(k.lookup_narrow * self.narrow),
            },
            "update": {
                "gradients": self.accumulated or (self.layer_gradients + self.outer_gradients),
                "update": int(k.update * self.master),
            },
        }
        sums = {name: int(k.packing * sum(parts.values())) for name, parts in phases.items()}
        largest = max(sums, key=lambda name: sums[name])
        components = {"weights (master copy)": self.master}
        for name, (stacked, outside) in self.moments.items():
            on_device = outside if self.offloaded_state else stacked + outside
            components[f"optimizer: {name}"] = on_device
        components["batch"] = self.batch
        components |= {name: size for name, size in phases[largest].items() if size}
        components["packing"] = sums[largest] - sum(phases[largest].values())
        moments = sum(sum(parts) for parts in self.moments.values()) - self.offloaded_state
        return Prediction(
            components,
            sums,
            self.master + moments + self.batch,
            self.offloaded_state + sum(self.offloaded.values()),
        )


def _without(weight: Weight, gone: tuple[int, ...]) -> Weight:
    """A weight without some of its dims: what a sum over them leaves."""
    names = weight.axes.replace("->", " ").split()
    kept = [i for i in range(len(names)) if i not in gone]
    return Weight(tuple(weight.shape[i] for i in kept), " ".join(names[i] for i in kept))
