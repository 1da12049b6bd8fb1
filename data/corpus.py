"""Tokenised documents on disk: read by position, written once, split into trained and held-out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.config import NO_PATH, DataConfig
from data.documents import Document, Documents, held_out, texts_of
from data.files import built_once
from data.images import image_files
from data.parts import TEXT, Parts
from data.sources import find_files
from data.stdlib import stdlib_files
from data.tokens import Tokenizer

FORMAT = 2  # raise when what is on disk changes its meaning


@dataclass(frozen=True)
class Corpus:
    """Documents as ranges of one long line of tokens.

    Attributes:
      shards: files of uint16 or uint32 tokens, mapped, that follow each other.
      starts: first token of each document, int64 [documents].
      lengths: its tokens, the end included, int64 [documents].
      fingerprint: a hash of all tokens and of what is held out, and of sources, labels and images.
      columns: more numbers of each document, int64 [documents]: `source_starts` and
        `source_lengths` of what it is made from, its end included; `label_<task>`; `image`, its
        number in `images`.
      images: uint8 [images, height, width, channels], mapped; None where there are none.
    """

    shards: tuple[np.ndarray, ...]
    starts: np.ndarray
    lengths: np.ndarray
    fingerprint: str
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    images: np.ndarray | None = None

    def take(self, index: np.ndarray) -> np.ndarray:
        """The tokens at positions `index`, int64 [n] -> int32 [n]."""
        if len(self.shards) == 1:
            return self.shards[0][index].astype(np.int32)
        ends = np.cumsum([len(shard) for shard in self.shards])
        of_shard = np.searchsorted(ends, index, side="right")
        tokens = np.empty(len(index), np.int32)
        for number in np.unique(of_shard):
            here = of_shard == number
            shard = self.shards[number]
            tokens[here] = shard[index[here] - (ends[number] - len(shard))]
        return tokens

    def choose(self, documents: np.ndarray) -> Corpus:
        """The same corpus with some of its documents only; `documents` is a bool [documents]."""
        return replace(
            self,
            starts=self.starts[documents],
            lengths=self.lengths[documents],
            columns={name: column[documents] for name, column in self.columns.items()},
        )

    def rows(self, starts: np.ndarray, counts: np.ndarray, width: int) -> np.ndarray:
        """`counts` [rows] tokens from `starts` [rows] on, padded with 0: int32 [rows, width]."""
        index = np.arange(width)
        there = index < counts[:, None]
        rows = np.zeros(there.shape, np.int32)
        rows[there] = self.take((starts[:, None] + index)[there])
        return rows


def open_corpus(
    config: DataConfig,
    tokenizer: Tokenizer,
    documents: Documents,
    cache: Path,
    parts: Parts = TEXT,
) -> tuple[Corpus, Corpus]:
    """The training documents and the held-out ones, tokenised now or earlier.

    Args:
      config: names the source.
      tokenizer: makes the tokens.
      documents: goes through the texts.
      cache: folder to keep the tokens in, under a hash of the files' names, sizes and times, the
        tokeniser and the config. One process of several writes, the others wait.
      parts: what `documents` gives of each.

    Raises:
      ValueError: no documents.
    """
    folder = built_once(
        cache / _cache_key(config, tokenizer, parts),
        lambda new: _write(documents, tokenizer, new, config, parts),
    )
    meta = json.loads((folder / "meta.json").read_text())
    tokens = np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r")
    lengths, sources, held, labels = (
        np.load(folder / f"{name}.npy") for name in ("lengths", "source_lengths", "held", "labels")
    )
    starts = np.cumsum(lengths + sources) - lengths  # a source stands before its text
    columns = {f"label_{task}": labels[:, i] for i, task in enumerate(parts.tasks)}
    if parts.source:
        columns |= {"source_starts": starts - sources, "source_lengths": sources}
    images = None
    if parts.image is not None:
        size, channels = parts.image.image_size, parts.image.channels
        pixels = np.memmap(folder / "images.bin", dtype=np.uint8, mode="r")
        images = pixels.reshape(-1, size, size, channels)
        columns["image"] = np.arange(len(images))
    corpus = Corpus((tokens,), starts, lengths, meta["fingerprint"], columns, images)
    return corpus.choose(~held), corpus.choose(held)


def _cache_key(config: DataConfig, tokenizer: Tokenizer, parts: Parts) -> str:
    listing: list = [FORMAT, config.source, config.text_field, tokenizer.fingerprint]
    if parts != TEXT:
        listing += [config.source_field, repr(parts)]
    if config.source in ("stdlib", "docstrings"):
        listing.append(stdlib_files()[2])
    for key in ("path", "eval_path") if config.source not in NO_PATH else ():
        files = find_files(config, key) if getattr(config, key) else []
        shown = f"config.data.{key} = '{getattr(config, key)}'"
        if config.source == "images":
            files += [image for file in files for image in image_files(shown, file)]
        stats = [(str(file.resolve()), file.stat()) for file in files if file.exists()]
        listing.append([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:24]


def _write(
    documents: Documents, tokenizer: Tokenizer, folder: Path, config: DataConfig, parts: Parts
) -> None:
    dtype = np.dtype("uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32")
    scores, lengths, source_lengths, labels = [], [], [], []
    digest = hashlib.blake2b(tokenizer.fingerprint.encode(), digest_size=16)
    with open(folder / "tokens.bin", "wb") as tokens, open(folder / "images.bin", "wb") as images:

        def write(file: BinaryIO, content: bytes) -> None:
            digest.update(content)
            file.write(content)

        for batch in _batches(documents, characters=1 << 22):
            encoded = iter(
                tokenizer.encode_batch([text for one in batch for text in texts_of(one)])
            )
            for document in batch:
                ids = [np.append(next(encoded), tokenizer.end_id) for _ in texts_of(document)]
                write(tokens, np.concatenate(ids).astype(dtype).tobytes())
                if document.image is not None:
                    write(images, document.image.tobytes())
                scores.append(document.score)
                lengths.append(len(ids[-1]))
                source_lengths.append(sum(map(len, ids[:-1])))
                labels.append(document.labels)
    if not lengths:
        raise ValueError(
            f"config.data.path = '{config.path}': no document in it; give files that hold text"
        )
    held = held_out(np.asarray(scores, np.uint64))
    digest.update(held.tobytes())
    arrays = {"lengths": lengths, "source_lengths": source_lengths, "labels": labels}
    for name, numbers in arrays.items():
        np.save(folder / f"{name}.npy", np.asarray(numbers, np.int64))
    if parts.tasks:
        digest.update(np.asarray(labels, np.int64).tobytes())
    np.save(folder / "held.npy", held)
    meta = {"dtype": dtype.name, "fingerprint": digest.hexdigest()}
    (folder / "meta.json").write_text(json.dumps(meta))


def _batches(documents: Documents, characters: int) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents():
        batch.append(document)
        size += sum(map(len, texts_of(document)))
        size += 0 if document.image is None else document.image.size
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
