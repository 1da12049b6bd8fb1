"""Draws of a row depend on its key alone, the same on every machine, and are uniform."""

import numpy as np

from data.draws import row_keys, uniform


def slow_hash(x):
    """SplitMix64's finaliser on Python's own integers."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def test_they_equal_plain_arithmetic():
    keys = row_keys(np.array([0, 7]), 1, 2**32 - 1)
    found = uniform(keys, 3, 2)
    for row, key in zip((0, 7), keys.tolist(), strict=True):
        assert key == slow_hash(slow_hash(slow_hash(1) ^ (2**32 - 1)) ^ row)
    for i, key in enumerate(keys.tolist()):
        for j in range(3):
            assert found[i, j] == (slow_hash(key ^ slow_hash(j + 2 * 2**32)) >> 11) / 2**53


def test_a_row_is_drawn_for_by_itself():
    keys = row_keys(np.arange(8), 3, 4)
    np.testing.assert_array_equal(row_keys(np.array([5, 2]), 3, 4), keys[[5, 2]])
    np.testing.assert_array_equal(uniform(keys[2:3], 9, 1), uniform(keys, 9, 1)[2:3])
    np.testing.assert_array_equal(uniform(keys, 4, 1), uniform(keys, 9, 1)[:, :4])
    every = np.concatenate([keys, row_keys(np.arange(8), 4, 3), row_keys(np.arange(8), 3, 5)])
    assert len(np.unique(every)) == 24


def test_they_are_uniform_and_independent():
    keys = row_keys(np.arange(1000), 0)
    one, other = uniform(keys, 200, 0), uniform(keys, 200, 1)
    assert 0 <= one.min() < one.max() < 1
    n = one.size
    counts = np.histogram(one, bins=10, range=(0, 1))[0]
    # 5 standard deviations of a binomial: one in a million.
    assert np.abs(counts - n / 10).max() < 5 * np.sqrt(n * 0.1 * 0.9)
    pairs = [(one, other), (one[:, 1:], one[:, :-1]), (one[1:], one[:-1])]
    for a, b in pairs:  # a correlation of n pairs has the standard deviation n ** -0.5
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / np.sqrt(a.size)
