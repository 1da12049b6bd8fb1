"""What a model's config may not be, and what of it does nothing: `models.config`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.positions import SCALINGS

if TYPE_CHECKING:
    from models.config import ModelConfig

CHOICES = {
    "family": ("decoder", "encoder", "encoder_decoder", "vision", "vision_language"),
    "cross": ("none", "plain", "gated"),
    "norm": ("rms", "layer"),
    "norm_position": ("pre", "post", "sandwich"),
    "sharing": ("cycle", "repeat"),
    "positions": ("rope", "learned", "sinusoidal", "relative", "none"),
    "rope_scaling": SCALINGS,
    "activation": ("gelu", "gelu_tanh", "silu", "relu"),
    "attention": ("auto", "xla", "rows", "blocked", "cudnn"),
}
# Fields that mean something for an encoder alone.
OF_ENCODERS = (
    "token_types",
    "embed_norm",
    "position_offset",
    "head_transform",
    "head_bias",
    "pooler",
)
# Forms of attention that add a bias to the scores.
BIASED = ("auto", "xla")


def check(config: ModelConfig) -> None:
    """Refuses a config that cannot be.

    Raises:
      ValueError: naming the key, its value and what would be right.
    """
    _check_values(config)
    _check_sharing(config)
    _check_attention(config)
    _check_positions(config)
    config.vision.check_family(config.family)
    _check_beside(config)
    _check_experts(config)
    _check_of_encoders(config)


def _check_values(config: ModelConfig) -> None:
    """Each by itself."""
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            raise ValueError(
                f"config.model.{name} = {getattr(config, name)!r}: choose one of "
                f"{', '.join(choices)}"
            )
    sizes = ("vocab_size", "layers", "embed_dim", "mlp_dim", "heads", "kv_heads", "head_dim")
    for name in (*sizes, "max_length", "unroll"):
        if getattr(config, name) < 1:
            raise ValueError(f"config.model.{name} = {getattr(config, name)}: at least 1")
    for name in ("dropout", "attention_dropout"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"config.model.{name} = {getattr(config, name)}: in [0, 1)")
    for name in (
        "window",
        "attention_softcap",
        "logit_softcap",
        "query_scale",
        "rope_local_theta",
        "position_offset",
        "token_types",
    ):
        if getattr(config, name) < 0:
            raise ValueError(f"config.model.{name} = {getattr(config, name)}: 0 (off) or more")
    for name in ("norm_eps", "init_std", "rope_theta"):
        if getattr(config, name) <= 0:
            raise ValueError(f"config.model.{name} = {getattr(config, name)}: more than 0")


def _check_sharing(config: ModelConfig) -> None:
    """Blocks that layers share, and tables that are factorised."""
    if not 0 <= config.distinct < config.layers:
        raise ValueError(
            f"config.model.distinct = {config.distinct}: 1 to {config.layers - 1}, fewer than "
            f"config.model.layers; or 0, every layer has its own block"
        )
    if config.sharing == "repeat" and (config.distinct == 0 or config.layers % config.distinct):
        raise ValueError(
            f"config.model.sharing = 'repeat': every block serves as many layers, so "
            f"config.model.distinct = {config.distinct} should divide config.model.layers = "
            f"{config.layers}"
        )
    if not 0 <= config.embed_rank < config.embed_dim:
        raise ValueError(
            f"config.model.embed_rank = {config.embed_rank}: 1 to {config.embed_dim - 1}, less "
            f"than config.model.embed_dim; or 0, a table that is not factorised"
        )
    if config.embed_rank and config.family == "vision":
        raise ValueError(
            f"config.model.embed_rank = {config.embed_rank}: config.model.family = 'vision' has "
            f"no table of tokens; set it to 0"
        )


def _check_attention(config: ModelConfig) -> None:
    """Heads, and which layers see how far."""
    if config.heads % config.kv_heads:
        raise ValueError(
            f"config.model.kv_heads = {config.kv_heads} does not divide config.model.heads = "
            f"{config.heads}; every K/V head serves an equal group of heads"
        )
    if not config.pattern or not set(config.pattern) <= {"local", "global"}:
        raise ValueError(
            f"config.model.pattern = {list(config.pattern)}: a list of 'local' and 'global'"
        )
    if ("local" in config.pattern) != (config.window > 0):
        raise ValueError(
            f"config.model.window = {config.window} and config.model.pattern = "
            f"{list(config.pattern)}: a window wants 'local' layers in the pattern, and they "
            f"want a window"
        )
    if config.rope_local_theta and "local" not in config.pattern:
        raise ValueError(
            f"config.model.rope_local_theta = {config.rope_local_theta}: there is no 'local' "
            f"layer in config.model.pattern"
        )


def _check_positions(config: ModelConfig) -> None:
    """What the kind of positions asks for."""
    if config.positions == "rope":
        config.rope(local=False).frequencies(config.head_dim)  # refuses what cannot be
    if config.positions == "relative":
        _check_relative(config)
    if config.positions == "sinusoidal" and config.embed_dim % 2:
        raise ValueError(
            f"config.model.embed_dim = {config.embed_dim}: sinusoidal positions come in pairs; "
            f"choose an even one"
        )
    if config.position_offset and config.positions != "learned":
        raise ValueError(
            f"config.model.position_offset = {config.position_offset}: rows of a table, and "
            f"config.model.positions = {config.positions!r} have none; set it to 0"
        )


def _check_relative(config: ModelConfig) -> None:
    buckets, distance = config.relative_buckets, config.relative_distance
    if buckets < 4 or buckets % 4:
        raise ValueError(
            f"config.model.relative_buckets = {buckets}: a multiple of 4; an encoder divides "
            f"them by direction, and half of each are for single distances"
        )
    if distance <= buckets // 2:
        raise ValueError(
            f"config.model.relative_distance = {distance}: more than {buckets // 2}, the "
            f"distances that have a bucket to themselves"
        )
    if config.family == "vision":
        raise ValueError(
            "config.model.positions = 'relative': not built for config.model.family = "
            "'vision'; choose learned, sinusoidal or rope"
        )
    if config.attention not in BIASED:
        raise ValueError(
            f"config.model.attention = {config.attention!r}: not built for "
            f"config.model.positions = 'relative'; choose {' or '.join(BIASED)}"
        )


def _check_beside(config: ModelConfig) -> None:
    """An encoder beside a decoder, and attention over one."""
    if config.family == "encoder_decoder":
        if config.encoder_layers < 1:
            raise ValueError(
                f"config.model.encoder_layers = {config.encoder_layers}: config.model.family = "
                f"'encoder_decoder' has at least 1"
            )
        if config.cross == "none":
            raise ValueError(
                "config.model.cross = 'none': config.model.family = 'encoder_decoder' reads "
                "its source by cross-attention; choose plain or gated"
            )
        if config.distinct >= config.encoder_layers:
            raise ValueError(
                f"config.model.distinct = {config.distinct}: both stacks share as many, so fewer "
                f"than config.model.encoder_layers = {config.encoder_layers}"
            )
        if config.sharing == "repeat" and config.encoder_layers % config.distinct:
            raise ValueError(
                f"config.model.sharing = 'repeat': config.model.distinct = {config.distinct} "
                f"should divide config.model.encoder_layers = {config.encoder_layers}"
            )
    else:
        unread: list[tuple[str, object]] = [("encoder_layers", 0), ("source_tied", True)]
        if config.family != "vision_language":
            unread.append(("cross", "none"))
        for name, value in unread:
            if getattr(config, name) != value:
                raise ValueError(
                    f"config.model.{name} = {getattr(config, name)!r}: config.model.family = "
                    f"{config.family!r} has no encoder of a source; leave it {value!r}"
                )


def _check_experts(config: ModelConfig) -> None:
    """Where experts are built."""
    if config.experts.number and config.mlp_bias:
        raise ValueError("config.model.mlp_bias = True: experts have no biases; set it to False")
    if config.experts.number and config.family in ("encoder", "vision"):
        raise ValueError(
            f"config.experts.number = {config.experts.number}: not built for "
            f"config.model.family = {config.family!r}; set it to 0"
        )
    if config.cross != "none" and config.experts.number:
        raise ValueError(
            f"config.experts.number = {config.experts.number}: not built for config.model.cross "
            f"= {config.cross!r}; set it to 0"
        )


def _check_of_encoders(config: ModelConfig) -> None:
    """What an encoder alone has."""
    for name in OF_ENCODERS:
        if config.family != "encoder" and getattr(config, name):
            raise ValueError(
                f"config.model.{name} = {getattr(config, name)}: of config.model.family = "
                f"'encoder' alone, and it is {config.family!r}; leave it out"
            )


def without_effect(config: ModelConfig) -> list[str]:
    """Keys that were set and are not read, a sentence each."""
    notes = []
    if config.pooler and not config.tasks:
        notes.append("config.model.pooler has no effect: there are no config.objective.tasks")
    notes += [
        f"config.model.{name} has no effect: config.objective.name is 'classification'"
        for name in ("head_transform", "head_bias", "logit_softcap")
        if getattr(config, name) and not config.token_head and config.family == "encoder"
    ]
    notes += [
        f"config.model.{name} has no effect: config.model.family = 'vision' reads no tokens"
        for name in ("embed_scale", "logit_softcap")
        if getattr(config, name) and config.family == "vision"
    ]
    if config.head_scale and config.family in ("encoder", "vision"):
        notes.append(
            f"config.model.head_scale has no effect: config.model.family = {config.family!r} has "
            f"no decoder"
        )
    return notes
