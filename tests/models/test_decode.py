"""Decoding with a cache against the model on whole rows: the same logits, whatever the cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.config import ModelConfig
from models.decode import Decoding, kind_of, make_decoding, weights_of
from models.kv_cache import CacheShape
from parallel.remat import RematConfig
from parallel.rules import Rules
from tests.families import FAMILIES, Family, S
from tests.small import B, initial_params, layout

T, NEW = 6, 7  # prompts of up to T tokens; NEW more, one after the other
SLOTS, BLOCK = 16, 4
# Sums in another order, of float32.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

GENERATING = {
    name: replace(family, config=replace(family.config, dropout=0.0))
    for name, family in FAMILIES.items()
    if family.config.family in ("decoder", "encoder_decoder", "vision_language")
}
LOCAL = Family(
    replace(GENERATING["decoder"].config, window=5, pattern=("local", "global"), layers=5)
)
CAPPED = Family(
    replace(
        GENERATING["decoder"].config, attention_softcap=5.0, logit_softcap=3.0, positions="learned",
        tied=False, max_length=40,
    )
)  # fmt: skip
VIRTUAL = replace(LOCAL, config=replace(LOCAL.config, prefix_length=3, layers=2))
ALL = GENERATING | {"windows": LOCAL, "capped": CAPPED, "virtual": VIRTUAL}
LAYOUTS = {
    "one": {},
    "tensor 4 x data 2": {"tensor": 4, "data": 2},
    "fsdp 8": {"fsdp": 8, "zero": 3},
}


def prompts(family: Family) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Rows of T + NEW tokens, what else the model reads of each, and the prompts' lengths."""
    rng = np.random.default_rng(1)
    batch = family.batch(0)
    kept = {
        name: array
        for name, array in batch.items()
        if name.startswith("source_") or name == "patches"
    }
    if "source_segments" in kept:  # one source a row
        kept["source_segments"] = (kept["source_segments"] > 0).astype(np.int32)
        kept["source_positions"] = np.broadcast_to(np.arange(S, dtype=np.int32), (B, S)).copy()
    tokens = rng.integers(0, family.config.vocab_size, (B, T + NEW)).astype(np.int32)
    return kept | {"tokens": tokens}, rng.integers(1, T + 1, B).astype(np.int32)


def logits_of(config: ModelConfig, rules: Rules) -> Callable[[Any, Any], jax.Array]:
    """(parameters, batch) -> the logits of whole rows [B, T, V padded], without a cache."""
    kind = kind_of(config)
    graph = nnx.graphdef(nnx.eval_shape(lambda: kind(config, rules, RematConfig(), nnx.Rngs(0))))

    @jax.jit
    def logits(params: Any, batch: Any) -> jax.Array:
        model = nnx.merge(graph, params)
        head, features = model.head(), model.to_head(model(batch))
        table = head.weight if head.axes.startswith("vocab") else head.weight.T
        found = jnp.einsum("btd,vd->btv", features, table, precision="highest")
        cap = config.logit_softcap
        return cap * jnp.tanh(found / cap) if cap else found

    return logits


@functools.cache
def uncached(name: str) -> np.ndarray:
    """Logits of the token after each of the last NEW + 1 of every row, [B, NEW + 1, V]."""
    family = ALL[name]
    batch, count = prompts(family)
    index = np.broadcast_to(np.arange(T + NEW, dtype=np.int32), (B, T + NEW)).copy()
    segments = (index < (count + NEW)[:, None]).astype(np.int32)
    batch = batch | {"positions": index, "segments": segments}
    if family.objective.name == "prefix_lm":
        batch["prefix"] = count
    # No token is dropped where text is generated.
    config = replace(family.config, experts=replace(family.config.experts, capacity=0.0))
    with layout(config=config, objective=family.objective) as laid:
        params = initial_params(config, family.objective)
        logits = logits_of(config, laid.model.rules)
        found = np.asarray(logits(laid.params(params), laid.placed(batch)))
    at = count[:, None] - 1 + np.arange(NEW + 1)[None]
    return np.take_along_axis(found, at[:, :, None], 1)[:, :, : config.vocab_size]


