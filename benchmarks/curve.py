"""Draws the loss of a run over its steps, from its metrics.jsonl, as SVG.

python benchmarks/curve.py runs/tiny docs/quickstart.svg
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "meshwright"  # the same run gives the same file
import matplotlib.pyplot as plt  # noqa: E402


def main(workdir: Path, picture: Path) -> None:
    """Training loss by step, the loss of a uniform guess, and the held-out loss at the end."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    config = json.loads((workdir / "config.json").read_text())
    vocab = config["model"]["vocab_size"]
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], label="training")
    axes.axhline(math.log(vocab), color="gray", ls=":", label=f"uniform guess, ln({vocab})")
    axes.axhline(math.log(vocab) / 2, color="gray", ls="--", label="half of it")
    held_out = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    axes.plot(*zip(*held_out, strict=True), "o", label=f"held-out files, {held_out[-1][1]:.2f}")
    axes.set(xlabel="step", ylabel="loss, nats a token", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(picture, metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
