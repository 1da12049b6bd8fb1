"""RoBERTa: a BERT whose positions begin behind the padding's, with other names for its heads.

Names and keys are those of `RobertaForMaskedLM` and `RobertaForSequenceClassification` of
https://github.com/huggingface/transformers.
"""

from __future__ import annotations

from typing import Any

from hf import bert
from hf.bert import POSITION_IDS, classes_of, dense_links, norm_links, of_rows, of_tokens
from hf.family import Family, Link
from hf.keys import Keys
from models.config import ModelConfig


def read(keys: Keys) -> dict[str, Any]:
    """What both of them have in common; the row of the padding in the table of positions is its id,
    and the first position's is the next one.
    """
    padding = keys.get("pad_token_id", 1)
    if isinstance(padding, bool) or not isinstance(padding, int) or padding < 0:
        raise keys.refused("pad_token_id", "should be a whole number of at least 0")
    fields = bert.read(keys)
    longest = fields["max_length"] - padding - 1
    if longest < 1:
        raise keys.refused("max_position_embeddings", f"no row is left after {padding + 1}")
    return fields | {"position_offset": padding + 1, "max_length": longest}


def read_tokens(keys: Keys) -> dict[str, Any]:
    """The fields of a `RobertaForMaskedLM`."""
    if keys.get("hidden_act", "gelu") != "gelu":
        raise keys.refused("hidden_act", "not computed here; before the head there is gelu alone")
    return read(keys) | of_tokens(keys)


def write(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a RoBERTa."""
    return bert.write(config) | {
        "model_type": "roberta",
        "max_position_embeddings": config.max_length + config.position_offset,
        "pad_token_id": config.position_offset - 1,
    }


def token_links(config: ModelConfig) -> list[Link]:
    """Those of a `RobertaForMaskedLM`."""
    return [
        *bert.trunk_links("roberta"),
        *dense_links("head_transform/dense", "lm_head.dense"),
        *norm_links("head_transform/norm", "lm_head.layer_norm"),
        Link("head_bias", "lm_head.bias"),
    ]


def row_links(config: ModelConfig) -> list[Link]:
    """Those of a `RobertaForSequenceClassification`."""
    ((task, _),) = config.tasks
    return [
        *bert.trunk_links("roberta"),
        *dense_links("pooler/dense", "classifier.dense"),
        *dense_links(f"heads/{task}", "classifier.out_proj"),
    ]


FAMILIES = (
    Family(
        "RobertaForMaskedLM",
        read_tokens,
        write,
        token_links,
        ignored=(POSITION_IDS, r"roberta\.pooler\.dense\..*"),  # a pooler that nobody trained
        copies=(("lm_head.decoder.weight", "embedding"), ("lm_head.decoder.bias", "head_bias")),
    ),
    Family(
        "RobertaForSequenceClassification",
        lambda keys: read(keys) | of_rows(keys),
        lambda config: write(config) | classes_of(config),
        row_links,
        ignored=(POSITION_IDS,),
        copies=(),
    ),
)
