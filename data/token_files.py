"""Files that hold tokens already: one long line of documents, each with its end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data.config import DataConfig
from data.corpus import Corpus
from data.documents import HELD_SHARE, held_out, score
from data.files import built_once
from data.shuffle import hash64
from data.sources import find_files
from data.tokens import Tokenizer

FORMAT = 1  # raise when what is on disk changes its meaning
CHUNK = 1 << 24  # tokens looked at together


def open_tokens(
    config: DataConfig, tokenizer: Tokenizer, cache: Path, vocab_size: int
) -> tuple[Corpus, Corpus]:
    """The training documents and the held-out ones of source `tokens`.

    Args:
      config: names the files.
      tokenizer: made the tokens.
      cache: folder to keep in where documents begin.
      vocab_size: `config.model.vocab_size`.

    Raises:
      ValueError: a file that is missing or not whole, or tokens that do not fit the vocabulary.
    """
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
