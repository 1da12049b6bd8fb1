"""Rows: which tokens stand where, which are asked for, and into how few shapes they go."""

from __future__ import annotations

import numpy as np
import pytest

from harness.rows import Row, RowShape


def asked(batch, number):
    """(input, target) of every token that is asked for in a row."""
    where = np.flatnonzero(batch["counted"][number])
    return [(int(batch["tokens"][number, t]), int(batch["targets"][number, t])) for t in where]


def test_a_continuation_is_asked_after_its_context():
    shape, row = RowShape(longest=64), Row([1, 2, 3], [4, 5])
    batch = shape.batch([row], (8,), 2)
    assert asked(batch, 0) == [(3, 4), (4, 5)]
    assert batch["tokens"][0].tolist() == [1, 2, 3, 4, 0, 0, 0, 0]
    assert batch["segments"].tolist() == [[1] * 4 + [0] * 4, [0] * 8]
    assert batch["positions"][0].tolist() == [0, 1, 2, 3, 0, 0, 0, 0]
    assert asked(batch, 1) == []
    assert all(array.dtype == np.int32 for array in batch.values())


def test_a_context_is_cut_from_the_left():
    shape = RowShape(longest=4)
    batch = shape.batch([Row([1, 2, 3, 4], [5, 6])], (4,), 1)
    assert batch["tokens"].tolist() == [[2, 3, 4, 5]]
    assert asked(batch, 0) == [(4, 5), (5, 6)]
    # As long as the model: the first input is the last token that is given.
    batch = shape.batch([Row([1, 2], [3, 4, 5, 6])], (4,), 1)
    assert asked(batch, 0) == [(2, 3), (3, 4), (4, 5), (5, 6)]


def test_a_prefix_is_what_is_given():
    batch = RowShape(longest=4, prefix=True).batch(
        [Row([1, 2], [3, 4]), Row([1] * 9, [7])], (4,), 3
    )
    assert batch["prefix"].tolist() == [2, 4, 0]
    assert asked(batch, 0)[0] == (2, 3), "the prefix's last token predicts the first one asked for"


def test_a_source_is_given_apart():
    shape = RowShape(longest=4, sources=True, start_id=9)
    batch = shape.batch([Row([1, 2, 3, 4, 5], [6, 7])], (4, 4), 2)
    assert batch["source_tokens"].tolist() == [[2, 3, 4, 5], [0] * 4]
    assert batch["source_segments"].tolist() == [[1] * 4, [0] * 4]
    assert asked(batch, 0) == [(9, 6), (6, 7)]


@pytest.mark.parametrize("longest", [48, 64, 1000])
def test_lengths_go_into_few_buckets(longest):
    shape = RowShape(longest=longest, multiple=3)
    buckets = {n: shape.sizes(Row([1] * n, [2]))[0] for n in range(1, 2 * longest)}
    assert len(set(buckets.values())) <= np.log2(longest)
    for length, bucket in buckets.items():
        assert min(length, longest) <= bucket < longest + 3
        assert bucket % 3 == 0
