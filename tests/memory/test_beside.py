"""The planner of models with an encoder beside a decoder against what is made and compiled."""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from data.objective import ObjectiveConfig
from memory.compiled import compile_step
from memory.constants import CONSTANTS
from memory.job import Job
from memory.phases import phases
from memory.predict import predict
from memory.terms import Terms
from models.beside import beside_length
from models.config import ModelConfig
from models.vision_config import VisionConfig
from models.weights import model_weights
from parallel.mesh import MeshConfig, make_mesh
from parallel.precision import PrecisionConfig
from parallel.remat import RematConfig
from parallel.rules import ParallelConfig, make_rules
from parallel.targets import parse_target
from tests.families import FAMILIES
from tests.jaxpr import primitives
from training.batch_arrays import abstract_batch
from training.losses import LossConfig
from training.optim import OptimizerConfig
from training.state import abstract_params, abstract_state
from training.step import loss_and_grads

# What all layers keep is exact; the fullest moment of one layer is not, and here it is 1 in 128.
CLOSE = 0.01
# Deep, so that what a single layer holds while it works is little beside what all layers keep.
DEEP = 128
IMAGES = VisionConfig(image_size=32, patch_size=4, channels=3)
CAPTIONER = ModelConfig(
    vocab_size=256, layers=DEEP, embed_dim=64, mlp_dim=128, heads=4, kv_heads=4, head_dim=16,
    max_length=128, family="vision_language",
    vision=replace(IMAGES, layers=DEEP, embed_dim=64, mlp_dim=128, heads=4),
)  # fmt: skip
VIT = replace(
    CAPTIONER, family="vision", vision=IMAGES, tasks=(("kind", 10),), norm="layer",
    positions="learned", max_length=64, activation="gelu", gated=False, mlp_bias=True,
    token_head=False,
)  # fmt: skip
SOURCE = 24
LENGTHS = {"captioning": 32, "classification": 64}


def job(config, objective, remat="none", rows=8, zero=3, frozen=(), **sizes):
    mesh = MeshConfig(**{"data": 1} | sizes)
    parallel = ParallelConfig(zero=zero)
    length = LENGTHS.get(objective.name, 16)
    dims = (
        config.dims()
        | config.row_dims(length, SOURCE)
        | {"batch": (rows, "config.data.batch_size")}
    )
    return Job(
        model=config,
        mesh=mesh,
        parallel=parallel,
        precision=PrecisionConfig(),
        remat=RematConfig(policy=remat),
        optimizer=OptimizerConfig(name="sgd", frozen=frozen),
        objective=objective,
        loss=LossConfig(),
        batch_size=rows,
        sequence_length=length,
        micro_steps=1,
        steps=10,
        rules=make_rules(parallel, mesh.sizes(), dims),
        source_length=beside_length(config, SOURCE) * (config.cross != "none"),
    )


OBJECTIVES = {
    "captioning": (CAPTIONER, ObjectiveConfig(name="captioning")),
    "classification": (VIT, ObjectiveConfig(name="classification", tasks={"kind": 10})),
}


@pytest.mark.parametrize(
    "name",
    ["captioning", "captioning, gated", "captioning, shared", "vision", "2017", "t5", "t5, shared"],
)
def test_layers_declare_the_weights_that_they_make(name):
    family = FAMILIES[name]
    one = job(family.config, family.objective)
    with jax.set_mesh(make_mesh(one.mesh, jax.devices()[:1])):
        model, _, _ = one.build()
        arrays = abstract_params(model, one.precision)
    names = jax.tree.leaves(model.axes)
    made = Counter((a.shape, axes) for a, axes in zip(jax.tree.leaves(arrays), names, strict=True))
    block, outside = model_weights(one.model)
    stacked = [weight.stacked(one.model.blocks, one.model.stack) for weight in block]
    assert Counter((weight.shape, weight.axes) for weight in stacked + outside) == made


