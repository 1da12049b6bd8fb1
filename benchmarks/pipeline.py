"""The pipeline's executor: against GPipe by autodiff, its memory, its ticks, real compilers.

    python benchmarks/pipeline.py --part=autodiff --rounds=3
    python benchmarks/pipeline.py --part=growth
    python benchmarks/pipeline.py --part=ticks --rounds=5
    python benchmarks/pipeline.py --part=real       # extras gpu-target and tpu-target

autodiff: temporaries and seconds of loss and gradients, 1F1B against `autodiff_pipeline.py`, four
simulated devices, 16 and 32 micro-batches; of its two ways to compute layers again, both.

growth: temporaries of every schedule and form by micro-batches, with the table's slots.

ticks: two stages on two simulated devices of one core each, against the simulator's lockstep time
with the costs of F, B and W as loops of one action have them. Wants two idle cores; memory that is
freed stays with the process, or a step would be as long as the system clears its buffers anew.

real: Llama 3 8B, pipe 4 x fsdp 8 x tensor 2, compiled for 64 H100 and 64 TPU v5p: memory by
schedule, and the axes of what communicates inside conditionals.

Each writes its part of benchmarks/results/pipeline.json. Variants take turns in one process; read
ratios, not seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from parallel.huge_pages import use_huge_pages  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "pipeline.json"
# The sizes are those of the optimised program; only its machine code is worse.
CHEAP = "--xla_backend_optimization_level=0"
ONE_CORE = "--xla_cpu_multi_thread_eigen=false"
# For glibc: nothing goes back to the system.
KEEP_MEMORY = ":".join(
    f"glibc.malloc.{key}"
    for key in ("mmap_threshold=99999999999", "trim_threshold=99999999999", "arena_max=1")
)
# Part -> simulated devices, flags of XLA.
SETTING = {"autodiff": (4, ""), "growth": (4, CHEAP), "ticks": (2, ONE_CORE)}
TARGETS = ("gpu:h100:8x8", "tpu:v5p:4x4x4")
STEP = "step"
Rows = Iterator[dict[str, Any]]


def autodiff(rounds: int) -> Rows:
    """1F1B and both forms of the other, by rematerialisation and micro-batches."""
    from benchmarks.autodiff_pipeline import loss_and_grads
    from benchmarks.staged import Program, busy, ours, ratio, staged, take_turns
    from training.causal_lm import causal_lm

    def theirs(*, stages: bool, layers: bool) -> Callable[..., Any]:
        def make(model: Any, e: Any) -> Any:
            policy = type(e.remat)(policy="full" if layers else "none")
            plain = causal_lm(e.model, e.loss, e.rules(), policy)
            return loss_and_grads(plain, e.precision, e.micro_steps, full=stages)

        return make

    makes: dict[str, dict[str, Callable[..., Any]]] = {
        "none": {"1f1b": ours, "autodiff": theirs(stages=False, layers=False)},
        "full": {
            "1f1b": ours,
            "autodiff": theirs(stages=True, layers=False),
            "autodiff, layers": theirs(stages=False, layers=True),
        },
    }
    for microbatches in (16, 32):
        for remat, variants in makes.items():
            experiment = staged({"pipe": 4}, microbatches, remat__policy=remat)
            programs = {name: Program(experiment, make) for name, make in variants.items()}
            loss = [float(program.run()[0]["loss"]) for program in programs.values()]
            assert max(loss) - min(loss) <= 1e-5 * loss[0], loss
            seconds = take_turns({n: p.run for n, p in programs.items()}, rounds)
            for name, program in programs.items():
                yield {
                    "variant": name,
                    "remat": remat,
                    "microbatches": microbatches,
                    "temporary_mib": mib(program.temporaries),
                    "memory_ratio": round(programs["1f1b"].temporaries / program.temporaries, 4),
                    "median_seconds": round(statistics.median(seconds[name]), 4),
                    "time_ratio": round(ratio(seconds["1f1b"], seconds[name]), 4),
                    "rounds": rounds,
                    "load": round(busy(), 1),
                }


def growth(_: int) -> Rows:
    """Every schedule in every form; two stages hold as much of 4 micro-batches as of 32."""
    from benchmarks.staged import Program, staged
    from parallel.schedule_kinds import FORMS, make_schedule
    from parallel.schedule_slots import slots

    for stages, counts in ((2, (4, 32)), (4, (8, 32))):
        for name, forms in FORMS.items():
            for form in forms:
                for remat in ("none", "full"):
                    for microbatches in counts:
                        table = make_schedule(name, stages, microbatches, form=form)
                        pipeline: dict[str, Any] = {
                            "pipeline__schedule": name,
                            "pipeline__form": form,
                        }
                        experiment = staged(
                            {"pipe": stages}, microbatches, remat__policy=remat, **pipeline
                        )
                        found = slots(table)
                        yield {
                            "schedule": table.name,
                            "remat": remat,
                            "stages": stages,
                            "microbatches": microbatches,
                            "temporary_mib": mib(Program(experiment).temporaries),
                            "slots": {name: list(n) for name, n in found.counts.items()},
                        }


def ticks(rounds: int) -> Rows:
    """Seconds of a step over the simulator's, for tables with F, B and W together and apart."""
    from benchmarks.stage_costs import stage_costs
    from benchmarks.staged import Program, busy, staged, take_turns
    from parallel.schedule_costs import lockstep
    from parallel.schedule_kinds import Form, make_schedule

    microbatches = 16
    tables: tuple[tuple[str, Form], ...]
    tables = ("1f1b", "wide"), ("1f1b", "lean"), ("gpipe", "wide"), ("zb_h1", "wide")
    for remat in ("none", "full"):
        for name, form in tables:
            pipeline: dict[str, Any] = {"pipeline__schedule": name, "pipeline__form": form}
            experiment = staged({"pipe": 2}, microbatches, 4, remat__policy=remat, **pipeline)
            alone = stage_costs(experiment)
            seconds = take_turns(alone.runs | {STEP: Program(experiment).run}, rounds)
            table = make_schedule(name, 2, microbatches, form=form)
            # Of each round, in which a busy neighbour slows all.
            over = [
                seconds[STEP][n] / lockstep(table, alone.costs(seconds, n)).time
                for n in range(rounds)
            ]
            median = {key: [statistics.median(times)] for key, times in seconds.items()}
            costs = alone.costs(median, 0)
            yield {
                "schedule": table.name,
                "remat": remat,
                "microbatches": microbatches,
                "median_seconds": round(median[STEP][0], 4),
                "predicted_seconds": round(lockstep(table, costs).time, 4),
                "ratio": round(statistics.median(over), 4),
                "costs": vars(costs),
                "rounds": rounds,
                "load": round(busy(), 1),
            }


