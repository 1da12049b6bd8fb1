"""Batch k is a function of (seed, k) alone, whoever asks for it and however; threads end."""

import hashlib
import itertools
import math
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from data.loader import DEEPEST, Loader, TrainBatches, device_batches, local_rows, to_device
from parallel.mesh import MeshConfig, make_mesh


def take(loader, count):
    with loader:
        return list(itertools.islice(loader, count))


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys() == {"tokens", "targets", "segments", "positions"}
        for name in a:
            assert a[name].dtype == np.int32
            np.testing.assert_array_equal(a[name], b[name])


def row_set(batches):
    """Every row as one hashable thing, in order."""
    names = ("tokens", "targets", "segments", "positions")
    return [
        b"".join(batch[name][i].tobytes() for name in names)
        for batch in batches
        for i in range(len(batch["tokens"]))
    ]


BUCKETS = {"packing": "buckets", "buckets": (4, 8, 16)}


@pytest.mark.parametrize("config", [{}, BUCKETS], ids=["packed", "buckets"])
def test_starting_late_changes_nothing(open_texts, config):
    whole = take(open_texts(**config).train(), 40)
    for start in (1, 7, 39):
        assert_same(take(open_texts(**config).train(start), 40 - start), whole[start:])


@pytest.mark.parametrize(
    ("config", "digest"),
    [
        ({}, "6e91428f45fa41a8"),
        (BUCKETS, "55fd1e412ab7b83c"),
        ({"packing": "none"}, "7bbf9da0193b5363"),
    ],
)
def test_batches_are_those_of_earlier_versions(open_texts, config, digest):
    """A run that is continued with a newer version of the code sees what it would have seen."""
    data, content = open_texts(seed=3, **config), hashlib.sha256()
    for batch in take(data.train(5), 20) + take(data.held_out(3), 3):
        for name in ("tokens", "targets", "segments", "positions"):
            content.update(batch[name].tobytes())
    assert content.hexdigest().startswith(digest)
    assert data.summary.fingerprint == "541a7491ab20aaf3f8ab55c05ad6907f"


@pytest.mark.parametrize("config", [{}, BUCKETS], ids=["packed", "buckets"])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_one_batch(open_texts, config, processes):
    data = open_texts(**config)
    parts = [take(data.train(3, i, processes), 30) for i in range(processes)]
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert_same(joined, take(data.train(3), 30))


def test_seed_decides_the_order_and_prefetch_does_not(open_texts):
    first = take(open_texts(seed=0).train(), 5)
    assert_same(take(open_texts(seed=0, prefetch_mib=1).train(), 5), first)
    assert row_set(first) != row_set(take(open_texts(seed=1).train(), 5))


def test_epochs_cover_the_same_rows_in_another_order(open_texts):
    data = open_texts(batch_size=1)
    rows = data.summary.rows
    seen = row_set(take(data.train(), 3 * rows))
    first, second, third = seen[:rows], seen[rows : 2 * rows], seen[2 * rows :]
    assert first != second != third != first
    everything = row_set([data.plans[0].fill(data.training, np.arange(rows))])
    assert sorted(first) == sorted(second) == sorted(third) == sorted(everything)


def test_an_epoch_ends_in_the_middle_of_a_batch(open_texts):
    single = row_set(take(open_texts(batch_size=1).train(), 400))
    assert open_texts().summary.rows % 8
    assert row_set(take(open_texts(batch_size=8).train(), 50)) == single


