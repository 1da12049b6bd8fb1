"""Masks against a definition written as plain loops."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from models.blocked_attention import block_pairs
from models.masks import Mask, MaskArrays, key_range, visible

MASKS = [
    Mask(causal=causal, window=window, prefix=prefix, segments=segments)
    for causal, window, prefix, segments in itertools.product(
        (True, False), (None, 1, 3), (True, False), (True, False)
    )
    if causal or not prefix
]
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 3, 0, 0], [1] * 10], np.int32)
PREFIX = np.array([5, 0], np.int32)


def by_definition(mask: Mask, row: int, q: int, k: int) -> bool:
    """Whether query q of a row sees key k, case by case."""
    if mask.segments:
        if SEGMENTS[row, q] == 0 or SEGMENTS[row, k] == 0:
            return False
        if SEGMENTS[row, q] != SEGMENTS[row, k]:
            return False
    if mask.window is not None and (k <= q - mask.window or k >= q + mask.window):
        return False
    if not mask.causal:
        return True
    return k <= q or (mask.prefix and k < PREFIX[row])


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_visible_is_the_definition_on_any_block(mask):
    q_index, k_index = np.arange(2, 10), np.arange(1, 8)
    arrays = MaskArrays(
        jnp.asarray(SEGMENTS[:, q_index]), jnp.asarray(SEGMENTS[:, k_index]), jnp.asarray(PREFIX)
    )
    seen = np.asarray(visible(mask, jnp.asarray(q_index), jnp.asarray(k_index), arrays))
    want = [
        [[[by_definition(mask, row, q, k) for k in k_index] for q in q_index]] for row in range(2)
    ]
    assert seen.shape == (2 if mask.prefix or mask.segments else 1, 1, 8, 7)
    np.testing.assert_array_equal(np.broadcast_to(seen, (2, 1, 8, 7)), want)
    assert mask.sees_all == (mask == Mask(causal=False))


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(("q_start", "q_stop"), [(0, 3), (3, 7), (7, 10)])
def test_key_range_is_exact_where_one_row_is_one_document(mask, q_start, q_stop):
    """Row 1 is one document without prefix: the range is as narrow as it can be without data."""
    columns = [
        k for k in range(10) if any(by_definition(mask, 1, q, k) for q in range(q_start, q_stop))
    ]
    start, stop = key_range(mask, q_start, q_stop, 10)
    if mask.prefix:  # the prefix is data: it may reach to the end
        assert start <= columns[0]
        assert stop == min(10, 10 if mask.window is None else q_stop - 1 + mask.window)
    else:
        assert (start, stop) == (columns[0], columns[-1] + 1)


def test_block_pairs_skip_what_is_hidden():
    triangle = [(i, j) for i in range(4) for j in range(i + 1)]
    assert [tuple(p) for p in block_pairs(Mask(), 16, 16, 4)] == triangle
    assert len(block_pairs(Mask(causal=False), 16, 16, 4)) == 16
    assert len(block_pairs(Mask(prefix=True), 16, 16, 4)) == 16
    # A window of 5 reaches the block before: 4 back from a block's first query.
    assert [tuple(p) for p in block_pairs(Mask(window=5), 16, 16, 4)] == [
        (0, 0), (1, 0), (1, 1), (2, 1), (2, 2), (3, 2), (3, 3)
    ]  # fmt: skip
    assert [tuple(p) for p in block_pairs(Mask(window=1), 16, 16, 4)] == [(i, i) for i in range(4)]
    # More queries than keys, lengths that are not multiples of the block.
    assert [tuple(p) for p in block_pairs(Mask(), 10, 5, 4)] == [
        (0, 0),
        (1, 0),
        (1, 1),
        (2, 0),
        (2, 1),
    ]


def test_a_prefix_without_causality_is_refused():
    with pytest.raises(AssertionError):
        Mask(causal=False, prefix=True)
