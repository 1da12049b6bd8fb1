"""Compiles a config's step for a target, of training, evaluation or generation, in a process of its
own, and keeps the answer.

A process each: the variables that make a compiler available are read when JAX is imported, and a
compiler that dies takes nothing with it. Answers are kept on disk by content: the config, the
target, this code and the versions of all that compiles.

    echo '{"config": {...}, "target": "gpu:h100:1x8", "mode": "train"}' | python compile_for.py
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
    from experiment import Experiment
    from memory.compiled import Compiled

ROOT = Path(__file__).parent
SOURCES = (
    *("parallel/*.py", "models/*.py", "training/*.py", "memory/*.py", "data/config.py"),
    *("configs/base.py", "config_*.py", "experiment*.py", "compile_for.py"),
    *("generation/config.py", "inference.py"),
)
COMPILERS = (
    *("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cudnn-cu12"),
    *("flax", "optax"),
)
# What cannot change the program.
IRRELEVANT = ("checkpoint", "eval", "logging")


def compile_for(
    config: dict[str, Any], target: Target, *, mode: str = "train", timeout: float = 1800
) -> dict[str, Any]:
    """What the compiler says of `config` (plain data) on `target`.

    Args:
      mode: train, evaluate or generate.

    Returns:
      {"status": "ok" | "does not fit" | "failed", "error": None or one line, and where it compiled
      the sizes of `memory.compiled.Compiled` and what `counted` says}; of generation the sizes are
      those of the program that needs most, and `programs` has those of both.

    Raises:
      ValueError: the target's compiler is not installed.
    """
    target.check_compiler()
    if mode == "train" and (folder := teacher_of(config)):  # that process runs in another folder
        config = config | {"distill": config["distill"] | {"teacher": str(folder.absolute())}}
    kept = cache_folder() / f"{content_key(config, target, mode)}.json.gz"
    if kept.is_file():
        return json.loads(gzip.decompress(kept.read_bytes()))
    request = json.dumps({"config": config, "target": target.name, "mode": mode})
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


def content_key(config: dict[str, Any], target: Target, mode: str = "train") -> str:
    """A hash of all that the answer depends on."""
    digest = hashlib.sha256()
    relevant = {name: value for name, value in config.items() if name not in IRRELEVANT}
    digest.update(json.dumps([relevant, target.name, mode], sort_keys=True).encode())
    digest.update(os.environ.get("XLA_FLAGS", "").encode())
    teacher = teacher_of(config)
    if teacher is not None and (teacher / "config.json").is_file():
        digest.update((teacher / "config.json").read_bytes())
    for package in COMPILERS:
        try:
            digest.update(f"{package} {importlib.metadata.version(package)}".encode())
        except importlib.metadata.PackageNotFoundError:
            continue
    for pattern in SOURCES:
        for file in sorted(ROOT.glob(pattern)):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def teacher_of(config: dict[str, Any]) -> Path | None:
    """The folder whose model is compiled beside the config's own."""
    named = config.get("distill", {}).get("teacher", "")
    return Path(named) if named else None


def main() -> None:
    """Answers one request on standard input."""
    request = json.loads(sys.stdin.read())
    target = parse_target(request["target"])
    mode = request.get("mode", "train")
    from config_border import complete
    from experiment import read_experiment

    config, count = complete(request["config"]), target.device_count
    experiment = read_experiment(config, count, training=mode == "train")
    print(json.dumps(ANSWERS[mode](experiment, target)))


def of_training(experiment: Experiment, target: Target) -> dict[str, Any]:
    from memory.compiled import compile_step
    from memory.counted import counted

    job = experiment.job()
    compiled = compile_step(job, target)
    return answer(compiled, {} if compiled.out_of_memory else counted(compiled, job, target))


def of_evaluation(experiment: Experiment, target: Target) -> dict[str, Any]:
    from memory.compiled_inference import compile_evaluation
    from memory.counted import held

    compiled = compile_evaluation(experiment.job(), target)
    more = {} if compiled.out_of_memory else held(compiled, "weights and batch")
    return answer(compiled, more)


def of_generation(experiment: Experiment, target: Target) -> dict[str, Any]:
    """The program that needs most, and `programs`: phase -> sizes of both."""
    from inference import inference_job
    from memory.compiled_inference import compile_inference
    from memory.counted import held

    programs = compile_inference(inference_job(experiment), target)
    largest = max(programs.values(), key=lambda compiled: compiled.total_bytes)
    sizes = {phase: compiled.sizes() for phase, compiled in programs.items()}
    more = {} if largest.out_of_memory else held(largest, "weights, cache and tokens")
    return answer(largest, {"programs": sizes} | more)


ANSWERS = {"train": of_training, "evaluate": of_evaluation, "generate": of_generation}


def answer(compiled: Compiled, more: dict[str, Any]) -> dict[str, Any]:
    """A compiled program as plain data."""
    status = "does not fit" if compiled.out_of_memory else "ok"
    return {"status": status} | compiled.sizes() | more


if __name__ == "__main__":
    main()
