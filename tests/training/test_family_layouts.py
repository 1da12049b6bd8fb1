"""Families on meshes: losses and gradients of five steps as on one device.

Of all families and meshes here are those that bring a new kind of array or communication;
`benchmarks/family_layouts.py` has all of them.
"""

from __future__ import annotations

import pytest

from benchmarks import family_layouts
from tests.families import FAMILIES
from tests.training.cells import CELLS, assert_same, cells
from tests.training.stages import TOLERANCE

HERE = {
    # Blocks of several layers, on several stages.
    "shared neighbours": ["1f1b"],
    # A loss of tokens, and of labels of rows; blocks and a factorised table without a causal mask.
    "encoder, shared": ["1f1b", "all"],
    # A source's own arrays; heads of both stacks divided.
    "2017": ["tensor"],
    # A bias of scores that all layers of a stack read; a source's features in the stream of stages.
    "t5, shared": ["zb_h1", "all"],
    # Rows without tokens.
    "vision": ["fsdp"],
    # Patches before a text, which stages pass on with it.
    "captioning, shared": ["1f1b", "all"],
    # Attention to features of other dims than the stream's.
    "captioning, gated": ["zb_h1", "all"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HERE)
def test_a_family(name):
    for cell in HERE[name]:
        assert_same(name, **CELLS[cell])


def test_the_published_matrix_is_whole_and_within_tolerance():
    rows = family_layouts.rows()
    assert rows.keys() == set(family_layouts.cases())
    for case, row in rows.items():
        assert row["kind"] == CELLS[row["cell"]], case
        assert all(row[name] <= TOLERANCE for name in family_layouts.MEASURED), case
    for name in FAMILIES:
        assert {cell for family, cell in rows if family == name} == set(cells(name))
