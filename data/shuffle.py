"""Random orders of any size without storing them."""

from __future__ import annotations

import numpy as np

ROUNDS = 4  # of a Feistel network: Luby and Rackoff 1988, https://doi.org/10.1137/0217022


def hash64(x: np.ndarray) -> np.ndarray:
    """A well-mixed uint64 for every uint64: the finaliser of SplitMix64.

    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators",
    https://doi.org/10.1145/2660193.2660195
    """
    with np.errstate(over="ignore"):
        x = np.asarray(x).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def shuffled(index: np.ndarray, size: int, *key: np.ndarray | int) -> np.ndarray:
    """Where a random permutation of `range(size)` sends each index.

    A Feistel network over the smallest even number of bits that holds `size`, walked until it lands
    inside: O(1) memory, the same on every machine and version. `key` names the permutation (seed,
    epoch, ...); index and key are ints or int arrays of one shape [n].
    """
    index = np.asarray(index, np.uint64)
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    secret = np.zeros_like(index)
    for part in key:
        secret = hash64(secret ^ np.asarray(part).astype(np.uint64))
    secrets = hash64(secret ^ np.arange(ROUNDS, dtype=np.uint64)[:, None])  # [ROUNDS, n]

    def permute(x: np.ndarray, secrets: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for secret in secrets:
            left, right = right, left ^ (hash64(secret ^ right) & mask)
        return (left << half) | right

    result = permute(index, secrets)
    while (outside := result >= np.uint64(size)).any():
        result[outside] = permute(result[outside], secrets[:, outside])
    return result.astype(np.int64)
