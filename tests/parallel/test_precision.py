"""Dtypes: what is stored, what is computed with, and the loss scale of float16."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import get_mesh

from models.config import ModelConfig
from parallel.precision import LossScale, PrecisionConfig
from tests.drawn import drawn_params
from tests.small import layout
from tests.training.line import BAD, D, line, tokens
from training.state import TrainState, abstract_state, create_state
from training.step import make_step

TINY = ModelConfig(
    vocab_size=250, layers=2, embed_dim=32, mlp_dim=32, heads=2, kv_heads=1, head_dim=8,
    attention="xla",
)  # fmt: skip
HALF = PrecisionConfig(compute="float16", scale=2.0**15, scale_steps=3)


def run(model, precision, batches, optimizer=None):
    """The states and metrics of some steps, as NumPy; the first state is the initial one."""
    optimizer = optimizer or optax.sgd(0.1)
    schedule = lambda count: jnp.float32(0.1)
    step = jax.jit(make_step(model, optimizer, schedule, precision, seed=0))
    states, metrics = [create_state(model, optimizer, precision, 0, get_mesh())], []
    for batch in batches:
        state, numbers = step(states[-1], batch)
        states.append(state)
        metrics.append({name: float(value) for name, value in numbers.items()})
    return states, metrics


def test_the_scale_halves_on_overflow_and_doubles_after_good_steps(use_mesh):
    """A gradient of 8 times the scale: beyond 65504, float16's largest, until the scale is 4096."""
    with use_mesh():
        batch = tokens([[0, 0], [0, 0]])
        states, metrics = run(line(8.0), HALF, [batch] * 10)
    scales = [2.0**15, 2.0**14, 2.0**13, *[2.0**12] * 3, 2.0**13, *[2.0**12] * 3]
    assert [m["loss_scale"] for m in metrics] == scales
    finite = [scale == 2.0**12 for scale in scales]
    assert [m["finite"] for m in metrics] == finite
    assert [m["skipped"] for m in metrics] == np.cumsum(np.logical_not(finite)).tolist()
    assert [int(s.step) for s in states] == list(range(11))  # a skipped step is a step
    w = 1.0
    for before, after, m in zip(states, states[1:], metrics, strict=False):
        assert m["loss"] == pytest.approx(8 * w, rel=1e-3)  # float16, and without the scale
        if m["finite"]:
            assert m["grad_norm"] == 8
            w -= 0.1 * 8
            np.testing.assert_allclose(after.params["w"][0], w, rtol=1e-6)
        else:
            np.testing.assert_array_equal(after.params["w"], before.params["w"])


def test_a_bad_step_changes_no_bit_of_the_state(use_mesh):
    """Also where nothing is scaled: an infinite loss, between good steps."""
    for precision in (PrecisionConfig(), HALF):
        with use_mesh():
            good, bad = tokens([[0, 1]]), tokens([[0, 1]], targets=BAD)
            states, metrics = run(line(0.5), precision, [good, bad, good], optax.adam(0.1))
            straight, _ = run(line(0.5), precision, [good, good], optax.adam(0.1))
        assert [m["finite"] for m in metrics] == [1, 0, 1]
        before, after = states[1:3]
        for part in ("params", "opt_state"):
            jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(before, part))
            jax.tree.map(
                np.testing.assert_array_equal,
                getattr(states[-1], part),
                getattr(straight[-1], part),
            )
        assert int(states[-1].step) == 3
        assert int(states[-1].skipped) == 1
        assert np.any(np.asarray(states[1].params["w"]) != np.asarray(states[0].params["w"]))


def test_the_scale_stays_within_its_bounds():
    config = PrecisionConfig(compute="float16", scale=2.0, scale_steps=1)
    scale = LossScale.init(config)
    for want in (1.0, 1.0):
        scale = scale.update(config, jnp.asarray(False))
        assert float(scale.scale) == want
    for _ in range(30):
        scale = scale.update(config, jnp.asarray(True))
    assert float(scale.scale) == 2.0**24
    plain = LossScale.init(PrecisionConfig())
    assert float(plain.scale) == 1.0
    assert plain.update(PrecisionConfig(), jnp.asarray(False)) is plain


