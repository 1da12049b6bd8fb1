"""Packing loses no target, mixes no documents and wastes little."""

import numpy as np
import pytest

from data.corpus import Corpus
from data.pack import aranges, best_fit, make_plans, waste

T = 16
END = 1000


def corpus_of(lengths, shards=1):
    """Documents of 0, 1, 2, ... with no token twice, so that a token names its place."""
    lengths = np.asarray(lengths, np.int64)
    starts = np.cumsum(lengths) - lengths
    tokens = np.arange(lengths.sum(), dtype=np.uint32)
    cuts = np.sort(starts[1:])[:: max(1, len(starts) // shards)][: shards - 1]
    return Corpus(tuple(np.split(tokens, cuts)), starts, lengths, "")


def all_rows(plan, corpus):
    return plan.fill(corpus, np.arange(plan.rows))


LENGTHS = np.random.default_rng(0).integers(0, 5 * T, 200)


@pytest.mark.parametrize("packing", ["packed", "none", "buckets"])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_target_once_with_its_input(packing, shards):
    corpus = corpus_of(LENGTHS, shards)
    assert len(corpus.shards) == shards
    buckets = (4, 8, T) if packing == "buckets" else ()
    targets, inputs = [], []
    for plan in make_plans(corpus, T, packing, buckets):
        batch = all_rows(plan, corpus)
        real = batch["segments"] > 0
        targets.append(batch["targets"][real])
        inputs.append(batch["tokens"][real])
        assert not batch["tokens"][~real].any()
        assert not batch["targets"][~real].any()
    targets, inputs = np.concatenate(targets), np.concatenate(inputs)
    # Each token but the first of its document is a target, whose input is the token before it.
    first = set(corpus.starts[corpus.lengths > 0])
    expected = [i for i in range(LENGTHS.sum()) if i not in first]
    assert sorted(targets) == expected
    np.testing.assert_array_equal(inputs, targets - 1)


def test_segments_and_positions_follow_documents():
    corpus = corpus_of(LENGTHS)
    document = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    (plan,) = make_plans(corpus, T, "packed")
    batch = all_rows(plan, corpus)
    for tokens, targets, segments, positions in zip(
        *(batch[name] for name in ("tokens", "targets", "segments", "positions")), strict=True
    ):
        assert 1 in segments
        real = segments[segments > 0]
        np.testing.assert_array_equal(np.unique(real), np.arange(1, real.max() + 1))
        assert (np.diff(real) >= 0).all()
        assert (segments[len(real) :] == 0).all()  # padding only at the end
        for segment in np.unique(real):
            here = segments == segment
            assert len({*document[tokens[here]], *document[targets[here]]}) == 1
            np.testing.assert_array_equal(positions[here], np.arange(here.sum()))
            np.testing.assert_array_equal(np.diff(tokens[here]), 1)


def naive_best_fit(count, length):
    """Best fit, one piece after the other: the free space left in each row."""
    free = []
    for size in sorted(count, reverse=True):
        fits = [i for i, space in enumerate(free) if space >= size]
        if fits:
            free[min(fits, key=lambda i: free[i])] -= size
        else:
            free.append(length - size)
    return sorted(free)


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_equals_the_plain_loop(seed):
    rng = np.random.default_rng(seed)
    length = int(rng.integers(1, 40))
    count = rng.integers(1, length + 1, int(rng.integers(1, 200)))
    row = best_fit(count, length)
    used = np.bincount(row, weights=count).astype(int)
    assert used.min() > 0
    assert sorted(length - used) == naive_best_fit(count, length)


def test_waste_is_little_and_reported_exactly():
    corpus = corpus_of(LENGTHS)
    (packed,) = make_plans(corpus, T, "packed")
    (padded,) = make_plans(corpus, T, "none")
    buckets = make_plans(corpus, T, "buckets", (4, 8, T))
    segments = all_rows(packed, corpus)["segments"]
    assert waste([packed]) == pytest.approx((segments == 0).mean())
    # Lengths are uniform, so that pieces of every size are at hand to fill a row.
    assert waste([packed]) < 0.01
    assert waste([packed]) < waste(buckets) < waste([padded])


def test_no_rows_without_targets():
    (plan,) = make_plans(corpus_of([0, 1, 1]), T, "packed")
    assert plan.rows == 0
    assert make_plans(corpus_of([1]), T, "buckets", (4, T)) == []
    assert aranges(np.array([], np.int64)).size == 0


def test_padding_rows_are_empty():
    corpus = corpus_of(LENGTHS)
    (plan,) = make_plans(corpus, T, "packed")
    batch = plan.fill(corpus, np.array([3, -1, 0, -1]))
    alone = plan.fill(corpus, np.array([3, 0]))
    for name in batch:
        assert not batch[name][[1, 3]].any()
        np.testing.assert_array_equal(batch[name][[0, 2]], alone[name])