def real(_: int) -> Rows:
    """Llama 3 8B for real compilers; 16 micro-batches of 8 rows of 4096 tokens."""
    from compile_for import compile_for
    from config_border import load_config, override
    from config_types import plain
    from parallel.schedule_kinds import FORMS
    from parallel.targets import parse_target

    shape = {
        "mesh.data": 1,
        "mesh.pipe": 4,
        "mesh.fsdp": 8,
        "mesh.tensor": 2,
        "data.sequence_length": 4096,
        "data.batch_size": 128,
        "pipeline.microbatches": 16,
        "remat.policy": "full",
    }
    cells = [(name, form) for name in FORMS for form in FORMS[name]]
    row: dict[str, Any]
    for target in map(parse_target, TARGETS):
        for name, form in cells:
            keys = shape | {"pipeline.schedule": name, "pipeline.form": form}
            flags = [f"--config.{key}={value}" for key, value in keys.items()]
            config = override(load_config(str(ROOT / "configs" / "llama3_8b.py")), flags)
            answer = compile_for(plain(config), target)
            names = (
                *("status", "error", "total_bytes", "arguments", "temporaries"),
                *("compile_seconds", "conditions", "in_branches"),
            )
            row = {"target": target.name, "schedule": name, "form": form}
            row |= {key: answer.get(key) for key in names}
            for found in answer.get("in_branches", ()):
                assert "pipe" not in found["axis"].split("+"), (row, found)
            yield row


def mib(size: int) -> float:
    return round(size / 2**20, 2)


def main() -> None:
    """One part, in this process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = {"autodiff": autodiff, "growth": growth, "ticks": ticks, "real": real}
    parser.add_argument("--part", choices=tuple(parts), required=True)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if options.part == "ticks":
        os.environ.setdefault("GLIBC_TUNABLES", KEEP_MEMORY)
    use_huge_pages()  # starts anew with the variable
    devices, xla = SETTING.get(options.part, (1, ""))
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_NUM_CPU_DEVICES"] = str(devices)
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla}".strip()
    import jax

    rows = []
    for row in parts[options.part](options.rounds):
        print(json.dumps(row), flush=True)
        rows.append(row)
        result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        result[options.part] = {"jax": jax.__version__, "rows": rows}
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
