"""Optimizers on every layout against one device, and against optax where optax has a say."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from parallel.mesh import MeshConfig, make_mesh
from parallel.rules import ParallelConfig, make_rules
from training.matrices import decays, matrix_dims, orthogonalises
from training.optim import (
    BITS,
    NAMES,
    SCALES,
    OptimizerConfig,
    apply_update,
    make_optimizer,
    state_specs,
)
from training.schedules import make_schedule

L, D, N, H, F, V = 3, 16, 4, 8, 32, 128
AXES = {
    "blocks": {
        "q": "layers embed -> heads head_dim",
        "o": "layers heads head_dim -> embed",
        "up": "layers embed -> mlp",
        "gain": "layers norm",
        "bias": "layers heads head_dim",
    },
    "table": "vocab -> embed",
}
SIZES = {"layers": L, "embed": D, "heads": N, "head_dim": H, "mlp": F, "norm": D, "vocab": V}
SHAPES = jax.tree.map(lambda names: tuple(SIZES[n] for n in names.replace("->", "").split()), AXES)
STEPS = 3


def is_shape(x):
    return isinstance(x, tuple)


def arrays(seed):
    """A tree of numbers of different sizes, so that clipping and scaling have something to do."""
    rng = np.random.default_rng(seed)
    make = lambda shape: (rng.normal(size=shape) * rng.uniform(0.5, 2)).astype(np.float32)
    return jax.tree.map(make, SHAPES, is_leaf=is_shape)


def place(tree, spec_of):
    return jax.tree.map(lambda a, names: jax.device_put(a, spec_of(names, a.shape)), tree, AXES)


def config_of(name, **changes):
    given = {"learning_rate": 0.1, "warmup_steps": 2, "rank": 4, "refresh": 2}
    return OptimizerConfig(**({"name": name} | given | changes))


def rules_for(sizes, zero):
    return make_rules(ParallelConfig(zero=zero), MeshConfig(**({"data": 1} | sizes)).sizes(), {})


def train(config, rules, dtype=np.float32, scale=1.0):
    """The parameters and the state after a few updates on the current mesh."""
    optimizer = make_optimizer(config, 10, AXES)
    params = place(arrays(0), rules.at_rest)
    state = jax.jit(optimizer.init)(params)
    types = jax.tree.map(jax.typeof, (params, state))
    step = jax.jit(lambda *args: apply_update(optimizer, *args, scale=scale))
    for i in range(STEPS):
        grads = jax.tree.map(lambda a: (a * scale).astype(dtype), arrays(i + 1))
        params, state, _, finite = step(place(grads, rules.of_gradient), state, params)
        assert finite
    assert jax.tree.map(jax.typeof, (params, state)) == types
    specs = state_specs(optimizer, AXES, params, rules)
    assert jax.tree.map(lambda a: a.sharding.spec, state) == specs
    return jax.tree.map(np.asarray, params), jax.tree.map(np.asarray, state)


def assert_near(got, want, tolerance):
    """Near as a fraction of how far the parameters moved."""
    moved = jax.tree.map(lambda a, b: np.linalg.norm(a - b), want, arrays(0))
    off = jax.tree.map(lambda a, b: np.linalg.norm(a - b), got, want)
    assert all(jax.tree.leaves(jax.tree.map(lambda o, m: o <= tolerance * m, off, moved))), off


@functools.cache
def on_one_device(config):
    with jax.set_mesh(make_mesh(MeshConfig(data=1), jax.devices()[:1])):
        return train(config, rules_for({}, 0))


MESHES = [({"fsdp": 8}, 3), ({"data": 2, "tensor": 4}, 0)]


@pytest.mark.parametrize("name", NAMES)
def test_sharded_updates_equal_one_device(use_mesh, name):
    config = config_of(name)
    want, want_state = on_one_device(config)
    lean = name in {*BITS, *SCALES}  # which take seconds to compile
    for sizes, zero in [({"fsdp": 4, "tensor": 2}, 3)] if lean else MESHES:
        with use_mesh(**sizes):
            got, state = train(config, rules_for(sizes, zero))
        assert_near(got, want, 1e-5)
        # Singular vectors turn by the rounding of a gradient over the gap of their values.
        least = 1e-5 if name == "galore" else 1e-6
        near = partial(np.testing.assert_allclose, rtol=1e-4, atol=least)
        jax.tree.map(near, state, want_state)


@pytest.mark.parametrize("zero", [1, 2])
def test_gradients_come_in_any_sharding_and_dtype(use_mesh, zero):
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    config = config_of("sgd", momentum=0.0)
    with use_mesh(**sizes):
        got, _ = train(config, rules_for(sizes, zero), jnp.bfloat16)
    assert_near(got, on_one_device(config)[0], 4e-3)  # bfloat16 rounds each gradient by 2^-9


def test_a_loss_scale_is_taken_out_before_clipping(use_mesh):
    config = config_of("adamw")
    with use_mesh():
        got, _ = train(config, rules_for({}, 0), scale=1024.0)
    assert_near(got, on_one_device(config)[0], 1e-6)


def by_optax(optimizer, params, grads_of):
    state = optimizer.init(params)
    update = jitted(optimizer)
    with jax.numpy_dtype_promotion("standard"):
        for i in range(STEPS):
            updates, state = update(grads_of(i + 1), state, params)
            params = optax.apply_updates(params, updates)
    return params


@functools.cache
def jitted(optimizer):
    return jax.jit(optimizer.update)


def clipped(seed):
    grads = arrays(seed)
    norm = np.sqrt(sum(np.sum(a**2) for a in jax.tree.leaves(grads)))
    return jax.tree.map(lambda a: a / np.float32(norm), grads)


MASK = {
    "blocks": {"q": True, "o": True, "up": True, "gain": False, "bias": False},
    "table": True,
}


def test_adamw_lion_and_sgd_equal_optax_with_an_explicit_mask():
    for name, theirs in {
        "adamw": lambda rate: optax.adamw(rate, 0.9, 0.95, weight_decay=0.1, mask=MASK),
        "lion": lambda rate: optax.lion(rate, 0.9, 0.95, weight_decay=0.1, mask=MASK),
        "sgd": lambda rate: optax.chain(
            optax.trace(0.9),
            optax.add_decayed_weights(0.1, MASK),
            optax.scale_by_learning_rate(rate),
        ),
    }.items():
        config = config_of(name)
        want = by_optax(theirs(make_schedule(config, 10)), arrays(0), clipped)
        assert_near(on_one_device(config)[0], jax.tree.map(np.asarray, want), 1e-5)


def stacks(tree):
    """The matrices of a tree of stacks: {name: [L, in, out]}."""
    b = tree["blocks"]
    return {"q": b["q"].reshape(L, D, -1), "o": b["o"].reshape(L, -1, D), "up": b["up"]}


def one_by_one(optimizer):
    """`optimizer` on every layer's matrices apart."""
    results = [
        by_optax(
            optimizer,
            jax.tree.map(lambda a, i=i: a[i], stacks(arrays(0))),
            lambda seed, i=i: jax.tree.map(lambda a: a[i], stacks(clipped(seed))),
        )
        for i in range(L)
    ]
    return jax.tree.map(lambda *layers: np.stack(layers), *results)


