"""Rows of stages and spread layers hold the same, and no device ever has more than its share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from parallel.division import Division
from parallel.exchange import by_rows, to_rows, to_spread
from parallel.mesh import MeshConfig
from parallel.rules import ParallelConfig, make_rules
from parallel.schedule_kinds import make_schedule
from tests.hlo import collectives

UP, BIAS, ODD = "layers embed -> mlp", "layers norm", "layers head_dim"
SHAPES = {UP: (6, 16, 24), BIAS: (6, 16), ODD: (6, 3)}
DIVISIONS = [("interleaved", (1, 2, 1, 2)), ("zb_v", (1, 1, 3, 1)), ("1f1b", (4, 2))]


def rows_of(name, layers, stages=2):
    return Division(layers).rows(make_schedule(name, stages, 4))


def rules_of(zero, **sizes):
    sizes = MeshConfig(**({"data": 1} | sizes)).sizes()
    return make_rules(ParallelConfig(zero=zero), sizes, {}, rows=False)


@pytest.mark.parametrize(("schedule", "layers"), DIVISIONS)
@pytest.mark.parametrize("names", SHAPES)
@pytest.mark.parametrize(
    ("zero", "sizes"), [(0, {"pipe": 2}), (1, {"pipe": 2, "fsdp": 2, "tensor": 2})], ids=str
)
def test_each_stage_gets_its_layers_and_gives_them_back(
    use_mesh, schedule, layers, names, zero, sizes
):
    rules, rows, shape = rules_of(zero, **sizes), rows_of(schedule, layers), SHAPES[names]
    whole = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    with use_mesh(**sizes):
        mesh = jax.sharding.get_mesh()
        spec = rules.spread(names, shape)
        array = jax.device_put(whole, NamedSharding(mesh, spec))
        there = jax.jit(lambda a: to_rows(a, spec, rows))(array)
        assert there.sharding.spec == by_rows(spec)
        assert there.sharding.shard_shape(there.shape)[0] == len(rows) // 2
        own = np.asarray(rows) >= 0
        np.testing.assert_array_equal(np.asarray(there)[own], whole[np.asarray(rows)[own]])
        # What stands in rows without a layer is not to come back.
        spoilt = jnp.where(jnp.asarray(own).reshape(-1, *[1] * (whole.ndim - 1)), there, jnp.nan)
        back = jax.jit(lambda a: to_spread(a, spec, rows))(spoilt)
        assert back.sharding.spec == spec
        np.testing.assert_array_equal(np.asarray(back), whole)


def test_what_divides_is_divided_over_pipe():
    rules = rules_of(1, pipe=2, fsdp=2, tensor=2)
    assert rules.spread(UP, SHAPES[UP]) == P(None, ("fsdp", "pipe"), "tensor")
    assert rules.spread(UP, (6, 6, 24)) == P(None, "fsdp", ("tensor", "pipe"))
    assert rules.spread(BIAS, SHAPES[BIAS]) == P(None, ("fsdp", "pipe"))
    assert rules.spread(ODD, SHAPES[ODD]) == P(None, None)
    assert rules_of(0, pipe=2, fsdp=2).spread(UP, SHAPES[UP]) == P(None, "pipe", None)
    assert rules.at_rest(UP, SHAPES[UP]) == rules.of_gradient(UP, SHAPES[UP])
    assert rules.in_model(UP, SHAPES[UP]) == P("pipe", None, "tensor")  # what stages compute with


def test_nothing_is_gathered(use_mesh):
    """An all-to-all each way; what a device holds in between is not more than it gives away."""
    sizes = dict(pipe=4, fsdp=2)
    rules, shape = rules_of(3, **sizes), (12, 64, 128)
    rows = rows_of("interleaved", (1, 1, 2, 2, 1, 2, 2, 1), stages=4)
    with use_mesh(**sizes):
        mesh = jax.sharding.get_mesh()
        spec = rules.spread(UP, shape)
        for exchange, number, at in ((to_rows, 12, spec), (to_spread, len(rows), by_rows(spec))):
            like = jax.ShapeDtypeStruct(
                (number, *shape[1:]), jnp.float32, sharding=NamedSharding(mesh, at)
            )
            program = jax.jit(lambda a, go=exchange: go(a, spec, rows)).lower(like).compile()
            kinds = [c.kind for c in collectives(program.as_text())]
            assert kinds == ["all-to-all"], kinds
            share = 4 * len(rows) * 64 * 128 // 8
            assert program.memory_analysis().temp_size_in_bytes <= 3 * share
