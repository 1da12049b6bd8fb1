"""Frozen parameters: the same bits, no gradient, no state; the others as if nothing were frozen."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallel.pipeline import PipelineConfig
from parallel.precision import PrecisionConfig
from tests.jaxpr import primitives
from tests.small import DECODER, initial_params, layout
from training.frozen import freeze
from training.naming import named
from training.optim import OptimizerConfig, make_optimizer
from training.schedules import make_schedule
from training.state import abstract_state, create_state
from training.step import loss_and_grads, make_step

FLOAT32 = PrecisionConfig()
SMALL = replace(DECODER, layers=2, tied=False)
FROZEN = ("embedding", "stack/*/mlp/*", "*_norm/gain")
OPTIMIZER = OptimizerConfig(warmup_steps=0, frozen=FROZEN, learning_rate=0.1)
PLAIN = dict(config=SMALL)
KINDS = {
    "micro-steps": (2, {}),
    "zero 2": (1, dict(fsdp=2, tensor=2, zero=2, sequence=True)),
    "shared": (1, dict(config=replace(SMALL, distinct=1, embed_rank=8), fsdp=2, zero=3)),
    "stages": (2, dict(pipe=2, pipeline=PipelineConfig(microbatches=2))),
}


def is_frozen(name):
    return any(fnmatchcase(name, pattern) for pattern in FROZEN)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_frozen_leaves_are_bit_identical_and_the_others_train_as_ever(name):
    micro, kind = KINDS[name]
    with layout(**PLAIN | kind) as laid:
        model = freeze(laid.model, FROZEN)
        optimizer = make_optimizer(OPTIMIZER, 10, model.trained(model.axes))
        params = laid.params(initial_params((PLAIN | kind)["config"]))
        before = jax.tree.map(np.asarray, params)
        state = create_state(model, optimizer, FLOAT32, 0, laid.mesh, params)
        kept = [n for n in named(state.opt_state) if n.startswith("direction/")]
        trained = [n for n in named(before) if not is_frozen(n)]
        assert len(kept) == 2 * len(trained) + 1  # moments and a counter
        assert not any(n.endswith(f"/{frozen}") for n in kept for frozen in model.frozen)
        want = abstract_state(model, optimizer, FLOAT32, laid.mesh)
        assert jax.tree.map(lambda a: a.shape, state) == jax.tree.map(lambda a: a.shape, want)

        key = jax.random.fold_in(jax.random.key(3), 0)
        of_all = jax.jit(loss_and_grads(laid.model, FLOAT32, micro))
        _, grads = of_all(params, laid.batch(), key, jnp.float32(1))
        squares = {
            n: np.sum(np.square(np.asarray(g), dtype=np.float64)) for n, g in named(grads).items()
        }
        norm = np.sqrt(sum(squares[n] for n in trained))
        assert norm < 0.9 * np.sqrt(sum(squares.values()))

        rate = make_schedule(OPTIMIZER, 10)
        step = jax.jit(make_step(model, optimizer, rate, FLOAT32, seed=3, micro_steps=micro))
        for number in range(2):
            state, metrics = step(state, laid.batch(number))
            if number == 0:
                np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
        for name, after in named(state.params).items():
            same = np.array_equal(np.asarray(after), named(before)[name])
            assert same == is_frozen(name), name


def test_gradients_of_the_trained_are_those_of_the_whole_model():
    with layout(**PLAIN) as laid:
        given = laid.params(initial_params(SMALL)), laid.batch(), jax.random.key(1), jnp.float32(1)
        _, want = jax.jit(loss_and_grads(laid.model, FLOAT32))(*given)
        _, got = jax.jit(loss_and_grads(freeze(laid.model, FROZEN), FLOAT32))(*given)
    assert named(got).keys() == {n for n in named(want) if not is_frozen(n)}
    for name, g in named(got).items():
        np.testing.assert_allclose(g, named(want)[name], rtol=1e-5, atol=1e-7, err_msg=name)


def test_nothing_is_propagated_below_what_is_trained():
    """With all below the head frozen, the layers run forward alone."""
    with layout(**PLAIN) as laid:
        params = jax.eval_shape(laid.model.init, jax.random.key(0))
        given = params, laid.batch(), None, jnp.float32(1)

        def products(*frozen):
            grads_of = loss_and_grads(freeze(laid.model, frozen), FLOAT32)
            return len(list(primitives(jax.make_jaxpr(grads_of)(*given).jaxpr, "dot_general")))

        everything, head = products(), products("embedding", "stack/*")
    # Each product of a layer has two more in the backward pass; the head has its own all the same.
    assert head < everything / 2


@pytest.mark.slow
def test_weights_in_host_memory_are_frozen_too():
    """The update of offloaded moments, on CPU one memory, leaves out what is frozen; of blocks that
    layers share, too.
    """
    shared = replace(SMALL, layers=3, distinct=2)
    with layout(config=shared) as laid:
        model = freeze(laid.model, FROZEN)
        params = laid.params(initial_params(shared))
        states = []
        for offload in (False, True):
            config = replace(OPTIMIZER, offload=offload)
            optimizer = make_optimizer(config, 10, model.trained(model.axes))
            state = create_state(model, optimizer, FLOAT32, 0, laid.mesh, params)
            step = make_step(model, optimizer, make_schedule(config, 10), FLOAT32, seed=3)
            states.append(jax.jit(step)(state, laid.batch())[0])
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (("stak/*",), ("config.optimizer.frozen = ['stak/*']", "names no parameter", "'stack/*'")),
        (("embedding", "layers"), ("'layers' names no parameter", "embedding")),
        (("*",), ("config.optimizer.frozen = ['*']", "nothing is left to train")),
    ],
)
def test_what_cannot_be_frozen_is_refused(patterns, words):
    with layout(**PLAIN) as laid, pytest.raises(ValueError, match=r"config\.optimizer") as error:
        freeze(laid.model, patterns)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_offload_without_a_trained_layer_is_refused():
    with layout(**PLAIN) as laid:
        axes = freeze(laid.model, ("stack/*",)).trained(laid.model.axes)
    with pytest.raises(ValueError, match=r"config\.optimizer\.offload"):
        make_optimizer(OptimizerConfig(offload=True), 10, axes)
