"""The layer stack: a scan that is a plain Python loop, and the traps of scanning modules."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.config import ModelConfig
from models.layers import normal, weight
from models.stack import Stack
from parallel.mesh import MeshConfig
from parallel.remat import RematConfig
from parallel.rules import ParallelConfig, make_rules
from tests.drawn import decoder_of, drawn_params, put
from tests.jaxpr import inside, primitives
from tests.small import layout, numpy_batch

D = 8
RULES = make_rules(ParallelConfig(zero=0), MeshConfig(data=1).sizes(), {})


class Layer(nnx.Module):
    """x + tanh(x W), halved in layers of that kind, times noise where there is a key."""

    def __init__(self, rngs, dim=D):
        self.weight = weight(rngs, (dim, dim), "position -> norm", RULES, normal(0.3))

    def __call__(self, x, key, kind):
        y = jnp.tanh(x @ self.weight.get_value())
        if kind == "halved":
            y = y / 2
        return x + y if key is None else x + y * jax.random.normal(key, x.shape)


def stack_of(layers, dim=D, **options):
    options = {"remat": RematConfig()} | options
    return Stack(lambda rngs: Layer(rngs, dim), layers, nnx.Rngs(params=0), **options)


def apply(layer, x, key, kind):
    return layer(x, key, kind)


def runner(stack):
    """A function (weights [L, D, D], x, key) -> x."""
    graph, _ = nnx.split(stack)

    def run(weights, x, key):
        params = {"blocks": {"weight": weights}}
        return nnx.merge(graph, params).run(apply, x, key)

    return run


@pytest.mark.parametrize(
    ("layers", "options"),
    [
        (5, {}),
        (5, {"unroll": 2}),
        (5, {"unroll": 8}),
        (6, {"pattern": ("plain", "halved")}),
        (5, {"pattern": ("plain", "plain", "halved")}),
        (5, {"pattern": ("halved", "plain"), "unroll": 2, "remat": RematConfig("full")}),
        (2, {"pattern": ("plain", "plain", "halved")}),
    ],
    ids=str,
)
def test_the_scan_is_a_plain_loop(use_mesh, layers, options):
    """Values and gradients, the keys of the layers and their kinds."""
    with use_mesh():
        stack = stack_of(layers, **options)
        weights = stack.blocks.weight.get_value()
        assert weights.shape == (layers, D, D)
        x, key = jnp.linspace(-1, 1, 3 * D).reshape(3, D), jax.random.key(4)
        run = runner(stack)
        value = lambda weights: jnp.sum(run(weights, x, key) ** 2)
        got = jax.jit(jax.value_and_grad(value))(weights)

        def loop(weights):
            y, pattern = x, options.get("pattern", (None,))
            for i in range(layers):
                z = jnp.tanh(y @ weights[i]) / (2 if pattern[i % len(pattern)] == "halved" else 1)
                y = y + z * jax.random.normal(jax.random.fold_in(key, i), z.shape)
            return jnp.sum(y**2)

        want = jax.jit(jax.value_and_grad(loop))(weights)
    assert np.all(np.any(np.asarray(want[1]) != 0, (1, 2)))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)  # float32, other fusions


def test_every_layer_draws_its_own_weights(use_mesh):
    with use_mesh():
        weights = np.asarray(stack_of(4).blocks.weight.get_value())
    assert len({layer.tobytes() for layer in weights}) == 4
    assert abs(weights.std() - 0.3) < 0.05  # 256 draws


def test_no_key_stays_no_key(use_mesh):
    with use_mesh():
        stack = stack_of(3)
        x = jnp.ones((1, D))
        want = x
        for w in stack.blocks.weight.get_value():
            want = want + jnp.tanh(want @ w)
        np.testing.assert_allclose(stack.run(apply, x), want, rtol=1e-6, atol=1e-6)


def test_weights_are_scanned_and_neither_closed_over_nor_returned(use_mesh):
    with use_mesh():
        stack = stack_of(6)
        weights = stack.blocks.weight.get_value()
        run = lambda w, x: runner(stack)(w, x, None)
        forward = jax.make_jaxpr(run)(weights, jnp.ones((2, D))).jaxpr
        grad = jax.grad(lambda w, x: jnp.sum(run(w, x)))
        both = jax.make_jaxpr(grad)(weights, jnp.ones((2, D))).jaxpr
        scans = [scan for jaxpr in (forward, both) for scan in primitives(jaxpr, "scan")]
    assert len(scans) == 3  # forward alone; forward and backward
    for scan in scans:
        body = next(inside(scan))
        weights_in = [
            inner.aval.shape
            for outer, inner in zip(scan.invars, body.invars, strict=True)
            if outer.aval.shape == weights.shape
        ]
        assert weights_in == [(D, D)]  # one layer's for an iteration, never all
    for scan in scans[:2]:
        assert weights.shape not in [v.aval.shape for v in scan.outvars]
    assert [v.aval.shape for v in scans[0].outvars] == [(2, D)]


@pytest.mark.parametrize("pattern", [("plain",), ("plain", "halved")], ids=len)
def test_no_second_copy_of_the_weights(use_mesh, pattern):
    """8 layers of 64 x 64 and one row of activations: the gradient is the output, and temporaries
    hold no other array of that size.
    """
    with use_mesh():
        stack = stack_of(8, 64, pattern=pattern)
        run = runner(stack)
        value = lambda w, x: jnp.sum(run(w, x, None))
        w = jax.ShapeDtypeStruct((8, 64, 64), jnp.float32)
        x = jax.ShapeDtypeStruct((1, 64), jnp.float32)
        size = 4 * 8 * 64 * 64
        for function, outputs in ((run_without_key(run), 4 * 64), (jax.grad(value), size)):
            memory = jax.jit(function).lower(w, x).compile().memory_analysis()
            assert memory.output_size_in_bytes == outputs
            assert memory.temp_size_in_bytes < size / 2


def run_without_key(run):
    return lambda w, x: run(w, x, None)


def test_remat_outside_of_loops_is_kept_apart_by_jax(use_mesh):
    """XLA may merge a layer and its recomputation where no loop parts them: `prevent_cse`."""
    with use_mesh():
        for layers, unroll, want in (
            (4, 1, [False]),
            (5, 1, [False, True]),
            (4, 2, [True]),
            (1, 1, [True]),
        ):
            pattern = ("plain", "halved") if layers > 1 else ("plain",)
            stack = stack_of(layers, pattern=pattern, unroll=unroll, remat=RematConfig("full"))
            weights = stack.blocks.weight.get_value()
            run = runner(stack)
            jaxpr = jax.make_jaxpr(run_without_key(run))(weights, jnp.ones((1, D))).jaxpr
            kept = [e.params["prevent_cse"] for e in primitives(jaxpr, "remat2")]
            kept = kept or [e.params["prevent_cse"] for e in primitives(jaxpr, "checkpoint")]
            assert sorted(set(kept)) == want, (layers, unroll)


def test_a_decoder_of_every_pattern_and_unroll_is_the_same():
    """Layers whose kinds are equal are equal however they are grouped."""
    base = ModelConfig(
        vocab_size=100, layers=5, embed_dim=16, mlp_dim=16, heads=2, kv_heads=1, head_dim=8,
        attention="xla", dropout=0.1,
    )  # fmt: skip
    wide = replace(base, window=16, pattern=("local", "global"))  # a window that hides nothing
    got = []
    for config in (base, replace(base, unroll=2), wide):
        with layout(config=config, rows=2) as laid:
            build, params = decoder_of(laid, config), laid.params(drawn_params(laid, config))
            batch = numpy_batch(rows=2)
            batch["tokens"] %= 100
            run = jax.jit(lambda p, b, build=build: build(p)(b, jax.random.key(0)))
            got.append(np.asarray(run(params, put(laid, batch))))
    for other in got[1:]:
        np.testing.assert_allclose(other, got[0], rtol=1e-5, atol=1e-6)  # other fusions


def test_logical_axes_name_every_parameter_and_its_layer_axis():
    with layout() as laid:
        shapes = jax.eval_shape(laid.model.init, jax.random.key(0))
        axes = laid.model.axes
        assert jax.tree.structure(axes) == jax.tree.structure(shapes)
        for (path, shape), names in zip(
            jax.tree.leaves_with_path(shapes), jax.tree.leaves(axes), strict=True
        ):
            assert len(names.replace("->", " ").split()) == shape.ndim
            stacked = any(getattr(part, "key", None) == "blocks" for part in path)
            assert names.startswith("layers ") == stacked
            assert (shape.shape[0] == 3) == stacked
        assert axes["stack"]["blocks"]["attention"]["query"] == "layers embed -> heads head_dim"
