"""The door for contractions: `einsum` in value and gradient, with the collectives it promises."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallel.einsum import einsum, einsums
from parallel.mesh import MeshConfig
from parallel.rules import ParallelConfig, make_rules
from parallel.twin import Twin
from tests.hlo import collectives

B, T, D, N, H, F = 8, 4, 16, 4, 6, 32
MESH = {"data": 2, "fsdp": 2, "tensor": 2}
# float32 sums of at most B T = 32 or D, F = 32 terms, divided over devices in another order
TOLERANCE = 1e-6

CASES = {  # equation -> shapes of x and w, names of x, w and the result
    "btd,df->btf": ((B, T, D), (D, F), "batch seq act_embed", "embed -> mlp", "batch seq act_mlp"),
    "btf,fd->btd": (
        (B, T, F), (F, D), "batch seq act_mlp", "mlp -> embed", "batch residual_seq act_embed",
    ),
    "btd,dnh->btnh": (
        (B, T, D), (D, N, H), "batch seq act_embed", "embed -> heads head_dim",
        "batch seq act_heads head_dim",
    ),
    "btnh,nhd->btd": (
        (B, T, N, H), (N, H, D), "batch seq act_heads head_dim", "heads head_dim -> embed",
        "batch residual_seq act_embed",
    ),
}  # fmt: skip


def rules_for(zero=3, sequence=False, **sizes):
    config = ParallelConfig(zero=zero, sequence=sequence)
    return make_rules(config, MeshConfig(**({"data": 1} | sizes)).sizes(), {})


def drawn(*shapes):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def assert_near(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert np.linalg.norm(got - want) <= TOLERANCE * np.linalg.norm(want)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("equation", list(CASES))
def test_values_gradients_and_layouts(use_mesh, equation, sequence):
    x_shape, w_shape, x_names, w_names, out_names = CASES[equation]
    rules = rules_for(sequence=sequence, **MESH)
    inputs, result = equation.split("->")
    x_dims, w_dims = inputs.split(",")
    x, w = drawn(x_shape, w_shape)
    want = np.einsum(equation, x.astype(np.float64), w)
    (g,) = drawn(want.shape)
    with use_mesh(**MESH):
        x_there, g_there = (
            jax.device_put(x, rules.spec(x_names)),
            jax.device_put(g, rules.spec(out_names)),
        )
        w_there = jax.device_put(w, rules.in_model(w_names, w_shape))

        @jax.jit
        def run(x, w, g):
            y, pull = jax.vjp(lambda x, w: einsum(equation, x, w, rules.spec(out_names)), x, w)
            return y, *pull(g)

        y, dx, dw = run(x_there, w_there, g_there)
        for got, like in ((y, g_there), (dx, x_there), (dw, w_there)):
            assert jax.typeof(got).sharding.spec == jax.typeof(like).sharding.spec
    assert_near(y, want)
    assert_near(dx, np.einsum(f"{result},{w_dims}->{x_dims}", g.astype(np.float64), w))
    assert_near(dw, np.einsum(f"{x_dims},{result}->{w_dims}", x.astype(np.float64), g))


def three_products(rules):
    """q, k, v of one input; the K/V heads are replicated where `tensor` is more than they are."""
    names = ["heads", "kv_heads", "kv_heads"]
    specs = [rules.spec(f"batch seq act_{name} head_dim") for name in names]
    shapes = [(D, 4, H), (D, 2, H), (D, 2, H)]

    def place(x, *ws):
        layouts = [
            rules.in_model(f"embed -> {n} head_dim", w.shape)
            for n, w in zip(names, ws, strict=True)
        ]
        there = [jax.device_put(w, layout) for w, layout in zip(ws, layouts, strict=True)]
        return jax.device_put(x, rules.spec("batch seq act_embed")), there

    def loss(door):
        return lambda x, ws: sum(jnp.sum(jnp.sin(y)) for y in door(x, ws, specs))

    return place, shapes, loss


def through_the_door(x, ws, specs):
    return einsums("btd,dnh->btnh", x, ws, specs)


def one_by_one(x, ws, specs):
    return [einsum("btd,dnh->btnh", x, w, spec) for w, spec in zip(ws, specs, strict=True)]


@pytest.mark.parametrize("replicated", [False, True], ids=["divided", "replicated-kv"])
def test_several_products_of_one_input_share_one_reduction(use_mesh, replicated):
    sizes = {"tensor": 4 if replicated else 2}
    dims = {"kv_heads": (2, "kv_heads")}
    rules = make_rules(ParallelConfig(), MeshConfig(**({"data": 1} | sizes)).sizes(), dims)
    assert bool(rules.axes("kv_heads")) != replicated
    place, shapes, loss = three_products(rules)
    x, *ws = drawn((B, T, D), *shapes)
    found, gradients = {}, {}
    with use_mesh(**sizes):
        there = place(x, *ws)
        for door in (through_the_door, one_by_one):
            grad = jax.jit(jax.grad(loss(door), (0, 1))).lower(*there).compile()
            of_x = [c for c in collectives(grad.as_text()) if (B, T, D) in c.shapes]
            assert {c.kind for c in of_x} == {"all-reduce"}
            found[door] = sum(len(c.shapes) for c in of_x)
            gradients[door] = grad(*there)
    assert found[through_the_door] == 1
    assert found[one_by_one] == (1 if replicated else 3)  # the count can see more than one
    for got, want in zip(*map(jax.tree.leaves, gradients.values()), strict=True):
        assert_near(got, want)


def test_a_weight_divided_over_fsdp_is_the_residual(use_mesh):
    """Gathered in the forward and again in the backward pass, in between divided."""
    rules = rules_for(fsdp=8)
    x, w = drawn((B, T, D), (D, F))
    with use_mesh(fsdp=8):
        x = jax.device_put(x, rules.spec("batch seq act_embed"))
        w = jax.device_put(w, rules.in_model("embed -> mlp", w.shape))
        _, pull = jax.vjp(
            lambda x, w: einsum("btd,df->btf", x, w, rules.spec("batch seq act_mlp")), x, w
        )
        kept = [a for a in jax.tree.leaves(pull) if a.shape == (D, F)]
        assert kept
        assert all(a.addressable_shards[0].data.shape == (D // 8, F) for a in kept)


def test_the_gradient_of_a_twin_goes_to_its_divided_half(use_mesh):
    rules = rules_for(zero=2, **MESH)
    x, w = drawn((B, T, D), (D, F))
    out = rules.spec("batch seq act_mlp")
    with use_mesh(**MESH):
        x = jax.device_put(x, rules.spec("batch seq act_embed"))
        whole = jax.device_put(w, rules.in_model("embed -> mlp", w.shape))
        part = jax.device_put(w, rules.of_gradient("embed -> mlp", w.shape))
        assert whole.addressable_shards[0].data.shape == (D, F // 2)
        assert part.addressable_shards[0].data.shape == (D // 2, F // 2)
        loss = lambda x, w: jnp.sum(jnp.sin(einsum("btd,df->btf", x, w, out)))
        want = jax.jit(jax.grad(loss, (0, 1)))(x, whole)
        got = jax.jit(jax.grad(lambda x, p: loss(x, Twin(whole, p)), (0, 1)))(x, part)
        assert jax.typeof(got[1]).sharding.spec == jax.typeof(part).sharding.spec
    for g, w in zip(got, want, strict=True):
        assert_near(g, w)


def test_other_dtypes_do_not_pass(use_mesh):
    with use_mesh():
        x, w = jnp.ones((1, 1, 4)), jnp.ones((4, 4), jnp.bfloat16)
        with pytest.raises(AssertionError, match="bfloat16"):
            einsum("btd,df->btf", x, w, rules_for().spec("batch seq act_mlp"))
