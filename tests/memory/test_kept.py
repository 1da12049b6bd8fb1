"""Weights in other forms and adapters in the plan: state to the byte, what layers keep as compiled.

The deep model is that of `test_knobs`: what all layers keep is what counts.
"""

from __future__ import annotations

import math

import jax
import pytest

from config_border import load_config, override
from experiment import read_experiment
from memory.arrays import arrays_of
from memory.constants import CONSTANTS
from memory.predict import predict
from memory.roofline import step_time
from memory.terms import Terms
from parallel.mesh import make_mesh
from parallel.targets import cpu_target
from tests.memory.test_knobs import CLOSE, SCALARS, TESTS, XLA, T, compiled, predicted
from training.naming import named
from training.optim import make_optimizer
from training.state import abstract_state

LAYOUTS = {
    "one": (1, {}),
    "zero 1": (8, dict(mesh__data=1, mesh__fsdp=8, parallel__zero=1)),
    "zero 3": (8, dict(mesh__data=1, mesh__fsdp=8)),
    "tensor": (8, dict(mesh__data=2, mesh__tensor=4)),
}
MIXED = "int8@0 rank:8@1 int4:16"
SMALL = dict(model__layers=4, model__embed_dim=64, model__mlp_dim=128, model__head_dim=8)
SMALL |= dict(data__sequence_length=16, data__batch_size=8)


def keys_of(form="", method="", **values):
    keys = dict(values)
    if form:
        keys["weights__forms"] = f"{{'stack/*': '{form}'}}"
    if method:
        keys |= dict(adapter__method=method, adapter__base="runs/base", adapter__rank=4)
    return keys


def experiment(devices, **values):
    flags = [f"--config.{k.replace('__', '.')}={v}" for k, v in (SMALL | values).items()]
    return read_experiment(
        override(load_config(str(TESTS.parent / "configs/tiny.py")), flags), devices
    )


@pytest.mark.parametrize(
    ("form", "method", "layout", "more"),
    [
        ("int8", "", "zero 1", {}),
        ("int4:16", "lora", "tensor", {}),
        ("nf4:16", "lora", "zero 3", {}),
        ("2:4", "", "tensor", {}),
        ("rank:8", "", "zero 1", dict(optimizer__name="adafactor")),
        (MIXED, "lora", "zero 3", {}),
        (MIXED, "", "tensor", {}),
        ("", "lora", "zero 1", dict(optimizer__name="muon")),
        ("", "dora", "tensor", dict(precision__params="bfloat16")),
        ("int4:16", "dora", "zero 3", {}),
        ("int4:16", "ia3", "tensor", {}),
        ("", "ia3", "one", {}),
        ("", "prefix", "tensor", {}),
        ("int4:16", "prefix", "zero 3", {}),
    ],
    ids=str,
)
def test_state_and_batch_are_predicted_to_the_byte(form, method, layout, more):
    devices, sizes = LAYOUTS[layout]
    chosen = experiment(devices, **keys_of(form, method, **sizes, **more))
    mesh = make_mesh(chosen.mesh, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        model = chosen.build_model()
        transform = make_optimizer(chosen.optimizer, 10, model.trained(model.axes))
        state = abstract_state(model, transform, chosen.precision, mesh)
    arrays = jax.tree.leaves(state)
    held = sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in arrays)
    own = chosen.job()
    batch = 4 * 4 * own.batch_size * own.sequence_length // own.rules.parts("batch")
    # Counters, the loss scale and Muon's three coefficients are not predicted.
    few = 4 * sum(a.size for a in arrays if a.size <= 3)
    assert predict(own, cpu_target(devices).chip).arguments + few == held + batch


@pytest.mark.parametrize("layout", ["zero 3", "tensor"])
def test_the_jobs_model_is_that_which_trains(layout):
    devices, sizes = LAYOUTS[layout]
    chosen = experiment(devices, **keys_of(MIXED, "lora", **sizes))
    with jax.set_mesh(make_mesh(chosen.mesh, jax.devices()[:devices])):
        trains, planned = chosen.build_model(), chosen.job().build_model()
    assert trains.axes == planned.axes
    assert trains.frozen == planned.frozen
    arrays = arrays_of(chosen.job())
    wanted = {name for name in named(trains.axes) if name not in trains.frozen}
    assert {a.name for a in arrays.stacked + arrays.outside if a.trained} == wanted


INT4 = "weights.forms={'stack/*': 'int4:32'}"


