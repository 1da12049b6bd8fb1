"""Moments in host memory: the same training, with one layer of them at a time on the device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import get_mesh

from parallel.precision import PrecisionConfig
from parallel.targets import parse_target
from tests.small import layout
from tests.training.test_optim import AXES, arrays, config_of, place, rules_for
from training.by_layer import ByLayer
from training.checkpoint import CheckpointConfig, Checkpoints
from training.optim import BITS, NAMES, apply_update, make_optimizer, state_specs
from training.schedules import make_schedule
from training.state import abstract_state, create_state, shardings_of
from training.step import make_step

HOST = jax.memory.Space.Host
FLOAT32 = PrecisionConfig()
MESH = dict(fsdp=4, tensor=2)


def shardings_for(optimizer, params, rules):
    """Where the state of these parameters belongs, on the current mesh."""
    shardings = shardings_of(state_specs(optimizer, AXES, params, rules), get_mesh())
    return optimizer.placed(shardings, params) if isinstance(optimizer, ByLayer) else shardings


def laid_out(optimizer, rules):
    """Parameters, and the optimizer's state where it belongs."""
    params = place(arrays(0), rules.at_rest)
    shardings = shardings_for(optimizer, params, rules)
    return params, jax.jit(optimizer.init, out_shardings=shardings)(params)


def updated(config, rules):
    """Parameters and state after four updates in float16's way, of which one is skipped."""
    optimizer = make_optimizer(config, 10, AXES)
    params, state = laid_out(optimizer, rules)
    types = jax.tree.map(jax.typeof, (params, state))
    step = jax.jit(lambda *args: apply_update(optimizer, *args, scale=8.0), donate_argnums=(1, 2))
    for i in range(4):
        old = state
        before = jax.tree.map(np.asarray, (params, state)) if i == 2 else None
        grads = jax.tree.map(lambda a: (8 * a).astype(np.float16), arrays(i + 1))
        if before:
            grads["blocks"]["q"][1, 0] = np.inf  # in one layer: no layer may be updated
        params, state, _, finite = step(place(grads, rules.of_gradient), state, params)
        assert bool(finite) == (before is None)
        if before:
            jax.tree.map(np.testing.assert_array_equal, (params, state), before)
        else:  # NumPy's view would hold the donated arrays
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert jax.tree.map(jax.typeof, (params, state)) == types
    return jax.tree.map(np.asarray, (params, state))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("adamw8bit", "galore")])
def test_updates_are_the_same(use_mesh, name):
    rules = rules_for(MESH, zero=3)
    with use_mesh(**MESH):
        want = updated(config_of(name), rules)
        got = updated(config_of(name, offload=True), rules)
    # Elementwise arithmetic is the same to the bit. Muon's products of one matrix are summed in
    # another order than those of a batch of them: some 1e-7 of an entry, grown by five iterations.
    tolerance = 1e-5 if name == "muon" else 1e-6
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    jax.tree.map(close, got, want)


def equations(jaxpr):
    """All equations of a program and of the programs in it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda p: isinstance(p, ClosedJaxpr | Jaxpr)
        ):
            if isinstance(value, ClosedJaxpr | Jaxpr):
                yield from equations(getattr(value, "jaxpr", value))


@pytest.mark.parametrize("name", NAMES)
def test_only_slices_of_one_layer_travel(use_mesh, name):
    """Arrays in host memory are cut and written to, and what is moved is one layer's."""
    optimizer, rules = make_optimizer(config_of(name, offload=True), 10, AXES), rules_for(MESH, 3)
    with use_mesh(**MESH):
        params, state = laid_out(optimizer, rules)
        on_host = [leaf for leaf in jax.tree.leaves(state) if jax.typeof(leaf).memory_space == HOST]
        kept = {"adamw": 10, "muon": 7, "adafactor": 8, "galore": 13, "apollo": 10}
        assert len(on_host) == (kept | dict.fromkeys(BITS, 16)).get(name, 5)
        grads = place(arrays(1), rules.of_gradient)
        update = jax.make_jaxpr(lambda *args: apply_update(optimizer, *args))
        program = update(grads, state, params)
    moved = 0
    for eqn in equations(program.jaxpr):
        types = [v.aval for v in (*eqn.invars, *eqn.outvars) if hasattr(v.aval, "memory_space")]
        if not any(t.memory_space == HOST for t in types):
            continue
        kind = eqn.primitive.name
        if kind == "device_put":
            assert all(t.shape[0] == 1 for t in types), eqn
            moved += len(eqn.outvars)
        else:
            assert kind in ("while", "scan", "dynamic_slice", "dynamic_update_slice"), eqn
    assert moved == 2 * len(on_host)  # there and back


