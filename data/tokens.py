"""Tokenisers: bytes, a byte-level BPE trained on the corpus, or any `tokenizer.json`."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from data.config import DataConfig
from data.files import atomic_file, locked

END = "<|end|>"
USUAL_ENDS = (END, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
MASK = "<|mask|>"
USUAL_MASKS = (MASK, "[MASK]", "<mask>")
USUAL_STARTS = ("<pad>", "[PAD]", "<|pad|>")
SENTINELS = tuple(f"<extra_id_{number}>" for number in range(100))  # as many as T5 has

log = logging.getLogger(__name__)


class Tokenizer(Protocol):
    """Text to ids and back.

    Attributes:
      vocab_size: largest id + 1.
      end_id: the id that ends every document.
      start_id: the decoder's first input, where it has one: the padding token, as for T5, or where
        there is none the end.
      mask_id: the id of a hidden token; None where there is none.
      sentinels: ids that stand for spans, the first, the second, ...; () where there are none.
      special: ids that stand for no text, bool [vocab_size].
      fingerprint: a hash of everything that decides the ids of a text.
    """

    vocab_size: int
    end_id: int
    start_id: int
    mask_id: int | None
    sentinels: tuple[int, ...]
    special: np.ndarray
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, int [n], without the end of the document."""

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """`encode` of several texts, on all cores where it can."""

    def encode_prompt(self, text: str) -> np.ndarray:
        """`encode` of a text that is to be continued, after what the tokeniser puts before one."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; ends of documents are left out."""

    def token_bytes(self) -> np.ndarray:
        """Bytes of text that each token stands for, int32 [vocab_size]; 0 for the end."""


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255; 256 ends a document; what an objective needs follows.

    Args:
      marks: names of more tokens, `MASK` or `SENTINELS`.
    """

    end_id = start_id = 256
    fingerprint = "bytes"  # more tokens change no text's ids

    def __init__(self, marks: Sequence[str] = ()) -> None:
        ids = {name: self.end_id + 1 + number for number, name in enumerate(marks)}
        self.vocab_size = self.end_id + 1 + len(ids)
        self.mask_id = ids.get(MASK)
        self.sentinels = tuple(ids[name] for name in SENTINELS if name in ids)
        self.special = np.arange(self.vocab_size) >= self.end_id

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def encode_prompt(self, text: str) -> np.ndarray:
        return self.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(i) for i in ids if 0 <= i < 256).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        return (~self.special).astype(np.int32)


class JsonTokenizer:
    """A `tokenizer.json` of the `tokenizers` library.

    Args:
      path: the file.
      key: config key that gave the path, for errors.
      end_token: the token that ends a document; empty looks for a usual name.

    Raises:
      ValueError: no such file, no tokeniser in it, or no end-of-document token.
    """

    def __init__(self, path: Path, key: str = "config.data.tokenizer", end_token: str = "") -> None:
        from tokenizers import Tokenizer as Backend

        if not path.is_file():
            raise ValueError(
                f"{key} = '{path}': no such file; choose bytes, bpe or the path of a tokenizer.json"
            )
        content = path.read_bytes()
        try:
            self.backend = Backend.from_str(content.decode())
        except Exception as error:  # the library raises bare Exception
            raise ValueError(
                f"{key} = '{path}': not a tokenizer.json of the tokenizers library ({error})"
            ) from error
        self.backend.encode_special_tokens = True  # "<|end|>" written in a text is text, not an end
        self.backend.no_padding()
        self.backend.no_truncation()
        self.vocab: dict[str, int] = self.backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self.vocab.values()) + 1
        names = [end_token] if end_token else USUAL_ENDS
        found = [name for name in names if name in self.vocab]
        if not found:
            raise ValueError(
                f"config.data.end_token = {end_token!r}: '{path}' has no token "
                f"{' or '.join(names)}; name the token of it that ends a document"
            )
        self.end_id = self.vocab[found[0]]
        self.mask_id = next((self.vocab[name] for name in USUAL_MASKS if name in self.vocab), None)
        starts = [self.vocab[name] for name in USUAL_STARTS if name in self.vocab]
        self.start_id = starts[0] if starts else self.end_id
        self.sentinels = tuple(self.vocab[name] for name in SENTINELS if name in self.vocab)
        self.special = self._special()
        self.fingerprint = hashlib.sha256(content + found[0].encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self.backend.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        encoded = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(one.ids, np.int32) for one in encoded]

    def encode_prompt(self, text: str) -> np.ndarray:
        """As the file's own template has it, up to the end of the text: Llama's and Gemma's begin
        with a token of their own.
        """
        ids = self.backend.encode(text, add_special_tokens=True).ids
        plain = self.backend.encode(text, add_special_tokens=False).ids
        begin = next(i for i in range(len(ids) + 1) if ids[i : i + len(plain)] == plain)
        return np.asarray(ids[:begin] + plain, np.int32)

    def _special(self) -> np.ndarray:
        """Ids that stand for no text: those the file calls special, ours, and gaps between ids."""
        special = np.ones(self.vocab_size, bool)
        special[list(self.vocab.values())] = False
        added = self.backend.get_added_tokens_decoder()
        special[[i for i, token in added.items() if token.special]] = True
        special[[self.end_id, *self.sentinels]] = True
        if self.mask_id is not None:
            special[self.mask_id] = True
        return special

    def decode(self, ids: Iterable[int]) -> str:
        kept = [int(i) for i in ids if i != self.end_id]
        return self.backend.decode(kept, skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        """Exact for byte-level BPE; for other kinds what the token's name stands for.

        (SentencePiece's mark of a space counts 1, `<0x0A>` counts 1, WordPiece's `##` nothing.)
        """
        byte_level = '"ByteLevel"' in json.dumps(json.loads(self.backend.to_str())["decoder"])
        added = {i: token.content for i, token in self.backend.get_added_tokens_decoder().items()}
        sizes = np.zeros(self.vocab_size, np.int32)
        for token, i in self.vocab.items():
            if i in added:
                sizes[i] = len(added[i].encode())
            elif byte_level:  # one printable character stands for one byte
                sizes[i] = len(token)
            elif token.startswith("<0x") and token.endswith(">") and len(token) == 6:
                sizes[i] = 1
            else:
                sizes[i] = len(token.removeprefix("##").replace("\u2581", " ").encode())
        sizes[[self.end_id, *self.sentinels]] = 0
        return sizes


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path, marks: Sequence[str] = ()) -> None:
    """Trains a byte-level BPE of `vocab_size` tokens and writes it to `path` (a tokenizer.json).

    Every byte is a token, so every text can be encoded and comes back unchanged. The end of a
    document and `marks` are among the tokens.
    Source: Sennrich et al. 2016, https://arxiv.org/abs/1508.07909; on bytes, Radford et al. 2019.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, *marks],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    with atomic_file(path) as file:
        file.write(backend.to_str().encode())


