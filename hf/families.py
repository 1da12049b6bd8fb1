"""The families that are read and written, and which of them a folder or a config is of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf import bert, gemma3, gpt2, llama, mixtral, qwen3_moe, roberta, t5
from hf.family import Family, computed
from hf.files import read_config_json
from hf.keys import Keys
from models.config import ModelConfig

# In the order in which one is looked for that can say what a config computes.
FAMILIES = (
    *llama.FAMILIES,
    *gpt2.FAMILIES,
    *gemma3.FAMILIES,
    *bert.FAMILIES,
    *roberta.FAMILIES,
    *t5.FAMILIES,
    *mixtral.FAMILIES,
    *qwen3_moe.FAMILIES,
)


def family_of(config: dict[str, Any], where: str) -> Family:
    """The family of a config.json.

    Raises:
      ValueError: an architecture that is not read here, or quantised weights.
    """
    keys = Keys(config, where)
    keys.only("quantization_config")
    names = keys.get("architectures")
    for family in FAMILIES:
        if names == [family.architecture]:
            return family
    known = ", ".join(family.architecture for family in FAMILIES)
    raise keys.refused("architectures", f"not read here; there is {known}")


def read_model(path: Path, key: str) -> dict[str, Any]:
    """The fields of `config.model` that the config.json of a folder decides.

    Args:
      path: the folder.
      key: what named it, for messages.

    Raises:
      ValueError: no such folder, or a model that is not computed here, by key and value.
    """
    return fields_of(read_config_json(path, key), f"{key} = '{path}': config.json")


def fields_of(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The same of a config.json that was read."""
    return family_of(config, where).read(Keys(config, where))


def family_for(config: ModelConfig) -> Family:
    """The first family that computes what the config says.

    Raises:
      ValueError: there is none; the message names what keeps the likeliest one from it.
    """
    found = {family.architecture: differences(family, config) for family in FAMILIES}
    for family in FAMILIES:
        if not found[family.architecture]:
            return family
    if config.family in ("vision", "vision_language"):
        raise ValueError(
            f"config.model.family = {config.family!r}: no format of checkpoints is written for it; "
            f"decoders, encoders and encoder-decoders have one"
        )
    nearest = min(found, key=lambda name: len(found[name]))
    said = "; ".join(found[nearest][:3])
    raise ValueError(f"config.model: no family of checkpoints computes it; {nearest} has {said}")


def differences(family: Family, config: ModelConfig) -> list[str]:
    """What would be another after the config went to a config.json and came back, in words."""
    try:
        written = family.write(config)
        back = ModelConfig(**family.read(Keys(written, family.architecture)))
    except ValueError as error:
        return [str(error)] * 100  # far from it
    mine, theirs = computed(config), computed(back)
    return [
        f"{name} = {theirs[name]!r}, not {mine[name]!r}"
        for name in mine
        if mine[name] != theirs[name]
    ]
