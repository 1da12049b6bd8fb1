"""What to train on and how to cut it: `config.data`."""

from __future__ import annotations

from dataclasses import dataclass

TEXTS = ("stdlib", "text", "jsonl", "tokens", "dataset")
IMAGES = ("digits", "images")
SOURCES = (*TEXTS, "docstrings", *IMAGES)
NO_PATH = ("stdlib", "docstrings", "digits")  # each its own data
PACKINGS = ("packed", "buckets", "none")
TOKEN_DTYPES = ("uint16", "uint32")


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and the shape of a batch (`config.data`).

    Attributes:
      source: `stdlib` (CPython's own standard library), `text` (one document a file), `jsonl` (one
        a line), `tokens` (already tokenised), `dataset` (a folder of Parquet or Arrow; extra `hf`),
        `docstrings` (pairs of code and its docstring, of the standard library), `digits` (scanned
        digits, of scikit-learn), `images` (a jsonl that names an image in each line; extra
        `images`).
      path: a file, a folder (`dataset`) or a glob; empty for `stdlib`, `docstrings` and `digits`.
      eval_path: held-out documents; empty holds out about 5% of `path`'s, chosen by their names.
      tokenizer: `bytes`, `bpe` (trained on the training documents, of `config.model.vocab_size`
        tokens), or the path of a `tokenizer.json`.
      end_token: the end-of-document token of that `tokenizer.json`; empty looks for a usual name.
      sequence_length: T, positions in a row; of the targets, where a row has a source.
      source_length: S, positions in a source row (objectives `span_corruption`, `seq2seq`).
      batch_size: B, rows of a step over all devices.
      packing: `packed` (several documents a row), `buckets` (one piece of a document a row, rows of
        `buckets` lengths), `none` (one piece a row, padded to T).
      buckets: row lengths in rising order, the last one `sequence_length`.
      prefetch_mib: host memory for batches made ahead, in MiB.
      text_field: the field that holds the text (`jsonl`, `dataset`, `images`).
      source_field: the field of a `jsonl` that holds the source of that text (`seq2seq`).
      token_dtype: dtype of raw `.bin` files (`tokens`).
      cache: folder for tokenised corpora; empty is `<workdir>/cache`.
    """

    source: str = "stdlib"
    path: str = ""
    eval_path: str = ""
    tokenizer: str = "bytes"
    end_token: str = ""
    sequence_length: int = 256
    source_length: int = 256
    batch_size: int = 64
    packing: str = "packed"
    buckets: tuple[int, ...] = ()
    prefetch_mib: int = 64
    text_field: str = "text"
    source_field: str = ""
    token_dtype: str = "uint16"
    cache: str = ""

    def __post_init__(self) -> None:
        choices = {"source": SOURCES, "packing": PACKINGS, "token_dtype": TOKEN_DTYPES}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"config.data.{name} = {getattr(self, name)!r}: choose one of "
                    f"{', '.join(allowed)}"
                )
        texts = ("path", "eval_path", "tokenizer", "end_token", "text_field", "source_field")
        for name in (*texts, "cache"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"config.data.{name} = {getattr(self, name)!r}: give a string")
        for name in ("sequence_length", "source_length", "batch_size", "prefetch_mib"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"config.data.{name} = {value!r}: give a whole number of at least 1"
                )
        if not self.tokenizer:
            raise ValueError(
                "config.data.tokenizer = '': choose bytes, bpe or the path of a tokenizer.json"
            )
        if self.source in NO_PATH:
            for name in ("path", "eval_path"):
                if getattr(self, name):
                    raise ValueError(
                        f"config.data.{name} = {getattr(self, name)!r}: config.data.source = "
                        f"{self.source!r} reads no path; leave it empty, or choose another source"
                    )
        elif not self.path:
            raise ValueError(
                f"config.data.path = '': config.data.source = '{self.source}' needs a file or a "
                "glob"
            )
        if self.source == "tokens" and self.tokenizer == "bpe":
            raise ValueError(
                "config.data.tokenizer = 'bpe': no BPE can be trained on config.data.source = "
                "'tokens'; give bytes or the path of the tokenizer.json that made them"
            )
        if self.source_field and self.source != "jsonl":
            raise ValueError(
                f"config.data.source_field = {self.source_field!r}: read only with "
                f"config.data.source = 'jsonl', which is {self.source!r}; leave it empty"
            )
        self._check_buckets()

    def _check_buckets(self) -> None:
        object.__setattr__(self, "buckets", tuple(self.buckets))  # lists arrive from ConfigDict
        if self.packing != "buckets":
            if self.buckets:
                raise ValueError(
                    f"config.data.buckets = {self.buckets}: read only with config.data.packing = "
                    f"'buckets', which is '{self.packing}'; leave it empty"
                )
            return
        rising = (
            self.buckets
            and self.buckets[0] >= 1
            and list(self.buckets) == sorted(set(self.buckets))
        )
        if not rising or self.buckets[-1] != self.sequence_length:
            raise ValueError(
                f"config.data.buckets = {self.buckets}: give row lengths in rising order, the "
                f"last one config.data.sequence_length = {self.sequence_length}"
            )
