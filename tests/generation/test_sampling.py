"""What tokens are drawn from and how often, against NumPy and `transformers`; the same anywhere."""

from __future__ import annotations

import importlib.util
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

from generation.sampling import Sampling, sample
from tests.small import B, layout

V = 50
ROWS = 64
SAMPLINGS = {
    "temperature": Sampling(0.7),
    "hot": Sampling(1.9),
    "top k": Sampling(1.0, top_k=5),
    "the likeliest, by top k": Sampling(1.0, top_k=1),
    "top k of all and more": Sampling(1.0, top_k=V + 7),
    "top p": Sampling(1.0, top_p=0.9),
    "the likeliest, by top p": Sampling(1.0, top_p=1e-6),
    "min p": Sampling(1.0, min_p=0.05),
    "the likeliest, by min p": Sampling(1.0, min_p=1.0),
    "top k, then top p": Sampling(1.3, top_k=20, top_p=0.8),
    "top p, then min p": Sampling(1.7, top_p=0.95, min_p=0.1),
    "all": Sampling(0.8, top_k=30, top_p=0.92, min_p=0.02),
}
# Probabilities of float32 sums beside float64 ones; nearer than that to a bound of top p or min p
# rounding would say which side a token is on.
CLOSE = 1e-5


def logits_of(seed: int = 1, rows: int = ROWS) -> np.ndarray:
    return (3 * np.random.default_rng(seed).standard_normal((rows, V))).astype(np.float32)


def softmax(x_BV: np.ndarray) -> np.ndarray:
    e_BV = np.exp(x_BV - x_BV.max(1, keepdims=True))
    return e_BV / e_BV.sum(1, keepdims=True)


