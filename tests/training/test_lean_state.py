"""Small states saved and restored: on the mesh that they come from bit for bit, and on another."""

import jax
import numpy as np
import pytest
from jax.sharding import get_mesh

from parallel.pipeline import PipelineConfig
from parallel.precision import PrecisionConfig
from tests.small import layout
from tests.training.test_optim import AXES, arrays, config_of, place, rules_for
from training.checkpoint import CheckpointConfig, Checkpoints
from training.frozen import freeze
from training.optim import apply_update, make_optimizer, state_specs
from training.schedules import make_schedule
from training.state import create_state, shardings_of
from training.step import make_step


def wanted(optimizer, rules):
    """What a state is restored to on the current mesh."""
    params = place(arrays(0), rules.at_rest)
    shapes = jax.eval_shape(optimizer.init, params)
    shardings = shardings_of(state_specs(optimizer, AXES, params, rules), get_mesh())
    return jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        shapes,
        shardings,
    )


@pytest.mark.parametrize("name", ["adamw4bit", "galore"])
def test_a_restored_state_goes_on_as_if_nothing_had_been(use_mesh, tmp_path, name):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    optimizer = make_optimizer(config_of(name), 10, AXES)
    sizes = dict(fsdp=4, tensor=2)
    with use_mesh(**sizes):
        rules = rules_for(sizes, 3)
        params = place(arrays(0), rules.at_rest)
        update = jax.jit(lambda *args: apply_update(optimizer, *args)[:2])
        grads = [place(arrays(i + 1), rules.of_gradient) for i in range(2)]
        params, state = update(grads[0], jax.jit(optimizer.init)(params), params)
        checkpoints.save(1, state, {})
        checkpoints.close()
        want = update(grads[1], state, params)
        _, restored = Checkpoints(tmp_path).restore(1, wanted(optimizer, rules))
        assert jax.tree.map(jax.typeof, restored) == jax.tree.map(jax.typeof, state)
        got = update(grads[1], restored, params)
        jax.tree.map(np.testing.assert_array_equal, got, want)
        saved = jax.tree.map(np.asarray, state)
    for sizes in (dict(fsdp=8), dict(pipe=3, data=2)):
        with use_mesh(**sizes):
            _, restored = Checkpoints(tmp_path).restore(1, wanted(optimizer, rules_for(sizes, 3)))
        jax.tree.map(np.testing.assert_array_equal, restored, saved)


@pytest.mark.slow
def test_all_of_it_at_once_trains_alike_on_one_device_and_in_stages():
    """bfloat16 alone, moments in 8 bits, frozen tables, stages that divide the layers."""
    precision = PrecisionConfig(params="bfloat16")
    frozen = ("embedding*",)
    config = config_of("adamw8bit", learning_rate=1e-2, frozen=frozen, stochastic_rounding=True)

    def losses(**kind):
        with layout(dropout=0.0, layers=2, tied=False, **kind) as laid:
            model = freeze(laid.model, frozen)
            optimizer = make_optimizer(config, 10, model.trained(model.axes))
            micro = 2 if "pipe" in kind else 1
            rate = make_schedule(config, 10)
            step = make_step(
                model, optimizer, rate, precision, seed=0, micro_steps=micro, stochastic=True
            )
            step = jax.jit(step, donate_argnums=0)
            state = create_state(model, optimizer, precision, 0, laid.mesh)
            found = []
            for _ in range(4):
                types = jax.tree.map(jax.typeof, state)
                state, metrics = step(state, laid.batch())
                assert jax.tree.map(jax.typeof, state) == types
                found.append(float(metrics["loss"]))
            return found

    want = losses()
    assert want[-1] < want[0] - 0.1
    got = losses(pipe=2, fsdp=2, zero=3, pipeline=PipelineConfig(microbatches=2))
    # Gradients are summed in another order, which a rounding by chance makes a step of bfloat16.
    np.testing.assert_allclose(got, want, rtol=5e-3)
