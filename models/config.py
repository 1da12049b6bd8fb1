"""The shape of a model: one frozen dataclass for all families."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from models.config_checks import check
from models.experts_config import ExpertsConfig
from models.positions import RopeConfig
from models.vision_config import VisionConfig
from parallel.rules import SHARED, STAGED

VOCAB_MULTIPLE = 128  # the padded vocabulary divides over any tensor axis up to 128


@dataclass(frozen=True)
class ModelConfig:
    """Shape and kind of a model (`config.model`).

    Attributes:
      family: decoder (GPT, Llama); encoder (BERT), whose tokens see both ways; encoder_decoder
        (T5), an encoder of a source beside a decoder; vision (ViT); vision_language, a ViT beside a
        decoder.
      encoder_layers: of an encoder_decoder's encoder; all else it has in common with the decoder.
      source_tied: the encoder's embedding table is the decoder's.
      cross: attention of each layer of the decoder over the encoder's features: none, plain, or
        gated by a scalar that starts at 0 (`models.cross_attention`). An image that is not read so
        stands before the text (`image_tokens`).
      vocab_size: real vocabulary; at rest it is padded to a multiple of 128.
      distinct: blocks that the layers share (`models.stack`); 0: every layer has its own.
      sharing: cycle (blocks 0 1 2 0 1 2) or repeat (0 0 1 1 2 2).
      embed_rank: r of a factorised embedding: a table [V, r] and a projection [r, D] (ALBERT,
        section 3.1, https://arxiv.org/abs/1909.11942), the loss head likewise; 0: a table [V, D].
      norm_position: pre (GPT-2, Llama), post (2017 Transformer), sandwich (Gemma: both).
      norm_plus_one: gains are stored minus one (Gemma).
      max_length: longest sequence; the size of a learned position table.
      position_offset: rows of that table before the first position's (RoBERTa: 2).
      token_types: rows of a table of token types; 0: none (BERT: 2). Rows made here are of type 0.
      embed_norm: embeddings go through a norm before dropout (BERT).
      relative_buckets, relative_distance: of relative positions (`models.relative_positions`).
      rope_local_theta: theta of the local layers of `pattern` (0: the same as rope_theta).
      rope_scaling: none, linear or llama3; the other rope_ keys are its figures
        (`models.positions`).
      gated: SwiGLU (silu) or GeGLU (gelu) instead of a plain feed-forward.
      query_scale: factor of the attention logits; 0 means head_dim ** -0.5.
      attention_softcap, logit_softcap: x -> cap * tanh(x / cap); 0 means none.
      window: keys that a local layer sees, itself included; 0 means all.
      pattern: kinds of layers, "local" or "global", repeated over the depth.
      tied: the loss head is the embedding table.
      head_transform: features go through a dense layer, `activation` and a norm before that (BERT).
      head_bias: a bias for each token of the vocabulary is added to the logits (BERT).
      pooler: rows are classified by a dense layer and tanh of their first token, not by its
        features alone (BERT).
      embed_scale: embeddings are multiplied by sqrt(embed_dim) (2017 Transformer, Gemma).
      head_scale: features are multiplied by 1 / sqrt(embed_dim) before the loss head (T5).
      init_std: standard deviation of the initial weights.
      attention: implementation of the attention core.
      unroll: layers a loop iteration of the scan runs.
      experts: a mixture of experts in place of the feed-forward (`config.experts`).
      vision: the images that it reads (`config.vision`).
      tasks: (name, classes) of what rows are classified by (`config.objective.tasks`).
      token_head: whether tokens are predicted, or rows alone classified (`config.objective.name`).
      prefix_length: virtual positions before each row, whose keys and values every layer learns
        (`config.adapter.prefix_length`); 0: none.
    """

    vocab_size: int
    layers: int
    embed_dim: int
    mlp_dim: int
    heads: int
    kv_heads: int
    head_dim: int
    family: str = "decoder"
    encoder_layers: int = 0
    source_tied: bool = True
    cross: str = "none"
    distinct: int = 0
    sharing: str = "cycle"
    embed_rank: int = 0
    norm: str = "rms"
    norm_position: str = "pre"
    norm_eps: float = 1e-6
    norm_plus_one: bool = False
    positions: str = "rope"
    max_length: int = 2048
    position_offset: int = 0
    token_types: int = 0
    embed_norm: bool = False
    relative_buckets: int = 32
    relative_distance: int = 128
    rope_theta: float = 10_000.0
    rope_local_theta: float = 0.0
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_length: int = 8192
    activation: str = "silu"
    gated: bool = True
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    query_scale: float = 0.0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    window: int = 0
    pattern: tuple[str, ...] = ("global",)
    tied: bool = True
    head_transform: bool = False
    head_bias: bool = False
    pooler: bool = False
    embed_scale: bool = False
    head_scale: bool = False
    init_std: float = 0.02
    dropout: float = 0.0
    attention_dropout: float = 0.0
    attention: str = "auto"
    unroll: int = 1
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    tasks: tuple[tuple[str, int], ...] = ()
    token_head: bool = True
    prefix_length: int = 0

    def __post_init__(self) -> None:
        check(self)

    @property
    def causal(self) -> bool:
        """Whether a token sees none after itself."""
        return self.family not in ("encoder", "vision")

    @property
    def image_tokens(self) -> int:
        """Tokens that stand before the text of a row in the residual stream."""
        before = self.family == "vision_language" and self.cross == "none"
        return self.vision.patches if before else 0

    def rope(self, *, local: bool) -> RopeConfig:
        """The rotary positions of a local or a global layer."""
        if local and self.rope_local_theta:  # Gemma 3 scales the global layers alone
            return RopeConfig(theta=self.rope_local_theta)
        return RopeConfig(
            theta=self.rope_theta,
            scaling=self.rope_scaling,
            factor=self.rope_factor,
            low_freq_factor=self.rope_low_freq_factor,
            high_freq_factor=self.rope_high_freq_factor,
            original_length=self.rope_original_length,
        )

    @property
    def blocks(self) -> int:
        """Blocks that are stored, of which layers may share one."""
        return self.distinct or self.layers

    @property
    def stack(self) -> str:
        """The logical name of the stored blocks' leading dim."""
        return SHARED if self.distinct else STAGED

    @property
    def table_dim(self) -> int:
        """Width of the vocabulary's table."""
        return self.embed_rank or self.embed_dim

    @property
    def padded_vocab(self) -> int:
        """Rows of the table at rest; 0 where there is none."""
        if self.family == "vision":
            return 0
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def feed_forward_dim(self) -> int:
        """Inner width of the feed-forward, or of an expert."""
        return (self.experts.number and self.experts.mlp_dim) or self.mlp_dim

    def dims(self) -> dict[str, tuple[int, str]]:
        """Logical name -> (size, config key) of every dim that a mesh axis may divide."""
        experts = self.experts
        of_expert = experts.number > 0 and experts.mlp_dim > 0
        wide = "config.experts.mlp_dim" if of_expert else "config.model.mlp_dim"
        dims = {
            "vocab": (self.padded_vocab, "config.model.vocab_size (padded to a multiple of 128)"),
            "heads": (self.heads, "config.model.heads"),
            "kv_heads": (self.kv_heads, "config.model.kv_heads"),
            "mlp": (self.feed_forward_dim, wide),
        }
        if self.family == "vision_language":  # the same axis divides those of the ViT
            of_vit = {
                "heads": (self.vision.heads, "config.vision.heads"),
                "mlp": (self.vision.mlp_dim, "config.vision.mlp_dim"),
            }
            dims |= {name: _common(dims[name], size) for name, size in of_vit.items()}
        if experts.number:
            dims["experts"] = (experts.number, "config.experts.number")
            dims["slot_embed"] = (self.embed_dim, "config.model.embed_dim")
        return dims

    def row_dims(self, sequence_length: int, source_length: int) -> dict[str, tuple[int, str]]:
        """The same of rows of so many tokens, and of what else is in the residual stream."""
        dim = sequence_length, "config.data.sequence_length"
        # Each alone and both together are divided.
        if self.family == "vision_language":
            dim = _common(dim, (self.vision.patches, "the patches of an image (config.vision)"))
        if self.family == "encoder_decoder":
            dim = _common(dim, (source_length, "config.data.source_length"))
        return {"residual_seq": dim}


def _common(first: tuple[int, str], second: tuple[int, str]) -> tuple[int, str]:
    """What divides where both sizes do, with their keys."""
    keys = f"{first[1]} = {first[0]} and {second[1]} = {second[0]}: their greatest common divisor"
    return math.gcd(first[0], second[0]), keys
