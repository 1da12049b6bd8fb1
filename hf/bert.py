"""BERT: norms after each sublayer, learned positions, token types, a head for masked tokens.

Names and keys are those of `BertForMaskedLM` and `BertForSequenceClassification` of
https://github.com/huggingface/transformers. Their classifier is our one task.
"""

from __future__ import annotations

from typing import Any

from hf.family import Family, Link
from hf.gpt2 import ACTIVATIONS
from hf.keys import Keys
from models.config import ModelConfig

TASK = "label"  # theirs has no name


def read(keys: Keys) -> dict[str, Any]:
    """What both of them and RoBERTa have in common."""
    keys.only("is_decoder", False)
    keys.only("add_cross_attention", False)
    keys.only("position_embedding_type", "absolute")
    keys.only("tie_word_embeddings", True)
    width, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    if width % heads:
        raise keys.refused("num_attention_heads", f"does not divide hidden_size = {width}")
    return {
        "family": "encoder",
        "vocab_size": keys.size("vocab_size"),
        "layers": keys.size("num_hidden_layers"),
        "embed_dim": width,
        "mlp_dim": keys.size("intermediate_size"),
        "heads": heads,
        "kv_heads": heads,
        "head_dim": width // heads,
        "norm": "layer",
        "norm_position": "post",
        "norm_eps": keys.number("layer_norm_eps", 1e-12),
        "norm_plus_one": False,
        "positions": "learned",
        "position_offset": 0,
        "max_length": keys.size("max_position_embeddings", 512),
        "token_types": keys.size("type_vocab_size", 2),
        "embed_norm": True,
        "rope_scaling": "none",
        "rope_factor": 1.0,
        "rope_local_theta": 0.0,
        "activation": keys.choice("hidden_act", ACTIVATIONS, "gelu"),
        "gated": False,
        "qkv_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "qk_norm": False,
        "query_scale": 0.0,
        "attention_softcap": 0.0,
        "logit_softcap": 0.0,
        "window": 0,
        "pattern": ("global",),
        "tied": True,
        "embed_scale": False,
    }


def of_tokens(keys: Keys) -> dict[str, Any]:
    """What the head for masked tokens adds."""
    return {"head_transform": True, "head_bias": True, "pooler": False}


def of_rows(keys: Keys) -> dict[str, Any]:
    """What a classifier adds: the number of its classes."""
    keys.only("problem_type", "single_label_classification")
    names = keys.get("id2label")
    classes = len(names) if isinstance(names, dict) else keys.size("num_labels", 2)
    if classes < 2:
        raise keys.refused("id2label", "should be at least 2 classes")
    heads = {"head_transform": False, "head_bias": False, "pooler": True}
    return heads | {"tasks": ((TASK, classes),), "token_head": False}


def write(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a BERT."""
    return {
        "model_type": "bert",
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.layers,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.max_length,
        "type_vocab_size": config.token_types,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": next(
            theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation
        ),
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "initializer_range": config.init_std,
    }


def classes_of(config: ModelConfig) -> dict[str, Any]:
    """The names of the classes, which are only numbers here."""
    names = [f"LABEL_{i}" for i in range(sum(classes for _, classes in config.tasks[:1]))]
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def trunk_links(prefix: str) -> list[Link]:
    """Where the parameters below the heads are."""
    block, layer = "stack/blocks/", f"{prefix}.encoder.layer.{{}}."
    tables = {"embedding": "word", "position": "position", "token_type": "token_type"}
    found = [
        Link(ours, f"{prefix}.embeddings.{theirs}_embeddings.weight")
        for ours, theirs in tables.items()
    ]
    found += norm_links("embed_norm", f"{prefix}.embeddings.LayerNorm")
    found += norm_links(f"{block}attention_norm", f"{layer}attention.output.LayerNorm")
    found += norm_links(f"{block}mlp_norm", f"{layer}output.LayerNorm")
    products = {
        "attention/query": "attention.self.query",
        "attention/key": "attention.self.key",
        "attention/value": "attention.self.value",
        "attention/out": "attention.output.dense",
        "mlp/up": "intermediate.dense",
        "mlp/down": "output.dense",
    }
    for ours, theirs in products.items():
        found.append(Link(f"{block}{ours}", f"{layer}{theirs}.weight", transposed=True))
        found.append(Link(f"{block}{ours}_bias", f"{layer}{theirs}.bias"))
    return found


def norm_links(ours: str, theirs: str) -> list[Link]:
    """A norm's gain and bias."""
    return [Link(f"{ours}/gain", f"{theirs}.weight"), Link(f"{ours}/bias", f"{theirs}.bias")]


def dense_links(ours: str, theirs: str) -> list[Link]:
    """A dense layer's weight and bias."""
    weight = Link(f"{ours}/weight", f"{theirs}.weight", transposed=True)
    return [weight, Link(f"{ours}/bias", f"{theirs}.bias")]


def token_links(config: ModelConfig) -> list[Link]:
    """Those of a `BertForMaskedLM`."""
    return [
        *trunk_links("bert"),
        *dense_links("head_transform/dense", "cls.predictions.transform.dense"),
        *norm_links("head_transform/norm", "cls.predictions.transform.LayerNorm"),
        Link("head_bias", "cls.predictions.bias"),
    ]


def row_links(config: ModelConfig) -> list[Link]:
    """Those of a `BertForSequenceClassification`."""
    ((task, _),) = config.tasks
    return [
        *trunk_links("bert"),
        *dense_links("pooler/dense", "bert.pooler.dense"),
        *dense_links(f"heads/{task}", "classifier"),
    ]


POSITION_IDS = r".*\.embeddings\.position_ids"  # 0, 1, 2, ...
# The files of 2018 were trained for a second objective, which the class leaves out as well.
NEXT_SENTENCE = (r"bert\.pooler\.dense\..*", r"cls\.seq_relationship\..*")
OLD_NAMES = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))

FAMILIES = (
    Family(
        "BertForMaskedLM",
        lambda keys: read(keys) | of_tokens(keys),
        write,
        token_links,
        ignored=(POSITION_IDS, *NEXT_SENTENCE),
        copies=(
            ("cls.predictions.decoder.weight", "embedding"),
            ("cls.predictions.decoder.bias", "head_bias"),
        ),
        old_names=OLD_NAMES,
    ),
    Family(
        "BertForSequenceClassification",
        lambda keys: read(keys) | of_rows(keys),
        lambda config: write(config) | classes_of(config),
        row_links,
        ignored=(POSITION_IDS,),
        copies=(),
        old_names=OLD_NAMES,
    ),
)
