"""The shipped shapes are the published ones, and their step can be traced on a mesh of 8."""

from __future__ import annotations

import jax
import pytest

from config_border import load_config
from experiment import read_experiment
from parallel.mesh import make_mesh
from training.batch_arrays import abstract_batch
from training.optim import make_optimizer
from training.schedules import make_schedule
from training.state import abstract_state
from training.step import make_step

# Parameters as counted by the published checkpoints; each file's header names its source.
PUBLISHED = {
    "gpt2_124m": (124_439_808, {"fsdp": 8}),
    "llama3_8b": (8_030_261_248, {"fsdp": 2, "tensor": 4}),
    "llama3_70b": (70_553_706_496, {"tensor": 8}),
    "qwen3_0_6b": (596_049_920, {"data": 2, "fsdp": 2, "tensor": 2}),
    "gemma3_1b": (999_885_952, {"data": 2, "fsdp": 4}),
    "mixtral_8x7b": (46_702_792_704, {"fsdp": 2, "expert": 4}),
    "paligemma_like": (2_923_466_480, {"fsdp": 4, "tensor": 2}),
    "bert_base": (109_514_298, {"fsdp": 2, "tensor": 4}),
    "t5_small": (60_506_624, {"fsdp": 2, "tensor": 4}),
    "transformer_2017_base": (63_045_632, {"data": 4, "fsdp": 2}),
    "qwen3_30b_a3b": (30_532_122_624, {"expert": 8}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shape(name):
    count, sizes = PUBLISHED[name]
    config = load_config(f"configs/{name}.py")
    for axis, size in ({"data": 1} | sizes).items():
        config.mesh[axis] = size
    experiment = read_experiment(config, 8)
    mesh = make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        model = experiment.build_model()
        optimizer = make_optimizer(experiment.optimizer, 10, model.axes)
        state = abstract_state(model, optimizer, experiment.precision, mesh)
        shape = experiment.model
        tables = 1 if shape.tied else 2
        width = shape.embed_dim * tables + shape.head_bias
        padding = (shape.padded_vocab - shape.vocab_size) * width
        assert sum(p.size for p in jax.tree.leaves(state.params)) - padding == count

        step = make_step(
            model,
            optimizer,
            make_schedule(experiment.optimizer, 10),
            experiment.precision,
            seed=0,
            micro_steps=experiment.train.grad_accumulation,
        )
        job = experiment.job()
        batch = abstract_batch(job.batch_arrays, job.batch_size, model.rules, mesh)
        new, metrics = jax.eval_shape(step, state, batch)
    assert metrics["loss"].shape == ()
    same = jax.tree.map(lambda a, b: a.sharding.spec == b.sharding.spec, state, new)
    assert all(jax.tree.leaves(same)), "the step changes a layout"
