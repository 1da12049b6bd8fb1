"""T5: an encoder-decoder with relative positions, RMSNorm before each sublayer and no biases.

Names and keys are those of `T5ForConditionalGeneration` of
https://github.com/huggingface/transformers: version 1.0 has relu, one table and scaled features
before it; 1.1 a gated GELU and a loss head of its own.
"""

from __future__ import annotations

from typing import Any

from hf.family import Family, Link
from hf.keys import Keys
from models.config import ModelConfig

FEED_FORWARDS = {  # their word -> (gated, nonlinearity); the first of equals is the one written
    "relu": (False, "relu"),
    "gated-gelu": (True, "gelu_tanh"),  # they take the approximation for this word
    "gelu_new": (False, "gelu_tanh"),
    "gelu": (False, "gelu"),
    "silu": (False, "silu"),
    "gated-gelu_new": (True, "gelu_tanh"),
    "gated-relu": (True, "relu"),
    "gated-silu": (True, "silu"),
}


def read(keys: Keys) -> dict[str, Any]:
    """The fields of a `T5ForConditionalGeneration`."""
    keys.only("is_encoder_decoder", True)
    words = {word: word for word in FEED_FORWARDS}
    gated, activation = FEED_FORWARDS[keys.choice("feed_forward_proj", words, "relu")]
    layers, heads = keys.size("num_layers"), keys.size("num_heads")
    # Transformers 5 writes `tie_word_embeddings` as true for every T5 and says what was meant in
    # the other key; a model without the scale has a head of its own.
    tied = keys.truth("tie_word_embeddings", True) and keys.truth("scale_decoder_outputs", True)
    return {
        "family": "encoder_decoder",
        "vocab_size": keys.size("vocab_size"),
        "encoder_layers": layers,
        "layers": keys.size("num_decoder_layers", layers),
        "source_tied": True,
        "cross": "plain",
        "embed_dim": keys.size("d_model"),
        "mlp_dim": keys.size("d_ff"),
        "heads": heads,
        "kv_heads": heads,
        "head_dim": keys.size("d_kv"),
        "norm": "rms",
        "norm_position": "pre",
        "norm_eps": keys.number("layer_norm_epsilon", 1e-6),
        "norm_plus_one": False,
        "positions": "relative",
        "relative_buckets": keys.size("relative_attention_num_buckets", 32),
        "relative_distance": keys.size("relative_attention_max_distance", 128),
        "max_length": keys.size("n_positions", 512),
        "rope_scaling": "none",
        "rope_factor": 1.0,
        "rope_local_theta": 0.0,
        "activation": activation,
        "gated": gated,
        "qkv_bias": False,
        "attention_out_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "query_scale": 1.0,
        "attention_softcap": 0.0,
        "logit_softcap": 0.0,
        "window": 0,
        "pattern": ("global",),
        "tied": tied,
        "embed_scale": False,
        "head_scale": tied,
    }


def write(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a T5."""
    kind = config.gated, config.activation
    words = [word for word, computed in FEED_FORWARDS.items() if computed == kind]
    if not words:
        raise ValueError(
            f"config.model.activation = {config.activation!r} with config.model.gated = "
            f"{config.gated}: T5 has no word for it"
        )
    return {
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "num_layers": config.encoder_layers,
        "num_decoder_layers": config.layers,
        "d_model": config.embed_dim,
        "d_ff": config.mlp_dim,
        "num_heads": config.heads,
        "d_kv": config.head_dim,
        "layer_norm_epsilon": config.norm_eps,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_distance,
        "n_positions": config.max_length,
        "feed_forward_proj": words[0],
        "tie_word_embeddings": config.tied,
        "dropout_rate": config.dropout,
    }


def links(config: ModelConfig) -> list[Link]:
    """Where the parameters are."""
    found = [Link("embedding", "shared.weight")]
    for ours, theirs, crosses in (("", "decoder.", True), ("encoder/", "encoder.", False)):
        found += _stack(config, ours, theirs, crosses)
    if not config.tied:
        found.append(Link("head_weight", "lm_head.weight", transposed=True))
    return found


def _stack(config: ModelConfig, ours: str, theirs: str, crosses: bool) -> list[Link]:
    """Those of the encoder or of the decoder."""
    block, layer = f"{ours}stack/blocks/", f"{theirs}block.{{}}.layer."
    found = [
        Link(f"{ours}final_norm/gain", f"{theirs}final_layer_norm.weight"),
        Link(
            f"{ours}relative/table",
            f"{theirs}block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        ),
    ]
    sublayers = {"attention": "SelfAttention", "cross": "EncDecAttention", "mlp": "DenseReluDense"}
    projections = {"query": "q", "key": "k", "value": "v", "out": "o"}
    names = [name for name in sublayers if crosses or name != "cross"]
    for number, name in enumerate(names):
        inside = f"{layer}{number}.{sublayers[name]}."
        found.append(Link(f"{block}{name}_norm/gain", f"{layer}{number}.layer_norm.weight"))
        if name == "mlp":
            gated = {"gate": "wi_0", "up": "wi_1"} if config.gated else {"up": "wi"}
            parts = gated | {"down": "wo"}
        else:
            parts = projections
        for part, theirs_part in parts.items():
            at = f"{inside}{theirs_part}.weight"
            found.append(Link(f"{block}{name}/{part}", at, transposed=True))
    return found


FAMILIES = (
    Family(
        "T5ForConditionalGeneration",
        read,
        write,
        links,
        # The one table under more names, and a table that no version of the model reads.
        ignored=(
            r"(en|de)coder\.embed_tokens\.weight",
            r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
        ),
    ),
)
