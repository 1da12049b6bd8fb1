"""The rows of a sweep in its folder: what is there already is not done again, nothing is lost."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from config_border import has_config, read_config, write_config
from config_types import plain
from memory.plan import GIB, Row, shown
from memory.search import seconds, total_bytes, why, with_compiled

GRADES = {"predict": "predicted", "compile": "compiled", "run": "measured"}  # by mode


class Kept:
    """`sweep.jsonl` of a folder: a row for each layout and mode, added as soon as it is known.

    Raises:
      ValueError: the folder holds a sweep of another config or target, is a file, the current
        folder, or none that may be written.
    """

    def __init__(self, folder: Path, config: ConfigDict, target: str):
        if folder == Path():
            raise ValueError(f"--out={folder}: give a folder of its own, such as runs/sweep")
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--out={folder}: a file; give a folder")
        if has_config(folder) and plain(read_config(folder)) != plain(config):
            raise ValueError(f"--out={folder}: holds a sweep of another config; give another --out")
        self.file = folder / "sweep.jsonl"
        self._lock = threading.Lock()
        self._rows: dict[tuple[str, str], Row] = {}
        lines = self.file.read_text().splitlines(True) if self.file.exists() else []
        if lines and not lines[-1].endswith("\n"):  # torn by a kill
            self.file.write_text("".join(lines[:-1]))
        for line in lines:
            if line.endswith("\n"):
                row = json.loads(line)
                self._rows[row["mode"], key(row)] = row
        there = next(iter(self._rows.values()), None)
        if there is not None and there["target"] != target:
            raise ValueError(
                f"--out={folder}: holds a sweep on {there['target']}; give another --out"
            )
        try:
            write_config(folder, config)
        except OSError as error:
            why = f"--out={folder}: {error.strerror}; give a folder that you may write"
            raise ValueError(why) from error

    def add(self, mode: str, rows: Sequence[Row]) -> None:
        """Appends the rows that are new."""
        new = [row | {"mode": mode} for row in rows if (mode, key(row)) not in self._rows]
        with self._lock, self.file.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in new)
        self._rows |= {(mode, key(row)): row for row in new}

    def of(self, mode: str, row: Row) -> Row | None:
        """The row of the same layout that was done before, held against this row's limit."""
        kept = self._rows.get((mode, key(row)))
        if kept is None or mode == "predict":
            return kept
        if mode == "run":
            return row | {name: kept[name] for name in ("measured", "fits", "status", "error")}
        compiled = kept["compiled"]
        if compiled is None:
            return with_compiled(row, {"status": "failed", "error": kept["error"]})
        status = "does not fit" if compiled.get("out_of_memory") else "ok"
        return with_compiled(row, compiled | {"status": status, "error": kept["error"]})

    def whole(self, row: Row, mode: str) -> Row:
        """The row as this mode left it, with the other grades that are known."""
        for other, grade in GRADES.items():
            if other != mode and (kept := self.of(other, row)) is not None:
                row = row | {grade: row[grade] or kept[grade]}
        return self.of(mode, row) or row


def key(row: Row) -> str:
    """What makes two rows the same layout."""
    return json.dumps(row["overrides"], sort_keys=True)


def in_order(rows: Sequence[Row], grade: str) -> list[Row]:
    """The fastest first of those that have the grade and fit, then what does not, then failures."""
    return sorted(
        rows,
        key=lambda row: (
            row["status"] == "failed",
            row[grade] is None,
            not row["fits"],
            seconds(row) if row["predicted"] else 0.0,
        ),
    )


def summary(rows: Sequence[Row], grade: str, top: int) -> str:
    """The first rows for a terminal, why the best is the best, and how to ask for it."""
    lines = [f"{'GiB':>8} {'s/step':>9} {'MFU':>5}  layout ({grade})"]
    for row in rows[:top]:
        if row["predicted"] is None:
            lines.append(f"{'failed':>24}  {row['name']}: {row['error']}")
            continue
        gib, mfu = total_bytes(row) / GIB, row["predicted"]["mfu"]
        end = "" if row["status"] == "ok" else f"  ({row['status']})"
        lines.append(f"{gib:8.4g} {seconds(row):9.4g} {mfu:5.0%}  {row['name']}{end}")
    best = rows[0]
    if not best["fits"]:
        return "\n".join(lines)
    flags = [f"--{key}={shown(value)}" for key, value in best["overrides"].items()]
    lines += [f"best: {best['name']}", f"    {why(best)}", f"    {' '.join(flags)}"]
    faster = [row for row in rows if row["predicted"] and not row["fits"] and _beats(row, best)]
    if faster:
        least = min(faster, key=total_bytes)
        lines.append(
            f"    {len(faster)} faster layouts do not fit; the smallest of them, {least['name']}, "
            f"needs {total_bytes(least) / GIB:.4g} GiB"
        )
    return "\n".join(lines)


def _beats(row: Row, best: Row) -> bool:
    return bool(row["predicted"]["seconds"] < best["predicted"]["seconds"])
