"""Of every objective: batch k is a function of (seed, k) alone, held-out rows are fixed, and the
arrays of a batch are those of the contract.
"""

import itertools
import json

import numpy as np
import pytest

from data.config import DataConfig
from data.dataset import open_data
from data.loader import TrainBatches
from data.objective import ObjectiveConfig
from data.parts import ImageShape

TEXT = {"tokens", "targets", "segments", "positions"}
SOURCE = {"source_tokens", "source_segments", "source_positions"}
DIGITS = {"digit": 10, "parity": 2}
ONE = {"packing": "none"}

# Name -> objective, keys of config.data, arrays of a batch beside those of a text.
CASES = {
    "causal_lm": (ObjectiveConfig(), {}, TEXT),
    "masked_lm": (ObjectiveConfig("masked_lm"), {}, TEXT | {"counted"}),
    "masked_lm in buckets": (
        ObjectiveConfig("masked_lm"),
        {"packing": "buckets", "buckets": (4, 8, 16)},
        TEXT | {"counted"},
    ),
    "prefix_lm": (ObjectiveConfig("prefix_lm"), ONE, TEXT | {"counted", "prefix"}),
    "span_corruption": (
        ObjectiveConfig("span_corruption"),
        ONE | {"sequence_length": 32, "source_length": 64},
        TEXT | SOURCE,
    ),
    "seq2seq": (
        ObjectiveConfig("seq2seq"),
        ONE | {"source": "jsonl", "source_field": "code", "source_length": 24},
        TEXT | SOURCE,
    ),
    "captioning": (ObjectiveConfig("captioning"), ONE | {"source": "digits"}, TEXT | {"patches"}),
    "captioning with tasks": (
        ObjectiveConfig("captioning", tasks={"digit": 10}),
        ONE | {"source": "digits"},
        TEXT | {"patches", "label_digit"},
    ),
    "classified images": (
        ObjectiveConfig("classification", tasks=DIGITS),
        ONE | {"source": "digits"},
        {"patches", "label_digit", "label_parity"},
    ),
    "classified texts": (
        ObjectiveConfig("classification", tasks={"kind": 3}),
        ONE | {"source": "jsonl"},
        {"tokens", "segments", "positions", "label_kind"},
    ),
    "masked_lm with tasks": (
        ObjectiveConfig("masked_lm", tasks={"kind": 3}),
        ONE | {"source": "jsonl"},
        TEXT | {"counted", "label_kind"},
    ),
}
DRAWN = ("masked_lm", "masked_lm in buckets", "prefix_lm", "span_corruption")


