"""Adapters compute and learn what the dense weights that they stand for say, on every layout."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from parallel.adapted import base_name
from parallel.precision import PrecisionConfig
from tests.jaxpr import primitives
from tests.small import DECODER, initial_params, layout
from training.adapters import AdapterConfig, adapted, begun
from training.naming import named
from training.state import create_state
from training.step import loss_and_grads, make_step
from training.stored import WeightsConfig, dense_params, is_matrix, stored

FLOAT32 = PrecisionConfig()
SMALL = replace(DECODER, layers=2, dropout=0.0)
LAYOUTS = [
    dict(fsdp=8, zero=3),
    dict(data=2, tensor=4),
    dict(data=2, fsdp=2, tensor=2, zero=2, sequence=True),
]
RANK, ALPHA = 4, 8.0
# Columns of heads, fewer than the parts; rows of heads; rows of the feed-forward.
NAMES = ("stack/*/key", "stack/*/out", "stack/*/down")


def config_of(method, **changes):
    names = ("stack/*/key", "stack/*/down") if method == "ia3" else NAMES
    given = dict(base="runs/base", rank=RANK, alpha=ALPHA, names=names)
    return AdapterConfig(method, **given | changes)


@contextmanager
def adapted_layout(config, forms=None, **sizes):
    """A layout whose model has adapters, and that model without them."""
    with layout(**dict(config=SMALL) | sizes) as laid:
        base = stored(laid.model, WeightsConfig(forms or {}))
        yield replace(laid, model=adapted(base, config)), base


@functools.cache
def filled(method, form="", seed=0):
    """NumPy parameters whose adapters are far from what they begin with."""
    with adapted_layout(config_of(method), {"stack/*": form} if form else {}) as (laid, base):
        params = jax.jit(base.init)(jax.random.key(0))
        tree = jax.tree.map(np.asarray, begun(laid.model, params, config_of(method), FLOAT32, 1))
        rng = np.random.default_rng(seed)
        leaves = {
            name: a if name in laid.model.frozen else a + 0.1 * rng.normal(size=a.shape)
            for name, a in named(tree).items()
        }
        leaves = [leaves[n].astype(a.dtype) for n, a in named(tree).items()]
        return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def loss_of(laid, params):
    """The loss, and the gradients by name."""
    metrics, grads = jax.jit(loss_and_grads(laid.model, FLOAT32))(
        params, laid.batch(), None, jnp.float32(1)
    )
    return float(metrics["loss"]), {n: np.asarray(g) for n, g in named(grads).items()}


def formula(method, name, w, own):
    """One layer's dense weight, by the papers; w [contracted dims, others]."""
    if method == "ia3":
        gain = own["gain"]
        return w * gain.reshape(*gain.shape, 1) if name.endswith("down") else w * gain[None]
    v = w + ALPHA / RANK * jnp.tensordot(own["into"], own["out_of"], 1)
    if method == "lora":
        return v
    dims = tuple(range(own["into"].ndim - 1))
    norm = jax.lax.stop_gradient(jnp.sqrt(jnp.sum(v**2, dims, keepdims=True)))
    return own["magnitude"].reshape(norm.shape) * v / norm


@functools.cache
def on_one_device(method, form):
    with adapted_layout(config_of(method), {"stack/*": form} if form else {}) as (laid, _):
        return loss_of(laid, laid.params(filled(method, form)))


@functools.cache
def dense_loss():
    """Of the model without adapters: parameters -> loss and gradients, compiled once."""
    with layout(config=SMALL) as plain:
        return jax.jit(loss_and_grads(plain.model, FLOAT32))


def of_dense(params):
    with layout(config=SMALL) as plain:
        given = plain.params(params), plain.batch(), None, jnp.float32(1)
        metrics, grads = dense_loss()(*given)
        return float(metrics["loss"]), {n: np.asarray(g) for n, g in named(grads).items()}


