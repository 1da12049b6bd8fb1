"""What a training step must hold on each device, exact, from shapes and the layout alone.

What weights need is in `memory/weight_terms.py`; here are the batch, what remat saves, and tensors
of which a phase holds several. Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, count the
same saved tensors. Layers declare theirs beside themselves (`*_residuals` in models/).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, partial

from memory.partly_trained import ranks, read_again, scaled_products
from memory.weight_terms import WeightTerms
from models.attention import form_for
from models.block import RESIDUAL, block_residuals
from models.encoder import embedding_residuals
from models.encoder_heads import token_head_residuals
from models.experts import at_experts
from parallel.dispatch import row_count
from parallel.footprint import ITEM, Activation, activation_bytes
from parallel.remat import CROSS_TENSORS, EXPERT_TENSORS, PRESETS, PRODUCT_INPUTS, TENSORS


@dataclass(frozen=True)
class Terms(WeightTerms):
    """The single terms of one prediction, bytes on one device like `chip`."""

    # --- what there is --------------------------------------------------------------------------

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
    def sizes(self) -> dict[str, int]:
        """Logical dim -> size of one micro-step over all devices."""
        model, length = self.job.model, self.job.stream_length
        return {
            "batch": self.job.batch_size // self.job.micro_steps,
            "seq": length,
            "keys": length + model.prefix_length,
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

    @cached_property
    def batch(self) -> int:
        """All arrays of the whole step."""
        arrays = self.job.batch_arrays.values()
        row = sum(math.prod(array.dims) * ITEM[array.dtype] for array in arrays)
        return row * self.job.rows * self.job.micro_steps

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
        if self.arrays.below:
            return {}, {}
        stacked = self.arrays.stacked
        forms = {"attention": self.form, "cross": self.cross_form}
        read = partial(read_again, arrays=stacked, forms=forms, named=remat.policy != "none")
        tensors, offloaded = read(self.residuals) + scaled_products(stacked), list[Activation]()
        if remat.policy != "none":
            tensors = [Activation("block input", RESIDUAL), *read(self.saved_names)]
            offloaded = read(self._named(remat.offload))
            if self.chip.kind == "cpu":  # one memory
                tensors, offloaded = tensors + offloaded, []
        sums: tuple[dict[str, int], dict[str, int]] = ({}, {})
        for kept, into in zip((tensors, offloaded), sums, strict=True):
            for tensor in kept:
                size = layers * self.bytes_of([tensor])
                into[tensor.name] = into.get(tensor.name, 0) + size
        if remat.policy == "none" and (between := ranks(stacked)):
            one = self.bytes_of([Activation("", "batch seq")])
            sums[0]["between factors"] = int(between * self.uses) * one
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
