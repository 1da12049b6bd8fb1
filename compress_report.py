"""`python -m compress report`: what runs weigh, cost and lose, against the one they were made of.

All are evaluated on the dense run's held-out rows, on one layout: that of its config with the
command line's `--config.mesh...`. The same command with another layout adds to the tables.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cli

FLAGS = (
    cli.Flag("runs", str, None, "folders of runs, with a comma between them", required=True),
    cli.Flag(
        "out", Path, None, "the folder for report.json, report.md and pareto.png", required=True
    ),
    cli.Flag("prompt", int, 16, "tokens of each prompt that greedy decoding begins with"),
    cli.Flag("tokens", int, 32, "tokens that it then gives"),
)
Row = dict[str, Any]
KEPT = ("attention", "attention_dropout", "dropout", "init_std", "unroll")  # of the dense run
COLUMNS = {
    "name": ("run", "{}"),
    "layout": ("layout", "{}"),
    "disk_bytes": ("MiB on disk", "{:,.2f}"),
    "device_bytes": ("MiB per device", "{:,.3f}"),
    "bits_per_parameter": ("bits / parameter", "{:.3f}"),
    "bits_per_matrix_weight": ("bits / matrix weight", "{:.3f}"),
    "loss": ("loss", "{:.4f}"),
    "loss_change": ("loss, %", "{:+.2f}"),
    "perplexity": ("perplexity", "{:.3f}"),
    "bits_per_byte": ("bits / byte", "{:.4f}"),
    "bits_per_byte_change": ("bits / byte, %", "{:+.2f}"),
    "evaluation_tokens_per_second": ("evaluated tokens/s", "{:,.0f}"),
    "decoding_tokens_per_second": ("decoded tokens/s", "{:,.0f}"),
}
MIB = 2**20


def main(config: Any, workdir: Path, runs: str, out: Path, prompt: int, tokens: int) -> None:
    """Runs that fit together, a row of each, three files."""
    import jax  # here: a typo on the command line costs no import

    from compressed_row import machine_name, measured
    from experiment import read_experiment
    from inference import cache_shape, decoding_rules
    from parallel.compilation import keep_compiled

    if jax.process_count() > 1:
        raise ValueError(
            f"--num_processes={jax.process_count()}: one process measures; run it alone"
        )
    for name, value in (("prompt", prompt), ("tokens", tokens)):
        if value < 1:
            raise ValueError(f"--{name}={value}: at least 1")
    folders = [Path(part.strip()) for part in runs.split(",") if part.strip()]
    if not folders:
        raise ValueError(f"--runs={runs}: give folders with a comma between them")
    if prompt + tokens > config.model.max_length:
        raise ValueError(
            f"--tokens={tokens}: with --prompt={prompt} more than config.model.max_length = "
            f"{config.model.max_length}"
        )
    check_report(out / "report.json", workdir)
    keep_compiled()
    experiments = []
    for folder in (workdir, *folders):  # all that may be wrong, before anything is measured
        own = config_of(config, workdir, folder)
        experiment = read_experiment(own, jax.device_count(), training=False)
        generate = replace(experiment.generate, temperature=0.0, max_new_tokens=tokens)
        experiments.append(replace(experiment, generate=generate))
        if experiment.model.family == "decoder":
            cache_shape(experiments[-1], decoding_rules(experiment), prompt)
    data = experiments[0].open_data(workdir)
    out.mkdir(parents=True, exist_ok=True)
    common = os.path.commonpath([folder.absolute().parent for folder in (workdir, *folders)])
    layout, machine = experiments[0].describe_layout(), machine_name()
    rows: list[Row] = []
    for folder, experiment in zip((workdir, *folders), experiments, strict=True):
        name = str(folder.absolute().relative_to(common))
        row = {"name": name, "run": str(folder), "layout": layout, "machine": machine}
        row |= measured(experiment, folder, data, prompt, tokens)
        rows.append(row)
        compare(rows)
        told = [f"{title} {shown(row, n)}" for n, (title, _) in COLUMNS.items() if n != "layout"]
        print(f"{folder}: {', '.join(told[1:])}", flush=True)
    write(out, with_others(out / "report.json", rows), workdir)
    every = [row for row in with_others(out / "report.json", rows) if row["layout"] == layout]
    if not picture(every, out / "pareto.png"):
        print("note: no pareto.png, which wants matplotlib; run pip install -e '.[dev]'")
    print(json.dumps({"out": str(out), "runs": len(rows), "layout": layout}))


# --- What is compared -----------------------------------------------------------------------------


def config_of(config: Any, dense: Path, folder: Path) -> Any:
    """The dense run's config with another one's model.

    Raises:
      ValueError: that run has no checkpoint, or was made of other text or tokens.
    """
    from config_border import has_config, read_config, with_values
    from config_sources import OF_THE_MODEL
    from config_types import plain
    from training.checkpoint import Checkpoints

    def seen(where: Path) -> Any:
        checkpoints = Checkpoints(where / "checkpoints")
        step = checkpoints.latest()
        if step is None:
            flag = "--runs" if where != dense else "--workdir"
            raise ValueError(f"{flag}={where}: has no checkpoint; give a run's folder")
        return checkpoints.metadata(step).get("data")

    where = f"--runs={folder}" if folder != dense else f"--workdir={dense}"
    if not has_config(folder):
        raise ValueError(f"{where}: no config.json in it; give a run's folder")
    other = read_config(folder)
    if other.objective.name != config.objective.name:
        raise ValueError(
            f"{where}: config.objective.name = {other.objective.name!r}, and --workdir={dense} has "
            f"{config.objective.name!r}; they are compared on one task"
        )
    if other.model.vocab_size != config.model.vocab_size or seen(folder) != seen(dense):
        raise ValueError(
            f"{where}: its text or its tokenizer is not that of --workdir={dense}; runs are "
            f"compared on the same held-out rows"
        )
    if other.adapter.method:
        raise ValueError(
            f"{where}: a run of adapters; give what python -m compress merge makes of it"
        )
    values = {
        f"config.{section}.{key}": value
        for section in (*OF_THE_MODEL, "quantize")  # and what it rounds where it computes
        for key, value in plain(other[section]).items()
        if key not in KEPT
    }
    return with_values(config, values)


# --- Rows together --------------------------------------------------------------------------------


def compare(rows: Sequence[Row]) -> None:
    """Adds what is counted against the first row, which is dense."""
    from compressed_row import OF_TEXT

    dense = rows[0]
    for row in rows:
        row["bits_per_parameter"] = 8 * row["bytes"] / dense["numbers"]
        for name in OF_TEXT:
            if name in row:
                row[f"{name}_change"] = 100 * (row[name] / dense[name] - 1)


def with_others(file: Path, rows: Sequence[Row]) -> list[Row]:
    """The rows of other runs and layouts that the file has, and these."""
    kept = json.loads(file.read_text())["rows"] if file.is_file() else []
    place = lambda row: tuple(row[name] for name in ("run", "layout", "machine"))
    new = {place(row) for row in rows}
    return [row for row in kept if place(row) not in new] + list(rows)


def check_report(file: Path, dense: Path) -> None:
    """Refuses to put rows beside those that are compared with another run.

    Raises:
      ValueError: naming that run.
    """
    if not file.is_file():
        return
    before = json.loads(file.read_text())["dense"]
    if before != str(dense):
        raise ValueError(
            f"--out={file.parent}: has a report of runs compared with --workdir={before}; give "
            f"that, or another --out"
        )


def write(out: Path, rows: Sequence[Row], dense: Path) -> None:
    """The rows for programs and for a person."""
    from compressed_row import TIMES

    lines = json.dumps({"dense": str(dense), "rows": rows}, indent=1)
    (out / "report.json").write_text(lines + "\n")
    columns = {
        n: told for n, told in COLUMNS.items() if any(row.get(n) is not None for row in rows)
    }
    table = ["| " + " | ".join(title for title, _ in columns.values()) + " |"]
    table.append("|" + " --- |" * 2 + " ---: |" * (len(columns) - 2))
    table += ["| " + " | ".join(shown(row, name) for name in columns) + " |" for row in rows]
    machines = "; ".join(dict.fromkeys(row["machine"] for row in rows))
    end = (
        f"Changes are against `{dense}` on the same held-out rows. Bits a parameter: all arrays, "
        f"over the dense run's parameters; bits a matrix weight: those of a run's own matrices. "
        f"Disk: the checkpoint's arrays, with * those of the optimizer, too. "
        f"Speeds are medians of {TIMES} on {machines}."
    )
    (out / "report.md").write_text("\n".join([*table, "", end]) + "\n")


def shown(row: Mapping[str, Any], name: str) -> str:
    """A cell."""
    value = row.get(name)
    if value is None:
        return "-"
    text = COLUMNS[name][1].format(value / MIB if name.endswith("_bytes") else value)
    return f"{text} *" if name == "disk_bytes" and row.get("optimizer_on_disk") else text


def picture(rows: Sequence[Row], file: Path) -> bool:
    """The Pareto front of the rows of one layout; False without matplotlib."""
    from compress.pareto import Point, draw

    loss = "bits_per_byte" if all("bits_per_byte" in row for row in rows) else "loss"
    dense, *others = [Point(row["name"], row["bits_per_parameter"], row[loss]) for row in rows]
    words = {"bits_per_byte": "bits per byte, held out", "loss": "loss, held out"}
    return draw(dense, others, ("bits per parameter of the dense model", words[loss]), file)
