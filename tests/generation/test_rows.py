"""Rows and blocks over many texts, without a device: nobody writes where another reads."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from generation.rows import Request, Rows
from generation.text import Text
from models.kv_cache import CacheShape


def request(number: int, prompt: list[int], most: int) -> Request:
    return Request(number, prompt, Text(lambda ids: ""), most)


def run(rows: Rows, requests: list[Request], rng: random.Random, check) -> None:
    """What the engine does with rows, each token read at once; some texts end early."""
    rows.waiting.extend(requests)
    while rows.waiting or any(rows.active()):
        read = []
        while admitted := rows.admit():
            for row in admitted:
                rows.begun(row)
            read += admitted
        read += [row for row in rows.step() if row is not None]
        check(rows)
        for row in read:
            if not rows.holds(row):
                continue
            text = row.request.text
            if text.reason:
                continue
            text.add(rng.randrange(50))
            if len(text.tokens) == row.request.most or rng.random() < 0.002:
                text.finish("length")
                rows.free(row)


def check_blocks(rows: Rows) -> None:
    """A block has as many users as its pool says; one that is written has one."""
    for part, pool in enumerate(rows.pools):
        mine = [row for row in rows.active() if rows.part(row) == part]
        users = Counter(number for row in mine for number in row.blocks)
        assert pool.used == len(users) == sum(pool.users(number) > 0 for number in users)
        for row in mine:
            assert len(row.blocks) * pool.block >= row.cached
            written = row.blocks[row.cached // pool.block :]  # by the next tokens
            assert all(users[number] == 1 for number in written)
            assert all(pool.users(number) == users[number] for number in row.blocks)


@pytest.mark.parametrize(("parts", "blocks"), [(1, 40), (4, 12)])
def test_texts_of_all_lengths_end_and_give_all_back(parts, blocks):
    rng = random.Random(0)
    begin = [rng.randrange(50) for _ in range(30)]
    requests = []
    for number in range(150):
        own = [rng.randrange(50) for _ in range(rng.randint(1, 25))]
        prompt = begin[: rng.randint(1, 30)] + own[:5] if number % 2 else own
        requests.append(request(number, prompt, rng.randint(1, 12)))
    rows = Rows(CacheShape(8, 48, block=4, blocks=blocks), parts, sharing=True)
    run(rows, requests, rng, check_blocks)
    assert all(r.text.reason for r in requests)
    assert all(pool.free == blocks for pool in rows.pools)
    assert parts == 4 or rows.gave_way > 0


def test_the_pool_is_hardly_larger_than_what_lives():
    """Blocks of 16: each text wastes less than one, and one that others share is there once."""
    rng = random.Random(1)
    begin = [rng.randrange(50) for _ in range(200)]  # of every second text
    requests = [
        request(
            number,
            begin * (number % 2) + [rng.randrange(50) for _ in range(rng.randint(20, 400))],
            rng.randint(50, 300),
        )
        for number in range(120)
    ]
    shape = CacheShape(32, 1024, block=16, blocks=32 * 64)
    rows = Rows(shape, 1, sharing=True)
    worst = 0.0

    def check(rows: Rows) -> None:
        nonlocal worst
        used, live = rows.in_use()
        if len(list(rows.active())) == 32:  # all rows: what a pool is made for
            worst = max(worst, used * shape.block / live)

    run(rows, requests, rng, check)
    assert 1.0 < worst <= 1.1
    contiguous = shape.rows * shape.slots
    assert rows.most_used * shape.block < 0.5 * contiguous
