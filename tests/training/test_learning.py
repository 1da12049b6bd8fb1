"""What is published of learning is whole, and what it is compared with is what it says."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import learning
from benchmarks.constant import constant_losses

LIMIT = 180  # seconds of the whole process
SHARE = 0.8  # of the best constant's loss
OF_TWO = 0.85  # the same of each of two objectives, which share a trunk and a sum


@pytest.fixture(scope="module")
def published():
    return json.loads(learning.RESULT.read_text())


@pytest.mark.parametrize("name", learning.CASES)
def test_every_case_is_published_and_learns_in_time(published, name):
    case, row = learning.CASES[name], published[name]
    assert row["flags"] == case.flags()
    assert row["seconds"] < LIMIT
    assert row["curve"][0][0] == 1
    assert row["curve"][-1][0] == row["steps"]
    assert len(row["curve"]) >= 24
    for part in row["parts"].values():
        share = OF_TWO if name == "multi_task" else SHARE
        assert part["held_out"] < share * part["constant"]
    assert row["held_out"] < SHARE * row["constant"]
    assert row["held_out"] < row["first"]


@pytest.mark.parametrize("name", ["captions_prefix", "captions_gated"])
def test_captions_of_other_images_are_no_better_than_chance(published, name):
    row = published[name]
    assert row["parts"]["tokens"]["of"] == "rows"  # chance: how often each caption occurs
    assert row["shuffled"] >= row["constant"]


def text(targets, counted=None):
    """A batch whose targets are all counted, but for zeros."""
    targets = np.array(targets, np.int32)
    batch = {"targets": targets, "segments": (targets > 0).astype(np.int32)}
    return batch if counted is None else batch | {"counted": np.array(counted, np.int32)}


def test_a_constant_predictor_of_tokens_knows_how_often_they_occur():
    random = np.random.default_rng(0)
    p = np.array([0.5, 0.25, 0.125, 0.125])
    batches = [text(random.choice([1, 2, 3, 4], (64, 512), p=p)) for _ in range(3)]
    loss, of = constant_losses(batches[:2], batches[2:], 5, {})["tokens"]
    assert of == "tokens"
    # The entropy, four deviations of the mean over 32,768 drawn tokens beside it.
    assert loss == pytest.approx(-(p * np.log(p)).sum(), abs=0.01)


def test_of_tokens_at_each_position_where_they_differ():
    random = np.random.default_rng(0)
    here = lambda: text(np.arange(1, 17) + 16 * random.integers(0, 2, (256, 16)))
    loss, of = constant_losses([here()], [here()], 33, {})["tokens"]
    assert of == "positions"  # rows are too many to have been seen
    assert loss == pytest.approx(np.log(2), abs=0.02)  # one of two, each fitted on 256 rows


def test_of_whole_rows_where_they_recur():
    rows = text([[1, 2, 9], [3, 4, 9], [1, 2, 9], [3, 4, 9], [0, 0, 0]])
    loss, of = constant_losses([rows], [text([[3, 4, 9], [0, 0, 0]])], 10, {})["tokens"]
    assert of == "rows"
    assert loss == pytest.approx(np.log(2) / 3)  # padding is no row


def test_only_what_counts_is_scored():
    fitted = text([[1, 2, 3]], counted=[[0, 1, 0]])
    seen, unseen = (text([[1, 2, 3]], counted=c) for c in ([[0, 1, 0]], [[1, 0, 0]]))
    assert constant_losses([fitted], [seen], 4, {})["tokens"] == (0.0, "rows")
    loss, of = constant_losses([fitted], [unseen], 4, {})["tokens"]
    assert of == "tokens"
    assert loss == pytest.approx(np.log(5))  # one of four tokens was seen, all are counted once


def test_of_classes():
    labels = {"label_kind": np.array([0, 0, 1, -1], np.int32)}  # -1: padding
    (found,) = constant_losses([labels], [labels], 0, {"kind": 2}).values()
    assert found[0] == pytest.approx(-(2 * np.log(3 / 5) + np.log(2 / 5)) / 3)


def test_rows_are_given_what_is_of_others_and_padding_stays():
    segments = np.ones((6, 2), np.int32)
    segments[5] = 0
    rows = {"segments": segments, "patches": np.arange(6)[:, None], "targets": np.arange(6)}
    batches = [
        {name: array[part] for name, array in rows.items()} for part in ([0, 1, 2], [3, 4, 5])
    ]
    found = list(learning.given_to_others(batches, ["patches"], seed=0))
    together = {name: np.concatenate([batch[name] for batch in found]) for name in rows}
    np.testing.assert_array_equal(together["targets"], rows["targets"])
    patches = together["patches"][:, 0].tolist()
    assert sorted(patches) == list(range(6))
    assert patches[5] == 5
    assert patches != list(range(6))