def test_muon_equals_optax_on_each_matrix_apart():
    config = config_of("muon", momentum=0.95)
    rate = make_schedule(config, 10)
    want = one_by_one(optax.contrib.muon(rate, beta=0.95, weight_decay=0.1, consistent_rms=0.2))
    got = on_one_device(config)[0]
    moved = jax.tree.map(lambda a, b: np.linalg.norm(a - b), want, stacks(arrays(0)))
    off = jax.tree.map(lambda a, b: np.linalg.norm(a - b), stacks(got), want)
    # Five rounds of Newton-Schulz in float32 multiply rounding errors by up to 3.4 each.
    assert all(off[name] < 1e-4 * moved[name] for name in moved), (off, moved)
    adam = by_optax(optax.adamw(rate, 0.9, 0.95, weight_decay=0.1, mask=MASK), arrays(0), clipped)
    for key in ("gain", "bias"):
        np.testing.assert_allclose(got["blocks"][key], adam["blocks"][key], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got["table"], adam["table"], rtol=1e-5, atol=1e-6)


def test_adafactor_equals_optax_on_each_matrix_apart():
    config = config_of("adafactor")
    theirs = optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=1),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(make_schedule(config, 10)),
    )
    want, got = one_by_one(theirs), stacks(on_one_device(config)[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


def test_adafactor_factors_matrices_by_name_and_vectors_never():
    moments = on_one_device(config_of("adafactor"))[1]["direction"].moments
    shapes = jax.tree.map(lambda a: a.shape, moments)
    assert shapes["blocks"] == {
        "q": {"row": (L, D), "column": (L, N, H)},
        "o": {"row": (L, N, H), "column": (L, D)},
        "up": {"row": (L, D), "column": (L, F)},
        "gain": {"full": (L, D)},
        "bias": {"full": (L, N, H)},
    }
    assert shapes["table"] == {"row": (V,), "column": (D,)}


def test_names_decide_what_decays_and_what_muon_takes():
    assert jax.tree.map(decays, AXES) == MASK
    assert jax.tree.map(orthogonalises, AXES) == MASK | {"table": False}
    assert not orthogonalises("embed -> vocab")
    assert not orthogonalises("position -> embed")
    assert matrix_dims("layers heads head_dim -> embed") == ((1, 2), (3,))
    assert matrix_dims("layers norm") is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_changes_nothing(use_mesh, bad):
    sizes = {"fsdp": 4, "tensor": 2}
    with use_mesh(**sizes):
        rules = rules_for(sizes, 3)
        optimizer = make_optimizer(config_of("adamw"), 10, AXES)
        params = place(arrays(0), rules.at_rest)
        step = jax.jit(lambda *args: apply_update(optimizer, *args))
        state = jax.jit(optimizer.init)(params)
        good, spoilt = arrays(1), arrays(1)
        spoilt["blocks"]["up"][1, 2, 3] = bad
        good, spoilt = (place(g, rules.of_gradient) for g in (good, spoilt))
        params, state, norm, finite = step(good, state, params)
        assert finite
        assert np.isfinite(norm)
        old = jax.tree.map(np.asarray, (params, state))
        params, state, norm, finite = step(spoilt, state, params)
        assert not finite
        assert not np.isfinite(norm)
        jax.tree.map(np.testing.assert_array_equal, (params, state), old)
        _, state, _, finite = step(good, state, params)
        assert finite
        assert state["rate"].count == 2, "a skipped update does not move the schedule"


def test_clipping_by_global_norm(use_mesh):
    with use_mesh(fsdp=8):
        rules = rules_for({"fsdp": 8}, 3)
        params, grads = place(arrays(0), rules.at_rest), place(arrays(1), rules.of_gradient)
        true_norm = np.sqrt(sum(np.sum(a**2) for a in jax.tree.leaves(arrays(1))))
        for limit, factor in [(1.0, 1 / true_norm), (2 * true_norm, 1.0), (0.0, 1.0)]:
            config = config_of(
                "sgd", momentum=0.0, weight_decay=0.0, clip_norm=limit, warmup_steps=0
            )
            optimizer = make_optimizer(config, 10, AXES)
            state = optimizer.init(params)
            new, _, norm, _ = jax.jit(lambda *a, o=optimizer: apply_update(o, *a))(
                grads, state, params
            )
            assert float(norm) == pytest.approx(true_norm, rel=1e-6), "before clipping"
            want = jax.tree.map(lambda p, g, f=factor: p - 0.1 * f * g, arrays(0), arrays(1))
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), new, want)
            updates, _ = jax.jit(optimizer.update)(grads, state, params)  # without a known norm
            want = jax.tree.map(lambda g, f=factor: -0.1 * f * g, arrays(1))
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), updates, want)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in {*BITS, *SCALES}])
def test_a_donated_step_is_updated_in_place(use_mesh, name):
    """Skipping needs the old state, and yet no copy of it beside what the update itself takes."""
    axes = dict.fromkeys("abcd", "layers embed -> mlp")
    with use_mesh():
        params = {key: jnp.ones((2, 64, 64)) for key in axes}
        optimizer = make_optimizer(config_of(name), 10, axes)
        state = optimizer.init(params)

        def grads(params):
            return jax.grad(lambda p: sum(jnp.sum(jnp.sin(p["a"] @ a)) for a in p.values()))(params)

        def ours(state, params):
            params, state, norm, finite = apply_update(optimizer, grads(params), state, params)
            return state, params, norm, finite

        def plain(state, params):
            updates, state = optimizer.update(grads(params), state, params)
            return state, optax.apply_updates(params, updates)

        with jax.numpy_dtype_promotion("standard"):
            compiled = [
                jax.jit(f, donate_argnums=(0, 1)).lower(state, params).compile()
                for f in (ours, plain)
            ]
    sizes, plain_sizes = (c.memory_analysis() for c in compiled)
    donated = sum(a.nbytes for a in jax.tree.leaves((state, params)))
    assert sizes.alias_size_in_bytes >= donated
    leaf = params["a"].nbytes
    # Muon's products are the peak, and the gradients stay beside them until the branch ends.
    kept = 4 * leaf if name == "muon" else 0
    assert sizes.temp_size_in_bytes < plain_sizes.temp_size_in_bytes + kept + leaf / 2
    if name != "lion":  # reads the old moment after writing the new one
        assert not [
            s for s in compiled[0].as_text().splitlines() if "64,64]" in s and " copy(" in s
        ]


