"""The shape of a decoder: one frozen dataclass from GPT-2 to Llama 3, Qwen 3 and Gemma 3."""

from __future__ import annotations

from dataclasses import dataclass

from models.positions import SCALINGS, RopeConfig

VOCAB_MULTIPLE = 128  # the padded vocabulary divides over any tensor axis up to 128
CHOICES = {
    "family": ("decoder",),
    "norm": ("rms", "layer"),
    "norm_position": ("pre", "post", "sandwich"),
    "positions": ("rope", "learned", "sinusoidal", "none"),
    "rope_scaling": SCALINGS,
    "activation": ("gelu", "gelu_tanh", "silu", "relu"),
    "attention": ("auto", "xla", "rows", "blocked", "cudnn"),
}


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and kind of a decoder (`config.model`).

    Attributes:
      vocab_size: real vocabulary; at rest it is padded to a multiple of 128.
      norm_position: pre (GPT-2, Llama), post (2017 Transformer), sandwich (Gemma: both).
      norm_plus_one: gains are stored minus one (Gemma).
      max_length: longest sequence; the size of a learned position table.
      rope_local_theta: theta of the local layers of `pattern` (0: the same as rope_theta).
      rope_scaling: none, linear or llama3; the other rope_ keys are its figures
        (`models.positions`).
      gated: SwiGLU (silu) or GeGLU (gelu) instead of a plain feed-forward.
      query_scale: factor of the attention logits; 0 means head_dim ** -0.5.
      attention_softcap, logit_softcap: x -> cap * tanh(x / cap); 0 means none.
      window: keys that a local layer sees, itself included; 0 means all.
      pattern: kinds of layers, "local" or "global", repeated over the depth.
      tied: the loss head is the embedding table.
      embed_scale: embeddings are multiplied by sqrt(embed_dim) (2017 Transformer, Gemma).
      init_std: standard deviation of the initial weights.
      attention: implementation of the attention core.
      unroll: layers a loop iteration of the scan runs.
    """

    vocab_size: int
    layers: int
    embed_dim: int
    mlp_dim: int
    heads: int
    kv_heads: int
    head_dim: int
    family: str = "decoder"
    norm: str = "rms"
    norm_position: str = "pre"
    norm_eps: float = 1e-6
    norm_plus_one: bool = False
    positions: str = "rope"
    max_length: int = 2048
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
    embed_scale: bool = False
    init_std: float = 0.02
    dropout: float = 0.0
    attention_dropout: float = 0.0
    attention: str = "auto"
    unroll: int = 1

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"config.model.{name} = {getattr(self, name)!r}: choose one of "
                    f"{', '.join(choices)}"
                )
        sizes = ("vocab_size", "layers", "embed_dim", "mlp_dim", "heads", "kv_heads", "head_dim")
        for name in (*sizes, "max_length", "unroll"):
            if getattr(self, name) < 1:
                raise ValueError(f"config.model.{name} = {getattr(self, name)}: at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"config.model.kv_heads = {self.kv_heads} does not divide config.model.heads = "
                f"{self.heads}; every K/V head serves an equal group of heads"
            )
        if self.positions == "rope":
            self.rope(local=False).frequencies(self.head_dim)  # refuses what cannot be
        if self.positions == "sinusoidal" and self.embed_dim % 2:
            raise ValueError(
                f"config.model.embed_dim = {self.embed_dim}: sinusoidal positions come in pairs; "
                f"choose an even one"
            )
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"config.model.{name} = {getattr(self, name)}: in [0, 1)")
        for name in (
            "window",
            "attention_softcap",
            "logit_softcap",
            "query_scale",
            "rope_local_theta",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"config.model.{name} = {getattr(self, name)}: 0 (off) or more")
        for name in ("norm_eps", "init_std", "rope_theta"):
            if getattr(self, name) <= 0:
                raise ValueError(f"config.model.{name} = {getattr(self, name)}: more than 0")
        if not self.pattern or not set(self.pattern) <= {"local", "global"}:
            raise ValueError(
                f"config.model.pattern = {list(self.pattern)}: a list of 'local' and 'global'"
            )
        if ("local" in self.pattern) != (self.window > 0):
            raise ValueError(
                f"config.model.window = {self.window} and config.model.pattern = "
                f"{list(self.pattern)}: a window wants 'local' layers in the pattern, and they "
                f"want a window"
            )
        if self.rope_local_theta and "local" not in self.pattern:
            raise ValueError(
                f"config.model.rope_local_theta = {self.rope_local_theta}: there is no 'local' "
                f"layer in config.model.pattern"
            )

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
    def padded_vocab(self) -> int:
        """Rows of the table at rest."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def dims(self) -> dict[str, tuple[int, str]]:
        """Logical name -> (size, config key) of every dim that a mesh axis may divide."""
        return {
            "vocab": (self.padded_vocab, "config.model.vocab_size (padded to a multiple of 128)"),
            "heads": (self.heads, "config.model.heads"),
            "kv_heads": (self.kv_heads, "config.model.kv_heads"),
            "mlp": (self.mlp_dim, "config.model.mlp_dim"),
        }
