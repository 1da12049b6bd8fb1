"""Tokens generated a second by GPT-2 124M: ours against `transformers`, in turns, on CPU.

    JAX_PLATFORMS=cpu python benchmarks/decode_speed.py [--rounds=7]
        [--out=benchmarks/results/decode_speed.json]

Random float32 weights, exported by `hf/exporting.py` and read by both sides; 8 prompts of 128
tokens, 128 new ones, greedy. Ours is the engine of `generate.py`; theirs is `model.generate` with
its cache, scaled-dot-product attention and inference mode, in a process of its own that is idle
between its turns. Both have the same two cores and as many threads. A round times one new token
(prefill), then 128, on each side: a decode step is the difference over 127. Figures are medians
over rounds, ratios those of the ratios within a round. Wants the extra `parity`; prints JSON.

`step` says where a decode step's time goes: XLA's own profile, by part of the model, and the bytes
that it must read at least over the bandwidth that one large product reaches.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import numpy as np

from benchmarks.decode_profile import bandwidth, profile
from configs import gpt2_124m
from experiment import Experiment, read_experiment
from generation.engine import Engine
from generation.prompts import Prompt
from generation.rows import Request
from generation.text import Text
from hf.exporting import export_params
from inference import decoder_weights, make_engine
from parallel.huge_pages import use_huge_pages
from parallel.mesh import make_mesh
from prompt_tokens import requests_of, tokenizer_of
from run_params import saved_params
from training.state import drawn_params

BATCH, PROMPT, NEW = 8, 128, 128
CORES = 2


def our_experiment() -> Experiment:
    """GPT-2 124M in float32, as a user of `generate.py` would ask for it."""
    config = gpt2_124m.get_config()
    config.precision.compute = "float32"
    config.data.tokenizer = "bytes"
    config.generate.update(batch_size=BATCH, max_new_tokens=NEW, ignore_end=True)
    return read_experiment(config, 1, training=False)


class Ours:
    """The engine, and what it is asked."""

    def __init__(self, experiment: Experiment, engine: Engine, prompts: np.ndarray) -> None:
        self._experiment, self.engine = experiment, engine
        self._prompts = [
            Prompt(f"row {row}", tokens=tuple(tokens))
            for row, tokens in enumerate(prompts.tolist())
        ]
        self._tokenizer = tokenizer_of(experiment, None)

    def requests(self, new: int) -> list[Request]:
        """Texts of so many tokens."""
        requests = requests_of(self._experiment, self._prompts, self._tokenizer)
        for request in requests:
            request.most = new
        return requests

    def __call__(self, new: int) -> tuple[float, list[list[int]]]:
        """(seconds, tokens of each row)."""
        requests = self.requests(new)
        since = time.perf_counter()
        for _ in self.engine.run(requests):
            pass
        return time.perf_counter() - since, [request.text.tokens for request in requests]


class Theirs:
    """The same by `torch_generation.py`."""

    def __init__(self, folder: Path) -> None:
        script = str(Path(__file__).with_name("torch_generation.py"))
        self._child = subprocess.Popen(
            [sys.executable, script, str(folder), str(CORES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.facts = self._read()

    def __call__(self, new: int) -> tuple[float, list[list[int]]]:
        """(seconds, tokens of each row)."""
        assert self._child.stdin is not None
        self._child.stdin.write(f"{new}\n")
        self._child.stdin.flush()
        answer = self._read()
        return answer["seconds"], answer["tokens"]

    def close(self) -> None:
        """Ends the process."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()

    def _read(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        found: dict[str, Any] = json.loads(self._child.stdout.readline())
        return found


def take_turns(sides: dict[str, Any], rounds: int) -> tuple[dict[str, Any], float]:
    """Seconds of prefill and of a decode step by side and round, and the part of equal tokens."""
    found: dict[str, Any] = {name: {"prefill": [], "decode": []} for name in sides}
    equal = 0.0
    for number in range(rounds + 1):  # the first one compiles and warms up
        tokens = {}
        for name in sorted(sides, reverse=number % 2 == 1):
            prefill, _ = sides[name](1)
            whole, tokens[name] = sides[name](NEW)
            if number:
                found[name]["prefill"].append(prefill)
                found[name]["decode"].append((whole - prefill) / (NEW - 1))
        ours, theirs = (np.asarray(tokens[name]) for name in ("ours", "theirs"))
        assert ours.shape == theirs.shape == (BATCH, NEW)
        equal = float((ours == theirs).mean())
        print(f"round {number} of {rounds}; equal tokens {equal:.1%}", file=sys.stderr)
    return found, equal


def report(seconds: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second of both sides, and the ratios."""
    rows: dict[str, Any] = {}
    for what, tokens in (("prefill", BATCH * PROMPT), ("decode", BATCH)):
        ours, theirs = (seconds[name][what] for name in ("ours", "theirs"))
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        rows[what] = {
            "ours_tokens_per_second": round(tokens / statistics.median(ours), 1),
            "theirs_tokens_per_second": round(tokens / statistics.median(theirs), 1),
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(ratio, 3) for ratio in ratios],
            "ours_seconds": [round(x, 5) for x in ours],
            "theirs_seconds": [round(x, 5) for x in theirs],
        }
    return rows


def facts() -> dict[str, Any]:
    """What the figures are of."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((s.split(":")[1].strip() for s in lines if s.startswith("model name")), cpu)
    return {
        "model": "configs/gpt2_124m.py, float32",
        "batch": BATCH,
        "prompt": PROMPT,
        "new": NEW,
        "cpu": cpu,
        "cores": CORES,
        "load_before": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "malloc": os.environ.get("GLIBC_TUNABLES", ""),
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    """Exports, takes turns, prints, keeps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])  # before JAX has threads
    result = {"command": f"python benchmarks/decode_speed.py --rounds={args.rounds}", **facts()}
    experiment = our_experiment()
    prompts = np.random.default_rng(0).integers(0, experiment.model.vocab_size, (BATCH, PROMPT))
    mesh = make_mesh(experiment.mesh, jax.devices()[:1])
    with tempfile.TemporaryDirectory() as temporary, jax.set_mesh(mesh):
        folder = Path(temporary) / "gpt2"
        model = experiment.build_model()
        initial = drawn_params(model, experiment.precision, experiment.seed)
        export_params(initial, experiment.model, model.axes, folder)
        del initial
        np.save(folder / "prompts.npy", prompts)
        params = saved_params(experiment, model, mesh, None, None, folder).params
        engine = make_engine(
            experiment, decoder_weights(experiment, model, params), mesh, PROMPT, 0
        )
        ours, theirs = Ours(experiment, engine, prompts), Theirs(folder)
        seconds, equal = take_turns({"ours": ours, "theirs": theirs}, args.rounds)
        theirs.close()
        result |= {"theirs": theirs.facts, "equal_tokens": equal, **report(seconds)}
        reads = bandwidth()
        requests = ours.requests(NEW)
        for request in requests:  # a piece for each token
            request.text = Text(lambda ids: "x" * len(list(ids)))
        pieces = engine.run(requests)
        result["step"] = {"bandwidth_gb_per_second": reads}
        result["step"] |= profile(pieces, engine, NEW - 1, reads)
    text = json.dumps(result, indent=2)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    use_huge_pages()
    main()
