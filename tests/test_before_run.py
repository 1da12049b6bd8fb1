"""The plan before a run: refused, warned of, chosen, and given up when memory runs out."""

from __future__ import annotations

import re

import pytest

from before_run import planned, with_plan
from config_border import with_values
from configs import tiny
from memory.measure import OutOfMemory


def config(**values):
    small = {"config.model.layers": 2, "config.model.embed_dim": 64, "config.model.mlp_dim": 128}
    keys = {name.replace("__", "."): value for name, value in values.items()}
    return with_values(tiny.get_config(), small | {f"config.{k}": v for k, v in keys.items()})


def test_what_fits_is_said_and_trained():
    said = []
    given = config()
    assert list(planned(given, said.append)) == [given]
    assert len(said) == 1
    assert said[0].startswith("plan: ")
    found = re.match(r"plan: (\S+) of \S+ GiB per device predicted \((.*)\)$", said[0])
    sizes = [float(named.split()[-1]) for named in found[2].split(",")]
    assert float(found[1]) > sum(sizes)
    assert len(sizes) == 4
    assert all(sizes), "a small model has digits too"


def test_what_cannot_fit_is_refused_with_what_would_help():
    small = config(memory__budget_gib=0.0005)
    with pytest.raises(ValueError, match="does not fit: needs") as caught:
        list(planned(small, lambda line: None))
    assert "saves" in str(caught.value)
    assert "config.memory.check=warn" in str(caught.value)


def test_weights_in_other_forms_are_planned_as_they_are():
    """Refused as any run is, and of less than dense weights need."""
    least = []
    for forms in ({}, {"stack/*": "int8"}):
        small = config(memory__budget_gib=0.0005, weights__forms=forms)
        said = []
        with pytest.raises(ValueError, match="does not fit: needs") as caught:
            list(planned(small, said.append))
        assert [line.partition(":")[0] for line in said] == ["plan"]
        least.append(float(re.search(r"needs (\S+)", str(caught.value))[1]))
    assert least[1] < least[0]


@pytest.mark.parametrize(("check", "warnings"), [("warn", 1), ("off", 0)])
def test_unless_told_otherwise(check, warnings):
    said = []
    small = config(memory__budget_gib=0.0005, memory__check=check)
    assert list(planned(small, said.append)) == [small]
    assert sum(line.startswith("warning: does not fit") for line in said) == warnings


def test_auto_chooses_within_the_budget():
    said = []
    first = next(planned(config(layout="auto", memory__budget_gib=0.5), said.append))
    assert said[0].startswith("layout: ")
    assert first.mesh.data * first.mesh.fsdp * first.mesh.tensor == 8


def test_auto_with_no_room_at_all_says_the_least():
    with pytest.raises(ValueError, match=r"budget_gib=0\.0001: nothing fits; the least"):
        next(planned(config(layout="auto", memory__budget_gib=0.0001), lambda line: None))


def test_out_of_memory_goes_on_to_the_next_layout():
    tried, said = [], []

    def train(given):
        tried.append(given)
        if len(tried) < 3:
            raise OutOfMemory("planted")

    with_plan(config(layout="auto"), train, said.append)
    assert len(tried) == 3
    layouts = [str(given.to_dict()) for given in tried]
    assert len(set(layouts)) == 3
    assert sum("out of memory: trying the next layout" in line for line in said) == 2


def test_a_given_layout_has_no_next():
    def train(given):
        raise OutOfMemory("planted")

    with pytest.raises(OutOfMemory, match="planted"):
        with_plan(config(), train, lambda line: None)
