"""What is chosen by counting is what sorting chooses, ties included, on every layout."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from parallel.fours import left_out
from parallel.stored import Matrix
from parallel.two_of_four import two_of_four
from training.magnitude import numbers, with_zeros

AXES = {
    "up": "layers embed -> mlp",
    "out": "layers heads head_dim -> embed",
    "head": "embed -> mlp",
}
SHAPES = {"up": (3, 32, 16), "out": (3, 8, 4, 16), "head": (32, 24)}
LAYOUTS = {
    "one device": ({}, {}),
    "fsdp 8": (dict(fsdp=8), {"up": P(None, "fsdp"), "out": P(None, "fsdp"), "head": P("fsdp")}),
    "tensor 4, data 2": (
        dict(data=2, tensor=4),
        {"up": P(None, None, "tensor"), "out": P(None, "tensor"), "head": P(None, "tensor")},
    ),
    "stages": (dict(pipe=3), {"up": P("pipe"), "out": P("pipe"), "head": P()}),
}


def weights(kind: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    drawn = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    if kind == "ties":  # nearly every number is equal to others
        drawn = {name: np.round(w * 2) / 2 for name, w in drawn.items()}
    if kind == "bfloat16":
        return {name: np.asarray(jnp.asarray(w, jnp.bfloat16)) for name, w in drawn.items()}
    return drawn


def sorted_away(arrays: list[np.ndarray], share: float) -> list[np.ndarray]:
    """The arrays, of all their numbers those zero that a stable sort by magnitude has first."""
    flat = np.concatenate([a.reshape(-1) for a in arrays])
    order = np.argsort(np.abs(flat.astype(np.float32)), kind="stable")
    flat[order[: round(share * flat.size)]] = 0
    ends = np.cumsum([a.size for a in arrays])[:-1]
    return [f.reshape(a.shape) for f, a in zip(np.split(flat, ends), arrays, strict=True)]


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(
    ("layout", "kind"),
    [("one device", "normal"), ("one device", "bfloat16"), *[(name, "ties") for name in LAYOUTS]],
)
def test_the_smallest_are_those_of_a_sort(use_mesh, layout, scope, kind):
    given, share = weights(kind), 0.6
    if scope == "global":
        order = sorted(given)
        want = dict(zip(order, sorted_away([given[n] for n in order], share), strict=True))
    else:
        of = lambda a: sorted_away([a], share)[0]
        want = {n: of(w) if n == "head" else np.stack([*map(of, w)]) for n, w in given.items()}
    sizes, specs = LAYOUTS[layout]
    with use_mesh(**sizes):
        placed = {n: jax.device_put(w, specs.get(n, P())) for n, w in given.items()}

        @jax.jit
        def prune(placed):
            return with_zeros(placed, AXES, numbers(placed, AXES, share, scope), scope=scope)

        got = prune(placed)
        assert jax.tree.map(jax.typeof, got) == jax.tree.map(jax.typeof, placed)
    for name, array in want.items():
        np.testing.assert_array_equal(np.asarray(got[name]), array, err_msg=name)


@pytest.mark.parametrize("layout", ["one device", "tensor 4, data 2"])
def test_two_of_every_four_are_those_that_the_packed_form_keeps(use_mesh, layout):
    given = weights("ties")
    sizes, specs = LAYOUTS[layout]
    with use_mesh(**sizes):
        placed = {n: jax.device_put(w, specs.get(n, P())) for n, w in given.items()}

        @jax.jit
        def prune(placed):
            number = numbers(placed, AXES, 0.5, "layer")
            half = with_zeros(placed, AXES, number, pattern="2:4")
            return half, with_zeros(placed, AXES, None, pattern="2:4")

        got, at_once = jax.tree.map(np.asarray, prune(placed))
    jax.tree.map(np.testing.assert_array_equal, at_once, got)
    for name, w in given.items():
        matrix = Matrix.of(w.shape, AXES[name])
        packed = two_of_four(matrix, matrix.flat(jnp.asarray(w)), jnp.float32)
        want = matrix.unflat(packed.unpacked(jnp.float32))
        np.testing.assert_array_equal(got[name], want, err_msg=name)


def test_fours_on_two_devices_are_found_too(use_mesh):
    scores = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    want = np.asarray(left_out(jnp.asarray(scores), 0))
    assert want.reshape(4, 4, 3).sum(1).tolist() == [[2] * 3] * 4
    with use_mesh(fsdp=8):  # two rows each
        got = jax.jit(lambda x: left_out(x, 0))(jax.device_put(scores, P("fsdp")))
    np.testing.assert_array_equal(got, want)


def test_counts_beyond_32_bits():
    """Halves of counts are compared as the whole numbers would be."""
    axes = {"w": "layers embed -> mlp"}
    shape = jax.ShapeDtypeStruct((100, 2**14, 2**14), jnp.float32)
    high, low = numbers({"w": shape}, axes, 0.5, "global")[""]
    assert (high << 16) + low == 100 * 2**28 // 2 > 2**32
