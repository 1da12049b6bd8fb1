"""GaLore against optax's and singular vectors of NumPy, APOLLO against its formula."""

import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from tests.training.test_optim import AXES as PARAMS
from tests.training.test_optim import arrays, config_of, place, rules_for
from training.low_rank import leading, scale_by_low_rank, sides_of
from training.optim import make_optimizer

RANK, D = 3, 12
ADAM = dict(b1=0.9, b2=0.95, eps=1e-8)


def low(rng, *shape):
    """A matrix of rank 3 with singular values far from each other, float32."""
    left, right = (np.linalg.qr(rng.normal(size=(n, RANK)))[0] for n in shape)
    return np.float32(left * [9.0, 3.0, 1.0] @ right.T)


def directions(transform, grads):
    """What `transform` makes of one gradient after another."""
    update = jax.jit(transform.update)
    state, found = transform.init(grads[0]), []
    for g in grads:
        step, state = update(g, state)
        found.append(jax.tree.map(np.asarray, step))
    return found, state


def test_galore_is_optax_s_on_each_square_matrix():
    """Of a matrix that is not square optax projects the larger side, the paper the smaller one.

    Its moments do not tell a singular vector from its negative.
    """
    rng = np.random.default_rng(0)
    grads = [np.stack([low(rng, D, D) for _ in range(2)]) for _ in range(4)]
    ours = scale_by_low_rank(
        {"w": "layers embed -> mlp"}, method="galore", rank=RANK, refresh=10, scale=0.25, **ADAM
    )
    got, _ = directions(ours, [{"w": jnp.asarray(g)} for g in grads])
    theirs = optax.contrib.scale_by_galore(
        rank=RANK, update_proj_gap=10, scale=0.25, base_optimizer=optax.scale_by_adam(**ADAM)
    )
    for layer in range(2):
        want, _ = directions(theirs, [{"w": jnp.asarray(g[layer])} for g in grads])
        for a, b in zip(got, want, strict=True):
            # Singular vectors in float32, and the smallest entries of R are divided by themselves.
            np.testing.assert_allclose(a["w"][layer], b["w"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(24, 60), (24, 24)])
def test_leading_singular_vectors(shape):
    rng = np.random.default_rng(1)
    left, right = (np.linalg.qr(rng.normal(size=(n, 24)))[0] for n in shape)
    g = np.float32(left * 0.6 ** np.arange(24) @ right.T)
    got = np.asarray(leading(jnp.asarray(g) * 1e-12, 4, jax.random.key(0)))
    assert got.shape == (shape[0], 4)
    # Five factors of the spectrum, past 12 vectors 0.6^12, once for the sketch and twice more.
    np.testing.assert_allclose(np.abs(got.T @ left[:, :4]), np.eye(4), atol=1e-4)


@pytest.mark.parametrize("rank", [RANK, 1])
def test_apollo_is_its_formula(rank):
    """Of both orientations, and of a stack whose layers share their random vectors."""
    rng = np.random.default_rng(2)
    axes = {"wide": "layers embed -> heads head_dim", "tall": "layers mlp -> embed"}
    shapes = {"wide": (2, D, 4, 5), "tall": (2, 30, D)}
    grads = [
        {key: np.float32(rng.normal(size=shape)) for key, shape in shapes.items()} for _ in range(5)
    ]
    ours = scale_by_low_rank(axes, method="apollo", rank=rank, refresh=2, scale=2.0, **ADAM)
    got, state = directions(ours, [jax.tree.map(jnp.asarray, g) for g in grads])
    assert {a.shape for a in state.moments["tall"].values()} == {(2, rank, 30)}
    for name, layer in (("wide", 0), ("wide", 1), ("tall", 1)):
        mu = nu = 0.0
        for i, step in enumerate(got):
            turn = jax.random.fold_in(jax.random.key(zlib.crc32(name.encode())), i // 2)
            p = np.asarray(jax.random.normal(turn, (D, rank))) / math.sqrt(rank)
            g = grads[i][name][layer]
            g = g.reshape(D, -1) if name == "wide" else g.T
            r = p.T @ g
            mu, nu = 0.9 * mu + 0.1 * r, 0.95 * nu + 0.05 * r**2
            adam = mu / (1 - 0.9 ** (i + 1)) / (np.sqrt(nu / (1 - 0.95 ** (i + 1))) + 1e-8)
            over = None if rank == 1 else 0
            norms = [np.sqrt(np.sum(a**2, over, keepdims=True)) for a in (adam, r)]
            want = 2.0 * g * norms[0] / norms[1]
            want = want.reshape(D, 4, 5) if name == "wide" else want.T
            np.testing.assert_allclose(step[name][layer], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["galore", "apollo"])
def test_what_is_projected_and_how_it_is_divided(use_mesh, name):
    """Matrices between features by their names; r is divided as the dim that is gone."""
    with use_mesh(fsdp=4, tensor=2):
        params = place(arrays(0), rules_for(dict(fsdp=4, tensor=2), 3).at_rest)
        state = make_optimizer(config_of(name), 10, PARAMS).init(params)
    moments = state["direction"].moments
    for key in ("gain", "bias"):
        assert moments["blocks"][key]["nu"].shape == params["blocks"][key].shape
    assert moments["table"]["nu"].sharding == params["table"].sharding
    q, o = (moments["blocks"][key] for key in "qo")
    assert q["mu"].shape == (3, 4, 4, 8)
    assert q["mu"].sharding.spec == P(None, "fsdp", "tensor", None)
    assert o["mu"].shape == (3, 4, 4, 8)
    assert set(q) - {"mu", "nu"} == ({"projection"} if name == "galore" else set())
    if name == "galore":
        assert q["projection"].shape == (3, 16, 4)
        assert q["projection"].sharding.spec == P(None, "fsdp", "tensor")


def test_a_matrix_no_larger_than_the_rank_is_left_to_adam():
    assert sides_of("layers embed -> mlp", (2, 8, 64), 8) is None
    assert sides_of("layers embed -> mlp", (2, 9, 64), 8) is not None
    for axes in ("layers norm", "vocab -> embed", "embed -> vocab"):
        assert sides_of(axes, (64, 64)[: len(axes.replace("->", "").split())], 8) is None
