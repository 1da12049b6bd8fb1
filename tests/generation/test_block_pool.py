"""Blocks of a pool: never two owners of one that is not shared, none lost, none leaked."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from generation.block_pool import BlockPool


def test_a_hundred_thousand_takes_and_releases_neither_overlap_nor_leak():
    """Against a plain count of users: rows that take, share, say what they hold, and end."""
    rng = random.Random(0)
    pool, block = BlockPool(97, 4), 4
    rows: list[tuple[list[int], list[int]]] = []  # (tokens, blocks)
    taken = released = 0
    while taken + released < 100_000:
        if rows and (rng.random() < 0.45 or pool.free < 8):
            for number in rows.pop(rng.randrange(len(rows)))[1]:
                pool.release(number)
                released += 1
        else:
            # Few different beginnings, so that many rows begin alike.
            tokens = [rng.randrange(2) for _ in range(rng.randint(1, 7 * block))]
            blocks = pool.holding(tokens)
            assert len(blocks) * block < len(tokens)
            for number in blocks:
                pool.use(number)
            while len(blocks) < pool.needed(len(tokens)):
                blocks.append(pool.take())
            taken += len(blocks)
            pool.hold(blocks, tokens)
            rows.append((tokens, blocks))
        users = Counter(number for _, blocks in rows for number in blocks)
        assert pool.used == len(users)
        assert pool.free == 97 - len(users)
        if (taken + released) % 50 == 0:
            check_contents(rows, block)
    for _, blocks in rows:
        for number in blocks:
            pool.release(number)
    assert (pool.free, pool.used) == (97, 0)
    assert not pool._holding
    assert not pool._content


def check_contents(rows, block):
    """A block that two rows have is full, and all before it is the same in both."""
    beginnings: dict[int, tuple[int, ...]] = {}
    for tokens, blocks in rows:
        for place, number in enumerate(blocks):
            mine = tuple(tokens[: (place + 1) * block])
            if number in beginnings:
                assert beginnings[number] == mine
                assert len(mine) == (place + 1) * block
            beginnings[number] = mine


def test_a_full_pool_has_nothing_to_take():
    pool = BlockPool(2, 16)
    assert {pool.take(), pool.take()} == {0, 1}
    with pytest.raises(IndexError):
        pool.take()


def test_what_a_block_held_is_forgotten_with_its_last_user():
    pool = BlockPool(4, 2)
    first = [pool.take(), pool.take()]
    pool.hold(first, [5, 6, 7])
    assert pool.holding([5, 6, 7]) == first[:1]
    assert pool.holding([5, 6]) == []  # its last token must be computed
    pool.use(first[0])
    pool.release(first[0])
    assert pool.holding([5, 6, 9]) == first[:1]
    pool.release(first[0])
    assert pool.holding([5, 6, 9]) == []
