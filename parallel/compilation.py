"""Compiled programs: kept on disk between runs, and what one needs in memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import jaxlib.version


def keep_compiled() -> None:
    """Keeps compiled programs in a folder of the user, so that a second start does not compile.

    The folder is $JAX_COMPILATION_CACHE_DIR, or meshwright/compiled under $XDG_CACHE_HOME or
    ~/.cache.
    """
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(home) / "meshwright" / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def quick_compilation() -> dict[str, str] | None:
    """`compiler_options` for a program that runs once, such as the one that draws the parameters.

    On CPU most of the time of a start went into optimising that program: six times as long as at
    level 1, whose code is as fast and gives the same bits. A level in XLA_FLAGS stays.
    """
    option = "xla_backend_optimization_level"
    if jax.default_backend() != "cpu" or option in os.environ.get("XLA_FLAGS", ""):
        return None
    return {option: "1"}


def safe_compilation(kind: str | None = None) -> dict[str, str | bool]:
    """`compiler_options` for every program that computes with divided arrays.

    XLA:GPU makes zeros where an all-gather is followed by a slice of each device's own part, as at
    a residual sum under `config.parallel.sequence`: the pass that is left out here turns the pair
    into a permute that sends nothing (https://github.com/openxla/xla/pull/45218).

    Args:
      kind: cpu, gpu or tpu; None is what is here.
    """
    if (kind or jax.default_backend()) != "gpu":
        return {}
    return {"xla_disable_hlo_passes": "all-gather-to-collective-permute-simplifier"}


def many_rows() -> dict[str, str | bool]:
    """`compiler_options` for products of hundreds of rows with a weight, beside those above.

    On CPU jaxlib 0.10 gives all products to a library that is faster for a few rows; its older one
    takes three quarters of the time for many.
    """
    old = jax.default_backend() == "cpu" and jaxlib.version.__version__.startswith("0.10.")
    return {"xla_cpu_experimental_ynn_fusion_type": ""} if old else {}


def device_bytes(compiled: Any) -> int:
    """Bytes per device of a compiled program: arguments + outputs + temporaries - aliases."""
    m = compiled.memory_analysis()
    return int(
        m.argument_size_in_bytes
        + m.output_size_in_bytes
        + m.temp_size_in_bytes
        - m.alias_size_in_bytes
    )
