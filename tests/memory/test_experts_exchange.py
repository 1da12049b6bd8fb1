"""What experts cost: bytes of the exchange, state, FLOPs; predicted against compiled."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path

import pytest

from config_border import load_config, override
from experiment import read_experiment
from memory.compiled import compile_step
from memory.experts_exchange import exchanges
from memory.hlo import parse
from memory.hlo_costs import count
from memory.predict import predict
from memory.roofline import step_time
from memory.search import meshes
from memory.terms import Terms
from models.flops import empty_slots, layer_parameters
from parallel.mesh import AXES
from parallel.targets import parse_target

ROOT = Path(__file__).parents[2]
L, D, F, T, E, K = 4, 32, 48, 16, 8, 2
SHAPE = [
    *(f"model.layers={L}", f"model.embed_dim={D}", "model.heads=4", "model.kv_heads=2"),
    *("model.head_dim=8", f"model.max_length={T}", f"data.sequence_length={T}"),
    *(f"experts.number={E}", f"experts.per_token={K}", f"experts.mlp_dim={F}"),
    *("data.batch_size=16", "optimizer.name=sgd", "mesh.data=-1"),
]
TARGET = parse_target("cpu:8")
SCALARS = 5 * 4  # of the state, not predicted


def job(*changes):
    config = load_config(str(ROOT / "configs/tiny.py"))
    config = override(config, [f"--config.{change}" for change in (*SHAPE, *changes)])
    return read_experiment(config, 8).job()


@functools.cache
def compiled(*changes):
    return compile_step(job(*changes), TARGET)


FORMS = {"sorted": "experts.capacity=0", "slots": "experts.capacity=1.25"}
LAYOUTS = {
    "expert8": ("mesh.expert=8",),
    "data2-expert2-tensor2": ("mesh.expert=2", "mesh.tensor=2"),
    "fsdp2-expert4-full": ("mesh.fsdp=2", "mesh.expert=4", "remat.policy=full"),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_bytes_of_the_exchange_are_as_predicted(form, layout):
    """Each collective over the expert axis, all layers, forward and backward."""
    changes = (FORMS[form], *LAYOUTS[layout])
    one = job(*changes)
    found = count(parse(compiled(*changes).text), one.sizes).collectives
    got, want = Counter(), Counter()
    for c in found:
        if c.axis == "expert" and c.kind != "all-reduce":
            got[c.kind] += c.bytes * c.count
    for e in exchanges(Terms(one, TARGET.chip)):
        want[e.kind] += e.bytes * e.times * L
    assert got == want


def test_slots_travel_whole():
    """An all-to-all of every expert's slots, there and back, forward and backward."""
    one = job("experts.capacity=2", "mesh.expert=8")
    features, scale = exchanges(Terms(one, TARGET.chip))
    slots = 2 * (2 * T * K // E) * E  # of two rows on a device
    assert features == ("all-to-all", slots * D * 4, 4)
    assert scale == ("all-to-all", slots * 4, 2)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_state_is_as_predicted(form):
    """Of 8 experts each device of the axis has one."""
    changes = (FORMS[form], "mesh.expert=8")
    guess = predict(job(*changes), TARGET.chip)
    assert compiled(*changes).arguments == guess.arguments + SCALARS
    whole = predict(job(FORMS[form], "mesh.data=8"), TARGET.chip)
    master = "weights (master copy)"
    experts = L * 3 * E * D * F * 4
    assert whole.components[master] - guess.components[master] == experts * 7 // 8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["expert_input", "mlp_gate", "mlp_act"])
@pytest.mark.parametrize("form", FORMS)
def test_a_saved_tensor_costs_its_bytes(form, name):
    """Of rows or slots; deep, so that what one layer holds while it works is little beside it."""
    deep = FORMS[form], "model.layers=128"
    saving = *deep, "remat.policy=custom", f"remat.save={name}"
    change = compiled(*saving).temporaries - compiled(*deep, "remat.policy=full").temporaries
    assert change == pytest.approx(Terms(job(*saving), TARGET.chip).saved[name], rel=0.02)


def test_operations_are_those_of_active_experts():
    model = job(FORMS["sorted"]).model
    attention = 2 * D * 4 * 8 + 2 * D * 2 * 8
    assert layer_parameters(model) == attention + D * E + K * 3 * D * F
    assert empty_slots(model, T) == 0
    slots = job(FORMS["slots"]).model  # 5 in place of 4
    assert empty_slots(slots, T) == pytest.approx(6 * L * 3 * D * F * (E * 5 / T - K))


def test_the_exchange_takes_time():
    """The axis moves tokens; without it, nothing does."""
    target = parse_target("gpu:h100:1x8")
    assert "expert" not in step_time(job("mesh.data=8"), target).communication_seconds
    assert step_time(job("mesh.expert=8"), target).communication_seconds["expert"] > 0


def test_sweeps_use_the_axis_where_there_are_experts():
    assert all(sizes["expert"] == 1 for sizes in meshes(8))
    found = {sizes["expert"] for sizes in meshes(8, experts=4)}
    assert found == {1, 2, 4}
    assert all(set(sizes) <= set(AXES) for sizes in meshes(8, experts=4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ("mesh.expert=8", "experts.number=0"),
            (
                "config.mesh.expert = 8: there are no experts to divide (config.experts.number is "
                "0); set it to 1, and config.mesh.data or fsdp higher"
            ),
        ),
        (
            ("mesh.expert=8", "experts.number=12"),
            (
                "config.experts.number = 12 does not divide by config.mesh.expert = 8; choose a "
                "multiple of 8"
            ),
        ),
        (
            ("mesh.expert=8", "experts.per_token=9"),
            "config.experts.per_token = 9: from 1 to config.experts.number = 8",
        ),
        (
            ("mesh.data=8", "parallel.rules={'experts': ['tensor']}"),
            (
                "config.parallel.rules.experts = ('tensor',): the exchange of tokens between "
                "experts fixes it; leave it out"
            ),
        ),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError) as error:
        job(*changes)
    assert str(error.value) == message
