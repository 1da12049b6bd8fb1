"""What a family of checkpoints is: its config both ways, and where each parameter is."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from typing import Any

from hf.keys import Keys
from models.config import ModelConfig

# Fields that no checkpoint decides: how a run trains and computes.
OF_THE_RUN = ("attention", "attention_dropout", "dropout", "init_std", "unroll")
# Those of `config.experts` that it decides.
OF_EXPERTS = ("number", "per_token", "mlp_dim", "normalise")


@dataclass(frozen=True)
class Link:
    """One of our parameters and the tensor that holds it.

    Matrices are [in, out] by the arrow of our axis string, heads and their dims side by side as one
    dim; a stacked parameter is one tensor a layer, or one an expert of a layer.

    Attributes:
      ours: canonical name (`training.naming`), such as `stack/blocks/attention/query`.
      theirs: their name, `{}` in it is the number of the layer, and a second one that of the
        expert; with one alone a tensor holds all experts of a layer, [experts, ...].
      transposed: theirs is [out, in], as torch's Linear has it.
      part: ours is the part of this number in the out dim of theirs ...
      parts: ... of this many (fused projections).
    """

    ours: str
    theirs: str
    transposed: bool = False
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
      architecture: the class of `transformers`, as config.json names it.
      read: config.json -> fields of `ModelConfig`; refuses what is not computed here.
      write: the inverse, for any config: what it cannot say, `read` will not give back.
      links: where the parameters are.
      prefix: of all names of tensors; some old files leave it out.
      ignored: patterns (regular expressions) of tensors that the architecture does not read.
      copies: of tied models: tensors that some files hold beside those that they repeat, and our
        names of the latter.
      old_names: endings of names in old files, and what they are now.
      other_forms: where they are in folders that have them by other names.
    """

    architecture: str
    read: Callable[[Keys], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    links: Callable[[ModelConfig], list[Link]]
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    copies: tuple[tuple[str, str], ...] = (("lm_head.weight", "embedding"),)
    old_names: tuple[tuple[str, str], ...] = ()
    other_forms: tuple[Callable[[ModelConfig], list[Link]], ...] = ()

    def links_of(self, config: ModelConfig, names: Collection[str]) -> list[Link]:
        """The form that most of the tensors `names` are of; without any it is `links`."""
        forms = [form(config) for form in (self.links, *self.other_forms)]
        there = set(names)
        return max(forms, key=lambda f: len({link.theirs.format(0, 0) for link in f} & there))


def layer_kinds(types: list[str]) -> tuple[str, ...]:
    """The shortest pattern that repeats to these kinds of layers."""
    length = len(types)
    for period in range(1, length + 1):
        if all(types[i] == types[i % period] for i in range(length)):
            return tuple(types[:period])
    raise AssertionError(types)


def kinds_of_layers(config: ModelConfig) -> list[str]:
    """The kind of every layer."""
    return [config.pattern[i % len(config.pattern)] for i in range(config.layers)]


def computed(config: ModelConfig) -> dict[str, Any]:
    """What the config computes: equal for configs that differ in words alone.

    Fields of the run are left out, and so are fields without effect. Those of `config.experts` are
    `experts.number` and so on.
    """
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in OF_THE_RUN}
    experts = values.pop("experts")
    values |= {f"experts.{name}": getattr(experts, name) for name in OF_EXPERTS}
    if experts.number:
        values |= {"mlp_dim": None, "experts.mlp_dim": config.feed_forward_dim}
    else:
        values |= {f"experts.{name}": None for name in OF_EXPERTS if name != "number"}
    kinds = kinds_of_layers(config)
    values["pattern"] = layer_kinds(kinds)
    values["query_scale"] = config.query_scale or config.head_dim**-0.5
    if "local" in kinds and not config.rope_local_theta and config.rope_scaling == "none":
        values["rope_local_theta"] = config.rope_theta
    if "global" not in kinds and values["rope_local_theta"] == config.rope_theta:
        values["rope_local_theta"] = 0.0
    if config.rope_scaling != "llama3":
        names = ("rope_low_freq_factor", "rope_high_freq_factor", "rope_original_length")
        values |= dict.fromkeys(names)
    values["tasks"] = tuple(classes for _, classes in config.tasks)  # names are ours alone
    if not config.tasks:
        values["pooler"] = None
    if not config.token_head:
        values |= dict.fromkeys(("tied", "head_transform", "head_bias", "logit_softcap"))
    if config.positions != "relative":
        values |= {name: None for name in values if name.startswith("relative_")}
    if config.positions != "rope":
        values |= {name: None for name in values if name.startswith("rope_")}
    return values


def config_key(name: str) -> str:
    """The key of a value that `computed` names."""
    return f"config.{name}" if name.startswith("experts.") else f"config.model.{name}"
