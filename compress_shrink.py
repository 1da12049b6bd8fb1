"""`python -m compress shrink`: whole heads, channels and layers of a run removed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cli
import compress_flags

FLAGS = (
    cli.Flag("heads", int, None, "query heads that are left of each layer"),
    cli.Flag("kv_heads", int, None, "key and value heads that are left"),
    cli.Flag("mlp_dim", int, None, "channels of the feed-forward that are left"),
    cli.Flag("layers", int, None, "layers that are left"),
    cli.Flag("scores", str, "activations", "what chooses: activations (on text) or magnitude"),
    *compress_flags.TEXT,
)
ABOUT = "Heads, channels and layers removed: fewer weights and FLOPs."


def main(
    config: Any,
    workdir: Path,
    out: Path,
    step: int | None,
    heads: int | None,
    kv_heads: int | None,
    mlp_dim: int | None,
    layers: int | None,
    scores: str,
    rows: int,
    seed: int,
) -> None:
    """The run, the importance of its parts, the smaller run."""
    import jax  # here: a typo on the command line costs no import
    import numpy as np
    from jax.sharding import NamedSharding

    from compress.importance import Scores, magnitude_scores
    from compress.prune_layers import activation_scores
    from compress.shrink import Sizes, shrink
    from compress.walk import STACK, Layer, check_walk, walk
    from compressing import compressed_model, opened, report, write_run

    sizes = Sizes(heads, kv_heads, mlp_dim, layers)
    if sizes == Sizes():
        raise ValueError("--heads: missing; give what is left: --heads, --mlp_dim or --layers")
    if scores not in ("activations", "magnitude"):
        raise ValueError(f"--scores={scores}: choose activations or magnitude")
    with opened(config, workdir, step, out) as run:
        model_config = run.experiment.model
        arrays = jax.tree.map(lambda a: np.asarray(jax.reshard(a, jax.P())), run.params)
        if scores == "activations":
            check_walk(run.model, "--scores=activations")
            seen: list[tuple[np.ndarray, np.ndarray]] = []
            text = run.calibration(rows, seed, "--scores=activations")

            def visit(layer: Layer) -> dict[str, jax.Array]:
                N, H = model_config.heads, model_config.head_dim
                seen.append(activation_scores(N, H, layer, STACK))
                return {}

            walk(text, run.params, visit)
            of_heads, channels = (np.stack(part) for part in zip(*seen, strict=True))
            found = Scores(of_heads, channels, of_heads.sum(-1) + channels.sum(-1))
        else:
            found = magnitude_scores(model_config, arrays)
        dense = sum(a.nbytes for a in jax.tree.leaves(run.params))
        parts = run.model.rules.parts("mlp")
        small, params = shrink(model_config, arrays, run.model.axes, sizes, found, parts=parts)
        keys = ("heads", "kv_heads", "mlp_dim", "layers")
        values = {f"config.model.{key}": getattr(small, key) for key in keys}
        new_config, model = compressed_model(run, values)

        def placed(array: np.ndarray, names: str) -> jax.Array:
            spec = model.rules.at_rest(names, array.shape)
            return jax.device_put(array, NamedSharding(run.mesh, spec))

        params = jax.tree.map(placed, params, model.axes)
        what = {"method": f"shrink by {scores}", "rows": rows} | vars(sizes)
        report(out, dense, write_run(run, new_config, params, out, what))
