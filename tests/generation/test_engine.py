"""Texts from the engine against the model run anew on whole rows for every token."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from dataclasses import replace

import jax
import numpy as np
import pytest

from generation.engine import Engine
from generation.rows import Request
from generation.sampling import Sampling, sample
from generation.steps import Steps
from generation.text import Text
from models.decode import make_decoding, weights_of
from models.kv_cache import CacheShape
from tests.models.test_decode import ALL, LAYOUTS, S, logits_of
from tests.small import initial_params, layout

GREEDY = Sampling()
DRAWN = Sampling(temperature=0.9, top_k=40, top_p=0.95, min_p=0.02)
PROMPTS, MOST = 14, 9  # more prompts than rows
SLOTS, BLOCK, ROWS = 28, 4, 8


def prompts_of(name: str) -> list[Request]:
    """Prompts of 1 to 12 tokens, of which several begin alike, with what else the model reads."""
    rng = np.random.default_rng(3)
    family = ALL[name]
    config, batch = family.config, family.batch(0)
    begin = rng.integers(0, config.vocab_size, 9).tolist()
    requests = []
    for number in range(PROMPTS):
        own = rng.integers(0, config.vocab_size, rng.integers(1, 13)).tolist()
        prompt = begin + own[:3] if number % 3 == 0 else own
        source = patches = None
        if config.family == "encoder_decoder":
            source = rng.integers(0, config.vocab_size, rng.integers(3, S)).tolist()
        if config.family == "vision_language":
            patches = batch["patches"][number % 8]
        text = Text(lambda ids: "".join(f"<{i}>" for i in ids))
        most = int(rng.integers(1, MOST + 1))
        requests.append(Request(number, prompt, text, most, source, patches))
    return requests


@contextmanager
def engine_of(name, sizes, sampling=GREEDY, *, paged=False, int8=False, blocks=0):
    """An engine of a family's model on a layout, its texts not begun."""
    family = ALL[name]
    config = family.config
    with layout(config=config, objective=family.objective, **sizes) as laid:
        rules = laid.model.rules
        parts = rules.parts("batch")
        slots = SLOTS + config.image_tokens
        source = S if config.family == "encoder_decoder" else config.vision.patches
        all_blocks = ROWS // parts * -(-slots // BLOCK)
        shape = CacheShape(
            ROWS,
            slots,
            int8=int8,
            block=BLOCK if paged else 0,
            blocks=(blocks or all_blocks) if paged else 0,
            source=source if config.cross != "none" else 0,
        )
        prefix = family.objective.name == "prefix_lm"
        decoding = make_decoding(config, rules, shape, "float32", prefix=prefix)
        params = laid.params(initial_params(config, family.objective))
        weights = weights_of(params, laid.model.axes, rules, "float32")
        yield Engine(Steps(decoding, sampling), weights, laid.mesh, seed=5)


def texts(engine: Engine, requests: list[Request]) -> list[list[int]]:
    pieces = [""] * len(requests)
    for request, text, _ in engine.run(requests):
        pieces[request.number] += text
    assert pieces == [str(request.text) for request in requests]
    assert [request.text.reason for request in requests] == ["length"] * len(requests)
    assert [len(request.text.tokens) for request in requests] == [r.most for r in requests]
    return [request.text.tokens for request in requests]


