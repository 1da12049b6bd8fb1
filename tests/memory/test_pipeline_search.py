"""Searches of pipelines: what they look at, what they leave out, and that stages can win."""

from __future__ import annotations

import numpy as np
import pytest

from config_border import with_values
from configs import tiny
from layouts import all_rows, make_job, staged
from memory.pipeline_search import pays
from memory.predict import predict
from memory.roofline import step_time
from memory.tables import KINDS, table
from parallel.schedule_kinds import FORMS
from parallel.targets import parse_target

H100 = parse_target("gpu:h100:1x8")
TABLES = [(name, form) for name, forms in FORMS.items() for form in forms]
# A model whose layers are worth a device's time.
LARGE = {
    "model.embed_dim": 4096,
    "model.mlp_dim": 14336,
    "model.heads": 32,
    "model.kv_heads": 8,
    "model.head_dim": 128,
    "model.max_length": 2048,
    "data.batch_size": 64,
    "data.sequence_length": 2048,
    "precision.compute": "bfloat16",
}


def test_the_search_has_pipelines_that_can_run():
    config = with_values(tiny.get_config(), {"config.model.layers": 6})
    found = list(staged(config, H100, H100.chip.memory, ()))
    assert {one["config.mesh.pipe"] for one in found} == {2, 4}  # not 8: six layers
    for overrides in found:
        job = make_job(config, H100, overrides)
        assert sum(job.pipeline.layers) == 6
        assert job.pipeline.microbatches >= job.sizes["pipe"]
        assert not job.optimizer.offload


def test_the_search_balances_by_cost_where_that_divides_otherwise():
    def found(vocabulary):
        values = LARGE | {"model.layers": 8, "model.vocab_size": vocabulary}
        config = with_values(tiny.get_config(), {f"config.{k}": v for k, v in values.items()})
        return config, list(staged(config, H100, H100.chip.memory, ()))

    config, layouts = found(128_000)
    by_cost = [one for one in layouts if one["config.pipeline.balance"] == "cost"]
    assert by_cost
    for overrides in by_cost:
        equal = make_job(config, H100, overrides | {"config.pipeline.balance": "equal"})
        balanced = make_job(config, H100, overrides)
        assert balanced.pipeline.layers != equal.pipeline.layers
        assert step_time(balanced, H100).seconds < step_time(equal, H100).seconds
    _, layouts = found(256)  # less than half a layer
    assert {one["config.pipeline.balance"] for one in layouts} == {"equal"}


# The form that is at least as good as one that does not pay.
BETTER = {"interleaved": "wide", "zb_h1": "wide", "1f1b": "single"}


@pytest.mark.parametrize("stages", [2, 3, 4, 8])
def test_forms_that_do_not_pay_are_neither_faster_nor_smaller(stages):
    """Whatever a stage computes again, and however backward and forward passes compare."""
    poor = [(name, form) for name, form in TABLES if not pays(name, form, stages)]
    assert ("interleaved", "single") in poor
    for name, form in poor:
        for number in (2 * stages, 8 * stages):
            one, other = (table(name, stages, number, 0, f) for f in (form, BETTER[name]))
            assert all(size <= one.capacity[of] for of, size in other.capacity.items())
            for backward, weight, again in (
                (1, 1, 0),
                (1, 1, 1),
                (2, 1, 1),
                (0.5, 1, 0),
                (2, 1, 0),
            ):
                kinds = 1, backward + weight + again, backward + again, weight + again
                costs = {
                    kind: np.full((stages, one.chunks), float(cost))
                    for kind, cost in zip(KINDS, kinds, strict=True)
                }
                assert other.lockstep(costs) <= one.lockstep(costs), (name, form, number, kinds)


@pytest.mark.slow
def test_stages_win_where_links_between_hosts_are_slow_and_the_model_is_large():
    """Few tokens, and heads that no tensor axis divides: all would wait for gathers of weights."""
    target = parse_target("gpu:h100:2x8")
    values = {
        "model.layers": 32,
        "model.embed_dim": 8192,
        "model.mlp_dim": 28672,
        "model.heads": 1,
        "model.kv_heads": 1,
        "model.head_dim": 1024,
        "data.batch_size": 16,
        "data.sequence_length": 512,
        "model.max_length": 512,
        "precision.compute": "bfloat16",
    }
    config = with_values(tiny.get_config(), {f"config.{k}": v for k, v in values.items()})
    rows = all_rows(config, target, target.chip.memory)
    best = next(row for row in rows if row["fits"])
    assert best["overrides"]["config.mesh.pipe"] > 1
    again = make_job(config, target, best["overrides"])
    assert predict(again, target.chip).total_bytes == best["predicted"]["total_bytes"]
