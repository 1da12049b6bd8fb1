"""Shuffles are permutations, differ by key, and stay what they are."""

import numpy as np
import pytest

from data.shuffle import shuffled


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_is_a_permutation(size):
    for seed in range(5):
        np.testing.assert_array_equal(
            np.sort(shuffled(np.arange(size), size, seed, 3)), np.arange(size)
        )


def test_one_index_alone_gives_what_all_together_give():
    together = shuffled(np.arange(100), 100, 1, np.arange(100) % 7)
    for i in range(100):
        assert shuffled(np.array([i]), 100, 1, i % 7)[0] == together[i]


def test_keys_make_different_orders():
    orders = [shuffled(np.arange(1000), 1000, *key) for key in ((0, 1), (1, 0), (0, 0), (0, 1, 0))]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            # Two random orders of n agree in one place on average; 20 is beyond chance.
            assert (one == other).sum() < 20


def test_is_spread_evenly():
    # Where each of 20 things ends up over 4000 keys: 200 times everywhere, with a deviation of 14.
    keys = np.arange(4000)
    for i in (0, 7, 19):
        seen = np.bincount(shuffled(np.full(4000, i), 20, keys), minlength=20)
        assert abs(seen - 200).max() < 5 * 14


def test_the_order_never_changes():
    # A run resumed with a later version must see the same batches.
    assert shuffled(np.arange(10), 10, 42, 7).tolist() == [6, 7, 2, 4, 1, 0, 9, 8, 5, 3]
