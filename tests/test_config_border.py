"""A config survives the workdir, and only a run that would learn the same may continue."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import config_border as border
from config_types import plain
from configs import base

TINY = str(Path(__file__).parent.parent / "configs" / "tiny.py")


def test_config_json_round_trip(tmp_path):
    config = border.override(
        border.load_config(TINY),
        ["--config.remat.save=query", "--config.parallel.rules={'embed': ('fsdp',)}"],
    )
    border.write_config(tmp_path / "new" / "run", config)
    assert border.read_config(tmp_path / "new" / "run") == config
    text = (tmp_path / "new" / "run" / "config.json").read_text()
    assert list(json.loads(text)) == sorted(plain(config))
    assert [f.name for f in (tmp_path / "new" / "run").iterdir()] == ["config.json"]


def test_an_older_config_takes_new_keys_from_the_base(tmp_path):
    old = plain(base.get_config())
    del old["model"]["unroll"]
    del old["loss"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert border.read_config(tmp_path) == base.get_config()


@pytest.mark.parametrize(
    "same",
    ["train.steps=9", "mesh.fsdp=2", "parallel.zero=1", "remat.policy=full", "eval.batches=1"],
)
def test_a_run_may_continue_elsewhere_and_longer(same):
    old = border.load_config(TINY)
    border.check_same_run(old, border.override(old, [f"--config.{same}"]))


@pytest.mark.parametrize(
    "other",
    [
        "seed=1",
        "model.layers=9",
        "data.batch_size=8",
        "optimizer.b1=0.5",
        "precision.compute=bfloat16",
    ],
)
def test_another_run_is_refused(other):
    old = border.load_config(TINY)
    key, value = other.split("=")
    with pytest.raises(ValueError, match=rf"config\.{key} = '?{value}'?: this workdir's run has"):
        border.check_same_run(old, border.override(old, [f"--config.{other}"]))
