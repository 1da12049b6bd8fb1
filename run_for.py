"""Trains a config by `train.py`, a process and a workdir of its own, and reads what was measured.

The process runs here, or on a cluster through `submitit` (extra `slurm`). Partition and account
are sbatch's own variables, `SBATCH_PARTITION` and `SBATCH_ACCOUNT`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from config_border import with_values, write_config
from parallel.targets import Target

ROOT = Path(__file__).parent
STEPS, WARM = 13, 3  # of a run that is only timed, and those of them that are not

# Starts a command and returns what waits for it: None, or its last words if it failed.
Launch = Callable[[list[str]], Callable[[], str | None]]


def short(config: ConfigDict, data_cache: Path) -> ConfigDict:
    """The config of a run that is only timed: a few steps, each logged; one cache of tokens."""
    return with_values(
        config,
        {
            "config.train.steps": STEPS,
            "config.train.log_every": 1,
            "config.checkpoint.every": STEPS,
            "config.checkpoint.best": "",
            "config.eval.every": 0,
            "config.eval.batches": 1,
            "config.logging.tensorboard": False,
            "config.logging.wandb": False,
            "config.data.cache": config.data.cache or str(data_cache.absolute()),
        },
    )


def start(
    config: ConfigDict, target: Target, workdir: Path, launch: Launch
) -> Callable[[], dict[str, Any]]:
    """Starts the run, or continues it; call what is returned to wait for it.

    Returns:
      a function without arguments: {"status": "ok" | "does not fit" | "failed", "error": None or
      one line, "measured": None or what `measured` reads}.
    """
    write_config(workdir, config)
    environment = target.environment() if target.chip.kind == "cpu" else {}
    variables = [f"{name}={value}" for name, value in environment.items()]
    program = [sys.executable, str(ROOT / "train.py"), f"--workdir={workdir.absolute()}"]
    wait = launch(["env", *variables, *program])

    def finish() -> dict[str, Any]:
        error = wait()
        if error is None:
            return {"status": "ok", "error": None, "measured": measured(workdir)}
        out_of_memory = "RESOURCE_EXHAUSTED" in error or "out of memory" in error.lower()
        status = "does not fit" if out_of_memory else "failed"
        return {"status": status, "error": error, "measured": None}

    return finish


def here(command: list[str]) -> Callable[[], str | None]:
    """Runs a command on this machine, once it is waited for: one has the devices at a time."""

    def wait() -> str | None:
        done = subprocess.run(command, capture_output=True, text=True)
        return last_line(done.stderr) if done.returncode else None

    return wait


def through_submitit(cluster: str, target: Target, folder: Path, minutes: int = 24 * 60) -> Launch:
    """Runs commands as jobs of a cluster: "slurm", or "local" for processes on this machine.

    Raises:
      ValueError: submitit is not installed, or the cluster is not there.
    """
    try:
        import submitit
        from submitit.helpers import CommandFunction
    except ImportError as error:
        raise ValueError(
            f"--submit={cluster}: submitit is not installed; run pip install -e '.[slurm]'"
        ) from error
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
    except RuntimeError as error:
        raise ValueError(f"--submit={cluster}: {error}") from error
    gpus = target.devices_per_host if target.chip.kind == "gpu" else 0
    executor.update_parameters(
        name="meshwright",
        nodes=max(1, target.device_count // target.devices_per_host),
        tasks_per_node=1,
        timeout_min=minutes,
        **({"gpus_per_node": gpus} if gpus else {}),
    )

    def launch(command: list[str]) -> Callable[[], str | None]:
        # Its environment is the job's, in which train.py finds the other processes.
        def submit() -> Any:
            return executor.submit(CommandFunction(command, verbose=False))

        job = None if cluster == "local" else submit()

        def wait() -> str | None:
            try:
                (job or submit()).result()
            except submitit.core.utils.FailedJobError as error:
                return last_line(str(error))
            return None

        return wait

    return launch


def measured(workdir: Path) -> dict[str, Any]:
    """The medians of a run's logged steps, those of its warm-up left out.

    Returns:
      {"total_bytes": int or None, "seconds": ..., "tokens_per_second": ..., "loss": the last}.
    """
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    warm = [row for row in rows if row["step"] > WARM] or rows
    peaks = [row["device_peak_bytes"] for row in rows if row.get("device_peak_bytes")]
    return {
        "total_bytes": max(peaks, default=None),
        "seconds": statistics.median(row["step_seconds"] for row in warm),
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in warm),
        "loss": rows[-1]["loss"],
    }


def folder_name(name: str, overrides: dict[str, Any]) -> str:
    """A folder for one layout: its name, and a hash, since the name may leave something out."""
    digest = hashlib.sha256(json.dumps(overrides, sort_keys=True).encode()).hexdigest()
    return f"{re.sub('[^a-z0-9.]+', '-', name.lower())[:80]}-{digest[:8]}"


def last_line(text: str) -> str:
    """The error that a program ended with: our own `error: ...`, or else its last words."""
    ours = re.findall("(?:^|: )(error: .+)$", text, re.MULTILINE)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (ours or lines or ["it ended without a word"])[-1][:300]


def workers(memory_each: int = 4 * 2**30) -> int:
    """How many compilers this machine can run at once, by its cores and its free memory."""
    import psutil

    free = psutil.virtual_memory().available // memory_each
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(cores, free))
