"""What `learning.py` trains: each objective of each family, small enough for three minutes.

Real data for all: files and docstrings of the standard library, and scanned digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RUNS = Path("runs", "learning")  # in the repository


@dataclass(frozen=True)
class Case:
    """One objective of one family.

    Attributes:
      title: for people.
      config: which of configs/.
      keys: `section.key=value`, as on the command line.
      trunk: the case from whose checkpoint it starts.
    """

    title: str
    config: str
    keys: tuple[str, ...] = ()
    trunk: str = ""

    def flags(self) -> list[str]:
        """What train.py is given, but for the workdir."""
        flags = [f"--config=configs/{self.config}.py", *(f"--config.{key}" for key in self.keys)]
        return flags + ([f"--config.init_from={RUNS / self.trunk}"] if self.trunk else [])


SMALL = ("data.batch_size=16", "model.unroll=4", "train.steps=100", "eval.batches=16")
SHORT = (  # of masked tokens: where to look is learnt sooner among few positions, in many steps
    "model.layers=2",
    "model.unroll=2",
    "data.sequence_length=32",
    "data.batch_size=64",
    "optimizer.learning_rate=3e-3",
    "train.steps=250",
    "eval.batches=16",
)
PAIRS = (
    "model.encoder_layers=1",
    "model.layers=1",
    "data.batch_size=16",
    "data.source_length=128",
    "optimizer.name=muon",
    "train.steps=220",
    "eval.batches=16",
)
PACKAGE = ("objective.tasks={'package': 8}", "data.packing=none")
CASES = {
    "causal_lm": Case(
        "causal LM",
        "tiny",
        ("data.batch_size=16", "model.unroll=4", "train.steps=150", "eval.batches=32"),
    ),
    "prefix_lm": Case(
        "prefix LM", "tiny", (*SMALL, "objective.name=prefix_lm", "data.packing=none")
    ),
    "experts": Case("causal LM, experts", "tiny_experts", (*SMALL, "train.steps=80")),
    "shared": Case("causal LM, shared blocks", "tiny_shared", SMALL),
    "masked_lm": Case("masked LM", "tiny_encoder", SHORT),
    "package": Case(
        "text classified",
        "tiny_encoder",
        (*SMALL, *PACKAGE, "objective.name=classification"),
    ),
    "multi_task": Case("masked LM and classes", "tiny_encoder", (*SHORT, *PACKAGE)),
    "new_head": Case(
        "new head, frozen trunk",
        "tiny_encoder",
        (
            *SHORT,
            *PACKAGE,
            "objective.name=classification",
            "init_new=heads/*",
            "init_drop=head_*",
            "optimizer.frozen=embedding,embed_norm/*,position,stack/*",
        ),
        trunk="masked_lm",
    ),
    "span_corruption": Case(
        "span corruption, T5",
        "tiny_seq2seq",
        (
            *PAIRS,
            "objective.name=span_corruption",
            "data.source=stdlib",
            "data.sequence_length=32",
            "model.vocab_size=357",
        ),
    ),
    "seq2seq": Case(
        "docstring of code, T5",
        "tiny_seq2seq",
        (
            "data.batch_size=16",
            "data.source_length=128",
            "model.unroll=2",
            "model.init_std=0.06",
            "optimizer.name=muon",
            "eval.batches=16",
            "data.sequence_length=64",
            "train.steps=90",
        ),
    ),
    "seq2seq_2017": Case(
        "docstring of code, 2017",
        "tiny_seq2seq",
        (
            *PAIRS,
            "data.sequence_length=64",
            "model.init_std=0.088",
            "model.norm=layer",
            "model.norm_position=post",
            "model.positions=sinusoidal",
            "model.activation=relu",
            "model.gated=false",
            "model.mlp_bias=true",
            "model.mlp_dim=512",
            "model.tied=true",
            "model.embed_scale=true",
        ),
    ),
    "digits": Case("digits classified", "tiny_digits"),
    "captions_prefix": Case("captions, image first", "tiny_captions"),
    "captions_gated": Case(
        "captions, gated cross",
        "tiny_captions",
        ("model.cross=gated", "model.init_std=0.125", "data.batch_size=32", "train.steps=500"),
    ),
}
