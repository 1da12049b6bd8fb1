"""A config as a whole: what depends on several sections, for training and for evaluation."""

from __future__ import annotations

import pytest

from config_border import with_values
from configs import tiny
from experiment import read_experiment


def read(devices=8, *, training=True, **keys):
    values = {f"config.{key.replace('__', '.')}": value for key, value in keys.items()}
    return read_experiment(with_values(tiny.get_config(), values), devices, training=training)


FOUR = dict(mesh__data=2, mesh__pipe=4)
ORDERS = (
    "from parallel.schedule import B, F\n"
    "def orders(p, m): return [[a for i in range(m) for a in (F(i), B(i))]] * p\n"
)


def test_a_schedule_of_ones_own_is_the_configs(tmp_path):
    file = tmp_path / "in_turn.py"
    file.write_text(ORDERS)
    experiment = read(**FOUR, pipeline__orders=str(file))
    assert "in_turn of 8 micro-batches" in experiment.describe_layout()
    assert experiment.job().pipeline.table(4).name == "in_turn"


def test_evaluation_asks_nothing_of_schedule_and_micro_batches():
    for keys in (
        dict(mesh__data=4, mesh__pipe=2, pipeline__microbatches=32),
        dict(mesh__data=4, mesh__pipe=2, pipeline__layers=(1, 1, 1, 1)),
        dict(mesh__data=4, mesh__pipe=2, pipeline__orders="/no/such.py"),
        dict(mesh__data=1, mesh__pipe=8),  # more stages than layers
        dict(mesh__data=8, train__grad_accumulation=64),
        dict(**FOUR, remat__policy="custom", remat__offload=("query",)),
        dict(**FOUR, optimizer__offload=True),
    ):
        with pytest.raises(ValueError, match=r"config\."):
            read(**keys)
        experiment = read(**keys, training=False)
        assert not experiment.staged
        assert experiment.micro_steps == 1
        divides = experiment.model.layers % experiment.mesh.pipe == 0
        assert experiment.rules().rows == divides


def test_evaluation_still_wants_a_batch_that_divides():
    with pytest.raises(ValueError, match=r"config\.data\.batch_size = 12 .* multiple of 8"):
        read(mesh__data=8, data__batch_size=12, training=False)


@pytest.mark.parametrize(
    ("keys", "numbers"),
    [
        (dict(**FOUR, pipeline__microbatches=7), "4 or 8"),
        (dict(**FOUR, pipeline__microbatches=33), "32"),  # 64 has one row for two copies
        (dict(mesh__data=1, mesh__pipe=8, model__layers=8, pipeline__microbatches=33), "32 or 64"),
        (dict(mesh__data=8, train__grad_accumulation=3), "2 or 4"),
    ],
)
def test_a_batch_that_micro_batches_do_not_divide_names_the_nearest_that_do(keys, numbers):
    of = "pipeline.microbatches" if "mesh__pipe" in keys else "train.grad_accumulation"
    number = keys[of.replace(".", "__")]
    with pytest.raises(ValueError) as caught:
        read(**keys)
    assert str(caught.value) == (
        f"config.data.batch_size = 64 does not divide by config.{of} = {number}; choose a multiple "
        f"of {number}, or for config.{of} {numbers}"
    )
    for n in numbers.split(" or "):
        assert read(**(keys | {of.replace(".", "__"): int(n)})).micro_steps == int(n)


def test_keys_of_a_pipeline_without_effect_are_noted():
    (note,) = read(pipeline__schedule="zb_h1", pipeline__layers=(1, 2)).without_effect("gpu")
    assert note == (
        "config.pipeline.schedule, config.pipeline.layers have no effect: config.mesh.pipe is 1"
    )
    # Layers that were not given, but found, hide no balance.
    assert read(**FOUR, pipeline__balance="cost").without_effect("gpu") == []
    (note,) = read(**FOUR, pipeline__balance="cost", pipeline__layers=(1, 1, 1, 1)).without_effect(
        "gpu"
    )
    assert note == "config.pipeline.balance has no effect: config.pipeline.layers = (1, 1, 1, 1)"


def test_layers_that_are_computed_again_outweigh_the_head():
    def last(policy):
        keys = dict(model__layers=24, model__vocab_size=2048, remat__policy=policy)
        return read(**FOUR, pipeline__balance="cost", **keys).pipeline.layers[-1]

    assert last("full") > last("none")
