"""What `config.pipeline` refuses, says has no effect, and does not run."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import pytest

from parallel.pipeline import PipelineConfig, run_pipeline
from parallel.precision import PrecisionConfig
from parallel.schedule_kinds import make_schedule
from tests.small import layout
from training.step import loss_and_grads


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        (dict(schedule="1f1c"), "config.pipeline.schedule = '1f1c': choose one of gpipe, 1f1b"),
        (dict(form="nonsense"), "config.pipeline.form = 'nonsense': 1f1b comes as wide, lean"),
        (dict(schedule="gpipe", form="lean"), "config.pipeline.form = 'lean': gpipe comes as wide"),
    ],
)
def test_names_are_checked_with_no_table_made(keys, why):
    with pytest.raises(ValueError) as caught:
        PipelineConfig(**keys)
    assert str(caught.value).startswith(why)


@pytest.mark.parametrize(
    ("keys", "stages", "notes"),
    [
        ({}, 1, []),
        ({"schedule": "zb_h1", "form": "lean"}, 4, []),
        ({"balance": "cost"}, 4, []),
        ({"orders": "x.py"}, 4, []),
        (
            {"schedule": "zb_h1", "microbatches": 16, "layers": (1, 2)},
            1,
            [
                (
                    "config.pipeline.schedule, config.pipeline.microbatches, "
                    "config.pipeline.layers have no effect: config.mesh.pipe is 1"
                )
            ],
        ),
        ({"orders": "x.py"}, 1, ["config.pipeline.orders has no effect: config.mesh.pipe is 1"]),
        (
            {"balance": "cost", "layers": (1, 2)},
            2,
            ["config.pipeline.balance has no effect: config.pipeline.layers = (1, 2)"],
        ),
        (
            {"orders": "x.py", "schedule": "zb_h1", "form": "lean", "microbatches": 16},
            2,
            [
                (
                    "config.pipeline.schedule, config.pipeline.form have no effect: "
                    "config.pipeline.orders = 'x.py'"
                )
            ],
        ),
    ],
    ids=str,
)
def test_what_has_no_effect_is_said(keys, stages, notes):
    assert PipelineConfig(**keys).without_effect(stages) == notes


@dataclass(frozen=True)
class Fixed(PipelineConfig):
    """A table of one's own that does not ask for how many it is."""

    made_for: tuple[int, int] = (2, 4)

    def table(self, stages, microbatches=None):
        return make_schedule("1f1b", *self.made_for)


@pytest.mark.parametrize(
    ("made_for", "why"),
    [
        (
            (4, 4),
            "schedule '1f1b, wide' is of 4 stages, the step has 2 (config.mesh.pipe); make it for",
        ),
        (
            (2, 2),
            (
                "schedule '1f1b, wide' is of 2 micro-batches, the step has 4 "
                "(config.pipeline.microbatches); make it for"
            ),
        ),
    ],
)
def test_a_table_of_another_step_is_refused(made_for, why):
    with layout(pipe=2, layers=4, pipeline=PipelineConfig(microbatches=4)) as laid:
        model = replace(laid.model, pipeline=Fixed(microbatches=4, made_for=made_for))
        with pytest.raises(ValueError) as caught:
            loss_and_grads(model, PrecisionConfig(), 4)
        assert str(caught.value).startswith(why)
        # The executor itself refuses it, too, whoever calls it.
        weights = jax.ShapeDtypeStruct((4, 2, 16), jnp.float32)
        schedule = make_schedule("1f1b", *made_for)
        nothing = (None,) * 3
        with pytest.raises(ValueError) as caught:
            run_pipeline(
                model.cut, schedule, None, model.rules, *nothing, ({}, weights), None, "float32"
            )
        assert str(caught.value).startswith(why)
