"""What stands around a pipeline: evaluation, checkpoints and several processes."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import pipeline_equality
from parallel.pipeline import PipelineConfig
from parallel.precision import PrecisionConfig
from tests.hlo import collectives
from tests.processes import launch, outputs
from tests.small import DECODER, initial_params, layout
from tests.training.stages import TOLERANCE
from training.checkpoint import CheckpointConfig, Checkpoints
from training.evaluation import make_eval_step
from training.optim import OptimizerConfig, make_optimizer
from training.state import abstract_state, create_state
from training.step import make_step

FLOAT32 = PrecisionConfig()
# Wide, with few tokens: weights outweigh activations.
WIDE = replace(
    DECODER, embed_dim=64, mlp_dim=256, kv_heads=8, layers=8, dropout=0.0, vocab_size=100
)
LAYER = 4 * (4 * 64 * 64 + 3 * 64 * 256)
PLAIN = PipelineConfig(microbatches=4)
INTERLEAVED = PipelineConfig("interleaved", microbatches=4)
ZB_V = PipelineConfig("zb_v", microbatches=4)
UNEVEN = PipelineConfig(microbatches=4, layers=(5, 3))


def evaluated(config, **kind):
    """(sums of an evaluation, the compiled program)."""
    with layout(config=config, **kind) as laid:
        params, batch = laid.params(initial_params(config)), laid.batch()
        eval_step = jax.jit(make_eval_step(laid.model, FLOAT32, np.arange(config.vocab_size)))
        program = eval_step.lower(params, batch).compile()
        return {name: float(value) for name, value in program(params, batch).items()}, program


@pytest.fixture(scope="module")
def alone():
    return evaluated(WIDE)


@pytest.mark.parametrize(
    "kind",
    [
        dict(pipe=4, pipeline=PLAIN),
        dict(pipe=4, fsdp=2, zero=1, pipeline=INTERLEAVED),
        dict(pipe=2, pipeline=UNEVEN),
        pytest.param(dict(pipe=2, fsdp=2, zero=2, pipeline=PLAIN), marks=pytest.mark.slow),
        pytest.param(
            dict(pipe=2, fsdp=2, tensor=2, zero=3, sequence=True, pipeline=ZB_V),
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_evaluation_holds_a_share_of_the_layers_and_one_whole(alone, kind):
    got, program = evaluated(WIDE, **kind)
    assert got == pytest.approx(alone[0], rel=1e-5)  # float32, summed in another order
    share = WIDE.layers * LAYER / kind["pipe"] / kind.get("fsdp", 1)
    extra = (
        program.memory_analysis().temp_size_in_bytes - alone[1].memory_analysis().temp_size_in_bytes
    )
    # The share in the order of the model where it lies by stages, with what an exchange gives away
    # and gets; a gathered layer; a fifth of that for the rest. All layers would be eight.
    assert extra <= 1.2 * ((2 * share if kind["pipeline"] == PLAIN else 0) + LAYER)


def step_program(**kind):
    with layout(config=WIDE, remat="full", **kind) as laid:
        optimizer = optax.sgd(0.1)
        state = abstract_state(laid.model, optimizer, FLOAT32, laid.mesh)
        rate = lambda _: jnp.float32(0)
        step = make_step(laid.model, optimizer, rate, FLOAT32, seed=0, micro_steps=4)
        return jax.jit(step, donate_argnums=0).lower(state, laid.batch()).compile()


@pytest.mark.parametrize(
    ("kind", "exchanged"),
    [
        (dict(pipe=2, fsdp=2, zero=3, pipeline=PLAIN), False),
        pytest.param(
            dict(pipe=2, fsdp=2, zero=3, pipeline=INTERLEAVED), True, marks=pytest.mark.slow
        ),
        pytest.param(dict(pipe=2, tensor=2, pipeline=ZB_V), True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_no_device_has_more_than_its_share_of_a_stage(kind, exchanged):
    """Neither where the stages' region begins and ends, nor on the way there."""
    found = collectives(step_program(**kind).as_text())
    around = [c for c in found if c.where.startswith("main")]
    assert any(c.kind == "all-to-all" for c in around) == exchanged
    stage = 64 * 256 * WIDE.layers // 2
    for c in around:
        assert c.kind == "all-to-all" or max(map(math.prod, c.shapes)) < stage / 4, c


