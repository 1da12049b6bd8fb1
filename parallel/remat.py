"""What the forward pass keeps for the backward pass: a policy is a list of tensor names.

Blocks tag the values that their backward pass consumes with `tag(x, name)`; everything that is not
saved or offloaded by name is computed again, from the block's input. Tagging the output of a
nonlinearity would not help: its derivative needs the input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

# name -> its dims in one layer, by logical names: what a saved one costs is read off here.
TENSORS = {
    "attention_norm": "batch residual_seq act_embed",  # input of the q, k, v projections
    "query": "batch seq act_heads head_dim",  # rotated
    "key": "batch seq act_kv_heads head_dim",  # rotated
    "value": "batch seq act_kv_heads head_dim",
    "attention_probs": "batch act_heads seq keys",  # of the unblocked form
    "attention_lse": "batch act_heads seq",  # of the blocked forms, float32
    "attention_out": "batch seq act_heads head_dim",  # input of the output projection
    "attention_projection": "batch residual_seq act_embed",  # output of the output projection
    "mlp_norm": "batch residual_seq act_embed",  # input of the feed-forward
    "mlp_gate": "batch seq act_mlp",  # before its nonlinearity
    "mlp_up": "batch seq act_mlp",  # before its nonlinearity
    "mlp_act": "batch seq act_mlp",  # input of the down projection
    "mlp_projection": "batch residual_seq act_embed",  # output of the down projection
}
# With attention over the source, too.
CROSS_TENSORS = {
    "cross_norm": "batch residual_seq act_embed",  # input of the query's projection
    "cross_query": "batch seq act_heads head_dim",
    "cross_key": "batch source act_kv_heads head_dim",
    "cross_value": "batch source act_kv_heads head_dim",
    "cross_probs": "batch act_heads seq source",
    "cross_lse": "batch act_heads seq",
    "cross_out": "batch seq act_heads head_dim",
    "cross_projection": "batch residual_seq act_embed",
}
# With experts, of which the feed-forward's tensors are rows.
EXPERT_TENSORS = {"expert_input": "slot_embed"}  # tokens at their experts, as products read them
NAMES = (*TENSORS, *CROSS_TENSORS, *EXPERT_TENSORS)
# Saved by every policy: routing that is computed again may differ where two experts tie.
ROUTING = ("expert_choice",)
# Of these, what nothing but products reads.
PRODUCT_INPUTS = ("attention_norm", "cross_norm", "mlp_norm", "mlp_act", "expert_input")
DOTS = (
    "query",
    "key",
    "value",
    "attention_lse",
    "attention_out",
    "attention_projection",
    "mlp_gate",
    "mlp_up",
    "mlp_projection",
)
CROSS_DOTS = (
    *("cross_query", "cross_key", "cross_value", "cross_lse", "cross_out"),
    "cross_projection",
)
# What a recomputed attention core drops.
CORE = ("attention_probs", "attention_lse", "attention_out")
CROSS_CORE = ("cross_probs", "cross_lse", "cross_out")

PRESETS: dict[str, tuple[str, ...] | None] = {
    "none": None,  # no rematerialisation
    "full": (),  # the block's input alone
    "dots": DOTS
    + CROSS_DOTS,  # outputs of matrix products; norms, nonlinearities and softmax again
    # all but the attention core: selective recomputation, Korthikanti et al. 2022
    "attention": tuple(n for n in NAMES if n not in CORE + CROSS_CORE),
}

FORWARD = "forward"  # the policy of a model that is never differentiated: no policy at all


@dataclass(frozen=True)
class RematConfig:
    """Rematerialisation of one block (`config.remat`).

    Attributes:
      policy: `none`, `full`, `dots`, `attention`, or `custom`.
      save: tensor names to keep on the device; with policy custom.
      offload: tensor names to keep in host memory; with policy custom. XLA:CPU ignores it.
    """

    policy: str = "none"
    save: tuple[str, ...] = ()
    offload: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.policy not in (*PRESETS, "custom", FORWARD):
            choices = ", ".join((*PRESETS, "custom"))
            raise ValueError(f"config.remat.policy = {self.policy!r}: choose one of {choices}")
        for key in ("save", "offload"):
            names = getattr(self, key)
            if names and self.policy != "custom":
                raise ValueError(
                    f"config.remat.{key} = {list(names)}: has no effect with config.remat.policy = "
                    f"{self.policy!r}; set the policy to 'custom'"
                )
            for name in names:
                if name not in NAMES:
                    raise ValueError(
                        f"config.remat.{key} names {name!r}: no such tensor; there are "
                        f"{', '.join(NAMES)}"
                    )
        both = set(self.save) & set(self.offload)
        if both:
            raise ValueError(
                f"config.remat.offload names {sorted(both)[0]!r}, which config.remat.save names "
                f"too; a tensor is kept in one place"
            )
        if self.policy == "custom" and not self.save and not self.offload:
            raise ValueError(
                "config.remat.policy = 'custom' saves nothing: name tensors or use 'full'"
            )


def tag(x: jax.Array, name: str) -> jax.Array:
    """Names a value for the policy; the names are those of `NAMES`."""
    assert name in NAMES or name in ROUTING, name
    return checkpoint_name(x, name)


def remat(
    block: Callable[..., Any], config: RematConfig, *, looped: bool = True, slices: bool = False
) -> Callable[..., Any]:
    """`block` under the policy; XLA:CPU ignores it where it is not `looped` by a `lax.scan`.

    `slices`: the block cuts its weights out of an array of several layers. With policy none too,
    they are then cut out again for the backward pass: kept, they would be a second copy of all.
    """
    policy: Callable[..., Any]
    if config.policy == FORWARD:
        return block
    if config.policy == "none":
        if not slices:
            return block
        policy = _all_but_slices
    elif config.offload:
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[*config.save, *ROUTING],
            names_which_can_be_offloaded=list(config.offload),
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        names = config.save if config.policy == "custom" else PRESETS[config.policy]
        assert names is not None
        policy = jax.checkpoint_policies.save_only_these_names(*names, *ROUTING)
    # A loop keeps XLA from merging the two computations; elsewhere JAX must.
    return jax.checkpoint(block, policy=policy, prevent_cse=not looped)


def _all_but_slices(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive.name not in ("slice", "dynamic_slice", "squeeze")
