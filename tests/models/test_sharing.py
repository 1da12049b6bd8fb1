"""Layers that share blocks, against a stack of as many blocks of their own with equal weights."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallel.precision import PrecisionConfig
from tests.families import FAMILIES
from tests.small import DECODER, initial_params, layout
from training.naming import named, nested
from training.step import loss_and_grads

DEEP = replace(DECODER, layers=6)
LOCAL = dict(window=5, pattern=("local", "global"))
# What is shared -> the block of every layer.
SHARED = {
    "one": (replace(DEEP, distinct=1), (0, 0, 0, 0, 0, 0)),
    "cycle": (replace(DEEP, distinct=3), (0, 1, 2, 0, 1, 2)),
    "broken cycle": (replace(DEEP, distinct=4), (0, 1, 2, 3, 0, 1)),
    "repeat": (replace(DEEP, distinct=3, sharing="repeat"), (0, 0, 1, 1, 2, 2)),
    "cycle under a pattern": (replace(DEEP, distinct=3, **LOCAL), (0, 1, 2, 0, 1, 2)),
    "repeat under a pattern": (
        replace(DEEP, distinct=2, sharing="repeat", **LOCAL),
        (0, 0, 0, 1, 1, 1),
    ),
    "a pattern that does not divide": (
        replace(DEEP, layers=5, distinct=2, **LOCAL),
        (0, 1, 0, 1, 0),
    ),
}


def run(config, params=None, **kind):
    """(parameters, metrics, gradients) of one step as NumPy; dropout is on."""
    with layout(config=config, **kind) as laid:
        if params is None:
            params = jax.jit(laid.model.init)(jax.random.key(0))
        grads_of = jax.jit(loss_and_grads(laid.model, PrecisionConfig()))
        metrics, grads = grads_of(
            laid.params(params), laid.batch(), jax.random.key(7), jnp.float32(1)
        )
        return jax.tree.map(np.asarray, (params, metrics, grads))


def untied(params, blocks):
    """The same parameters with the block of every layer written out."""
    stack = jax.tree.map(lambda a: a[list(blocks)], params["stack"])
    return params | {"stack": stack}


def summed(grads, blocks):
    """For each block the sum of its layers' gradients."""

    def of_blocks(a):
        sums = np.zeros((max(blocks) + 1, *a.shape[1:]), a.dtype)
        np.add.at(sums, list(blocks), a)
        return sums

    return grads | {"stack": jax.tree.map(of_blocks, grads["stack"])}


# Two programs, of which a compiler may order the sums of a norm or a loss differently: a few units
# in the last place of float32. Another mask of dropout moves the loss by a thousand times that.
ROUNDING = 5e-7


def assert_close(got, want):
    """To 1e-6 of each gradient's norm."""
    for (path, w), g in zip(jax.tree.leaves_with_path(want), jax.tree.leaves(got), strict=True):
        name = jax.tree_util.keystr(path)
        assert g.shape == w.shape, name
        assert np.linalg.norm(w) > 0, name
        assert np.linalg.norm(g - w) <= 1e-6 * np.linalg.norm(w), name


@pytest.mark.parametrize(
    ("name", "remat"),
    [
        ("cycle under a pattern", "none"),
        *(
            pytest.param(name, "none", marks=pytest.mark.slow)
            for name in SHARED
            if name != "cycle under a pattern"
        ),
        pytest.param("cycle", "full", marks=pytest.mark.slow),
        pytest.param("repeat under a pattern", "full", marks=pytest.mark.slow),
    ],
)
def test_a_shared_block_has_the_sum_of_the_gradients_of_its_uses(name, remat):
    """And the loss is that of layers with equal weights: dropout goes by layer."""
    config, blocks = SHARED[name]
    params, metrics, grads = run(config, remat=remat)
    own = replace(config, distinct=0, sharing="cycle")
    _, want, want_grads = run(own, untied(params, blocks), remat=remat)
    assert metrics["loss"] == pytest.approx(want["loss"], rel=ROUNDING)
    assert_close(grads, summed(want_grads, blocks))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["encoder", "vision"])
