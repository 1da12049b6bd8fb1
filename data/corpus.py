"""Tokenised documents on disk: read by position, written once, split into trained and held-out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.config import DataConfig
from data.files import built_once
from data.shuffle import hash64
from data.sources import HELD_SHARE, Documents, find_files, held_out, score, stdlib_files
from data.tokens import Tokenizer

FORMAT = 1  # raise when what is on disk changes its meaning
CHUNK = 1 << 24  # tokens looked at together


@dataclass(frozen=True)
class Corpus:
    """Documents as ranges of one long line of tokens.

    Attributes:
      shards: files of uint16 or uint32 tokens, mapped, that follow each other.
      starts: first token of each document, int64 [documents].
      lengths: its tokens, the end included, int64 [documents].
      fingerprint: a hash of all tokens and of what is held out.
    """

    shards: tuple[np.ndarray, ...]
    starts: np.ndarray
    lengths: np.ndarray
    fingerprint: str

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
        return Corpus(
            self.shards, self.starts[documents], self.lengths[documents], self.fingerprint
        )


def open_corpus(
    config: DataConfig,
    tokenizer: Tokenizer,
    documents: Documents | None,
    cache: Path,
    vocab_size: int,
) -> tuple[Corpus, Corpus]:
    """The training documents and the held-out ones, tokenised now or earlier.

    Args:
      config: names the source.
      tokenizer: makes the tokens, or made them (source `tokens`).
      documents: goes through the texts; None for source `tokens`.
      cache: folder to keep the tokens in, under a hash of the files' names, sizes and times, the
        tokeniser and the config. One process of several writes, the others wait.
      vocab_size: `config.model.vocab_size`.

    Raises:
      ValueError: no documents, or tokens that do not fit the vocabulary.
    """
    if config.source == "tokens":
        return _open_tokens(config, tokenizer, cache, vocab_size)
    assert documents is not None
    folder = built_once(
        cache / _cache_key(config, tokenizer), lambda new: _write(documents, tokenizer, new, config)
    )
    meta = json.loads((folder / "meta.json").read_text())
    tokens = np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r")
    lengths, held = np.load(folder / "lengths.npy"), np.load(folder / "held.npy")
    corpus = Corpus((tokens,), np.cumsum(lengths) - lengths, lengths, meta["fingerprint"])
    return corpus.choose(~held), corpus.choose(held)


def _cache_key(config: DataConfig, tokenizer: Tokenizer) -> str:
    listing: list = [FORMAT, config.source, config.text_field, tokenizer.fingerprint]
    if config.source == "stdlib":
        listing.append(stdlib_files()[2])
    for key in ("path", "eval_path") if config.source != "stdlib" else ():
        files = find_files(config, key) if getattr(config, key) else []
        stats = [(str(file.resolve()), file.stat()) for file in files]
        listing.append([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:24]


def _write(documents: Documents, tokenizer: Tokenizer, folder: Path, config: DataConfig) -> None:
    dtype = np.dtype("uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32")
    scores, lengths = [], []
    digest = hashlib.blake2b(tokenizer.fingerprint.encode(), digest_size=16)
    with open(folder / "tokens.bin", "wb") as file:
        for batch in _batches(documents, characters=1 << 22):
            scores += [score for score, _ in batch]
            for ids in tokenizer.encode_batch([text for _, text in batch]):
                content = np.append(ids, tokenizer.end_id).astype(dtype).tobytes()
                lengths.append(len(ids) + 1)
                digest.update(content)
                file.write(content)
    if not lengths:
        raise ValueError(
            f"config.data.path = '{config.path}': no document in it; give files that hold text"
        )
    held = held_out(np.asarray(scores, np.uint64))
    digest.update(held.tobytes())
    np.save(folder / "lengths.npy", np.asarray(lengths, np.int64))
    np.save(folder / "held.npy", held)
    meta = {"dtype": dtype.name, "fingerprint": digest.hexdigest()}
    (folder / "meta.json").write_text(json.dumps(meta))


def _batches(documents: Documents, characters: int) -> Iterator[list[tuple[int, str]]]:
    batch, size = [], 0
    for document in documents():
        batch.append(document)
        size += len(document[1])
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _open_tokens(
    config: DataConfig, tokenizer: Tokenizer, cache: Path, vocab_size: int
) -> tuple[Corpus, Corpus]:
    keys = ["path", "eval_path"] if config.eval_path else ["path"]
    files = [(key, file) for key in keys for file in find_files(config, key)]
    shards = [_map_tokens(config, key, file) for key, file in files]
    folders = []
    for (key, file), shard in zip(files, shards, strict=True):
        stat = file.stat()
        name = [FORMAT, str(file.resolve()), stat.st_size, stat.st_mtime_ns]
        name += [config.token_dtype, tokenizer.end_id]
        code = hashlib.sha256(json.dumps(name).encode()).hexdigest()[:24]
        folders.append(built_once(cache / code, _scanner(shard, tokenizer.end_id)))
        largest = json.loads((folders[-1] / "meta.json").read_text())["largest"]
        if largest >= vocab_size:
            raise ValueError(
                f"config.data.{key} = '{getattr(config, key)}': '{file}' holds token {largest}, "
                f"but config.model.vocab_size = {vocab_size}; raise it, or check "
                f"config.data.token_dtype = '{config.token_dtype}' and config.data.tokenizer"
            )
    lengths = [np.load(folder / "lengths.npy") for folder in folders]
    if config.eval_path:
        sides = [
            np.full(len(n), key == "eval_path") for (key, _), n in zip(files, lengths, strict=True)
        ]
        held = np.concatenate(sides)
    else:
        if sum(map(len, lengths)) == 1:  # a lone document is cut in two
            cut = int(lengths[0][0] * (1 - HELD_SHARE))
            lengths = [np.array([cut, lengths[0][0] - cut])]
            held = np.array([False, True])
        else:
            scores = [
                hash64(np.uint64(score(file.name)) ^ np.arange(len(n), dtype=np.uint64))
                for (_, file), n in zip(files, lengths, strict=True)
            ]
            held = held_out(np.concatenate(scores))
    digest = hashlib.blake2b(tokenizer.fingerprint.encode(), digest_size=16)
    for folder in folders:
        digest.update(json.loads((folder / "meta.json").read_text())["digest"].encode())
    digest.update(held.tobytes())
    every = np.concatenate(lengths)
    corpus = Corpus(tuple(shards), np.cumsum(every) - every, every, digest.hexdigest())
    return corpus.choose(~held), corpus.choose(held)


def _map_tokens(config: DataConfig, key: str, file: Path) -> np.ndarray:
    shown = f"config.data.{key} = '{getattr(config, key)}': '{file}'"
    if file.suffix == ".npy":
        try:
            tokens = np.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{shown} is not a whole .npy file ({error})") from None
        if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32):
            raise ValueError(
                f"{shown} holds {tokens.dtype} {list(tokens.shape)}; give uint16 or uint32 of one "
                "dim"
            )
        return tokens
    size, item = file.stat().st_size, np.dtype(config.token_dtype).itemsize
    if size % item:
        raise ValueError(
            f"{shown} has {size} bytes, no multiple of the {item} of config.data.token_dtype = "
            f"'{config.token_dtype}'; give a whole file, or its true dtype"
        )
    return np.memmap(file, dtype=config.token_dtype, mode="r")


def _scanner(shard: np.ndarray, end_id: int) -> Callable[[Path], None]:
    """Finds the documents of a shard: each ends with `end_id`, the last one perhaps without."""

    def scan(folder: Path) -> None:
        ends, largest, digest = [], 0, hashlib.blake2b(digest_size=16)
        for at in range(0, len(shard), CHUNK):
            chunk = np.ascontiguousarray(shard[at : at + CHUNK])
            ends.append(np.flatnonzero(chunk == end_id) + at + 1)
            largest = max(largest, int(chunk.max()))
            digest.update(chunk.tobytes())
        bounds = np.concatenate([[0], *ends, [len(shard)]]).astype(np.int64)
        lengths = np.diff(bounds)
        np.save(folder / "lengths.npy", lengths if lengths[-1] else lengths[:-1])
        meta = {"largest": largest, "digest": digest.hexdigest()}
        (folder / "meta.json").write_text(json.dumps(meta))

    return scan