@pytest.fixture
def open_case(tmp_path, text_folder):
    """`open_case(name, seed=..., **config)`."""
    rows = [
        {"text": text.read_text(), "code": f"make {i} " * (i % 5), "kind": i % 3}
        for i, text in enumerate(sorted(text_folder.iterdir()))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = {"text": f"{text_folder}/*.py", "jsonl": str(tmp_path / "rows.jsonl"), "digits": ""}

    def build(name, seed=0, **changes):
        objective, config, _ = CASES[name]
        config = {"source": "text", "sequence_length": 16, "batch_size": 8} | config | changes
        data = DataConfig(path=paths[config["source"]], **config)
        shape = ImageShape(image_size=8, patch_size=4, channels=1)
        return open_data(data, 400, tmp_path / "run", seed=seed, objective=objective, image=shape)

    return build


def take(loader, count):
    with loader:
        return list(itertools.islice(loader, count))


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


def differ(one, other):
    return any((a[n] != b[n]).any() for a, b in zip(one, other, strict=True) for n in a)


@pytest.mark.parametrize("name", CASES)
def test_a_batch_is_a_function_of_seed_and_number(open_case, name):
    whole = take(open_case(name).train(), 8)
    assert whole[0].keys() == CASES[name][2]
    for array in whole[0].values():
        assert len(array) == 8
    assert_same(take(open_case(name).train(5), 3), whole[5:])  # as a run that is continued
    for processes in (2, 4):
        parts = [take(open_case(name).train(2, i, processes), 3) for i in range(processes)]
        joined = [
            {n: np.concatenate([part[n] for part in step]) for n in step[0]}
            for step in zip(*parts, strict=True)
        ]
        assert_same(joined, whole[2:5])
    rows = np.array([1, 6])
    shared = take(open_case(name).train(rows=rows), 2)  # as where processes share rows
    assert_same(shared, [{n: array[rows] for n, array in b.items()} for b in whole[:2]])
    if "buckets" not in name:
        assert differ(take(open_case(name, seed=1).train(), 8), whole)


@pytest.mark.parametrize("name", CASES)
def test_held_out_rows_are_fixed(open_case, name):
    """Whatever the seed, the processes and the size of a batch."""
    two = take(open_case(name, batch_size=2).held_out(4), 9)
    assert 0 < len(two) <= 4
    assert_same(take(open_case(name, seed=7, batch_size=2).held_out(4), 9), two)
    halves = [take(open_case(name, batch_size=2).held_out(4, i, 2), 9) for i in range(2)]
    joined = [{n: np.concatenate([a[n], b[n]]) for n in a} for a, b in zip(*halves, strict=True)]
    assert_same(joined, two)
    flat = {n: np.concatenate([b[n] for b in two]) for n in two[0]}
    (four, *_) = take(open_case(name, batch_size=4).held_out(1), 9)
    rows = min(4, 2 * len(two))
    assert_same(*([{n: a[:rows] for n, a in batch.items()}] for batch in (four, flat)))


@pytest.mark.parametrize("name", CASES)
def test_what_is_lacking_at_the_end_is_padding(open_case, name):
    data = open_case(name, batch_size=64 if "digits" not in CASES[name][1].values() else 128)
    (batch,) = take(data.held_out(10), 10)
    rows = data.held_out_plan.rows
    assert 0 < rows < len(next(iter(batch.values())))
    for array_name, array in batch.items():
        empty = array[rows:]
        assert (empty == (-1 if array_name.startswith("label_") else 0)).all()
        if array_name.endswith("segments"):
            assert (array[:rows].max(axis=1) > 0).all()
        if array_name.startswith("label_"):
            assert (array[:rows] >= 0).all()


@pytest.mark.parametrize("name", ["masked_lm", "prefix_lm", "span_corruption"])
def test_the_same_row_is_drawn_for_anew(open_case, name):
    """Another draw every time it comes up, of the same text."""
    data = open_case(name)
    batches = TrainBatches(data.training, data.plans, 0, 1, np.arange(1), data.recipe)
    plain = TrainBatches(data.training, data.plans, 0, 1, np.arange(1))
    rows = data.plans[0].rows
    when = {int(plain.choose(rows + k)[1][0]): rows + k for k in range(rows)}
    others = []
    for k in range(0, rows, 1 + rows // 30):
        again = when[int(plain.choose(k)[1][0])]
        assert_same([plain[k]], [plain[again]])
        others.append(differ([batches[k]], [batches[again]]))
    assert np.mean(others) > 0.5  # short texts have few ways


def test_the_fingerprint_knows_what_is_drawn(open_case, tmp_path, text_folder):
    plain = open_case("causal_lm").summary
    assert plain.fingerprint == open_case("causal_lm").training.fingerprint
    found = {open_case(name).summary.fingerprint for name in ("causal_lm", *DRAWN[1:])}
    assert len(found) == 4
    config = DataConfig(source="text", path=f"{text_folder}/*.py", sequence_length=16)
    more = open_data(
        config, 400, tmp_path / "run", objective=ObjectiveConfig("masked_lm", mask_rate=0.2)
    )
    assert more.summary.fingerprint not in found
    assert " for masked_lm, " in str(more.summary)
    assert " for " not in str(plain)


def test_prefetching_counts_what_a_batch_holds(open_case):
    for name in CASES:
        data = open_case(name, prefetch_mib=1, batch_size=64)
        batches = take(data.train(), 8)
        largest = max(sum(array.nbytes for array in batch.values()) for batch in batches)
        with data.train() as loader:
            assert loader.depth == min(max(2**20 // largest, 1), 64), name
