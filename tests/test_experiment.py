"""A config as a whole: what depends on several sections, for training and for evaluation."""

from __future__ import annotations

import pytest

from config_border import with_values
from configs import tiny, tiny_captions, tiny_digits
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


@pytest.mark.parametrize(
    ("shape", "keys", "said"),
    [
        (tiny_digits, dict(data__sequence_length=8), "the 16 patches of an image; set it to 16"),
        (tiny_captions, dict(data__sequence_length=56), r"56 and the 16 .* raise max_length"),
        (tiny_captions, dict(vision__heads=6), r"model\.heads = 8 and config\.vision\.heads = 6"),
        (
            tiny_captions,
            dict(data__sequence_length=36, parallel__sequence=True),
            r"sequence_length = 36 and the patches of an image .* = 4 does not divide",
        ),
        (tiny_captions, dict(model__family="decoder"), r"config\.vision\.image_size = 8"),
        (tiny_captions, dict(objective__name="causal_lm"), "is trained for captioning"),
        (tiny_digits, dict(objective__name="captioning"), "is trained for classification"),
    ],
)
def test_images_that_fit_nowhere_are_refused(shape, keys, said):
    values = {f"config.{key.replace('__', '.')}": value for key, value in keys.items()}
    layout = {"config.mesh.data": 1, "config.mesh.tensor": 8}
    with pytest.raises(ValueError, match=said):
        read_experiment(with_values(shape.get_config(), layout | values), 8)


def test_what_a_vit_does_not_read_is_said():
    config = with_values(tiny_digits.get_config(), {"config.model.embed_scale": True})
    assert any("embed_scale" in note for note in read_experiment(config, 1).without_effect("cpu"))


def test_keys_of_objectives_without_effect_are_noted():
    assert read(objective__name="prefix_lm", data__packing="none").without_effect("gpu") == []
    keys = dict(objective__mask_rate=0.3, data__source_length=99)
    assert read(**keys).without_effect("gpu") == [
        "config.objective.mask_rate has no effect: config.objective.name is 'causal_lm'",
        "config.data.source_length has no effect: config.objective.name is 'causal_lm'",
    ]


ENCODER = dict(model__family="encoder", objective__name="masked_lm", data__packing="none")
TASKS = {"package": 8}


def test_the_objective_says_what_heads_there_are():
    masked = read(**ENCODER).model
    assert (masked.token_head, masked.tasks) == (True, ())
    both = read(**ENCODER, objective__tasks=TASKS).model
    assert (both.token_head, both.tasks) == (True, (("package", 8),))
    rows = read(**ENCODER | {"objective__name": "classification"}, objective__tasks=TASKS)
    assert not rows.model.token_head
    assert {"targets", "counted"} & rows.job().batch_arrays.keys() == set()
    assert rows.job().batch_arrays["label_package"].below == 8


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            dict(model__family="encoder"),
            "config.objective.name = 'causal_lm': config.model.family = 'encoder' is trained for ",
        ),
        (dict(objective__name="masked_lm"), "config.objective.name = 'masked_lm': "),
        (
            dict(objective__tasks=TASKS),
            "config.objective.tasks = {'package': 8}: config.model.family = 'decoder' has no heads",
        ),
        (
            ENCODER | dict(experts__number=8),
            "config.experts.number = 8: not built for config.model.family = 'encoder'",
        ),
        (
            ENCODER | dict(checkpoint__best="package_loss"),
            "config.checkpoint.best = 'package_loss': choose one of loss, perplexity, ",
        ),
        (
            ENCODER
            | dict(objective__name="classification", objective__tasks=TASKS)
            | dict(checkpoint__best="perplexity"),
            "config.checkpoint.best = 'perplexity': choose one of loss, package_loss;",
        ),
    ],
)
def test_what_no_encoder_or_decoder_is_trained_for(keys, message):
    with pytest.raises(ValueError) as error:
        read(**keys)
    assert str(error.value).startswith(message)