@pytest.mark.parametrize("offload", [False, True])
def test_checkpoints_do_not_know_of_it(use_mesh, tmp_path, offload):
    """Moments saved from host memory come back on another mesh, in host memory or not."""
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    optimizer = make_optimizer(config_of("adamw", offload=True), 10, AXES)
    with use_mesh(**MESH):
        rules = rules_for(MESH, zero=3)
        params, state = laid_out(optimizer, rules)
        update = jax.jit(lambda *args: apply_update(optimizer, *args))
        _, state, *_ = update(place(arrays(1), rules.of_gradient), state, params)
        checkpoints.save(1, state, {})
        checkpoints.close()
        saved = jax.tree.map(np.asarray, state)
    optimizer = make_optimizer(config_of("adamw", offload=offload), 10, AXES)
    with use_mesh(fsdp=2):
        rules = rules_for(dict(fsdp=2), zero=3)
        params = place(arrays(0), rules.at_rest)
        shardings = shardings_for(optimizer, params, rules)
        wanted = jax.tree.map(
            lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
            jax.eval_shape(optimizer.init, params),
            shardings,
        )
        _, restored = Checkpoints(tmp_path).restore(1, wanted)
        assert jax.tree.map(lambda a: a.sharding, restored) == shardings
    jax.tree.map(np.testing.assert_array_equal, restored, saved)
    on_host = [a for a in jax.tree.leaves(restored) if a.sharding.memory_kind == "pinned_host"]
    assert len(on_host) == (10 if offload else 0)


@pytest.mark.slow
def test_steps_are_the_same():
    """The whole step: losses of a decoder, and where its state is before and after."""

    def run(offload):
        config = config_of("adamw", learning_rate=1e-2, offload=offload)
        with layout(zero=3, dropout=0.0, layers=2, **MESH) as laid:
            optimizer = make_optimizer(config, 10, laid.model.axes)
            step = make_step(laid.model, optimizer, make_schedule(config, 10), FLOAT32, seed=0)
            step = jax.jit(step, donate_argnums=0)
            state = create_state(laid.model, optimizer, FLOAT32, 0, laid.mesh)
            wanted = abstract_state(laid.model, optimizer, FLOAT32, laid.mesh)
            losses = []
            for i in range(3):
                assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, wanted)
                state, metrics = step(state, laid.batch(i))
                losses.append(float(metrics["loss"]))
            return losses

    # The same arithmetic, in programs that XLA divides into fusions differently.
    np.testing.assert_allclose(run(True), run(False), rtol=1e-6)


COMPILE = """
import json, sys
from config_border import load_config, override
from experiment import read_experiment
from memory.compiled import compile_step
from parallel.targets import parse_target

target = parse_target(sys.argv[1])
for changes in json.loads(sys.argv[2]):
    config = override(load_config("configs/tiny.py"), [f"--config.{change}" for change in changes])
    job = read_experiment(config, target.device_count).job()
    print(json.dumps(compile_step(job, target).sizes()))
"""
# Dims that a TPU need not pad to tiles of 8 x 128 numbers, or it would count more bytes.
L8, D8, B8, T8 = 8, 1024, 8, 128
SMALL = [
    *("mesh.data=1", "mesh.fsdp=8", f"data.batch_size={B8}", f"data.sequence_length={T8}"),
    *("model.heads=8", "model.kv_heads=8", "model.head_dim=128", f"model.layers={L8}"),
    *(f"model.embed_dim={D8}", f"model.mlp_dim={D8}"),
]


def compiled(target, *cases):
    """What the target's compiler says of a small step with each of the changes, in one process."""
    root = Path(__file__).parents[2]
    environment = os.environ | target.environment() | {"XLA_FLAGS": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, sys.path)])
    found = subprocess.run(
        [sys.executable, "-c", COMPILE, target.name, json.dumps([SMALL + case for case in cases])],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    return [json.loads(line) for line in found.stdout.splitlines()[-len(cases) :]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpu:h100:1x8", "tpu:v5e:2x4"])
def test_bytes_leave_the_device(name):
    """Counted by the target's own compiler: what leaves the device is on the host, to the byte."""
    target = parse_target(name)
    try:
        target.check_compiler()
    except ValueError as error:
        pytest.skip(str(error))
    save = ["remat.policy=custom", "remat.save=attention_out,mlp_act"]
    kept, moments, saved = compiled(
        target,
        save,
        [*save, "optimizer.offload=true"],
        [save[0], "remat.save=attention_out", "remat.offload=mlp_act"],
    )
    assert kept["host_bytes"] == 0

    weights = L8 * (7 * D8 * D8 + 2 * D8)  # four projections, three of the feed-forward, two gains
    assert moments["host_bytes"] == 2 * 4 * weights // 8  # both moments, float32, over 8 devices
    assert kept["arguments"] - moments["arguments"] == moments["host_bytes"]
    layer = moments["host_bytes"] // L8
    # Fetched, written back, and the neighbours that the compiler overlaps: less than four layers.
    assert moments["temporaries"] - kept["temporaries"] < 4 * layer
    assert moments["total_bytes"] < kept["total_bytes"]

    assert saved["host_bytes"] == L8 * (B8 // 8) * T8 * D8 * 4  # [layers, rows, T, F], float32
    # Of so small a tensor a TPU's buffers for the transfers are larger than what leaves it.
    if target.chip.kind == "gpu":
        assert saved["total_bytes"] < kept["total_bytes"]
