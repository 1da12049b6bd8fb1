"""Keys of the config that do nothing are said, and no others."""

from __future__ import annotations

import pytest

from training.adapters import AdapterConfig
from training.optim import OptimizerConfig
from training.sparsity import SparsityConfig


@pytest.mark.parametrize(
    ("config", "note"),
    [
        (
            SparsityConfig(every=10),
            "config.sparsity.every has no effect: config.sparsity.target is 0",
        ),
        (
            AdapterConfig("ia3", base="run", rank=4),
            "config.adapter.rank has no effect: config.adapter.method is 'ia3'",
        ),
        (
            OptimizerConfig(refresh=10),
            "config.optimizer.refresh has no effect: config.optimizer.name is 'adamw'",
        ),
    ],
)
def test_keys_without_effect_of_other_sections_are_said(config, note):
    assert config.without_effect() == [note]


@pytest.mark.parametrize(
    "config",
    [
        SparsityConfig(hold=True, names=("stack/*",)),
        SparsityConfig(target=0.5, every=10),
        AdapterConfig("dora", base="run", rank=4),
        OptimizerConfig("apollo", refresh=10),
        OptimizerConfig("muon", momentum=0.5),
    ],
)
def test_keys_that_are_read_are_not(config):
    assert config.without_effect() == []