def test_overflow_starts_the_count_of_good_steps_again():
    scale = LossScale.init(HALF)
    for finite, want in ((1, 15), (0, 14), (1, 14), (1, 14), (1, 15), (1, 15)):
        scale = scale.update(HALF, jnp.asarray(bool(finite)))
        assert math.log2(float(scale.scale)) == want


def test_small_updates_are_kept_by_a_float32_master_alone(use_mesh):
    """Updates of 1e-3 on a weight of 1, where bfloat16 has a step of 4e-3: its own sum stays 1."""
    got = {}
    with use_mesh():
        for params in ("float32", "bfloat16"):
            precision = PrecisionConfig(params=params, compute="bfloat16")
            batches = [tokens([[0]])] * 8
            states, _ = run(line(), precision, batches, optax.adamw(1e-3, weight_decay=0))
            for leaf in jax.tree.leaves((states[-1].params, states[-1].opt_state)):
                assert leaf.dtype in (jnp.dtype(params), jnp.int32)
            got[params] = float(states[-1].params["w"][0])
    assert got["float32"] == pytest.approx(1 - 8e-3, rel=1e-5)
    assert got["bfloat16"] == 1.0


@pytest.mark.parametrize(("params", "size"), [("float32", 4), ("bfloat16", 2)])
def test_argument_bytes_go_by_the_dtype_of_params(use_mesh, params, size):
    """Master copy and two moments; the copy in compute dtype is a temporary."""
    precision = PrecisionConfig(params=params, compute="bfloat16")
    optimizer = optax.adamw(1e-3)
    with use_mesh():
        state = abstract_state(line(), optimizer, precision, get_mesh())
        step = make_step(line(), optimizer, lambda _: jnp.float32(0), precision, seed=0)
        compiled = jax.jit(step).lower(state, tokens([[0, 0]])).compile()
    counters, batch = 5 * 4, 2 * 3 * 4  # tokens, targets and segments of two int32 (all are read)
    assert compiled.memory_analysis().argument_size_in_bytes == 3 * D * size + counters + batch


@pytest.mark.slow
def test_loss_curves_of_bfloat16_and_float16_follow_float32():
    """Ten steps of AdamW on one batch. bfloat16 rounds at 4e-3 and float16 at 5e-4, either way: the
    loss, a mean over 100 tokens, is off by less.
    """
    curves = {}
    for compute in ("float32", "bfloat16", "float16"):
        with layout(config=TINY) as laid:
            precision, optimizer = PrecisionConfig(compute=compute), optax.adamw(1e-2)
            small = jax.tree.map(lambda p: 0.3 * p, drawn_params(laid, TINY))
            params, zero = laid.params(small), jnp.int32(0)
            scale = LossScale.init(precision)
            state = TrainState(zero, params, optimizer.init(params), scale, zero)
            schedule = lambda count: jnp.float32(1e-2)
            step = jax.jit(make_step(laid.model, optimizer, schedule, precision, seed=0))
            losses, batch = [], laid.batch()
            for _ in range(10):
                state, metrics = step(state, batch)
                losses.append(float(metrics["loss"]))
            assert int(state.skipped) == 0
            assert {p.dtype for p in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
            curves[compute] = np.asarray(losses)
    assert curves["float32"][-1] < curves["float32"][0] - 0.5
    assert not np.array_equal(curves["bfloat16"], curves["float32"])
    np.testing.assert_allclose(curves["bfloat16"], curves["float32"], rtol=4e-3)
    np.testing.assert_allclose(curves["float16"], curves["float32"], rtol=5e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"compute": "float8"},
            "config.precision.compute = 'float8': choose one of float32, bfloat16, float16",
        ),
        (
            {"accumulate": 32},
            "config.precision.accumulate = 32: choose one of float32, bfloat16, float16",
        ),
        (
            {"params": "float16"},
            (
                "config.precision.params = 'float16': updates underflow in float16; keep the "
                "master copy in float32 (or bfloat16) and set config.precision.compute"
            ),
        ),
        ({"scale": 0.5}, "config.precision.scale = 0.5: a loss scale is at least 1"),
        ({"scale": math.nan}, "config.precision.scale = nan: a loss scale is at least 1"),
        ({"scale_steps": 0}, "config.precision.scale_steps = 0: at least 1"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError) as error:
        PrecisionConfig(**options)
    assert str(error.value) == message
