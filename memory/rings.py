"""What one layer leaves between the actions of a pipeline: a closed form of `parallel/split.py`.

F keeps what the backward pass reads and cannot make again element by element; B leaves for W the
cotangents of all products and norms. Rings hold that for every layer of a chunk, a slot for each
chunk of a micro-batch that is between the two.
"""

from __future__ import annotations

from models.block import RESIDUAL
from models.config import DecoderConfig
from parallel.footprint import Activation

INSIDE = "batch seq act_embed"
HEADS, KV_HEADS = "batch seq act_heads head_dim", "batch seq act_kv_heads head_dim"
WIDE = "batch seq act_mlp"


def kept(model: DecoderConfig, form: str, divided: bool) -> list[Activation]:
    """What F keeps of a layer without rematerialisation.

    Args:
      form: of attention.
      divided: whether the residual stream's sequence is: what was gathered is kept, too.
    """
    # The layer norm's mean is no element's, nor is what a policy for periods of layers saves.
    exact = model.norm == "layer" or len(model.pattern) > 1
    norms = [RESIDUAL] * (4 if model.norm_position == "sandwich" else 2)
    norms += [HEADS, KV_HEADS] if model.qk_norm else []
    tensors = []
    for dims in norms:
        root = " ".join(dims.split()[:-1])
        tensors.append(Activation("norm", dims, "float32" if exact else "compute"))
        tensors.append(Activation("norm root", root, "float32"))
    if divided:
        tensors += [Activation("attention_norm", INSIDE), Activation("mlp_norm", INSIDE)]
    tensors += [Activation("query", HEADS), Activation("key", KV_HEADS)]
    tensors += [Activation("value", KV_HEADS), Activation("attention_out", HEADS)]
    if form == "xla":
        tensors.append(Activation("attention_probs", "batch act_heads seq keys"))
    else:  # the largest logit and the sum; cuDNN's kernel has one for both
        statistics = 1 if form == "cudnn" else 2
        tensors += [Activation("attention_lse", "batch act_heads seq", "float32")] * statistics
    wides = ["mlp_gate", "mlp_up"] if model.gated else ["mlp_up"]
    return tensors + [Activation(name, WIDE) for name in wides]


def pending(model: DecoderConfig, divided: bool) -> list[Activation]:
    """What B leaves for a W in a later tick."""
    norms = [RESIDUAL] * (4 if model.norm_position == "sandwich" else 2)
    products = [INSIDE, INSIDE, HEADS, KV_HEADS, KV_HEADS] + [WIDE] * (2 if model.gated else 1)
    if model.qk_norm:
        norms += [HEADS, KV_HEADS]
    if divided:  # biases read the cotangent before it is gathered
        norms += [RESIDUAL] * (model.attention_out_bias + model.mlp_bias)
    return [Activation("pending", dims) for dims in norms + products]
