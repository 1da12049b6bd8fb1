"""The roofline in closed form against the same roofline of what the compiled step holds."""

from __future__ import annotations

import math
from functools import cache
from types import ModuleType

import pytest

from config_border import with_values
from configs import tiny, tiny_captions, tiny_digits, tiny_seq2seq
from layouts import make_job
from memory.collectives import Collective
from memory.compiled import compile_step
from memory.hlo import parse
from memory.hlo_costs import Counts, count
from memory.job import Job
from memory.roofline import branch_shares, counted_time, step_time
from memory.step_time import CEILINGS, StepTime
from parallel.remat import DOTS
from parallel.targets import parse_target

TARGET = parse_target("cpu:8")
LAYOUTS = {
    "data 8": {"mesh.data": 8},
    "fsdp 8": {"mesh.fsdp": 8},
    "fsdp 8, zero 2": {"mesh.fsdp": 8, "parallel.zero": 2},
    "fsdp 8, zero 1": {"mesh.fsdp": 8, "parallel.zero": 1},
    "fsdp 2, tensor 4": {"mesh.fsdp": 2, "mesh.tensor": 4},
    "fsdp 2, tensor 4, sequence": {
        "mesh.fsdp": 2,
        "mesh.tensor": 4,
        "parallel.sequence": True,
    },
    "fsdp 8, remat dots": {"mesh.fsdp": 8, "remat.policy": "dots"},
    "fsdp 2, tensor 4, products saved by name": {
        "mesh.fsdp": 2,
        "mesh.tensor": 4,
        "remat.policy": "custom",
        "remat.save": DOTS,
    },
    "tensor 8, sequence, remat none": {
        "mesh.tensor": 8,
        "parallel.sequence": True,
        "remat.policy": "none",
    },
    "data 4, fsdp 2, two micro-steps": {
        "mesh.data": 4,
        "mesh.fsdp": 2,
        "train.grad_accumulation": 2,
    },
}
# An image of 64 patches, wide enough that what is left out is little.
IMAGES = {
    "data.source": "images",
    "data.path": "corpus/*.jsonl",
    "data.sequence_length": 64,
    "vision.image_size": 32,
    "vision.patch_size": 4,
    "model.max_length": 64,
    "model.embed_dim": 128,
    "model.mlp_dim": 256,
    "model.head_dim": 16,
}
FAMILIES = {
    "an encoder of a source": (
        tiny_seq2seq,
        {"mesh.fsdp": 2, "mesh.tensor": 4, "data.sequence_length": 64, "data.source_length": 128},
    ),
    "a ViT": (tiny_digits, IMAGES | {"mesh.fsdp": 2, "mesh.tensor": 4}),
    "an image attended to, in stages": (
        tiny_captions,
        IMAGES
        | {"vision.embed_dim": 128, "vision.mlp_dim": 256, "model.cross": "gated"}
        | {"mesh.fsdp": 2, "mesh.tensor": 2, "mesh.pipe": 2, "pipeline.microbatches": 4},
    ),
}


def job_of(layout: dict[str, object], config: ModuleType = tiny) -> Job:
    fixed = {
        "data.batch_size": 16,
        "data.sequence_length": 128,
        "model.max_length": 128,
        "remat.policy": "full",
        "mesh.data": 1,
        "mesh.fsdp": 1,
        "mesh.tensor": 1,
    }
    values = {f"config.{key}": value for key, value in (fixed | layout).items()}
    return make_job(with_values(config.get_config(), {}), TARGET, values)


@cache
def both(name: str) -> tuple[StepTime, StepTime]:
    """Predicted, and counted from the compiled program."""
    config, layout = FAMILIES.get(name) or (tiny, LAYOUTS[name])
    job = job_of(layout, config)
    counts = count(parse(compile_step(job, TARGET).text), job.sizes, branch_shares(job, TARGET))
    return step_time(job, TARGET), counted_time(job, TARGET, counts)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_products_are_as_predicted(name):
    predicted, counted = both(name)
    # The model's FLOPs count the causal half of attention, the program here does whole blocks:
    # at this shape 9%; where scores are computed again, so much more.
    assert 1.0 <= counted.compute_seconds / predicted.compute_seconds <= 1.12


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_products_of_families_are_as_predicted(name):
    predicted, counted = both(name)
    # Scores that a causal mask hides are computed, as above, and beside them the rest is small.
    assert counted.compute_seconds == pytest.approx(predicted.compute_seconds, rel=0.1)
    # XLA:CPU joins less of what is no product into one pass over memory than is assumed, alike
    # with and without stages.
    assert 1.5 <= counted.memory_seconds / predicted.memory_seconds <= 2.6


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LAYOUTS, *FAMILIES])
def test_collectives_are_as_predicted_on_every_axis(name):
    predicted, counted = both(name)
    # Axes that the program joins in one collective count for both.
    for axis, seconds in predicted.communication_seconds.items():
        found = sum(s for a, s in counted.communication_seconds.items() if axis in a.split("+"))
        # Norms are not gathered and the layers' bias is no weight of a product: at most a tenth.
        assert found == pytest.approx(seconds, rel=0.1), axis
    axes = {part for axis in counted.communication_seconds for part in axis.split("+")}
    assert axes == set(predicted.communication_seconds)


def test_a_ring_sends_an_all_reduce_twice_and_a_permute_whole():
    job = job_of({"mesh.fsdp": 2, "mesh.tensor": 4})
    bandwidth = TARGET.bandwidth(job.sizes, ("tensor",))

    def seconds(kind: str, group: int) -> float:
        one = Collective(kind, "tensor", 1000, group, count=3, loop=None)
        time = counted_time(job, TARGET, Counts(1.0, 0.0, 0.0, [one]))
        return time.exposed_seconds["tensor"]

    link = CEILINGS["cpu"].link
    assert seconds("all-gather", 4) == pytest.approx(3 * 750 / bandwidth / link)
    assert seconds("all-reduce", 4) == pytest.approx(3 * 1500 / bandwidth / link)
    assert seconds("collective-permute", 2) == pytest.approx(3 * 1000 / bandwidth / link)


def test_what_runs_beside_products_is_waited_for_only_beyond_them():
    target = parse_target("gpu:h100:1x8")
    job = make_job(tiny.get_config(), target, {"config.mesh.fsdp": 4, "config.mesh.tensor": 2})
    one = Collective("all-gather", "fsdp", 10**9, 4, count=1, loop=None)
    two = Collective("all-reduce", "tensor", 10**6, 2, count=1, loop=None)
    short = counted_time(job, target, Counts(1e15, 0.0, 0.0, [one, two]))
    assert short.exposed_seconds["fsdp"] == 0
    assert short.exposed_seconds["tensor"] == short.communication_seconds["tensor"] > 0
    long = counted_time(job, target, Counts(1e9, 0.0, 0.0, [one, two]))
    whole = long.communication_seconds["fsdp"]
    assert long.exposed_seconds["fsdp"] == pytest.approx(whole - long.compute_seconds)
    assert math.isclose(long.seconds, long.compute_seconds + sum(long.exposed_seconds.values()))
