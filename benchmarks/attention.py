"""Times the forms of attention, forward and backward, on one device, causal with documents.

Command: JAX_PLATFORMS=cpu python benchmarks/attention.py [--length 512 --rounds 7 ...]

Prints one JSON line for each form and block size: the least seconds of wall clock and of processor
time (the forms run in turns, so that a busy machine slows all of them; processor time suffers
less), and the compiled temporaries. `jax` is `jax.nn.dot_product_attention` with the same mask.
`--layers` repeats the attention, one after another, as a model does.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
from jax import Array

from models.attention import attention
from models.masks import Mask, MaskArrays, visible
from parallel.mesh import MeshConfig, make_mesh
from parallel.rules import ParallelConfig, make_rules

MASK = Mask(causal=True, segments=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"batch": 8, "length": 512, "heads": 8, "kv_heads": 8, "head_dim": 64}
    for name, size in (sizes | {"documents": 3, "layers": 1, "rounds": 7}).items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--forms", nargs="+", default=["jax", "xla", "rows", "blocked"])
    parser.add_argument("--blocks", type=int, nargs="+", default=[128])
    args = parser.parse_args()

    mesh_config = MeshConfig(data=1)
    rules = make_rules(ParallelConfig(), mesh_config.sizes(), {})

    def form(name: str, block: int) -> Callable[..., tuple[Array, ...]]:
        def one(q: Array, k: Array, v: Array, segments: Array) -> Array:
            arrays = MaskArrays(segments, segments)
            if name == "jax":
                index = jnp.arange(args.length)
                seen = visible(MASK, index, index, arrays)
                return jax.nn.dot_product_attention(q, k, v, mask=seen)
            return attention(
                q, k, v, MASK, arrays, rules=rules, implementation=name, block=block or 128
            )

        def stacked(q: Array, k: Array, v: Array, segments: Array) -> Array:
            for _ in range(args.layers):
                q = one(q, k, v, segments)
            return q

        def both(q: Array, k: Array, v: Array, segments: Array, do: Array) -> tuple[Array, ...]:
            o, pull = jax.vjp(lambda q, k, v: stacked(q, k, v, segments), q, k, v)
            return (o, *pull(do))

        return both

    with jax.set_mesh(make_mesh(mesh_config, jax.devices()[:1])):
        keys = jax.random.split(jax.random.key(0), 4)
        q_shape = (args.batch, args.length, args.heads, args.head_dim)
        kv_shape = (args.batch, args.length, args.kv_heads, args.head_dim)
        shapes = (q_shape, kv_shape, kv_shape, q_shape)
        spec = rules.spec("batch seq act_heads head_dim")
        q, k, v, do = (
            jax.random.normal(key, shape, args.dtype, out_sharding=spec)
            for key, shape in zip(keys, shapes, strict=True)
        )
        segments = 1 + jnp.arange(args.length, dtype=jnp.int32) * args.documents // args.length
        segments = jnp.broadcast_to(segments[None], (args.batch, args.length))
        segments = jax.reshard(segments, rules.spec("batch seq"))
        inputs = (q, k, v, segments, do)

        names = [
            (name, block)
            for name in args.forms
            for block in (args.blocks if name in ("rows", "blocked") else [0])
        ]
        compiled = {name: jax.jit(form(*name)).lower(*inputs).compile() for name in names}
        wall = {name: float("inf") for name in names}
        processor = dict(wall)
        for _ in range(args.rounds + 1):  # the first round warms up, and is never the least
            for key, run in compiled.items():
                start, start_cpu = time.perf_counter(), time.process_time()
                jax.block_until_ready(run(*inputs))
                wall[key] = min(wall[key], time.perf_counter() - start)
                processor[key] = min(processor[key], time.process_time() - start_cpu)

        for name, block in names:
            memory: Any = compiled[name, block].memory_analysis()
            row = {
                "form": name,
                "block": block or None,
                "seconds": round(wall[name, block], 4),
                "processor_seconds": round(processor[name, block], 4),
                "temporary_mib": round(memory.temp_size_in_bytes / 2**20, 1),
            }
            versions = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
            print(json.dumps(row | vars(args) | versions))


if __name__ == "__main__":
    main()
