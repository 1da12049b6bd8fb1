"""Generates texts: prompts into free rows, one step for all rows, tokens read a step behind.

A step is dispatched before the tokens of the last one are read, so that the device never waits for
Python. A text that ended meanwhile was asked for one token too many, which is left out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from generation.rows import Request, Row, Rows
from generation.steps import Arrays, Steps
from models.decode import DecoderWeights
from parallel.compilation import many_rows, safe_compilation
from parallel.several import NONE

LEAST = 32  # prompts are padded to so many tokens, or to a power of two above: few programs


class Piece(NamedTuple):
    """More of a text: the characters that are new, and why it has ended, "" if it has not."""

    request: Request
    text: str
    reason: str


class Asked(NamedTuple):
    """The tokens of one call, still on the device, and whose they are."""

    tokens: jax.Array
    places: Sequence[Row | None]


class Engine:
    """Generates texts on the devices of a mesh; make and use it inside `jax.set_mesh`.

    Args:
      steps: not compiled yet.
      weights: of the model.
      mesh: of all devices.
      seed: of what is drawn.
      adapters: the weights have several, and each request one or none.

    Attributes:
      rows: which text is in which row.
    """

    def __init__(
        self,
        steps: Steps,
        weights: DecoderWeights,
        mesh: jax.sharding.Mesh,
        seed: int,
        *,
        adapters: bool = False,
    ) -> None:
        decoding = steps.decoding
        config, self._mesh, self._weights = decoding.config, mesh, weights
        self._rules, self._most = decoding.rules, decoding.shape.slots - config.image_tokens
        self._sources = decoding.shape.source if config.family == "encoder_decoder" else 0
        self._prefix, self._adapters = decoding.prefix, adapters
        # A ring or a source is a row's own, keys and values are an adapter's: who shares blocks
        # would lack it.
        own = "local" in config.pattern or config.cross != "none" or config.image_tokens > 0
        self.rows = Rows(
            decoding.shape,
            self._rules.parts("batch"),
            before=config.image_tokens,
            sharing=not (own or adapters or decoding.prefix),
        )
        safe = safe_compilation()
        prompts = safe | many_rows()
        self._begin = jax.jit(steps.begin, donate_argnums=1, compiler_options=prompts)
        self._follow = jax.jit(steps.follow, donate_argnums=1, compiler_options=prompts)
        self._step = jax.jit(steps.step, donate_argnums=1, compiler_options=safe)
        self._key = jax.random.key(seed)
        self._state = jax.jit(steps.empty)()

    def run(self, requests: Iterable[Request]) -> Iterator[Piece]:
        """The pieces of all texts as they come; those of one text in order."""
        rows, reading = self.rows, deque[Asked]()
        rows.waiting.extend(requests)
        while rows.waiting or reading or any(rows.active()):
            while admitted := rows.admit():
                reading.extend(self._read_prompts(admitted))
            step = self._next()
            if step is not None:
                reading.append(step)
            while len(reading) > (step is not None):
                yield from self._pieces(reading.popleft())

    def _read_prompts(self, admitted: list[Row]) -> Iterator[Asked]:
        """Asks for the first token of rows: those that share blocks by a call of their own."""
        for call, chosen in (
            (self._begin, [row for row in admitted if not row.shared]),
            (self._follow, [row for row in admitted if row.shared]),
        ):
            if not chosen:
                continue
            places = self._places(chosen)
            new = [row.request.tokens[row.shared :] if row else [] for row in places]
            rows = self._arrays(
                places,
                start=lambda row: row.shared,
                count=lambda row: len(row.request.tokens) - row.shared,
            )
            rows["row"] = self._placed([row.index % self._size if row else 0 for row in places])
            batch = self._batch(places, new)
            self._state, tokens = call(self._weights, self._state, self._key, rows, batch)
            for row in chosen:
                self.rows.begun(row)
            yield Asked(tokens, places)

    def _next(self) -> Asked | None:
        """Asks for one token more of every row that wants one."""
        places = self.rows.step()
        if not any(places):
            return None
        rows = self._arrays(places, start=lambda row: row.cached - 1, count=lambda row: 1)
        self._state, tokens = self._step(self._weights, self._state, self._key, rows)
        return Asked(tokens, places)

    def _pieces(self, asked: Asked) -> Iterator[Piece]:
        """Reads the tokens of a call."""
        values = np.asarray(asked.tokens)
        for value, row in zip(values, asked.places, strict=True):
            if row is None or not self.rows.holds(row):
                continue
            text = row.request.text
            piece = text.add(int(value))
            if not text.reason and len(text.tokens) == row.request.most:
                piece += text.finish("length")
            if text.reason:
                self.rows.free(row)
            if piece or text.reason:
                yield Piece(row.request, piece, text.reason)

    # --- Arrays of a call -------------------------------------------------------------------------

    @property
    def _size(self) -> int:
        """Rows of the cache in one part of the batch."""
        return self.rows.shape.rows // self.rows.parts

    def _places(self, chosen: list[Row]) -> list[Row | None]:
        """Rows of a call: as many of each part, a power of two unless it is all."""
        parts = [[r for r in chosen if self.rows.part(r) == p] for p in range(self.rows.parts)]
        size = min(_power_of_two(max(map(len, parts))), self._size)
        return [row for part in parts for row in [*part, *[None] * (size - len(part))]]

    def _arrays(
        self,
        places: Sequence[Row | None],
        *,
        start: Callable[[Row], int],
        count: Callable[[Row], int],
    ) -> Arrays:
        """What `generation.steps.Steps` wants of the rows of a call, but for `row`."""

        def of(value: Callable[[Row], int]) -> list[int]:
            return [0 if row is None else value(row) for row in places]

        arrays = {
            "start": of(start),
            "count": of(count),
            "number": of(lambda row: row.request.number),
            "position": of(lambda row: row.asked - 1),
        }
        if self._adapters:
            chosen = [NONE if row is None else row.request.adapter for row in places]
            arrays["adapter"] = chosen
        placed = {name: self._placed(values) for name, values in arrays.items()}
        if self.rows.pools:
            placed["table"] = self._placed(self.rows.table(places))
        return placed

    def _batch(self, places: Sequence[Row | None], new: list[list[int]]) -> Arrays:
        """Tokens of prompts and what else the model reads of a row."""
        length = min(_power_of_two(max(LEAST, *map(len, new))), self._most)
        batch = {"tokens": _padded(new, length)}
        requests = [None if row is None else row.request for row in places]
        if self._prefix:  # a text that is read again goes on after its prompt
            batch["prefix"] = np.asarray([0 if r is None else len(r.prompt) for r in requests])
        if self._sources:
            sources = [(r.source or []) if r else [] for r in requests]
            lengths = np.asarray([[len(source)] for source in sources])
            index = np.arange(self._sources, dtype=np.int32)[None]
            batch["source_tokens"] = _padded(sources, self._sources)
            batch["source_segments"] = (index < lengths).astype(np.int32)
            batch["source_positions"] = index * batch["source_segments"]
        images = [r.patches for r in requests if r is not None and r.patches is not None]
        if images:
            none = np.zeros_like(images[0])
            given = (None if r is None else r.patches for r in requests)
            batch["patches"] = np.stack([none if patches is None else patches for patches in given])
        return {name: self._placed(array) for name, array in batch.items()}

    def _placed(self, values: Sequence[int] | np.ndarray) -> jax.Array:
        array = np.asarray(values)
        array = array.astype(np.int32) if array.dtype.kind == "i" else array
        spec = jax.P(*self._rules.spec("batch"), *[None] * (array.ndim - 1))
        return jax.device_put(array, NamedSharding(self._mesh, spec))


def _padded(rows: list[list[int]], length: int) -> np.ndarray:
    """int32 [rows, length], 0 after each."""
    array = np.zeros((len(rows), length), np.int32)
    for line, tokens in zip(array, rows, strict=True):
        line[: len(tokens)] = tokens
    return array


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