COSINE = {"learning_rate": 2.0, "warmup_steps": 4, "final_fraction": 0.1}


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({"schedule": "cosine"}, {0: 0.5, 3: 2.0, 4: 2.0, 12: 1.1, 20: 0.2, 99: 0.2}),
        ({"schedule": "wsd"}, {0: 0.5, 3: 2.0, 16: 2.0, 18: 1.1, 20: 0.2, 99: 0.2}),
        ({"schedule": "wsd", "decay_fraction": 1.0}, {3: 2.0, 4: 2.0, 12: 1.1, 20: 0.2}),
        ({"schedule": "wsd", "decay_fraction": 0.0}, {3: 2.0, 19: 2.0}),
        ({"schedule": "constant"}, {0: 0.5, 3: 2.0, 99: 2.0}),
        ({"schedule": "constant", "warmup_steps": 0}, {0: 2.0}),
        ({"schedule": "cosine", "warmup_steps": 0}, {0: 2.0, 10: 1.1, 20: 0.2}),
        ({"schedule": "cosine", "warmup_steps": 40}, {0: 0.05, 19: 1.0}),  # longer than the run
        ({"schedule": "wsd", "warmup_steps": 40}, {0: 0.05, 19: 1.0}),
    ],
)
def test_schedule_values_at_named_steps(changes, values):
    schedule = make_schedule(OptimizerConfig(**(COSINE | changes)), total_steps=20)
    got = {count: float(schedule(jnp.int32(count))) for count in values}
    assert got == pytest.approx(values, rel=1e-6)


@pytest.mark.parametrize(
    "values",
    [
        {"name": "adam"},
        {"schedule": "linear"},
        {"learning_rate": 0.0},
        {"warmup_steps": -1},
        {"final_fraction": 1.5},
        {"decay_fraction": -0.1},
        {"weight_decay": -0.1},
        {"clip_norm": -1.0},
        {"b1": 1.0},
        {"b2": -0.5},
        {"momentum": 1.0},
        {"eps": 0.0},
        {"learning_rate": float("nan")},
    ],
)
def test_config_names_the_key_and_the_value(values):
    ((key, value),) = values.items()
    with pytest.raises(ValueError, match=f"config.optimizer.{key} = {value!r}: "):
        OptimizerConfig(**values)
