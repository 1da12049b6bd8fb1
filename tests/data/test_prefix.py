"""Prefix language modelling: what counts is what the prefix has not shown."""

import itertools

import numpy as np

from data.draws import row_keys
from data.objective import ObjectiveConfig
from data.prefix import draw_prefix

PREFIX = ObjectiveConfig(name="prefix_lm")


def test_what_counts_is_after_the_prefix(open_texts):
    data = open_texts(objective=PREFIX, packing="none")
    with data.train() as loader:
        batches = list(itertools.islice(loader, 40))
    drawn = set()
    for batch in batches:
        assert batch["prefix"].dtype == batch["counted"].dtype == np.int32
        for row, prefix in enumerate(batch["prefix"].tolist()):
            n = int((batch["segments"][row] > 0).sum())
            assert 1 <= prefix <= n
            drawn.add((n, prefix))
            shown = batch["tokens"][row][:prefix].tolist()
            # The text of the row, its last token a target alone.
            text = [*batch["tokens"][row][:n].tolist(), int(batch["targets"][row][n - 1])]
            counted = batch["counted"][row].astype(bool)
            assert shown + batch["targets"][row][counted].tolist() == text
    assert {(16, 1), (16, 16)} <= drawn  # both ends, of rows that are full


def test_lengths_are_equally_likely():
    rows, n = 50_000, 5
    segments = np.repeat([[1] * n + [0] * 3], rows, axis=0).astype(np.int32)
    prefix = draw_prefix({"segments": segments}, row_keys(np.arange(rows), 0))["prefix"]
    counts = np.bincount(prefix, minlength=n + 1)
    assert counts[0] == 0
    # Within 5 standard deviations of a binomial: one in a million.
    assert np.abs(counts[1:] - rows / n).max() < 5 * np.sqrt(rows * (1 / n) * (1 - 1 / n))


def test_a_row_of_padding_has_none():
    segments = np.zeros((1, 4), np.int32)
    batch = draw_prefix({"segments": segments}, row_keys(np.arange(1), 0))
    assert batch["prefix"].tolist() == [0]
    assert not batch["counted"].any()
