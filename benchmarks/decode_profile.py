"""Where the time of a decode step goes: XLA's profile by part of the model, and the least time."""

from __future__ import annotations

import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from generation.engine import Engine

INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*? ([\w\-]+)\(")
OP_NAME = re.compile(r'op_name="([^"]*)"')
SOFTMAX = ("reduce_max", "exp", "select_n", "div")
LARGE = 1 << 29  # bytes: more than any cache of the processor


def bandwidth() -> float:
    """GB/s at which a large matrix is read to be multiplied by a vector, the best of several."""
    array = jnp.ones((LARGE // 4096 // 4, 4096), jnp.float32)
    vectors = jnp.ones((4096, 8), jnp.float32)
    total = jax.jit(lambda array: array @ vectors)
    total(array).block_until_ready()
    seconds = []
    for _ in range(5):
        since = time.perf_counter()
        total(array).block_until_ready()
        seconds.append(time.perf_counter() - since)
    return round(LARGE / min(seconds) / 1e9, 2)


def part_of(line: str) -> str:
    """The part of the model that an instruction of the compiled step is of."""
    match = OP_NAME.search(line)
    op = match.group(1) if match else ""
    if "->btv" in op:
        return "head"
    if op.endswith("/scatter"):
        return "scatter"
    if "bcs" in op or " dot(" in line or op.rpartition("/")[2] in SOFTMAX:
        return "attention over the cache"
    if op.endswith("dot_general"):
        return "products with weights"
    return "rest"


def parts_of(text: str) -> dict[str, str]:
    """The part of every instruction of a compiled program's entry, by name."""
    entry = text[text.index("\nENTRY ") :].splitlines()[1:]
    found = ((INSTRUCTION.match(line), line) for line in entry)
    return {match.group(1): part_of(line) for match, line in found if match}


def compiled_step(engine: Engine) -> Any:
    """The step that the engine runs."""
    rows = engine._arrays(engine.rows.rows, start=lambda row: 0, count=lambda row: 1)
    return engine._step.lower(engine._weights, engine._state, engine._key, rows).compile()


def profile(pieces: Iterator[Any], engine: Engine, steps: int, gb_per_second: float) -> Any:
    """Milliseconds of a step by part, and what its bytes need at least.

    Args:
      pieces: of texts of as many tokens, and so `steps` steps after the first token of each.
    """
    program = compiled_step(engine)
    parts = parts_of(program.as_text())
    next(pieces)  # prompts are read
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            since = time.perf_counter()
            for _ in pieces:
                pass
            wall = (time.perf_counter() - since) / steps
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    spent: Counter[str] = Counter()
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                if event.name in parts:
                    spent[parts[event.name]] += event.duration_ns / 1e6 / steps
    weights = sum(x.nbytes for x in jax.tree.leaves(engine._weights))
    cache = sum(x.nbytes for x in jax.tree.leaves(engine._state.cache))
    return {
        "profiled_milliseconds": round(1e3 * wall, 2),
        "milliseconds_by_part": {name: round(ms, 2) for name, ms in spent.most_common()},
        "between_parts_milliseconds": round(1e3 * wall - sum(spent.values()), 2),
        "weights_mib": round(weights / 2**20, 1),
        "cache_mib": round(cache / 2**20, 1),
        "temporaries_mib": round(program.memory_analysis().temp_size_in_bytes / 2**20, 2),
        "least_milliseconds": round((weights + cache) / gb_per_second / 1e6, 2),
    }
