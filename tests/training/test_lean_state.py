"""Small states saved and restored: on the mesh that they come from bit for bit, and on another."""

import jax
import numpy as np
import pytest
from jax.sharding import get_mesh

from tests.training.test_optim import AXES, arrays, config_of, place, rules_for
from training.checkpoint import CheckpointConfig, Checkpoints
from training.optim import apply_update, make_optimizer, state_specs
from training.state import shardings_of


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