def test_buckets_give_no_more_shapes_than_buckets(open_texts):
    data = open_texts(**BUCKETS)
    batches_of_a_cycle = sum(-(-plan.rows // 8) for plan in data.plans)
    batches = take(data.train(), batches_of_a_cycle)
    assert {batch["tokens"].shape for batch in batches} == {(8, 4), (8, 8), (8, 16)}


def test_buckets_give_every_row_equally_often(open_texts):
    data = open_texts(**BUCKETS)
    source = TrainBatches(data.training, data.plans, 0, 8, np.arange(8))
    seen = [np.zeros(plan.rows, int) for plan in data.plans]
    for k in range(5 * int(source.batches_in.sum())):
        number, rows = source.choose(k)
        np.add.at(seen[number], rows, 1)
    for count in seen:
        assert count.min() >= 5
        assert count.max() - count.min() <= 1


def test_held_out_batches_are_fixed_and_never_repeat(open_texts):
    data = open_texts(seed=0, batch_size=2)
    assert data.held_out_plan.rows == 5
    two = take(data.held_out(2), 100)
    assert len(two) == 2
    assert_same(take(open_texts(seed=5, batch_size=2).held_out(2), 100), two)
    every = take(data.held_out(10_000), 10_000)
    assert len(every) == 3
    assert_same(every[:2], two)
    assert sum(int((batch["segments"] > 0).sum()) for batch in every) == data.held_out_plan.tokens
    halves = [take(data.held_out(10_000, i, 2), 10_000) for i in range(2)]
    joined = [{n: np.concatenate([a[n], b[n]]) for n in a} for a, b in zip(*halves, strict=True)]
    assert_same(joined, every)


def loader_threads():
    return [thread for thread in threading.enumerate() if "grain" in thread.name]


def test_closing_ends_the_threads(open_texts):
    data = open_texts()
    for _ in range(5):
        loader = data.train()
        next(loader)
        assert loader_threads()
        loader.close()
        loader.close()
    with pytest.raises(RuntimeError), data.train() as loader:
        raise RuntimeError
    deadline = time.monotonic() + 10
    while loader_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not loader_threads()


class Slow:
    """Batches that take a while to make and note when they were asked for."""

    def __init__(self, seconds):
        import grain

        def make(k):
            self.made.append(k)
            time.sleep(seconds)
            return {"tokens": np.full((1, 1), k, np.int32)}

        self.made = []
        self.wanted, self.batch_size = np.arange(1), 1
        self.to_iter_dataset = grain.MapDataset.range(1000).map(make).to_iter_dataset


@pytest.mark.parametrize(("budget", "depth"), [(0, 1), (1000, 1), (5000, 5), (10**9, DEEPEST)])
def test_prefetch_keeps_to_its_budget(budget, depth):
    slow = Slow(0)
    with Loader(slow, 0, budget, batch_bytes=1000) as loader:
        assert loader.depth == depth
        deadline = time.monotonic() + 10
        while len(slow.made) < depth and time.monotonic() < deadline:
            time.sleep(0.01)  # made ahead before anybody asked
        time.sleep(0.05)
        assert sorted(slow.made) == list(range(depth))


def test_waiting_is_counted():
    with Loader(Slow(0.05), 0, 1, batch_bytes=1) as loader:
        next(loader), next(loader), next(loader)
        assert loader.seconds_blocked > 0.05
        blocked = loader.seconds_blocked
        time.sleep(0.2)  # now the next one is ready
        assert int(next(loader)["tokens"][0, 0]) == 3
        assert loader.seconds_blocked - blocked < 0.045


SPEC = P(("data", "fsdp"))


def mesh_of(**sizes):
    config = MeshConfig(**({"data": 1} | sizes))
    return make_mesh(config, jax.devices()[: math.prod(config.sizes().values())])


def test_device_batches_are_the_host_batches(open_texts):
    data = open_texts()
    expected = take(data.train(), 4)
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    with data.train() as loader:
        found = list(itertools.islice(device_batches(loader, mesh, SPEC), 4))
        for batch in found:
            for array in batch.values():
                assert array.sharding.spec == SPEC
                assert array.addressable_shards[0].data.shape == (2, 16)
        assert_same([jax.device_get(batch) for batch in found], expected)
    with open_texts(batch_size=2).held_out(3) as loader:
        assert len(list(device_batches(loader, mesh_of(), SPEC))) == 3


def test_the_next_copy_is_under_way(open_texts):
    with open_texts().train() as loader:
        next(device_batches(loader, mesh_of(data=8), SPEC))
        assert loader._iterator.get_state()["next_index"] == 2


def test_rows_that_processes_share(open_texts):
    """Shards are cut from the rows at hand by their number, wherever those stand."""
    data = open_texts()
    (whole,) = take(data.train(), 1)
    mesh = mesh_of(data=2, tensor=4)
    np.testing.assert_array_equal(local_rows(mesh, P("data"), 8), np.arange(8))
    batch = to_device(whole, mesh, P("data", "tensor"), np.arange(8), 8)
    np.testing.assert_array_equal(batch["tokens"], whole["tokens"])
    two = take(data.train(rows=np.array([1, 6])), 1)[0]
    np.testing.assert_array_equal(two["tokens"], whole["tokens"][[1, 6]])


def test_rows_must_divide(open_texts):
    with pytest.raises(ValueError) as error:
        open_texts(batch_size=6).train(0, 0, 4)
    assert str(error.value) == (
        "config.data.batch_size = 6 does not divide by the 4 processes; choose a multiple of 4"
    )