@pytest.mark.parametrize("sizes", [dict(data=8), dict(fsdp=8), dict(fsdp=2, tensor=4)], ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_state_and_batch_are_predicted_to_the_byte(name, sizes):
    one = job(*OBJECTIVES[name], **sizes)
    mesh = make_mesh(one.mesh)
    with jax.set_mesh(mesh):
        model, optimizer, _ = one.build()
        state = abstract_state(model, optimizer, one.precision, mesh)
    held = sum(
        math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
        for a in jax.tree.leaves(state)
    )
    text = 4 * 4 * LENGTHS["captioning"] if name == "captioning" else 4
    batch = 8 * (4 * 64 * 48 + text) // one.rules.parts("batch")
    scalars = held + batch - predict(one, parse_target("cpu:8").chip).arguments
    assert 0 <= scalars <= 64  # counters and the loss scale, which are not predicted


@functools.cache
def temporaries(name, remat, of_vit=DEEP, frozen=()):
    """(compiled, predicted for the backward pass, without gaps that this allocator does not leave):
    see `tests/memory/test_knobs.py`.
    """
    config, objective = OBJECTIVES[name]
    if name == "captioning":
        config = replace(config, vision=replace(config.vision, layers=of_vit))
    one, target = job(config, objective, remat, rows=2, frozen=frozen), parse_target("cpu:1")
    predicted = predict(one, target.chip).phases["backward"] / CONSTANTS["cpu"].packing
    return compile_step(one, target).temporaries, predicted


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_remat_moves_what_is_predicted(name):
    """Of both stacks at once: what the ViT keeps lives through the decoder's backward pass."""
    before, after = temporaries(name, "none"), temporaries(name, "full")
    moved, predicted = (was - now for was, now in zip(before, after, strict=True))
    assert moved == pytest.approx(predicted, rel=CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_layers_of_the_vit_cost_what_is_predicted(remat):
    before, after = temporaries("captioning", remat), temporaries("captioning", remat, DEEP // 2)
    moved, predicted = (was - now for was, now in zip(before, after, strict=True))
    assert moved == pytest.approx(predicted, rel=CLOSE)


@pytest.mark.slow
def test_a_frozen_vit_keeps_nothing():
    """Nor has it gradients; the decoder's layers are trained as ever."""
    before, after = (temporaries("captioning", "none", frozen=f) for f in ((), ("images/vit/*",)))
    moved, predicted = (was - now for was, now in zip(before, after, strict=True))
    assert moved == pytest.approx(predicted, rel=CLOSE)


# Family, what is frozen -> whether anything is propagated through its layers, and through those of
# an encoder beside it.
PROPAGATED = {
    ("decoder", "stack/*,embedding"): (False, None),
    ("decoder", "stack/*"): (True, None),
    ("encoder, tokens and classes", "stack/*,emb*,position,token_type"): (False, None),
    ("encoder, tokens and classes", "stack/*,emb*,position"): (True, None),
    ("vision", "vision/stack/*,vision/p*"): (False, None),
    ("vision", "vision/stack/*"): (True, None),
    ("captioning", "images/vit/*"): (True, False),
    ("captioning", "images/vit/stack/*,images/vit/p*"): (True, False),
    ("captioning", "images/vit/stack/*"): (True, True),
    ("captioning", "images/vit/*,stack/*,emb*"): (True, False),  # for the projector
    ("captioning", "images/*,stack/*,emb*"): (False, False),
    ("captioning, gated", "images/vit/*"): (True, False),
    ("t5", "encoder/*"): (True, False),
    ("t5, shared", "encoder/*"): (True, True),  # for the table, which is the decoder's
    ("t5, shared", "encoder/*,emb*"): (True, False),
}


def scans(one):
    """Loops of the gradients: each stack has one forward, and one backward if need be."""
    with jax.set_mesh(make_mesh(one.mesh, jax.devices()[:1])):
        model, _, _ = one.build()
        params = abstract_params(model, one.precision)
        batch = abstract_batch(one.batch_arrays, one.rows, one.rules, jax.sharding.get_mesh())
        given = params, batch, None, jnp.float32(1)
        jaxpr = jax.make_jaxpr(loss_and_grads(model, one.precision))(*given).jaxpr
    return len(list(primitives(jaxpr, "scan")))


@pytest.mark.parametrize(("name", "patterns"), PROPAGATED)
def test_below_what_is_trained_nothing_is_kept(name, patterns):
    family, (through, through_beside) = FAMILIES[name], PROPAGATED[name, patterns]
    everything = job(family.config, family.objective)
    one = job(family.config, family.objective, frozen=tuple(patterns.split(",")))
    assert scans(everything) - scans(one) == (not through) + (through_beside is False)

    terms = Terms(one, parse_target("cpu:1").chip)
    backward = phases(terms, CONSTANTS["cpu"])["backward"]
    own, beside = (
        any(backward[name] for name in backward if name.startswith(kind))
        for kind in ("saved: ", "saved by the encoder: ")
    )
    assert (own, beside) == (through, bool(through_beside))
    assert ("encoder, backward" in phases(terms, CONSTANTS["cpu"])) == bool(through_beside)