def adapter(method, *more):
    return (f"adapter.method={method}", "adapter.base=runs/base", "adapter.rank=4", *more)


KEPT = {
    "lora": ("remat.policy=none", *adapter("lora")),
    "lora of queries": ("remat.policy=none", *adapter("lora", "adapter.names=stack/*/query")),
    "dora on int4": ("remat.policy=none", *adapter("dora"), INT4),
    "ia3": ("remat.policy=none", *adapter("ia3")),
    "prefix": ("remat.policy=none", *adapter("prefix", "adapter.prefix_length=4")),
    "rank": ("remat.policy=none", "weights.forms={'stack/*': 'rank:8'}"),
    "2:4": ("remat.policy=none", "weights.forms={'stack/*': '2:4'}"),
    "quantize": ("remat.policy=none", "quantize.forms={'stack/*': 'int4:32'}"),
    "ia3 by name": ("remat.policy=attention", *adapter("ia3")),
    "lora on int4 by name": ("remat.policy=dots", *adapter("lora"), INT4),
    "int4 by name": ("remat.policy=dots", INT4),
}
FAST = ("lora", "int4 by name")  # the others take a minute together


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in KEPT]
)
def test_layers_keep_what_is_predicted(name):
    """Of frozen weights no input, between factors a few numbers a token; arguments to the byte."""
    found, guess = compiled(XLA, *KEPT[name]), predicted(XLA, *KEPT[name])
    assert found.arguments == guess.arguments + SCALARS
    backward = guess.phases["backward"] / CONSTANTS["cpu"].packing  # as `test_knobs.moved` has it
    assert found.temporaries == pytest.approx(backward, rel=CLOSE)


def test_codes_and_scales_are_not_cast():
    """Of a packed base there is a copy in compute dtype of tables, norms and adapters alone."""
    values = dict(precision__compute="bfloat16")
    chip = cpu_target(1).chip
    copies = [
        predict(experiment(1, **keys_of(form, "lora", **values)).job(), chip).components
        for form in ("", "int8")
    ]
    job = experiment(1).job()
    stacked = 4 * (2 * 64 * 64 + 2 * 64 * 64 + 3 * 64 * 128)  # heads and kv_heads are 8
    assert job.model.heads == job.model.kv_heads == 8
    change = copies[0]["weights in compute dtype"] - copies[1]["weights in compute dtype"]
    assert change == 2 * stacked


@pytest.mark.parametrize(("layout", "parts"), [("zero 3", 1), ("tensor", 4)])
@pytest.mark.parametrize("key", ["weights", "quantize"])
def test_one_layer_is_made_dense_beside_its_codes(key, layout, parts):
    devices, sizes = LAYOUTS[layout]
    keys = {f"{key}__forms": "{'stack/*/mlp/*': 'int8'}"}
    own = Terms(experiment(devices, **sizes, **keys).job(), cpu_target(devices).chip)
    assert own.layer_made == 4 * 3 * 64 * 128 // parts


def test_what_is_gathered_and_reduced_is_what_there_is():
    """Codes travel in place of the dense weights, and no gradient of theirs."""
    devices, sizes = LAYOUTS["zero 3"]
    target = cpu_target(devices)
    times = [
        step_time(experiment(devices, **keys_of(form, method, **sizes)).job(), target)
        for form, method in (("", ""), ("", "lora"), ("int4:16", "lora"))
    ]
    dense, frozen, packed = (time.communication_seconds["fsdp"] for time in times)
    assert packed < frozen < dense


def test_planning_makes_no_key(monkeypatch):
    """Devices of a target that is not here run nothing: shapes come of a trace alone."""
    key = jax.random.key

    def traced(*args, **kwargs):
        made = key(*args, **kwargs)
        assert isinstance(made, jax.core.Tracer)
        return made

    devices, sizes = LAYOUTS["zero 3"]
    chosen = experiment(devices, **keys_of("int4:16", "lora", **sizes))
    monkeypatch.setattr(jax.random, "key", traced)
    with jax.set_mesh(make_mesh(chosen.mesh, jax.devices()[:devices])):
        chosen.job().build()


def test_a_prefix_is_before_the_keys_of_every_query():
    """Saved probabilities are of T + P keys."""
    name = "saved: attention_probs"
    dense, prefixed = (
        predicted(XLA, "remat.policy=none", *more).components[name]
        for more in ((), adapter("prefix", f"adapter.prefix_length={T // 4}"))
    )
    assert prefixed == dense * 5 // 4