def test_other_families_share_their_blocks(name):
    """The loss is that of layers with equal weights, dropout on."""
    family = FAMILIES[name]
    shared = replace(family.config, distinct=2)
    params = named(initial_params(shared, family.objective))
    own = {n: a[[0, 1, 0, 1]] if "stack/" in n else a for n, a in params.items()}
    losses = []
    for config, leaves in ((shared, params), (family.config, own)):
        with layout(config=config, objective=family.objective) as laid:
            grads_of = loss_and_grads(laid.model, PrecisionConfig())
            loss_of = jax.jit(lambda *given, f=grads_of: f(*given)[0]["loss"])
            given = laid.params(nested(leaves)), laid.placed(family.batch(0)), jax.random.key(7)
            losses.append(float(loss_of(*given, jnp.float32(1))))
    assert losses[0] == pytest.approx(losses[1], rel=ROUNDING)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_exactly(tied):
    """D blocks of L; of a factorised table V r + r D in place of V D, of a head as much again."""

    def counts(config):
        with layout(config=config) as laid:
            shapes = jax.eval_shape(laid.model.init, jax.random.key(0))
        stack = sum(a.size for a in jax.tree.leaves(shapes["stack"]))
        return stack, sum(a.size for a in jax.tree.leaves(shapes)) - stack

    own = replace(DEEP, tied=tied)
    (stack, outside), V, D, r = counts(own), own.padded_vocab, own.embed_dim, 8
    for distinct in (1, 3):
        assert counts(replace(own, distinct=distinct)) == (stack * distinct // 6, outside)
    tables = 1 if tied else 2
    ranked = outside - tables * (V * D - V * r - r * D)
    assert counts(replace(own, embed_rank=r)) == (stack, ranked)


def sizes(config, remat):
    """(compiled temporaries, bytes of the parameters) of loss and gradients, nothing run."""
    with layout(config=config, rows=2, remat=remat) as laid:
        grads_of = jax.jit(loss_and_grads(laid.model, PrecisionConfig()))
        params = jax.eval_shape(laid.model.init, jax.random.key(0))
        memory = (
            grads_of.lower(params, laid.batch(rows=2), jax.random.key(7), jnp.float32(1))
            .compile()
            .memory_analysis()
        )
        held = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(params["stack"]))
        return memory, held


@pytest.mark.slow
@pytest.mark.parametrize(("sharing", "remat"), [("cycle", "none"), ("repeat", "full")])
def test_no_array_of_all_layers_weights_or_gradients(sharing, remat):
    """Wide blocks and few tokens: what depends on the number of layers is activations alone.

    They are those of layers with their own blocks, whose gradients are outputs and no temporaries.
    """
    wide = replace(DECODER, layers=8, embed_dim=128, mlp_dim=512, dropout=0.0)
    shared = replace(wide, distinct=2, sharing=sharing)
    (own, held), (ours, block) = sizes(wide, remat), sizes(shared, remat)
    assert held == 4 * block
    assert ours.output_size_in_bytes < own.output_size_in_bytes - 2.9 * block
    # A sum of gradients beside those of one use, at most; never those of all layers.
    assert ours.temp_size_in_bytes - own.temp_size_in_bytes < 0.5 * block


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(distinct=6), ("config.model.distinct = 6", "1 to 5")),
        (dict(distinct=-1), ("config.model.distinct = -1",)),
        (dict(distinct=4, sharing="repeat"), ("'repeat'", "distinct = 4", "layers = 6")),
        (dict(sharing="repeat"), ("'repeat'", "distinct = 0")),
        (dict(distinct=2, sharing="ring"), ("config.model.sharing = 'ring'", "cycle, repeat")),
        (dict(embed_rank=32), ("config.model.embed_rank = 32", "1 to 31")),
        (dict(embed_rank=8, family="vision"), ("config.model.embed_rank = 8", "no table")),
    ],
)
def test_what_cannot_be_shared_is_refused(changes, words):
    with pytest.raises(ValueError, match=r"config\.model") as error:
        replace(DEEP, **changes)
    for word in words:
        assert word in str(error.value)
