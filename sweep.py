"""Ranks the layouts of a config on a target: predicted, compiled, or run on the devices here.

    python sweep.py --config=configs/llama3_70b.py --target=gpu:h100:64x8 --out=runs/sweep
    python sweep.py --config=configs/gpt2_124m.py --target=gpu:h100:1x8 --out=runs/compiled \
        --mode=compile --budget_gib=72
    python sweep.py --config=configs/tiny.py --target=cpu:8 --out=runs/grid --mode=run \
        --grid=config.mesh.fsdp=1,2,4 --grid=config.remat.policy=none,full

Without --grid every layout is predicted: mesh, ZeRO level, remat, offload, micro-steps. Then
--mode=compile compiles the promising until none that is left can be faster, and --mode=run trains
the best --top of them for a few steps each. With --grid each combination is compiled, or trained
as its config says, in a workdir of its own. --out gets `sweep.jsonl`, `sweep.md` and `sweep.html`;
the same command again does only what is not there yet. Failures are rows too.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cli

Row = dict[str, Any]
IN_PAGE = 2000  # rows; more would make it slow


def main(
    config: Any,
    target: str,
    out: Path,
    mode: str,
    budget_gib: float | None,
    top: int,
    grid: list[str] | None,
    precision: list[str] | None,
    submit: str | None,
) -> None:
    """Predict all, do what the mode asks for, write, say which is best."""
    from layouts import all_rows, grid_rows, read_grid  # here: a typo costs no import
    from memory import report
    from memory.plan import GIB, limit_for
    from memory.search import nothing_fits
    from parallel.targets import parse_target
    from sweep_rows import GRADES, Kept, in_order, summary

    place = parse_target(target)
    budget = limit_for(place, budget_gib)
    if top < 1:
        raise ValueError(f"--top={top}: at least 1")
    if grid and precision:
        raise ValueError(f"--precision={precision[0]}: with --grid, give it as a key of the grid")
    if grid:
        rows = grid_rows(config, place, budget, read_grid(config, grid))
    else:
        rows = all_rows(config, place, budget, [read_precision(text) for text in precision or ()])
    kept = Kept(out, config, target)
    kept.add("predict", rows)
    fitting = [row for row in rows if row["fits"]]
    print(f"{len(rows)} layouts on {target}; {len(fitting)} are predicted to fit", end=" ")
    print(f"{budget / GIB:.4g} GiB", flush=True)
    try:
        if mode == "compile":
            compile_some(config, place, rows, kept, within=None if grid else (budget, top))
        elif not fitting:
            raise nothing_fits(rows, budget)
        elif mode == "run":
            run_some(config, place, fitting if grid else fitting[:top], kept, submit, bool(grid))
    finally:  # what is known by now is worth seeing, whatever happened
        shown = in_order([kept.whole(row, mode) for row in rows], GRADES[mode])
        page = report.html(shown[:IN_PAGE], title=f"Layouts on {target}", limit_bytes=budget)
        (out / "sweep.html").write_text(page)
        (out / "sweep.md").write_text(report.markdown(shown[:IN_PAGE]))
    print(summary(shown, GRADES[mode], top))
    print(f"all of it: {out}/sweep.html, sweep.md, sweep.jsonl")


def compile_some(
    config: Any, place: Any, rows: list[Row], kept: Any, within: tuple[int, int] | None
) -> None:
    """Compiles all rows, or what a search `within` (bytes, compilations) asks for."""
    from compile_for import compile_for
    from config_border import with_values
    from config_types import plain
    from memory.search import search, with_compiled
    from run_for import workers

    place.check_compiler("take --mode=predict")

    def compile_row(row: Row) -> Row:
        if (done := kept.of("compile", row)) is None:
            values = plain(with_values(config, row["overrides"]))
            done = with_compiled(row, compile_for(values, place))
            kept.add("compile", [done])
            print(f"compiled: {done['name']}: {done['status']}", flush=True)
        return done

    def compile_rows(some: Iterable[Row]) -> list[Row]:
        with ThreadPoolExecutor(workers()) as pool:
            return list(pool.map(compile_row, some))

    if within is None:
        compile_rows(row for row in rows if row["predicted"] is not None)
    else:
        budget, most = within
        search(rows, compile_rows, budget=budget, most=most, width=workers())


def run_some(
    config: Any, place: Any, rows: list[Row], kept: Any, submit: str | None, whole: bool
) -> None:
    """Trains each row in a workdir of its own: as its config says (`whole`), or a few steps."""
    import run_for
    from config_border import with_values

    folder = kept.file.parent
    launch: run_for.Launch = run_for.here
    if submit:
        launch = run_for.through_submitit(submit, place, folder / "submitit")
    started = []
    for row in rows:
        if kept.of("run", row) is None:
            values = with_values(config, row["overrides"])
            values = values if whole else run_for.short(values, folder / "data")
            workdir = folder / "runs" / run_for.folder_name(row["name"], row["overrides"])
            started.append((row, run_for.start(values, place, workdir, launch)))
    for row, finish in started:
        answer = finish()
        fits = row["fits"] and answer["status"] != "does not fit"
        kept.add("run", [row | answer | {"fits": fits}])
        print(f"run: {row['name']}: {answer['error'] or 'ok'}", flush=True)


def read_precision(text: str) -> tuple[str, str]:
    """Parameters and compute of "float32/bfloat16"; one name stands for both."""
    params, _, compute = text.partition("/")
    return params, compute or params


FLAGS = (
    cli.Flag("target", str, None, "what it is for, such as gpu:h100:64x8 or cpu:8", required=True),
    cli.Flag("out", Path, None, "folder for what is found", required=True),
    cli.Flag("mode", str, "predict", "how true", choices=("predict", "compile", "run")),
    cli.Flag("budget_gib", float, None, "GiB per device; the device's memory if not given"),
    cli.Flag("top", int, 10, "layouts shown; without --grid, compiled or run at most"),
    cli.Flag("grid", str, None, "config.KEY=VALUE,VALUE: all combinations", several=True),
    cli.Flag("precision", str, None, "params/compute to try too, float32/bfloat16", several=True),
    cli.Flag("submit", str, None, "runs as jobs, through submitit", choices=("slurm", "local")),
)

if __name__ == "__main__":
    cli.run(
        main,
        name="sweep.py",
        about=__doc__,
        config_from="file",
        flags=FLAGS,
        needs_workdir=False,
    )