@pytest.mark.parametrize(("method", "form"), [("lora", ""), ("dora", "nf4:16"), ("ia3", "")])
def test_loss_and_gradients_are_those_of_the_dense_weight(method, form):
    params = filled(method, form)
    forms = {"stack/*": form} if form else {}
    with adapted_layout(config_of(method), forms) as (laid, base):
        placed = laid.params(params)
        loss, grads = on_one_device(method, form)
        merged = jax.tree.map(np.asarray, dense_params(placed, laid.model.axes))
        own = {n: a for n, a in named(params).items() if n not in laid.model.frozen}
        bare = {base_name(n): a for n, a in named(params).items() if n in laid.model.frozen}
        bare = jax.tree.unflatten(
            jax.tree.structure(base.axes), [bare[n] for n in named(base.axes)]
        )
        dense = named(dense_params(replace(laid, model=base).params(bare), base.axes))
    wanted, dense_grads = of_dense(merged)
    assert loss == pytest.approx(wanted, rel=1e-5)  # float32 sums in another order
    assert grads.keys() == own.keys()
    count = 0
    for weight in dense:
        mine = {n.rpartition("/")[2]: a for n, a in own.items() if n.rpartition("/")[0] == weight}
        if not mine:
            continue
        count += 1
        made = jax.vmap(functools.partial(formula, method, weight))
        value, pull = jax.vjp(functools.partial(made, jnp.asarray(dense[weight])), mine)
        np.testing.assert_allclose(named(merged)[weight], value, rtol=1e-4, atol=1e-6)
        for field, grad in pull(jnp.asarray(dense_grads[weight]))[0].items():
            got, norm = grads[f"{weight}/{field}"], np.linalg.norm(grad)
            assert norm > 1e-6, (weight, field)  # there is something to compare
            assert np.linalg.norm(got - grad) <= 1e-4 * norm, (weight, field)
    assert count == len(config_of(method).names)


CASES = [("lora", "", sizes) for sizes in LAYOUTS]
CASES += [("dora", "nf4:16", LAYOUTS[1]), ("dora", "nf4:16", LAYOUTS[2]), ("ia3", "", LAYOUTS[2])]


@pytest.mark.parametrize(("method", "form", "sizes"), CASES, ids=str)
def test_every_layout_computes_the_same(method, form, sizes):
    params, forms = filled(method, form), {"stack/*": form} if form else {}
    loss, grads = on_one_device(method, form)
    with adapted_layout(config_of(method), forms, **sizes) as (laid, _):
        sharded, sharded_grads = loss_of(laid, laid.params(params))
    assert sharded == pytest.approx(loss, rel=1e-6)  # float32 sums in another order
    assert grads.keys() == sharded_grads.keys()
    for name, grad in grads.items():
        norm = max(np.linalg.norm(grad), 1e-3)
        assert np.linalg.norm(grad - sharded_grads[name]) <= 1e-4 * norm, name


def matrix_shapes(model):
    """Of a model's stacked matrices, and of one layer of each, as a product may have it."""
    shapes = named(jax.eval_shape(model.init, jax.random.key(0)))
    stacked = [a.shape for n, a in shapes.items() if is_matrix(n, named(model.axes)[n])]
    return {s for full in stacked for s in (full, full[1:], full[1:][::-1])}


@pytest.mark.parametrize(
    ("method", "form"), [("lora", ""), ("lora", "nf4:16"), ("dora", ""), ("ia3", "nf4:16")]
)
def test_no_gradient_of_the_base_is_made_and_nothing_of_its_size_is_kept(method, form):
    """Loops give no array as large as a stacked weight, and no product is one layer's gradient."""
    config = config_of(method, names=())
    with (
        adapted_layout(config, {"stack/*": form} if form else {}) as (laid, _),
        layout(config=SMALL) as plain,
    ):
        shapes = matrix_shapes(plain.model)

        def made(model):
            params = jax.eval_shape(model.init, jax.random.key(0))
            given = params, laid.batch(), None, jnp.float32(1)
            program = jax.make_jaxpr(loss_and_grads(model, FLOAT32))(*given).jaxpr
            equations = [e for n in ("scan", "dot_general") for e in primitives(program, n)]
            return [v.aval.shape for e in equations for v in e.outvars if v.aval.shape in shapes]

        assert len(made(plain.model)) >= 2 * 7  # of each matrix: the product, and what loops give
        assert made(laid.model) == []


