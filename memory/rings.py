"""What one layer leaves between the actions of a pipeline: a closed form of `parallel/split.py`.

F keeps what the backward pass reads and cannot make again element by element; B leaves for W the
cotangents of all products and norms. Rings hold that for every layer of a chunk, a slot for each
chunk of a micro-batch that is between the two.
"""

from __future__ import annotations

from models.block import RESIDUAL, norms_of
from models.config import ModelConfig
from models.cross_attention import SOURCE
from models.experts import at_experts
from parallel.footprint import Activation

INSIDE = "batch seq act_embed"
HEADS, KV_HEADS = "batch seq act_heads head_dim", "batch seq act_kv_heads head_dim"
WIDE = "batch seq act_mlp"


def kept(model: ModelConfig, form: str, divided: bool, cross_form: str = "") -> list[Activation]:
    """What F keeps of a layer without rematerialisation.

    Args:
      form: of attention.
      divided: whether the residual stream's sequence is: what was gathered is kept, too.
      cross_form: of attention over a source.
    """
    crosses = model.cross != "none"
    # The layer norm's mean is no element's, nor is what a policy for periods of layers saves.
    exact = model.norm == "layer" or len(model.pattern) > 1
    norms = [RESIDUAL] * norms_of(model)
    norms += [HEADS, KV_HEADS] if model.qk_norm else []
    norms += [HEADS, SOURCE] if model.qk_norm and crosses else []
    tensors = []
    for dims in norms:
        root = " ".join(dims.split()[:-1])
        tensors.append(Activation("norm", dims, "float32" if exact else "compute"))
        tensors.append(Activation("norm root", root, "float32"))
    if divided:
        tensors += [Activation("attention_norm", INSIDE), Activation("mlp_norm", INSIDE)]
    tensors += _attention("attention", form, KV_HEADS, "keys")
    if crosses:
        tensors += _attention("cross", cross_form, SOURCE, "source")
        if divided:
            gathered = Activation("memory", "batch source act_embed")
            tensors += [Activation("cross_norm", INSIDE), gathered]
    wides = ["mlp_gate", "mlp_up"] if model.gated else ["mlp_up"]
    if not model.experts.number:
        return tensors + [Activation(name, WIDE) for name in wides]
    where = at_experts(model)
    return [
        *tensors,
        *[Activation(name, f"{where} act_mlp") for name in wides],
        Activation("expert_input", f"{where} act_embed"),
        Activation("expert_scale", where, "float32"),
        Activation("expert_index", where, "int32"),
        Activation("expert_choice", "batch seq choice", "int32"),
        Activation("router", "batch seq act_router", "float32"),
    ]


def _attention(sublayer: str, form: str, kv_heads: str, keys: str) -> list[Activation]:
    """What an attention keeps, by its kind of keys."""
    tensors = [Activation("query", HEADS), Activation("key", kv_heads)]
    tensors += [Activation("value", kv_heads), Activation(f"{sublayer}_out", HEADS)]
    if form == "xla":
        return [*tensors, Activation(f"{sublayer}_probs", f"batch act_heads seq {keys}")]
    # the largest logit and the sum; cuDNN's kernel has one for both
    statistics = 1 if form == "cudnn" else 2
    lse = Activation(f"{sublayer}_lse", "batch act_heads seq", "float32")
    return tensors + [lse] * statistics


def pending(model: ModelConfig, divided: bool) -> list[Activation]:
    """What B leaves for a W in a later tick."""
    norms = [RESIDUAL] * norms_of(model)
    crosses = model.cross != "none"
    mixture = model.experts.number > 0
    out, wide = INSIDE, WIDE
    if mixture:
        out, wide = f"{at_experts(model)} act_embed", f"{at_experts(model)} act_mlp"
    products = [INSIDE, out, HEADS, KV_HEADS, KV_HEADS] + [wide] * (2 if model.gated else 1)
    if model.qk_norm:
        norms += [HEADS, KV_HEADS] + [HEADS, SOURCE] * crosses
    if crosses:
        products += [INSIDE, HEADS, SOURCE, SOURCE]
    if divided:  # biases read the cotangent before it is gathered
        norms += [RESIDUAL] * (model.attention_out_bias * (1 + crosses) + model.mlp_bias)
    router = [Activation("pending", "batch seq act_router", "float32")] * mixture
    return [Activation("pending", dims) for dims in norms + products] + router