ADAMW = OptimizerConfig(warmup_steps=0)


def state_of(laid):
    optimizer = make_optimizer(ADAMW, 10, laid.model.axes)
    return abstract_state(laid.model, optimizer, FLOAT32, laid.mesh)


def test_a_checkpoint_of_a_pipeline_fits_any_layout(tmp_path):
    random = np.random.default_rng(0)

    def drawn(like):
        if jnp.issubdtype(like.dtype, jnp.floating):
            return random.standard_normal(like.shape, np.float32)
        return np.full(like.shape, 7, like.dtype)

    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=1))
    with layout(config=WIDE, pipe=4, fsdp=2, zero=2, pipeline=INTERLEAVED) as laid:
        state = state_of(laid)
        arrays = jax.tree.map(drawn, state)
        checkpoints.save(7, jax.tree.map(jax.device_put, arrays, shardings(state)), {})
        checkpoints.close()
    for kind in (
        {},
        dict(pipe=2, pipeline=PLAIN),
        dict(fsdp=8, zero=3),
        dict(pipe=2, tensor=2, zero=3, pipeline=UNEVEN),
    ):
        with layout(config=WIDE, **kind) as laid:
            wanted = state_of(laid)
            step, found = Checkpoints(tmp_path).restore(None, wanted)
        assert step == 7
        assert shardings(found) == shardings(wanted)
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, found), arrays)


def shardings(tree):
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


TRAIN = """
import json
from tests.training.test_pipeline_layouts import trained
print(json.dumps(trained()))
"""


def trained():
    """Losses of some steps of pipe 2 x data 2 x fsdp 2, and sums over the parameters after."""
    config = replace(DECODER, layers=4)
    kind = dict(pipe=2, data=2, fsdp=2, zero=2, pipeline=INTERLEAVED, rows=16, remat="full")
    with layout(config=config, **kind) as laid:
        assert len({d.process_index for d in laid.mesh.devices[0].flat}) == 1
        optimizer = make_optimizer(ADAMW, 10, laid.model.axes)
        state = create_state(laid.model, optimizer, FLOAT32, 0, laid.mesh)
        rate = lambda _: jnp.float32(0)
        step = make_step(laid.model, optimizer, rate, FLOAT32, seed=0, micro_steps=4)
        run, losses = jax.jit(step, donate_argnums=0), []
        for number in range(3):
            state, metrics = run(state, laid.batch(number, rows=16))
            losses.append(float(metrics["loss"]))
        sums = jax.jit(lambda params: [jnp.sum(jnp.square(p)) for p in jax.tree.leaves(params)])
        return losses, [float(s) for s in sums(state.params)]


@pytest.mark.slow
def test_two_processes_with_a_stage_each_are_one():
    one = trained()
    for told in outputs(launch(TRAIN), timeout=300):
        losses, sums = json.loads(told.splitlines()[-1])
        # Gloo sums in another order than XLA does within one process.
        assert losses == pytest.approx(one[0], rel=1e-6)
        assert sums == pytest.approx(one[1], rel=1e-6)


def test_the_published_matrix_is_whole_and_within_tolerance():
    """`benchmarks/pipeline_equality.py`: every schedule, form, mesh and rematerialisation."""
    rows = [json.loads(line) for line in pipeline_equality.RESULT.read_text().splitlines()]
    for case in pipeline_equality.cases():
        (row,) = (row for row in rows if pipeline_equality.same(row, case))
        found = [row[name] for name in pipeline_equality.MEASURED if name in row]
        assert found
        assert max(found) <= TOLERANCE
