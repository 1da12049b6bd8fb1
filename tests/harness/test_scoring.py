"""Scores of rows are those of all logits in float64, whatever the family and the layout."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data.objective import ObjectiveConfig
from harness.rows import Row, RowShape
from harness.scoring import Scorer
from models.decoder import Decoder
from models.encoder_decoder import EncoderDecoder
from parallel.precision import PrecisionConfig
from parallel.remat import RematConfig
from tests.small import CAUSAL_LM, DECODER, MIXTURE, initial_params, layout

LONGEST = 32
CONFIGS = {
    # Padded vocabulary, fewer K/V heads, capped logits, dropout that must not be there.
    "rope": replace(DECODER, logit_softcap=5.0, max_length=LONGEST),
    "learned": replace(DECODER, positions="learned", max_length=LONGEST, tied=False),
    "relative": replace(DECODER, positions="relative", max_length=LONGEST),
    "experts": replace(MIXTURE, max_length=LONGEST),
    "prefix": replace(DECODER, max_length=LONGEST),
    "encoder-decoder": replace(
        DECODER, family="encoder_decoder", encoder_layers=2, cross="plain", max_length=LONGEST
    ),
}
LAYOUTS = {
    "one device": {},
    "tensor 4 x data 2": {"tensor": 4, "data": 2},
    "fsdp 8, zero 2": {"fsdp": 8, "zero": 2},
    "pipe 3 x tensor 2, sequence": {"pipe": 3, "tensor": 2, "sequence": True, "zero": 3},
}
# Every family on the layout with most that can go wrong; one of them on all.
CASES = {(name, "tensor 4 x data 2"): None for name in CONFIGS}
CASES |= {("rope", name): None for name in LAYOUTS}
OBJECTIVES = {
    "prefix": ObjectiveConfig("prefix_lm"),
    "encoder-decoder": ObjectiveConfig("seq2seq"),
}
# Float32 against float64: sums of up to 30 terms of about 6.
CLOSE = {"rtol": 2e-6, "atol": 5e-5}


def shape_of(name: str) -> RowShape:
    sources = CONFIGS[name].family == "encoder_decoder"
    return RowShape(LONGEST, sources=sources, start_id=7, prefix=name == "prefix", multiple=2)


def one_row(name: str, row: Row) -> tuple[dict[str, np.ndarray], int]:
    """The arrays of a row by itself, and the place of the first token that it asks for.

    What stands behind a row is not padding here: no token sees what comes after it.
    """
    index = np.arange(LONGEST, dtype=np.int32)[None]
    sources = shape_of(name).sources
    given, wanted = list(row.given), list(row.wanted)
    inputs = [7, *wanted[:-1]] if sources else (given + wanted)[:-1][-LONGEST:]
    whole = lambda ids: np.array([ids + [1] * (LONGEST - len(ids))], np.int32)
    batch = {"tokens": whole(inputs), "segments": index * 0 + 1, "positions": index}
    first = len(inputs) - len(wanted)
    if name == "prefix":
        batch["prefix"] = np.array([first + 1], np.int32)
    if sources:
        source = given[-LONGEST:]
        batch["source_tokens"], batch["source_positions"] = whole(source), index
        batch["source_segments"] = (index < len(source)).astype(np.int32)
    return batch, first


@functools.cache
def oracle(name: str) -> tuple[list[Row], list[float], list[bool]]:
    """Rows, the log-probability of what each asks for, and whether all of it is most likely.

    By a softmax of all logits of one row at a time, in NumPy and float64.
    """
    config, rng = CONFIGS[name], np.random.default_rng(0)
    lengths = [(1, 1), (5, 3), (40, 6), (2, 30), (31, 1), (9, 9), (100, 1), (3, 2), (12, 20)]
    draw = lambda n: rng.integers(0, config.vocab_size, n).tolist()
    rows = [Row(draw(given), draw(wanted)) for given, wanted in lengths]
    kind = EncoderDecoder if shape_of(name).sources else Decoder
    objective = OBJECTIVES.get(name, CAUSAL_LM)
    params = initial_params(config, objective)

    with layout(config=config, objective=objective) as laid:
        build = lambda: kind(config, laid.model.rules, RematConfig(), nnx.Rngs(params=0))
        graph, _ = nnx.split(nnx.eval_shape(build))

        @jax.jit
        def run(batch):
            model = nnx.merge(graph, params)
            head = model.head()
            table = head.weight if head.axes.startswith("vocab") else head.weight.T
            return model.to_head(model(batch)), table

        def log_probs(row: Row) -> np.ndarray:
            """Of every token at every place that is asked for, [wanted, vocabulary]."""
            batch, first = one_row(name, row)
            features, table = run({key: jnp.asarray(a) for key, a in batch.items()})
            features = np.asarray(features, np.float64)[0, first : first + len(row.wanted)]
            logits = (features @ np.asarray(table, np.float64).T)[:, : config.vocab_size]
            if config.logit_softcap:
                logits = config.logit_softcap * np.tanh(logits / config.logit_softcap)
            top = logits.max(axis=1, keepdims=True)
            return logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))

        # Some that greedy decoding gives: a token at a time.
        for given in (4, 20):
            row = Row(draw(given), [0])
            for _ in range(3):
                best = int(log_probs(row)[-1].argmax())
                row = Row(row.given, [*row.wanted[:-1], best, 0])
            rows += [Row(row.given, row.wanted[:-1]), row]

        totals, greedy = [], []
        for row in rows:
            found = log_probs(row)
            totals.append(float(found[np.arange(len(row.wanted)), row.wanted].sum()))
            greedy.append(bool((found.argmax(axis=1) == row.wanted).all()))
    assert 2 <= sum(greedy) < len(rows)
    return rows, totals, greedy


@pytest.mark.slow
@pytest.mark.parametrize(("name", "where"), CASES)
def test_scores_are_those_of_all_logits(name, where):
    rows, totals, greedy = oracle(name)
    config, objective = CONFIGS[name], OBJECTIVES.get(name, CAUSAL_LM)
    with layout(config=config, objective=objective, source_length=16, **LAYOUTS[where]) as laid:
        params = laid.params(initial_params(config, objective))
        scorer = Scorer(
            laid.model, params, PrecisionConfig(), laid.mesh, shape_of(name), tokens=4 * LONGEST
        )
        batches = list(scorer(rows))
        assert scorer.batches == len(batches) > 1
        assert scorer._step._cache_size() == 1
    found = sorted(one for batch in batches for one in batch)
    assert [one.number for one in found] == list(range(len(rows))), "each row once"
    np.testing.assert_allclose([one.log_prob for one in found], totals, **CLOSE)
    assert [one.greedy for one in found] == greedy
    assert all(isinstance(one.log_prob, float) and isinstance(one.greedy, bool) for one in found)
