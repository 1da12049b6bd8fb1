"""The search against exhaustive choice, on tables where predictions are off as real ones are."""

from __future__ import annotations

import math
import random

import pytest

from config_border import with_values
from layouts import make_job
from memory import search
from parallel.targets import parse_target
from tests.runs import get_config

BUDGET = 1000
MEMORY_ERROR = 0.08  # of the tables' predictions: within what the search allows for


def row(name: str, bytes_: int, seconds: float) -> dict:
    return {
        "name": name,
        "overrides": {"name": name},
        "limit_bytes": BUDGET,
        "fits": bytes_ <= BUDGET,
        "predicted": {"total_bytes": bytes_, "seconds": seconds},
        "compiled": None,
        "measured": None,
        "status": "ok",
        "error": None,
    }


class Table:
    """Layouts with a true size and, where `timed`, a true time; the faster, the larger mostly."""

    def __init__(self, seed: int, count: int = 120, timed: bool = False):
        rng = random.Random(seed)
        self.truth: dict[str, dict] = {}
        self.rows = []
        self.compiled: list[str] = []
        for i in range(count):
            seconds = rng.uniform(1, 4)
            bytes_ = int(2500 / seconds * rng.uniform(0.5, 1.5))
            answer = {"total_bytes": bytes_}
            if timed:
                answer["seconds"] = seconds * (1 - rng.uniform(-1, 1) * search.TIES / 2)
            self.truth[f"layout {i}"] = answer
            off = 1 + rng.uniform(-MEMORY_ERROR, MEMORY_ERROR)
            self.rows.append(row(f"layout {i}", int(bytes_ * off), seconds))

    def compile_rows(self, some: list[dict]) -> list[dict]:
        self.compiled += [one["name"] for one in some]
        return [
            search.with_compiled(one, {"status": "ok", "error": None} | self.truth[one["name"]])
            for one in some
        ]

    def fitting(self, budget: int) -> list[dict]:
        """All rows that truly fit, compiled."""
        rows = [one | {"limit_bytes": budget} for one in self.rows]
        compiled = Table.compile_rows(self, rows)
        self.compiled.clear()
        return [one for one in compiled if one["fits"]]

    def search(self, budget: int = BUDGET, **how) -> list[dict]:
        rows = [one | {"limit_bytes": budget} for one in self.rows]
        how = {"budget": budget, "most": len(rows) // 4} | how
        return search.search(rows, self.compile_rows, **how)


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_it_finds_what_exhaustive_choice_finds(seed, timed):
    table = Table(seed, timed=timed)
    best = min(table.fitting(BUDGET), key=search.seconds)
    found = table.search()[0]
    assert len(set(table.compiled)) == len(table.compiled) <= len(table.rows) // 4
    assert search.seconds(found) <= 1.02 * search.seconds(best)
    assert found["fits"]


@pytest.mark.parametrize("budget", range(400, 2800, 100))
def test_what_is_faster_exceeds_the_budget(budget):
    table = Table(seed=budget)
    found = table.search(budget, most=len(table.rows))[0]
    assert table.truth[found["name"]]["total_bytes"] <= budget
    faster = [
        one["name"]
        for one in table.rows
        if one["predicted"]["seconds"] < found["predicted"]["seconds"]
    ]
    assert all(table.truth[name]["total_bytes"] > budget for name in faster)


def test_several_at_once_find_the_same():
    names = {Table(seed=3).search(width=width)[0]["name"] for width in (1, 2, 5)}
    assert len(names) == 1


def test_it_stops_at_the_first_that_fits():
    table = Table(seed=0, count=3)
    table.rows = [row("a", 900, 3.0), row("b", 990, 1.0), row("c", 500, 2.0)]
    table.truth = {"a": {"total_bytes": 900}, "b": {"total_bytes": 1010}, "c": {"total_bytes": 500}}
    assert table.search(most=3)[0]["name"] == "c"
    assert table.compiled == ["b", "c"]


def test_the_last_compilation_goes_to_one_that_surely_fits():
    table = Table(seed=0, count=0)
    table.rows = [row(f"{i}", 990, 1.0 + i / 100) for i in range(9)] + [row("small", 800, 2.0)]
    table.truth = {one["name"]: {"total_bytes": 1010} for one in table.rows[:9]}
    table.truth["small"] = {"total_bytes": 820}
    assert table.search(most=3)[0]["name"] == "small"
    assert table.compiled == ["0", "1", "small"]


@pytest.mark.parametrize(("least", "said"), [(2 * 2**30, "2.0 GiB"), (2**20, "0.00098 GiB")])
def test_nothing_fits(least, said):
    table = Table(seed=0, count=0)
    table.rows = [row("large", 3 * least, 1.0), row("fsdp 8", least, 2.0)]
    with pytest.raises(ValueError, match="nothing fits") as error:
        table.search(budget=1000, most=2)
    assert str(error.value).endswith(f"nothing fits; the least is {said} with fsdp 8")


def test_a_compiler_that_fails_is_a_row():
    table = Table(seed=0, count=0)
    table.rows = [row("a", 900, 1.0), row("b", 900, 2.0)]
    answers = {
        "a": {"status": "failed", "error": "it took more than 9 s"},
        "b": {"status": "ok", "error": None, "total_bytes": 900},
    }

    def compile_rows(some):
        return [search.with_compiled(one, answers[one["name"]]) for one in some]

    found = search.search(table.rows, compile_rows, budget=1000, most=2)
    assert [(one["name"], one["status"]) for one in found] == [("b", "ok"), ("a", "failed")]
    assert found[1]["error"] == "it took more than 9 s"


def test_fallbacks_get_smaller_and_none_is_slower_than_it_must_be():
    rows = Table(seed=5).rows
    failed = search.ranked(rows)[0]
    plans = search.fallbacks(rows, failed)
    chain = [failed, *plans]
    assert len(plans) > 2
    for before, after in zip(chain, plans, strict=False):
        limit = search.total_bytes(before) / (1 + search.MEMORY_ERROR)
        fastest = min((one for one in rows if search.total_bytes(one) < limit), key=search.seconds)
        assert after is fastest


def program(job) -> tuple:
    """What the compiler sees of a layout: axes of one device divide nothing."""
    sizes = {axis: size for axis, size in job.sizes.items() if size > 1}
    # Copies of the model and fsdp at level 0 are one program; without fsdp no level is any.
    zero = job.parallel.zero if "fsdp" in sizes else None
    if zero == 0:
        sizes["data"] = sizes.get("data", 1) * sizes.pop("fsdp")
    sequence = job.parallel.sequence and "tensor" in sizes
    precision = (job.precision.params, job.precision.compute)
    return (*sorted(sizes.items()), zero, sequence, job.remat, job.micro_steps, precision)


@pytest.mark.parametrize("devices", [1, 6, 8])
def test_every_layout_is_another_program_and_divides(devices):
    config = with_values(get_config(), {"config.data.batch_size": 24, "config.data.path": "texts"})
    target = parse_target(f"cpu:{devices}")
    space = list(
        search.layouts(
            devices,
            24,
            widest=8,
            remats=search.remat_choices({"policy": "full", "save": (), "offload": ()}, False),
            precisions=[("float32", "float32"), ("float32", "bfloat16")],
        )
    )
    programs = []
    for overrides in space:
        if 8 % overrides["config.mesh.tensor"]:  # heads
            with pytest.raises(ValueError, match=r"config\.model\."):
                make_job(config, target, overrides)
            continue
        job = make_job(config, target, overrides)
        programs.append(program(job))
        assert math.prod(job.sizes.values()) == devices
    assert len(set(programs)) == len(programs) > 20


def test_every_level_is_there():
    keys = ("config.mesh.data", "config.mesh.fsdp", "config.parallel.zero")
    space = search.layouts(4, 8, widest=1, remats=[{}])
    found = {tuple(one[key] for key in keys) for one in space}
    assert found == {(4, 1, 3)} | {(4 // n, n, z) for n in (2, 4) for z in (1, 2, 3)}


def test_a_custom_policy_is_a_choice_and_leaves_no_names_behind():
    own = {"policy": "custom", "save": ("query",), "offload": ()}
    found = search.remat_choices(own, host_memory=True)
    assert found[0] == {f"config.remat.{key}": value for key, value in own.items()}
    assert all(set(one) == set(found[0]) for one in found)
    assert len(found) == 6
    assert sum(bool(one["config.remat.offload"]) for one in found) == 1


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ({"config.mesh.data": 1, "config.mesh.fsdp": 1, "config.parallel.zero": 3}, "one device"),
        (
            {
                "config.mesh.data": 2,
                "config.mesh.fsdp": 4,
                "config.parallel.zero": 2,
                "config.remat.policy": "full",
                "config.train.grad_accumulation": 8,
            },
            "data 2, fsdp 4, zero 2, remat full, micro-steps 8",
        ),
        (
            {"config.remat.policy": "custom", "config.remat.offload": search.DOTS},
            "remat offload dots",
        ),
        ({"config.remat.policy": "custom", "config.remat.save": ("key",)}, "remat save key"),
        ({"config.seed": 3, "config.model.layers": 2}, "seed 3, model.layers 2"),
        (
            {"config.precision.params": "bfloat16", "config.precision.compute": "bfloat16"},
            "bfloat16",
        ),
    ],
)
def test_names(overrides, name):
    assert search.describe(overrides) == name