def test_state_is_of_the_adapters_alone_and_the_base_stays_bit_for_bit():
    """To the byte: of the base its parameters, of an adapter its parameters and two moments."""
    config, rate = config_of("dora"), 0.01
    with adapted_layout(config, {"stack/*": "nf4:16"}, fsdp=8, zero=3) as (laid, _):
        optimizer = optax.adamw(rate)
        params = laid.params(filled("dora", "nf4:16"))
        before = jax.tree.map(np.asarray, params)
        state = create_state(laid.model, optimizer, FLOAT32, 0, laid.mesh, params)
        step = make_step(laid.model, optimizer, lambda _: jnp.float32(rate), FLOAT32, seed=0)
        compiled = jax.jit(step, donate_argnums=0).lower(state, laid.batch()).compile()

        on_device = {n: a.addressable_shards[0].data.nbytes for n, a in named(params).items()}
        own = sum(size for n, size in on_device.items() if n not in laid.model.frozen)
        counters = 5 * 4  # step, skipped, loss scale and its counter, AdamW's count
        batch = sum(a.addressable_shards[0].data.nbytes for a in laid.batch().values())
        memory = compiled.memory_analysis()
        at_rest = sum(on_device.values()) + 2 * own + counters
        assert memory.argument_size_in_bytes == at_rest + batch
        assert memory.alias_size_in_bytes == at_rest  # updated in place

        for number in range(3):
            state, _ = compiled(state, laid.batch(number))
        for name, after in named(state.params).items():
            same = np.array_equal(np.asarray(after), named(before)[name])
            assert same == (name in laid.model.frozen), name


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (dict(rank=11, names=()), "config.adapter.rank = 11: saves nothing of stack/blocks/"),
        (dict(names=("stak/*",)), "config.adapter.names: 'stak/*' names no matrix; there are "),
        (dict(method="loar"), "config.adapter.method = 'loar': choose lora, dora, ia3, prefix"),
    ],
)
def test_what_cannot_be_adapted_is_refused(config, words):
    with layout(config=SMALL) as laid, pytest.raises(ValueError) as error:
        adapted(laid.model, config_of(**dict(method="lora") | config))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_dora_of_several_forms_is_refused_and_lora_is_not():
    forms = {"stack/*/key": "int8@0 int4:8"}
    with (
        pytest.raises(ValueError, match="several forms by layer"),
        adapted_layout(config_of("dora"), forms),
    ):
        pass
    with adapted_layout(config_of("lora"), forms) as (laid, base):
        of_base = jax.jit(base.init)(jax.random.key(0))
        params = begun(laid.model, of_base, config_of("lora"), FLOAT32, 0)
        found, _ = loss_of(laid, params)
        bare = jax.tree.map(np.asarray, dense_params(params, laid.model.axes))
    assert found == pytest.approx(of_dense(bare)[0], rel=1e-5)  # float32 sums in another order


def test_a_prefix_is_trained_alone_and_the_same_on_every_mesh():
    config, found = AdapterConfig("prefix", base="runs/base", prefix_length=3), []
    for sizes in ({}, dict(fsdp=4, tensor=2, zero=3)):
        with layout(config=SMALL, **sizes) as plain:
            base = plain.params(initial_params(SMALL))
        with layout(config=replace(SMALL, prefix_length=3), **sizes) as laid:
            model = adapted(laid.model, config)
            params = begun(model, base, config, FLOAT32, 0)
            trained = named(model.trained(params))
        at = "stack/blocks/attention"
        assert trained.keys() == {f"{at}/prefix_key", f"{at}/prefix_value"}
        assert {a.shape for a in trained.values()} == {(2, 3, 2, 8)}
        for name, array in named(base).items():
            assert named(params)[name] is array
        found.append({n: np.asarray(a) for n, a in trained.items()})
    for name, array in found[0].items():
        np.testing.assert_array_equal(found[1][name], array)