def open_tokenizer(
    config: DataConfig,
    vocab_size: int,
    workdir: Path,
    training_texts: Callable[[], Iterable[str]],
    marks: Sequence[str] = (),
) -> Tokenizer:
    """The tokeniser of `config.data.tokenizer`.

    Args:
      config: names the tokeniser.
      vocab_size: `config.model.vocab_size`.
      workdir: holds the `tokenizer.json` of a BPE, which is trained once and then reused.
      training_texts: the training documents; read only to train a BPE.
      marks: tokens that the objective needs, `(MASK,)` or `SENTINELS`; bytes and a BPE get them.

    Raises:
      ValueError: no such file, a mark that is not in it, or ids that the model's vocabulary does
        not hold.
    """
    tokenizer: Tokenizer
    if config.tokenizer == "bytes":
        tokenizer = ByteTokenizer(marks)
    elif config.tokenizer == "bpe":
        least = 257 + len(marks)
        if vocab_size < least:
            more = f", and {len(marks)} for the objective" if marks else ""
            raise ValueError(
                f"config.model.vocab_size = {vocab_size}: config.data.tokenizer = 'bpe' has a "
                f"token for each byte and one for the end of a document{more}; give at least "
                f"{least}"
            )
        path = workdir / "tokenizer.json"
        with locked(path):
            if not path.exists():
                log.info("training a BPE of %d tokens into %s", vocab_size, path)
                train_bpe(training_texts(), vocab_size, path, marks)
            else:
                log.info("reusing the BPE in %s", path)
        tokenizer = JsonTokenizer(path)
    else:
        path = Path(os.path.expanduser(config.tokenizer))
        tokenizer = JsonTokenizer(path, end_token=config.end_token)
    _check_marks(config, tokenizer, marks)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"config.data.tokenizer = '{config.tokenizer}' has {tokenizer.vocab_size} tokens, "
            f"more than config.model.vocab_size = {vocab_size}; raise config.model.vocab_size to "
            f"at least {tokenizer.vocab_size}, or choose another tokenizer"
        )
    return tokenizer


def _check_marks(config: DataConfig, tokenizer: Tokenizer, marks: Sequence[str]) -> None:
    shown = f"config.data.tokenizer = '{config.tokenizer}'"
    if MASK in marks and tokenizer.mask_id is None:
        raise ValueError(
            f"{shown} has no mask token ({', '.join(USUAL_MASKS)}), which config.objective.name = "
            f"'masked_lm' needs; choose bytes, bpe or a tokenizer.json that has one"
        )
    if SENTINELS[0] in marks and not tokenizer.sentinels:
        raise ValueError(
            f"{shown} has no token {SENTINELS[0]}, which config.objective.name = "
            f"'span_corruption' needs; choose bytes, bpe or a tokenizer.json that has it"
        )