def oracle(logits_BV: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities of what is drawn, float64, token by token in order of likelihood."""
    found = np.zeros(logits_BV.shape)
    for p_V, out_V in zip(
        softmax(logits_BV.astype(float) / sampling.temperature), found, strict=True
    ):
        order = np.argsort(-p_V)
        order = order[: sampling.top_k or V]
        p = p_V[order] / p_V[order].sum()
        if sampling.top_p < 1:
            before = np.concatenate([[0.0], np.cumsum(p)[:-1]])
            assert np.abs(before[1:] - sampling.top_p).min() > CLOSE, "choose another seed"
            p = p[before < sampling.top_p]
        bound = sampling.min_p * p[0]
        assert np.abs(p[1:] - bound).min(initial=1) > CLOSE * bound, "choose another seed"
        p = p[p >= bound]
        out_V[order[: len(p)]] = p / p.sum()
    return found


def kept(logits_BV: np.ndarray, sampling: Sampling) -> np.ndarray:
    return np.asarray(jax.jit(sampling.kept)(jnp.asarray(logits_BV)))


@pytest.mark.parametrize("name", SAMPLINGS)
def test_tokens_and_probabilities_are_those_of_numpy(name):
    logits_BV = logits_of()
    got, want = kept(logits_BV, SAMPLINGS[name]), oracle(logits_BV, SAMPLINGS[name])
    np.testing.assert_array_equal(np.isfinite(got), want > 0)
    np.testing.assert_allclose(softmax(got), want, rtol=CLOSE, atol=0)
    if name.startswith("the likeliest"):
        np.testing.assert_array_equal(np.isfinite(got).sum(1), 1)


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "transformers")),
    reason="the extra parity",
)
@pytest.mark.filterwarnings("default")  # theirs are not ours to mend
@pytest.mark.parametrize("name", SAMPLINGS)
def test_tokens_and_probabilities_are_those_of_transformers(name):
    import torch
    import transformers

    sampling, logits_BV = SAMPLINGS[name], logits_of()
    theirs = transformers.LogitsProcessorList(
        [transformers.TemperatureLogitsWarper(sampling.temperature)]
    )
    if sampling.top_k:
        theirs.append(transformers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        theirs.append(transformers.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        theirs.append(transformers.MinPLogitsWarper(sampling.min_p))
    want = theirs(None, torch.from_numpy(logits_BV.copy())).numpy()
    got = kept(logits_BV, sampling)
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
    np.testing.assert_allclose(softmax(got), softmax(want), rtol=CLOSE, atol=0)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_padding_of_the_vocabulary_is_never_kept(name):
    logits_BV = logits_of()
    padded_BV = np.pad(logits_BV, ((0, 0), (0, 14)), constant_values=-np.inf)
    got = kept(padded_BV, SAMPLINGS[name])
    assert np.all(np.isneginf(got[:, V:]))
    np.testing.assert_array_equal(np.isfinite(got[:, :V]), oracle(logits_BV, SAMPLINGS[name]) > 0)


@pytest.mark.parametrize("how", [{"top_k": 2}, {"top_p": 0.5}, {"min_p": 1.0}], ids=str)
def test_of_tokens_as_likely_none_is_left_out(how):
    logits_BV = np.asarray([[0.0, 2.0, -1.0, 2.0, 2.0, 1.0]], np.float32)
    got = kept(logits_BV, Sampling(1.0, **how))
    assert np.flatnonzero(np.isfinite(got[0])).tolist() == [1, 3, 4]


# --- What is drawn --------------------------------------------------------------------------------

DRAWS = 20_000
UNLIKELY = 1e-6  # a right sampler fails once in so many seeds; the seed here is fixed


@contextmanager
def drawing(sampling: Sampling, **sizes: int):
    """(logits, number, position) -> tokens, on a mesh."""
    with layout(**sizes) as laid:
        key, rules = jax.random.key(7), laid.model.rules
        draw = jax.jit(lambda logits, n, at: sample(logits, key, n, at, sampling, rules))

        def drawn(logits_BV: np.ndarray, number_B: np.ndarray, position_B: np.ndarray):
            arrays = {"logits": logits_BV, "number": number_B, "position": position_B}
            arrays |= {name: arrays[name].astype(np.int32) for name in ("number", "position")}
            placed = laid.placed(arrays)
            return np.asarray(draw(placed["logits"], placed["number"], placed["position"]))

        yield drawn


def check_frequencies(counts: np.ndarray, p: np.ndarray) -> None:
    """Pearson's chi-square of counts that have these probabilities, those of few put together."""
    order = np.argsort(p)
    rare = order[np.cumsum(p[order]) * counts.sum() < 10]
    many = np.setdiff1d(np.arange(len(p)), rare)
    assert counts[p == 0].sum() == 0
    got = np.append(counts[many], counts[rare].sum())
    want = np.append(p[many], p[rare].sum()) * counts.sum()
    got, want = got[want > 0], want[want > 0]
    statistic = float(((got - want) ** 2 / want).sum())
    assert statistic < chi2.isf(UNLIKELY, len(want) - 1), (statistic, len(want))


@pytest.mark.parametrize("name", ["temperature", "all"])
@pytest.mark.parametrize("over", ["numbers", "positions"])
def test_tokens_are_drawn_as_often_as_they_are_likely(name, over):
    index, zero = np.arange(DRAWS), np.zeros(DRAWS, int)
    number, position = (index, zero) if over == "numbers" else (zero, index)
    logits_V = logits_of(rows=1)
    with drawing(SAMPLINGS[name]) as drawn:
        tokens = drawn(np.repeat(logits_V, DRAWS, 0), number, position)
    check_frequencies(np.bincount(tokens, minlength=V), oracle(logits_V, SAMPLINGS[name])[0])


@pytest.mark.parametrize("pair", ["positions in a row", "numbers in a row", "swapped"])
def test_draws_are_independent(pair):
    """Of two tokens of a text, of two texts, and of text i's token j and text j's token i."""
    logits_V = logits_of(rows=1)
    p = oracle(logits_V, Sampling(1.0, top_k=4))[0]
    i, j = np.divmod(np.arange(DRAWS), 200) + np.asarray([[0], [1000]])
    other = {"positions in a row": (i, j + 1), "numbers in a row": (i + 1, j), "swapped": (j, i)}
    with drawing(Sampling(1.0, top_k=4)) as drawn:
        repeated = np.repeat(logits_V, DRAWS, 0)
        first, second = drawn(repeated, i, j), drawn(repeated, *other[pair])
    counts = np.bincount(first * V + second, minlength=V * V)
    if pair != "swapped":  # pairs overlap: every other one is independent of the rest
        even = (j if pair == "positions in a row" else i) % 2 == 0
        counts = np.bincount((first * V + second)[even], minlength=V * V)
    check_frequencies(counts, np.outer(p, p).ravel())


MESHES = {"tensor 4 x data 2": {"tensor": 4, "data": 2}, "fsdp 8": {"fsdp": 8}}


@pytest.mark.parametrize("name", ["temperature", "all"])
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_and_order_of_rows_draws_the_same(mesh, name):
    rng = np.random.default_rng(1)
    logits_BV = logits_of(rows=B)
    number_B, position_B = rng.permutation(100)[:B], rng.integers(0, 50, B)
    with drawing(SAMPLINGS[name]) as drawn:
        want = drawn(logits_BV, number_B, position_B)
        again = drawn(logits_BV, number_B, position_B + 1)
    assert np.any(want != again)
    with drawing(SAMPLINGS[name], **MESHES[mesh]) as drawn:
        for order in (np.arange(B), rng.permutation(B)):
            got = drawn(logits_BV[order], number_B[order], position_B[order])
            np.testing.assert_array_equal(got, want[order])
        # Beside other rows.
        beside = np.where(np.arange(B) % 2, np.arange(B)[::-1], 3)
        got = drawn(logits_BV[beside], number_B[beside], position_B[beside])
        np.testing.assert_array_equal(got, want[beside])


def test_without_temperature_the_likeliest_is_taken_whatever_the_seed():
    logits_BV = logits_of(rows=B)
    logits_BV[0, [3, 9]] = 100.0  # as likely: the first of them
    with drawing(Sampling(0.0)) as drawn:
        got = drawn(logits_BV, np.arange(B), np.arange(B))
    np.testing.assert_array_equal(got, logits_BV.argmax(1))
