"""Compiles a config's training step for a target, in a process of its own, and keeps the answer.

A process each: the variables that make a compiler available are read when JAX is imported, and a
compiler that dies takes nothing with it. Answers are kept on disk by content: the config, the
target, this code and the versions of all that compiles.

    echo '{"config": {...}, "target": "gpu:h100:1x8"}' | python compile_for.py
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.targets import Target, parse_target

if TYPE_CHECKING:
    from memory.compiled import Compiled
    from memory.job import Job

ROOT = Path(__file__).parent
SOURCES = (
    *("parallel/*.py", "models/*.py", "training/*.py", "memory/*.py", "data/config.py"),
    *("configs/base.py", "config_*.py", "experiment.py", "compile_for.py"),
)
COMPILERS = (
    *("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cudnn-cu12"),
    *("flax", "optax"),
)
LARGEST = 40  # buffers that are named
# What cannot change the program.
IRRELEVANT = ("checkpoint", "eval", "logging")


def compile_for(config: dict[str, Any], target: Target, *, timeout: float = 1800) -> dict[str, Any]:
    """What the compiler says of `config` (plain data) on `target`.

    Returns:
      {"status": "ok" | "does not fit" | "failed", "error": None or one line, and where it compiled
      the sizes of `memory.compiled.Compiled` and what `counted` says}.

    Raises:
      ValueError: the target's compiler is not installed.
    """
    target.check_compiler()
    kept = cache_folder() / f"{content_key(config, target)}.json.gz"
    if kept.is_file():
        return json.loads(gzip.decompress(kept.read_bytes()))
    request = json.dumps({"config": config, "target": target.name})
    try:
        done = subprocess.run(
            [sys.executable, str(ROOT / "compile_for.py")],
            input=request,
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=ROOT,
            env=os.environ | target.environment(),
        )
    except subprocess.TimeoutExpired:
        return {"status": "failed", "error": f"the compiler took more than {timeout:.0f} s"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        words = [line for line in done.stderr.splitlines() if line.strip()]
        return {"status": "failed", "error": (words or [f"exit code {done.returncode}"])[-1][:300]}
    answer = json.loads(lines[-1])
    kept.parent.mkdir(parents=True, exist_ok=True)
    part = kept.with_suffix(f".{os.getpid()}.part")
    part.write_bytes(gzip.compress(lines[-1].encode()))
    part.replace(kept)
    return answer


def cache_folder() -> Path:
    """Where answers are kept: beside JAX's compiled programs."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "meshwright" / "plans"


def content_key(config: dict[str, Any], target: Target) -> str:
    """A hash of all that the answer depends on."""
    digest = hashlib.sha256()
    relevant = {name: value for name, value in config.items() if name not in IRRELEVANT}
    digest.update(json.dumps([relevant, target.name], sort_keys=True).encode())
    digest.update(os.environ.get("XLA_FLAGS", "").encode())
    for package in COMPILERS:
        try:
            digest.update(f"{package} {importlib.metadata.version(package)}".encode())
        except importlib.metadata.PackageNotFoundError:
            continue
    for pattern in SOURCES:
        for file in sorted(ROOT.glob(pattern)):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def main() -> None:
    """Answers one request on standard input."""
    request = json.loads(sys.stdin.read())
    target = parse_target(request["target"])
    from config_border import complete
    from experiment import read_experiment
    from memory.compiled import compile_step

    job = read_experiment(complete(request["config"]), target.device_count).job()
    compiled = compile_step(job, target)
    status = "does not fit" if compiled.out_of_memory else "ok"
    counts = {} if compiled.out_of_memory else counted(compiled, job, target)
    print(json.dumps({"status": status} | compiled.sizes() | counts))


def counted(compiled: Compiled, job: Job, target: Target) -> dict[str, Any]:
    """What the program's text says: components and buffers at the peak, costs, and the roofline."""
    from memory.conditions import collectives_in_branches, conditions
    from memory.hlo import parse
    from memory.hlo_costs import count
    from memory.liveness import live_at_peak
    from memory.roofline import branch_shares, counted_time

    module = parse(compiled.text)
    counts = count(module, job.sizes, branch_shares(job, target))
    live = live_at_peak(module)
    # What the compiler keeps beyond what lives: gaps between buffers, and what outlives its use.
    packing = compiled.temporaries - live.peak_bytes
    state = {"state and batch": compiled.arguments}
    return {
        "components": state | live.by_component | {"packing": packing},
        "named_fraction": live.named_fraction,
        "buffers": [
            {
                "bytes": buffer.bytes,
                "shape": str(buffer.shape),
                "component": buffer.component,
                "source": buffer.source,
            }
            for buffer in live.buffers[:LARGEST]
        ],
        "timeline": live.timeline,
        "flops": counts.flops,
        "bytes_moved": counts.bytes_moved,
        "collectives": [vars(collective) for collective in counts.collectives],
        "conditions": len(list(conditions(module))),
        "in_branches": [
            {"kind": kind, "axis": axis, "instructions": n}
            for (kind, axis), n in sorted(collectives_in_branches(module, job.sizes).items())
        ],
    } | counted_time(job, target, counts).grade()


if __name__ == "__main__":
    main()