def shape_of(family: Family, parts: int, *, paged: bool = False, int8: bool = False) -> CacheShape:
    config = family.config
    slots = SLOTS + config.image_tokens
    row_blocks = -(-slots // BLOCK)
    source = S if config.family == "encoder_decoder" else config.vision.patches
    return CacheShape(
        rows=B,
        slots=slots,
        int8=int8,
        block=BLOCK if paged else 0,
        blocks=B // parts * row_blocks if paged else 0,
        source=source if config.cross != "none" else 0,
    )


def tables(shape: CacheShape, parts: int) -> np.ndarray:
    """Blocks of each row in an order that is none."""
    rng = np.random.default_rng(2)
    return np.concatenate(
        [rng.permutation(shape.blocks).reshape(B // parts, -1) for _ in range(parts)]
    ).astype(np.int32)


def decoded(name: str, sizes: dict[str, int], **kind: bool) -> tuple[np.ndarray, Decoding]:
    """The same logits from a cache, which rows begin in two calls, and go on one by one."""
    family = ALL[name]
    batch, count = prompts(family)
    config = family.config
    with layout(config=config, objective=family.objective, **sizes) as laid:
        rules = laid.model.rules
        parts = rules.parts("batch")
        shape = shape_of(family, parts, **kind)
        prefix = family.objective.name == "prefix_lm"
        decoding = make_decoding(config, rules, shape, "float32", prefix=prefix)
        params = laid.params(initial_params(config, family.objective))
        weights = weights_of(params, laid.model.axes, rules, "float32")
        cache = jax.jit(decoding.empty)()
        table = None
        if shape.block:
            table = laid.placed({"table": tables(shape, parts)})["table"]
        begin = jax.jit(decoding.begin, donate_argnums=1)
        given = {n: a[:, :T] if n == "tokens" else a for n, a in batch.items()}
        # Every other row of each part first, the rest beside rows that have begun.
        even = (np.arange(B) % 2 == 0).astype(np.int32)
        found = np.zeros((B, NEW + 1, config.padded_vocab), np.float32)
        for chosen in (even, 1 - even):
            placed = laid.placed({**given, "count": count * chosen})
            cache, logits = begin(weights, cache, placed, placed.pop("count"), None, table)
            found[:, 0] = np.where(chosen[:, None], np.asarray(logits), found[:, 0])
        go_on = jax.jit(decoding.go_on, donate_argnums=1)
        ones = np.ones(B, np.int32)
        for i in range(NEW):
            at = count + i
            tokens = np.take_along_axis(batch["tokens"], at[:, None], 1)
            start = at + config.image_tokens
            new = laid.placed({"tokens": tokens, "start": start, "count": ones})
            cache, logits = go_on(
                weights, cache, new["tokens"], new["start"], new["count"], None, table
            )
            found[:, i + 1] = np.asarray(logits)
    assert np.all(np.isneginf(found[:, :, config.vocab_size :]))
    return found[:, :, : config.vocab_size], decoding


@pytest.mark.parametrize("name", ALL)
def test_a_cache_gives_the_logits_of_whole_rows(name):
    np.testing.assert_allclose(decoded(name, {})[0], uncached(name), **CLOSE)


@pytest.mark.parametrize("name", ALL)
def test_blocks_of_a_pool_give_the_same(name):
    np.testing.assert_allclose(decoded(name, {}, paged=True)[0], uncached(name), **CLOSE)


CASES = [(n, s, p) for n in ALL for s in ["tensor 4 x data 2", "fsdp 8"] for p in (False, True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes", "paged"),
    [case for case in CASES if case[0] != "virtual" or case[1:] == ("tensor 4 x data 2", True)],
)
def test_every_layout_gives_the_same(name, sizes, paged):
    found, _ = decoded(name, LAYOUTS[sizes], paged=paged)
    np.testing.assert_allclose(found, uncached(name), **CLOSE)
