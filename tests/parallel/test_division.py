"""The layers of chunks: balanced as brute force would, and laid out stage by stage."""

from __future__ import annotations

from itertools import combinations

import pytest

from parallel.division import Costs, Division, check_layers, divide
from parallel.pipeline import PipelineConfig
from parallel.schedule_kinds import make_schedule

LOOP, V = (0, 1, 0, 1), (0, 1, 1, 0)


def loads(layers, costs):
    """Of every position."""
    given = costs.layer if isinstance(costs.layer, tuple) else (costs.layer,) * sum(layers)
    each, cuts = iter(given), []
    for number in layers:
        cuts.append(sum(next(each) for _ in range(number)))
    cuts[0] += costs.first
    cuts[-1] += costs.last
    return cuts


def of_stages(layers, costs, stages):
    sums = dict.fromkeys(stages, 0.0)
    for stage, load in zip(stages, loads(layers, costs), strict=True):
        sums[stage] += load
    return list(sums.values())


def every_division(layers, positions, period):
    units = layers // period
    for cuts in combinations(range(1, units), positions - 1):
        ends = *cuts, units
        yield tuple((b - a) * period for a, b in zip((0, *cuts), ends, strict=True))


@pytest.mark.parametrize("stages", [None, LOOP, V], ids=["apart", "loop", "v"])
@pytest.mark.parametrize("period", [1, 2])
@pytest.mark.parametrize("layers", [4, 5, 7, 10])
@pytest.mark.parametrize(("first", "last"), [(0, 0), (0, 1.5), (0.5, 3), (2, 9)])
def test_as_brute_force(layers, period, first, last, stages):
    costs = Costs(1.0, first, last)

    def badness(division):
        def down(values):
            return sorted((round(v, 6) for v in values), reverse=True)

        own = down(loads(division, costs))
        numbers = sorted(division, reverse=True)
        return down(of_stages(division, costs, stages or range(4))), own, numbers

    best = min(map(badness, every_division(layers * period, 4, period)))
    assert badness(divide(layers * period, 4, period, costs, stages).layers) == best


@pytest.mark.parametrize("seed", range(8))
def test_layers_of_different_costs(seed):
    layer = tuple(1 + (seed * 7 + i * i * 5) % 6 for i in range(9))
    costs = Costs(tuple(map(float, layer)), last=seed)
    got = divide(9, 4, costs=costs).layers
    assert max(loads(got, costs)) == min(max(loads(d, costs)) for d in every_division(9, 4, 1))


def test_a_head_of_two_layers_takes_their_place():
    # Llama 3 8B: a layer has 218 million weights, the head 525 million.
    layers = divide(32, 4, costs=Costs(218.0, last=525.0)).layers
    assert sorted(layers[:3]) == [8, 9, 9]
    assert layers[3] == 6


def test_in_a_v_the_head_shares_its_stage_with_the_first_chunk():
    costs = Costs(1.0, last=2.0)
    layers = divide(14, 4, costs=costs, stages=V).layers
    assert of_stages(layers, costs, V) == [8, 8]
    assert max(loads(layers, costs)) == 4


def test_a_deep_model_on_many_stages_takes_no_time():
    costs = Costs(1.0, last=2.4)
    got = divide(126, 32, costs=costs, stages=[*range(16), *reversed(range(16))])
    assert sum(got.layers) == 126
    assert max(of_stages(got.layers, costs, [*range(16), *reversed(range(16))])) <= 8.4


def test_rows_by_stage_and_chunk():
    division = Division((1, 2, 1, 2))
    assert division.most == 2
    assert [division.first(i) for i in range(4)] == [0, 1, 3, 4]
    loop, v = make_schedule("interleaved", 2, 4), make_schedule("zb_v", 2, 4)
    assert division.rows(loop) == [0, -1, 3, -1, 1, 2, 4, 5]
    assert division.rows(v) == [0, -1, 4, 5, 1, 2, 3, -1]
    assert not division.in_rows(loop)


def test_rows_that_need_no_exchange():
    schedule = make_schedule("1f1b", 2, 4)
    assert Division((2, 2)).in_rows(schedule)
    assert Division((2, 2)).rows(schedule) == [0, 1, 2, 3]
    assert not Division((2, 1)).in_rows(schedule)


@pytest.mark.parametrize(
    ("config", "layers", "want"),
    [
        ({}, 8, (4, 4)),
        ({}, 7, (4, 3)),
        ({"balance": "cost"}, 8, (5, 3)),
        ({"layers": (1, 7)}, 8, (1, 7)),
    ],
    ids=str,
)
def test_what_the_config_says(config, layers, want):
    schedule = make_schedule("1f1b", 2, 4)
    costs = Costs((1.0,) * layers, last=2.0)
    assert PipelineConfig(**config).division(schedule, layers, costs=costs).layers == want


def test_errors():
    with pytest.raises(ValueError, match=r"config\.model\.layers = 3: .* = 4 chunks .* at least 4"):
        check_layers(3, 4)
    with pytest.raises(ValueError, match=r"config\.model\.layers = 9 .* a multiple of 2"):
        divide(9, 4, 2)
