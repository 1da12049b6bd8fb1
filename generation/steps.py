"""The compiled functions of generation: a state in, the same state written in place out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
from jax import Array

from generation.sampling import Sampling, sample
from models.cached_attention import Places, replaced_rows
from models.decode import Cache, DecoderWeights, Decoding

Arrays = dict[str, Array]


class State(NamedTuple):
    """What every call takes and gives back: the cache, and the last token of each of its rows."""

    cache: Cache
    tokens_B: Array


@dataclass(frozen=True)
class Steps:
    """A decoding whose logits become tokens. Each function is to be compiled, its state donated.

    They take arrays of the rows of the call, int32 and divided as the batch is: `start`, the tokens
    that the cache has; `count`, new ones (0: a row that is not in use); `number` and `position`, as
    `generation.sampling.sample` wants them; `row`, where the call has others than the cache's;
    `table`, with a pool; `adapter`, where weights have several. Tokens come out twice: in the
    state, and whole for each process to read.
    """

    decoding: Decoding
    sampling: Sampling

    def empty(self) -> State:
        """The state before all prompts."""
        spec = self.decoding.rules.spec("batch")
        rows = self.decoding.shape.rows
        return State(self.decoding.empty(), jax.numpy.zeros(rows, "int32", out_sharding=spec))

    def step(
        self, weights: DecoderWeights, state: State, key: Array, rows: Arrays
    ) -> tuple[State, Array]:
        """One token more of each row."""
        tokens_BT = jax.numpy.expand_dims(state.tokens_B, 1)
        cache, logits_BV = self._go_on(weights, state, tokens_BT, rows)
        tokens_B = self._drawn(logits_BV, key, rows)
        return State(cache, tokens_B), jax.reshard(tokens_B, jax.P(None))

    def begin(
        self, weights: DecoderWeights, state: State, key: Array, rows: Arrays, batch: Arrays
    ) -> tuple[State, Array]:
        """The first token after prompts: `batch` as `Decoding.begin` wants it."""
        cache, logits_BV = self.decoding.begin(
            weights,
            state.cache,
            batch,
            rows["count"],
            rows["row"],
            rows.get("table"),
            rows.get("adapter"),
        )
        return self._begun(state._replace(cache=cache), logits_BV, key, rows)

    def follow(
        self, weights: DecoderWeights, state: State, key: Array, rows: Arrays, batch: Arrays
    ) -> tuple[State, Array]:
        """The same, of prompts whose beginning is in blocks that they share."""
        cache, logits_BV = self._go_on(weights, state, batch["tokens"], rows)
        return self._begun(state._replace(cache=cache), logits_BV, key, rows)

    def _go_on(
        self, weights: DecoderWeights, state: State, tokens_BT: Array, rows: Arrays
    ) -> tuple[Cache, Array]:
        places = rows["start"], rows["count"], None, rows.get("table"), rows.get("adapter")
        return self.decoding.go_on(weights, state.cache, tokens_BT, *places)

    def _begun(
        self, state: State, logits_BV: Array, key: Array, rows: Arrays
    ) -> tuple[State, Array]:
        new_B = self._drawn(logits_BV, key, rows)
        places = Places(rows["start"], rows["count"], rows["row"])
        tokens_B = replaced_rows(state.tokens_B, new_B, places)
        return state._replace(tokens_B=tokens_B), jax.reshard(new_B, jax.P(None))

    def _drawn(self, logits_BV: Array, key: Array, rows: Arrays) -> Array:
        rules = self.decoding.rules
        return sample(logits_BV, key, rows["number"], rows["position"], self.sampling, rules)
