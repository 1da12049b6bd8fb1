"""The step: micro-steps, what is skipped, what is donated, what it reports."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import get_mesh

from models.config import ModelConfig
from parallel.precision import PrecisionConfig
from tests.drawn import drawn_params, put
from tests.small import layout, numpy_batch
from tests.training.line import BAD, D, line, tokens
from training.state import create_state
from training.step import loss_and_grads, make_step

FLOAT32 = PrecisionConfig()
TINY = ModelConfig(
    vocab_size=250, layers=2, embed_dim=16, mlp_dim=16, heads=2, kv_heads=1, head_dim=8,
    attention="xla",
)  # fmt: skip


def started(optimizer=None, micro_steps=1, **options):
    """A jitted step of the line, donating, and its first state."""
    optimizer = optimizer or optax.adam(0.1)
    schedule = lambda count: 0.1 * (1 + count)
    step = make_step(line(**options), optimizer, schedule, FLOAT32, seed=0, micro_steps=micro_steps)
    state = create_state(line(**options), optimizer, FLOAT32, 0, get_mesh())
    return jax.jit(step, donate_argnums=0), state


ROWS = [[0, 1, 2], [0, 0, 0], [3, 4, 0], [5, 5, 5]]
SEGMENTS = [[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 2, 0]]  # 3, 1, 0 and 2 tokens that count


@pytest.mark.parametrize("micro_steps", [1, 2, 4])
def test_every_token_weighs_the_same_in_any_micro_step(use_mesh, micro_steps):
    """The gradient is that of the mean over all 6 tokens, by hand: counts of each feature / 6."""
    with use_mesh():
        of_batch = jax.jit(loss_and_grads(line(start=2.0), FLOAT32, micro_steps))
        params = line(start=2.0).init(jax.random.key(0))
        sums, grads = of_batch(params, tokens(ROWS, segments=SEGMENTS), None, jnp.float32(1))
    want = np.array([2, 1, 1, 0, 0, 2, 0, 0]) / 6
    np.testing.assert_allclose(grads["w"], want, rtol=1e-6)
    assert float(sums["loss"]) == pytest.approx(2.0, rel=1e-6)
    assert float(sums["tokens"]) == 6


def uneven_batch():
    """Rows of 2 to 16 tokens: means of micro-steps and the mean of all are far apart."""
    batch = numpy_batch()
    lengths = np.array([16, 2, 16, 2, 3, 16, 2, 16])
    batch["segments"] = batch["segments"] * (np.arange(16)[None] < lengths[:, None])
    return batch


@pytest.mark.slow
def test_accumulated_gradients_of_a_decoder_are_those_of_one_batch():
    got = {}
    with layout(config=TINY, data=2) as laid:
        params, batch = laid.params(drawn_params(laid, TINY)), put(laid, uneven_batch())
        for micro_steps in (1, 2, 4):
            of_batch = jax.jit(loss_and_grads(laid.model, FLOAT32, micro_steps))
            sums, grads = of_batch(params, batch, None, jnp.float32(1))
            got[micro_steps] = jax.tree.map(lambda a: np.asarray(a, np.float64), (sums, grads))
    sums, grads = got.pop(1)
    for other_sums, other_grads in got.values():
        for name, value in sums.items():
            np.testing.assert_allclose(other_sums[name], value, rtol=1e-6)
        # float32, the same terms in another order
        for other, one in zip(jax.tree.leaves(other_grads), jax.tree.leaves(grads), strict=True):
            assert np.linalg.norm(other - one) <= 1e-6 * np.linalg.norm(one)


def test_an_injected_infinity_is_skipped_and_counted(use_mesh):
    with use_mesh():
        step, state = started()
        good, bad = tokens([[0, 1]]), tokens([[0, 1]], targets=BAD)
        seen = []
        for batch in (good, bad, bad, good):
            before = jax.tree.map(np.asarray, (state.params, state.opt_state))
            state, metrics = step(state, batch)
            after = jax.tree.map(np.asarray, (state.params, state.opt_state))
            same = jax.tree.map(lambda x, y: x.tobytes() == y.tobytes(), before, after)
            unchanged = all(jax.tree.leaves(same))
            numbers = [float(metrics[k]) for k in ("finite", "skipped", "learning_rate")]
            seen.append((int(state.step), unchanged, *np.round(numbers, 6).tolist()))
        # step, state unchanged, finite, skipped, the rate of the update that comes next or came
        assert seen == [
            (1, False, 1, 0, 0.1),
            (2, True, 0, 1, 0.2),
            (3, True, 0, 2, 0.2),
            (4, False, 1, 2, 0.2),
        ]
        np.testing.assert_array_equal(state.opt_state[0].count, 2)  # updates, not steps


def test_a_donated_state_is_gone_and_its_bytes_are_used_again(use_mesh):
    with use_mesh():
        step, state = started()
        batch = tokens([[0, 1]])
        compiled = step.lower(state, batch).compile()
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        assert size == 3 * D * 4 + 5 * 4
        assert compiled.memory_analysis().alias_size_in_bytes == size
        places = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)}
        new, _ = compiled(state, batch)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
        assert {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(new)} == places
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(batch))


def test_a_step_keeps_the_types_of_the_state(use_mesh):
    """Or the second step would compile again."""
    with use_mesh():
        step, state = started(micro_steps=2)
        types = jax.tree.map(jax.typeof, state)
        for _ in range(3):
            state, _ = step(state, tokens([[0, 1], [2, 3]]))
        assert jax.tree.map(jax.typeof, state) == types
        assert step._cache_size() == 1


def test_dropout_goes_by_seed_and_step_and_not_by_what_was_skipped(use_mesh):
    """The key of a step is a function of (seed, step) alone."""
    keys = []

    def loss(params, batch, weights, key):
        jax.debug.callback(lambda data: keys.append(tuple(data.tolist())), jax.random.key_data(key))
        total = jnp.sum(weights.tokens_BT) * jnp.sum(params["w"])
        return total, {"nll_sum": jax.lax.stop_gradient(total)}

    with use_mesh():
        model, optimizer = replace(line(), loss=loss), optax.sgd(0.1)
        for seed in (0, 1):
            step = jax.jit(make_step(model, optimizer, lambda _: 0.1, FLOAT32, seed=seed))
            state = create_state(model, optimizer, FLOAT32, 0, get_mesh())
            for _ in range(2):
                state, _ = step(state, tokens([[0, 1]]))
        jax.effects_barrier()
        key = lambda seed, step: jax.random.fold_in(jax.random.key(seed), step)
        want = [jax.random.key_data(key(seed, step)) for seed in (0, 1) for step in (0, 1)]
        want = [tuple(np.asarray(data).tolist()) for data in want]
    assert keys == want
    assert len(set(keys)) == 4
