"""Times the loss head against logits of the whole batch, forward and backward, on one device.

Command: JAX_PLATFORMS=cpu python benchmarks/loss_head.py [--tokens 4096 --chunk 1024 --rounds 7]

Prints one JSON object: versions, shapes, the least seconds of each (run in turns, so that a busy
machine slows all of them), the least CPU seconds over all threads (which neighbours disturb less),
and the compiled temporaries. `gemms` is the three products alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
from jax import Array

from parallel.mesh import MeshConfig, make_mesh
from parallel.rules import ParallelConfig, make_rules
from training.losses import cross_entropy


def naive(x_TD: Array, table_VD: Array, targets_T: Array) -> Array:
    """The mean loss from logits of all tokens at once."""
    logits_TV = jnp.einsum("td,vd->tv", x_TD, table_VD, preferred_element_type=jnp.float32)
    picked_T = jnp.take_along_axis(logits_TV, targets_T[:, None], axis=1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits_TV, axis=1) - picked_T)


def gemms(x_TD: Array, table_VD: Array, targets_T: Array) -> tuple[Array, tuple[Array, Array]]:
    """The products that any exact loss head needs: logits, and the two gradients."""
    del targets_T
    logits_TV = jnp.einsum("td,vd->tv", x_TD, table_VD)
    d_x_TD = jnp.einsum("tv,vd->td", logits_TV, table_VD)
    return jnp.sum(d_x_TD), (d_x_TD, jnp.einsum("tv,td->vd", logits_TV, x_TD))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"tokens": 4096, "embed": 512, "vocab": 32000, "rounds": 7}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--chunk", type=int, nargs="+", default=[1024])
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()

    mesh_config = MeshConfig(data=1)
    rules = make_rules(ParallelConfig(zero=0), mesh_config.sizes(), {})
    with jax.set_mesh(make_mesh(mesh_config, jax.devices()[:1])):
        keys = jax.random.split(jax.random.key(0), 3)
        x_TD = jax.random.normal(keys[0], (args.tokens, args.embed), args.dtype)
        table_VD = jax.random.normal(keys[1], (args.vocab, args.embed), args.dtype) * 0.02
        targets_T = jax.random.randint(keys[2], (args.tokens,), 0, args.vocab)
        weights_T = jnp.full(args.tokens, 1.0 / args.tokens)

        def ours(chunk: int) -> Callable:
            def loss(x_TD: Array, table_VD: Array, targets_T: Array) -> Array:
                x_BTD = jax.reshard(x_TD[None], rules.spec("batch seq act_embed"))
                targets_BT = jax.reshard(targets_T[None], rules.spec("batch seq"))
                weights_BT = jax.reshard(weights_T[None], rules.spec("batch seq"))
                options = {"rules": rules, "vocab_size": args.vocab, "chunk": chunk}
                return cross_entropy(x_BTD, table_VD, targets_BT, weights_BT, **options)[0]

            return jax.value_and_grad(loss, argnums=(0, 1))

        programs = {"naive": jax.value_and_grad(naive, argnums=(0, 1)), "gemms": gemms}
        programs |= {f"chunk {chunk}": ours(chunk) for chunk in args.chunk}
        inputs = (x_TD, table_VD, targets_T)
        compiled = {name: jax.jit(f).lower(*inputs).compile() for name, f in programs.items()}
        seconds: dict[str, list[float]] = {name: [] for name in compiled}
        cpu_seconds: dict[str, list[float]] = {name: [] for name in compiled}
        for _ in range(args.rounds):
            for name, program in compiled.items():
                start, cpu_start = time.perf_counter(), time.process_time()
                jax.block_until_ready(program(*inputs))
                seconds[name].append(time.perf_counter() - start)
                cpu_seconds[name].append(time.process_time() - cpu_start)

    analyses = {name: program.memory_analysis() for name, program in compiled.items()}
    mib = {name: a.temp_size_in_bytes / 2**20 for name, a in analyses.items() if a is not None}
    report = vars(args) | {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "seconds": {name: round(min(times), 3) for name, times in seconds.items()},
        "cpu_seconds": {name: round(min(times), 3) for name, times in cpu_seconds.items()},
        "temporaries_mib": {name: round(size, 1) for name, size in mib.items()},
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
