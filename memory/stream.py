"""The tensors of one layer of a forward pass, of which several live at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from models.attention import form_for
from models.config import ModelConfig
from models.experts import at_experts
from models.kv_cache import repeats
from parallel.dispatch import row_count
from parallel.footprint import Activation, activation_bytes
from parallel.rules import Rules


@dataclass(frozen=True)
class Stream:
    """Tensors of one layer of a forward pass, bytes on one device.

    Attributes:
      length: tokens of a row.
      rows: over all devices.
      compute: dtype.
      kind: of chip.
    """

    model: ModelConfig
    length: int
    rows: int
    rules: Rules
    compute: str
    kind: str

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Logical dim -> its size over all devices."""
        model, experts = self.model, self.model.experts
        found = {
            "batch": self.rows,
            "seq": self.length,
            "keys": self.length,
            "act_embed": model.embed_dim,
            "act_heads": model.heads,
            "act_kv_heads": model.kv_heads,
            "head_dim": model.head_dim,
            "act_mlp": model.feed_forward_dim,
        }
        if experts.number:
            choices = self.rows, self.length, experts.per_token
            found["groups"] = self.rules.parts("groups")
            found["rows"] = row_count(choices, experts.number, self.rules)
            found["slot_embed"] = model.embed_dim
        return found

    def of(self, dims: str, dtype: str = "compute") -> int:
        """Bytes of a tensor with these logical dims."""
        dtypes = {"compute": self.compute}
        return activation_bytes([Activation("", dims, dtype)], self.sizes, self.rules, dtypes)

    @cached_property
    def narrow(self) -> int:
        return self.of("batch seq act_embed")

    @cached_property
    def wide(self) -> int:
        experts = replace(self.model.experts, capacity=0.0)  # no token is dropped
        inside = at_experts(replace(self.model, experts=experts)) if experts.number else "batch seq"
        return self.of(f"{inside} act_mlp")

    @cached_property
    def at_experts(self) -> int:
        """Rows sorted by expert, [rows, D]; 0 without experts."""
        return self.of("groups rows act_embed") if self.model.experts.number else 0

    @cached_property
    def heads(self) -> int:
        return self.of("batch seq act_heads head_dim")

    @cached_property
    def kv(self) -> int:
        """Keys, or values, as they are kept: one of each part where heads are fewer."""
        times = repeats(self.model, self.rules)
        divided = times > 1
        one = self.of(f"batch seq {'act_heads' if divided else 'act_kv_heads'} head_dim")
        return one * self.model.kv_heads * times // self.model.heads if divided else one

    @cached_property
    def form(self) -> str:
        """The form of attention that will run."""
        model = self.model
        return form_for(
            model.attention,
            self.kind,
            self.length,
            model.head_dim,
            self.compute,
            softcap=model.attention_softcap > 0,
            biased=model.family != "vision",
            added=model.positions == "relative",
        )

    @cached_property
    def scores(self) -> int:
        """float32 scores of the form that has them whole."""
        whole = self.form == "xla"
        return whole * self.of("batch act_heads seq keys", "float32")

    @cached_property
    def blocks(self) -> int:
        """What the blocked form sums, float32 [tokens, heads, H]."""
        return (self.form == "blocked") * self.of("batch seq act_heads head_dim", "float32")

    @cached_property
    def bias(self) -> int:
        """What is the same for all layers: cuDNN's mask as a bias, relative positions."""
        mask = self.of("batch seq keys") if self.form == "cudnn" and self.model.causal else 0
        relative = self.model.positions == "relative"
        return mask + relative * self.of("act_heads seq keys", "float32")

    @cached_property
    def angles(self) -> int:
        """Sines and cosines of rotary positions."""
        turns = self.model.positions == "rope"
        kinds = 2 if self.model.rope_local_theta and len(self.model.pattern) > 1 else 1
        return turns * kinds * self.of("batch seq") * self.model.head_dim

    @property
    def divided(self) -> bool:
        """Whether products are summed over devices."""
        return self.rules.parts("act_mlp") > 1