@functools.cache
def want(name: str, sampling: Sampling) -> list[list[int]]:
    """The same, each token by the whole row anew."""
    family = ALL[name]
    config = replace(family.config, experts=replace(family.config.experts, capacity=0.0))
    requests = prompts_of(name)
    found: list[list[int]] = [[] for _ in requests]
    with layout(config=config, objective=family.objective) as laid:
        rules = laid.model.rules
        logits = logits_of(config, rules)
        params = laid.params(initial_params(config, family.objective))
        draw = jax.jit(lambda *args: sample(*args, sampling, rules))
        for first in range(0, PROMPTS, ROWS):
            chosen = (requests[first:] + requests[:2])[:ROWS]
            for step in range(MOST):
                rows = [r.prompt + found[r.number][:step] for r in chosen]
                count = np.asarray([len(row) for row in rows])
                batch = whole_rows(family, chosen, rows)
                out = np.asarray(logits(params, laid.placed(batch)))
                last = out[np.arange(ROWS), count - 1]
                last[:, config.vocab_size :] = -np.inf
                number = np.asarray([r.number for r in chosen], np.int32)
                at = np.full(ROWS, step, np.int32)
                placed = laid.placed({"number": number, "at": at, "logits": last})
                key = jax.random.key(5)
                drawn = np.asarray(draw(placed["logits"], key, placed["number"], placed["at"]))
                for request, token in zip(chosen, drawn, strict=True):
                    if len(found[request.number]) == step < request.most:
                        found[request.number].append(int(token))
    return found


def whole_rows(family, chosen, rows) -> dict[str, np.ndarray]:
    index = np.broadcast_to(np.arange(SLOTS, dtype=np.int32), (ROWS, SLOTS)).copy()
    tokens = np.zeros((ROWS, SLOTS), np.int32)
    for line, row in zip(tokens, rows, strict=True):
        line[: len(row)] = row
    count = np.asarray([[len(row)] for row in rows])
    batch = {"tokens": tokens, "positions": index, "segments": (index < count).astype(np.int32)}
    if family.objective.name == "prefix_lm":
        batch["prefix"] = np.asarray([len(r.prompt) for r in chosen], np.int32)
    if family.config.family == "encoder_decoder":
        index = np.broadcast_to(np.arange(S, dtype=np.int32), (ROWS, S)).copy()
        batch["source_tokens"] = np.zeros((ROWS, S), np.int32)
        for line, request in zip(batch["source_tokens"], chosen, strict=True):
            line[: len(request.source)] = request.source
        lengths = np.asarray([[len(r.source)] for r in chosen])
        batch |= {"source_positions": index, "source_segments": (index < lengths).astype(np.int32)}
    if family.config.family == "vision_language":
        batch["patches"] = np.stack([r.patches for r in chosen])
    return batch


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("decoder", "contiguous"),
        ("decoder", "paged"),
        ("windows", "contiguous"),
        ("windows", "paged"),
        *(
            pytest.param(name, kind, marks=pytest.mark.slow)
            for name in ("t5", "captioning", "captioning, gated", "prefix", "experts")
            for kind in ("contiguous", "paged")
        ),
    ],
)
def test_texts_are_those_of_whole_rows(name, kind):
    with engine_of(name, {}, paged=kind == "paged") as engine:
        assert texts(engine, prompts_of(name)) == want(name, GREEDY)
        check_all_free(engine)


def check_all_free(engine):
    assert not any(engine.rows.rows)
    assert all(pool.used == 0 for pool in engine.rows.pools)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("kind", ["contiguous", "paged"])
@pytest.mark.parametrize("sizes", LAYOUTS)
def test_every_layout_gives_the_same_texts(sizes, kind, sampling):
    with engine_of("decoder", LAYOUTS[sizes], sampling, paged=kind == "paged") as engine:
        assert texts(engine, prompts_of("decoder")) == want("decoder", sampling)


@pytest.mark.parametrize(
    "name", ["decoder", *(pytest.param(n, marks=pytest.mark.slow) for n in ("prefix", "windows"))]
)
def test_a_small_pool_makes_texts_wait_and_changes_none(name):
    """Room for one text and a half: the youngest gives way and is read again."""
    with engine_of(name, {}, DRAWN, paged=True, blocks=9) as engine:
        assert texts(engine, prompts_of(name)) == want(name, DRAWN)
        assert engine.rows.gave_way > 0
        assert engine.rows.most_used <= 9
        check_all_free(engine)


def test_rows_that_begin_alike_share_blocks():
    with engine_of("decoder", {}, paged=True) as engine:
        shared = 0
        for _ in engine.run(prompts_of("decoder")):
            shared = max(shared, sum(row.shared for row in engine.rows.active()))
        assert shared >= 2 * BLOCK
