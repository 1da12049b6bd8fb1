"""What a training step must hold on each device, exact, from shapes and the layout alone.

State, the copy in compute dtype, gradients, and what remat saves: Korthikanti et al. 2022,
https://arxiv.org/abs/2205.05198, count the same saved tensors; Rajbhandari et al. 2020,
https://arxiv.org/abs/1910.02054, the state by ZeRO level. Layers declare their own weights and
tensors beside themselves (`*_weights`, `*_residuals` in models/).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

from memory.frozen import Frozen, frozen_weights
from memory.job import Job
from memory.moments import moments
from models.attention import form_for
from models.block import RESIDUAL, block_residuals
from models.encoder import embedding_residuals
from models.encoder_heads import token_head_residuals
from models.experts import at_experts
from models.weights import model_weights
from parallel.chips import Chip
from parallel.dispatch import row_count
from parallel.footprint import ITEM, Activation, Weight, activation_bytes, elements
from parallel.remat import CROSS_TENSORS, EXPERT_TENSORS, PRESETS, PRODUCT_INPUTS, TENSORS
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


def not_of_experts(weights: list[Weight]) -> list[Weight]:
    """The weights that the expert axis does not divide."""
    return [weight for weight in weights if "experts" not in weight.axes.split()]


@dataclass(frozen=True)
class Terms:
    """The single terms of one prediction, bytes on one device like `chip`."""

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
    def form(self) -> str:
        """The form of attention that will run."""
        added = self.job.model.positions == "relative"
        return self._form(self.job.stream_length, added=added)

    @cached_property
    def cross_form(self) -> str:
        """The form of attention over the source."""
        return self._form(max(self.job.sequence_length, self.job.source_length), added=False)

    def _form(self, length: int, *, added: bool) -> str:
        model = self.job.model
        return form_for(
            model.attention,
            self.chip.kind,
            length,
            model.head_dim,
            self.compute,
            softcap=model.attention_softcap > 0,
            dropped=model.attention_dropout > 0,
            added=added,
        )

    @cached_property
    def encoder(self) -> Terms | None:
        """The terms of the encoder beside the decoder, as those of a model of its own."""
        job = self.job.encoder
        return None if job is None else Terms(job, self.chip)

    @cached_property
    def teacher(self) -> Terms | None:
        """The terms of the teacher, if there is one, as those of a model that is evaluated."""
        return None if self.job.teacher is None else Terms(self.job.teacher, self.chip)

    @cached_property
    def block(self) -> list[Weight]:
        """The weights of one layer."""
        return model_weights(self.job.model)[0]

    @cached_property
    def weights(self) -> tuple[list[Weight], list[Weight]]:
        """Of all blocks stacked, and of what stands outside the stack."""
        model, outside = self.job.model, model_weights(self.job.model)[1] + self.job.projection
        return [weight.stacked(model.blocks, model.stack) for weight in self.block], outside

    @cached_property
    def frozen(self) -> Frozen:
        return frozen_weights(self.job.model, self.job.objective, self.job.optimizer.frozen)

    @cached_property
    def trained(self) -> tuple[list[Weight], list[Weight]]:
        """Of `weights` those that have gradients and moments."""
        parts = tuple([*part] for part in self.weights)
        for weight in self.frozen.weights:
            parts[weight not in parts[0]].remove(weight)
        return parts[0], parts[1]

    @property
    def uses(self) -> float:
        """Layers that share a block, on average: how often a stacked weight is used."""
        return self.job.model.layers / self.job.model.blocks

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Logical dim -> size of one micro-step over all devices."""
        model, length = self.job.model, self.job.stream_length
        return {
            "batch": self.job.batch_size // self.job.micro_steps,
            "seq": length,
            "keys": length,
            "source": self.job.source_length,
            "residual_seq": length,
            "act_embed": model.embed_dim,
            "act_heads": model.heads,
            "act_kv_heads": model.kv_heads,
            "head_dim": model.head_dim,
            "act_mlp": model.feed_forward_dim,
            **self._expert_sizes(),
        }

    def _expert_sizes(self) -> dict[str, int]:
        """The same for tokens at their experts."""
        experts, batch = self.job.model.experts, self.job.batch_size // self.job.micro_steps
        if not experts.number:
            return {}
        length, rules = self.job.stream_length, self.job.rules
        choices = (batch, length, experts.per_token)
        return {
            "act_router": experts.number,
            "choice": experts.per_token,
            "group_batch": batch,
            "act_experts": experts.number,
            "slots": experts.slots(length),
            "groups": rules.parts("groups"),
            "rows": row_count(choices, experts.number, rules),
            "slot_embed": self.job.model.embed_dim,
        }

    def bytes_of(self, tensors: list[Activation]) -> int:
        """Of activations of one layer."""
        dtypes = {"compute": self.compute, "product": self.product}
        return activation_bytes(tensors, self.sizes, self.job.rules, dtypes)

    def laid_out(self, weights: list[Weight], where: str) -> int:
        """Elements on one device: a method of `Rules` by name."""
        tiled = self.chip.kind == "tpu"
        return sum(_laid_out(weight, where, self.job.rules, tiled) for weight in weights)

    # --- the state ------------------------------------------------------------------------------

    @cached_property
    def master(self) -> int:
        stacked, outside = self.weights
        return self.laid_out(stacked + outside, "at_rest") * ITEM[self.job.precision.params]

    @cached_property
    def moments(self) -> dict[str, tuple[int, int]]:
        """Moment -> (bytes of the stacked weights, bytes of the others)."""
        of = [moments(self.job, ws, lambda w: self.laid_out(w, "at_rest")) for ws in self.trained]
        return {name: (of[0][name], of[1][name]) for name in of[0]}

    @cached_property
    def offloaded_state(self) -> int:
        """Bytes of moments that live in the memory of the host: those of the stacked weights."""
        if not self.job.optimizer.offload or self.chip.kind == "cpu":
            return 0
        return sum(stacked for stacked, _ in self.moments.values())

    @cached_property
    def batch(self) -> int:
        """All arrays of the whole step."""
        arrays = self.job.batch_arrays.values()
        row = sum(math.prod(array.dims) * ITEM[array.dtype] for array in arrays)
        return row * self.job.rows * self.job.micro_steps

    # --- what the model is given and gives back ---------------------------------------------------

    @cached_property
    def copy(self) -> int:
        """The weights as products read them; 0 where that is the master copy."""
        params = self.job.precision.params
        gathers = self.job.parallel.zero in (1, 2) and self.job.sizes["fsdp"] > 1
        stacked, outside = self.weights
        if params != self.compute or gathers:
            return self.laid_out(stacked + outside, "in_model") * self.product_item
        # A cast that nobody asked for: of what the layers' loops read.
        return self.laid_out(stacked, "in_model") * self.product_item * (params != self.product)

    @property
    def gathers_layers(self) -> bool:
        """Whether each layer's weights are gathered where they are used, and not all at once."""
        return self.job.parallel.zero == 3 and self.job.sizes["fsdp"] > 1

    @cached_property
    def gathered_copy(self) -> int:
        """The weights of the layers that are gathered all at once, at ZeRO level 1 and 2."""
        if self.job.parallel.zero not in (1, 2) or self.job.sizes["fsdp"] == 1:
            return 0
        return self.laid_out(self.weights[0], "in_model") * self.product_item

    @cached_property
    def cut(self) -> int:
        """The layers' weights of whole periods of a pattern, where it does not divide the layers:
        cutting the rest off copies them.
        """
        model = self.job.model
        periods, rest = divmod(model.layers, len(model.pattern))
        if not rest or model.distinct:
            return 0
        whole = self.laid_out(self.weights[0], "in_model") * self.product_item
        return whole * periods * len(model.pattern) // model.layers

    @cached_property
    def layer_gradients(self) -> int:
        return self.laid_out(self.trained[0], "of_gradient") * self.item

    @cached_property
    def outer_gradients(self) -> int:
        """Of the embedding, the head and what else stands outside the stack."""
        return self.laid_out(self.trained[1], "of_gradient") * self.item

    @cached_property
    def shared_gradients(self) -> int:
        """Of all weights but those of experts."""
        stacked, outside = self.trained
        shared = not_of_experts(stacked + outside)
        return self.laid_out(shared, "of_gradient") * self.item

    @cached_property
    def accumulated(self) -> int:
        """The buffer that sums gradients over micro-steps."""
        if self.job.micro_steps == 1:
            return 0
        stacked, outside = self.trained
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
        if self.frozen.below:
            return {}, {}
        tensors = self.residuals
        offloaded: list[Activation] = []
        if remat.policy != "none":
            tensors = [Activation("block input", RESIDUAL), *self.saved_names]
            offloaded = self._named(remat.offload)
            if self.chip.kind == "cpu":  # one memory
                tensors, offloaded = tensors + offloaded, []
        sums: tuple[dict[str, int], dict[str, int]] = ({}, {})
        for kept, into in zip((tensors, offloaded), sums, strict=True):
            for tensor in kept:
                size = layers * self.bytes_of([tensor])
                into[tensor.name] = into.get(tensor.name, 0) + size
        return sums

    @cached_property
    def embedding_saved(self) -> int:
        """Bytes that the embedding of an encoder keeps for the backward pass."""
        model = self.job.model
        return self.bytes_of(embedding_residuals(model)) if model.family == "encoder" else 0

    @cached_property
    def head_saved(self) -> int:
        """The same of what is before the loss head's table."""
        return self.bytes_of(token_head_residuals(self.job.model))

    @property
    def residuals(self) -> list[Activation]:
        """What one layer keeps without rematerialisation."""
        divided = self.job.rules.parts("residual_seq") > 1
        return block_residuals(self.job.model, self.form, self.cross_form, divided=divided)

    @property
    def saved_names(self) -> list[Activation]:
        """The tensors of one layer that the policy saves by name."""
        remat = self.job.remat
        names = remat.save if remat.policy == "custom" else PRESETS[remat.policy]
        routing = Activation("expert_choice", "batch seq choice", "int32")
        mixture = self.job.model.experts.number > 0
        return self._named(names or ()) + [routing] * (mixture and remat.policy != "none")

    def _named(self, names: tuple[str, ...]) -> list[Activation]:
        """The tensors of a policy that this model has and whose value the backward pass reads."""
        model = self.job.model
        absent = {"mlp_gate"} if not model.gated else set()
        dims = TENSORS | CROSS_TENSORS
        if model.cross == "none":
            absent |= set(CROSS_TENSORS)
        if model.experts.number:
            inside = ("mlp_gate", "mlp_up", "mlp_act")
            dims |= dict.fromkeys(inside, f"{self.at_experts} act_mlp")
            dims |= {n: f"{self.at_experts} {dim}" for n, dim in EXPERT_TENSORS.items()}
        else:
            absent |= set(EXPERT_TENSORS)
        for sublayer, form in (("attention", self.form), ("cross", self.cross_form)):
            absent.add(f"{sublayer}_{'lse' if form == 'xla' else 'probs'}")
            if form == "cudnn":  # a kernel that nobody tags the inside of
                absent |= {f"{sublayer}_lse", f"{sublayer}_out"}
        if model.norm_position == "pre":
            absent.add("mlp_projection")  # goes into a sum, whose derivative needs no value
        dtypes = dict.fromkeys(("attention_lse", "cross_lse"), "float32")
        dtypes |= dict.fromkeys(PRODUCT_INPUTS, "product")
        return [
            Activation(name, dims[name], dtypes.get(name, "compute"))
            for name in names
            if name not in absent
        ]

    # --- tensors of one layer or of the loss head, of which phases hold several -------------------

    @cached_property
    def wide(self) -> int:
        """One tensor [tokens, F] of the feed-forward, or of rows at experts."""
        return self.bytes_of([Activation("", f"{self.at_experts} act_mlp")])

    @property
    def at_experts(self) -> str:
        """The dims of tokens in the feed-forward."""
        return at_experts(self.job.model) if self.job.model.experts.number else "batch seq"

    @cached_property
    def narrow(self) -> int:
        """One tensor [tokens, D]."""
        return self.bytes_of([Activation("", "batch seq act_embed")])

    @cached_property
    def memory(self) -> int:
        """What the encoder gives, and all layers read."""
        return self.whole_memory // self.job.rules.parts("residual_seq")

    @cached_property
    def whole_memory(self) -> int:
        """The same where a product reads it: its sequence is not divided."""
        return self.bytes_of([Activation("", "batch source act_embed")])

    @cached_property
    def heads(self) -> int:
        """One tensor [tokens, heads, head_dim]."""
        return self.bytes_of([Activation("", "batch seq act_heads head_dim")])

    @cached_property
    def scores(self) -> int:
        """What attention holds that is quadratic: scores (xla), or cuDNN's bias."""
        return max(self.all_scores)

    @cached_property
    def all_scores(self) -> list[int]:
        """The same of each attention of a layer."""
        found = [self._scores(self.form, "keys")]
        if self.job.model.cross != "none":
            found.append(self._scores(self.cross_form, "source"))
        return found

    @cached_property
    def bias(self) -> int:
        """The bias of the scores by relative positions."""
        relative = self.job.model.positions == "relative"
        return relative * self.bytes_of([Activation("", "act_heads seq keys", "float32")])

    @cached_property
    def all_biases(self) -> int:
        """One for each layer, of an encoder beside the decoder, too."""
        beside = 0 if self.encoder is None else self.encoder.all_biases
        return self.bias * self.job.model.layers + beside

    def _scores(self, form: str, keys: str) -> int:
        if form == "xla":
            return self.bytes_of([Activation("", f"batch act_heads seq {keys}", "float32")])
        if form == "cudnn":
            return self.bytes_of([Activation("", f"batch seq {keys}")])
        return 0

    @cached_property
    def layer_weights(self) -> int:
        """Elements of one layer's weights as they are used: gathered over fsdp."""
        return self.laid_out(self.block, "gathered")

    @property
    def table(self) -> int:
        """Elements of the head's table while it is used."""
        model = self.job.model
        return model.padded_vocab // self.job.rules.parts("act_vocab") * model.table_dim

    @property
    def looked_up(self) -> int:
        """Elements of the embedding's gradient; the table is the first weight outside the stack."""
        return self.table * (self.weights[1][0] in self.trained[1])
