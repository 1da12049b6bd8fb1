"""Heads, channels and layers removed: smaller arrays, fewer operations, the same program otherwise.

Layers are stacked, so that all of them lose the same number; which ones they lose is each one's
own. Query heads that share a key and value head are a group: whole groups are removed, or the same
number of heads of every group that stays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress.importance import BLOCKS, Scores
from models.config import ModelConfig
from parallel.rules import STACKS
from parallel.stored import is_stored
from training.naming import named

Tree = Any
FAMILIES = ("decoder", "encoder")  # of one stack


@dataclass(frozen=True)
class Sizes:
    """What is to be left of a model; None: all.

    Attributes:
      heads: query heads of a layer.
      kv_heads: their key and value heads.
      mlp_dim: channels of the feed-forward, or of each expert.
      layers: of the stack.
    """

    heads: int | None = None
    kv_heads: int | None = None
    mlp_dim: int | None = None
    layers: int | None = None


def shrink(
    config: ModelConfig, params: Tree, axes: Tree, sizes: Sizes, scores: Scores, *, parts: int = 1
) -> tuple[ModelConfig, Tree]:
    """A smaller model of the most important parts of a larger one, in their order.

    Args:
      config: of the larger one.
      params: NumPy, or JAX arrays that are not divided.
      axes: the same tree of logical axes.
      sizes: what is left.
      scores: by which parts are chosen (`compress.importance`, or of activations).
      parts: that the tensor axis will divide heads and channels into.

    Returns:
      (config, params): NumPy arrays for NumPy ones, else JAX's.

    Raises:
      ValueError: sizes that are none of a smaller model, naming those that would do, or weights
        that are stored in other forms.
    """
    if any(is_stored(node) for node in jax.tree.leaves(params, is_leaf=is_stored)):
        raise ValueError(
            "config.weights.forms: parts are removed from arrays; start from the checkpoint before "
            "it was compressed"
        )
    small = smaller(config, sizes, parts)
    chosen = {
        "layers": _layers(config, small, scores.layers),
        "mlp": _largest(scores.channels, small.feed_forward_dim),
    }
    chosen["heads"], chosen["kv_heads"] = _heads(config, small, scores.heads)
    leaves = []
    for (name, array), names in zip(named(params).items(), jax.tree.leaves(axes), strict=True):
        if name.startswith(BLOCKS):
            for dim in ("heads", "kv_heads", "mlp"):  # of all layers, each its own
                array = _taken(array, names.replace("->", " ").split(), dim, chosen[dim])
            array = array[chosen["layers"]] if small.layers < config.layers else array
        leaves.append(array)
    return small, jax.tree.unflatten(jax.tree.structure(params), leaves)


def smaller(config: ModelConfig, sizes: Sizes, parts: int = 1) -> ModelConfig:
    """The config of the smaller model.

    Raises:
      ValueError: as `shrink`.
    """
    if config.family not in FAMILIES or config.cross != "none":
        raise ValueError(
            f"config.model.family = {config.family!r}: parts are removed from models of one stack "
            f"({', '.join(FAMILIES)})"
        )
    now = {
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "mlp_dim": config.feed_forward_dim,
        "layers": config.layers,
    }
    for key, size in now.items():
        wanted = getattr(sizes, key)
        if wanted is not None and not 1 <= wanted <= size:
            raise ValueError(f"--{key}={wanted}: the model has {size}; choose 1 to {size}")
    kv_heads = sizes.kv_heads or config.kv_heads
    heads = sizes.heads or kv_heads * (config.heads // config.kv_heads)
    _check_heads(config, heads, kv_heads, parts)
    mlp_dim = sizes.mlp_dim or config.feed_forward_dim
    if mlp_dim % parts:
        raise ValueError(f"--mlp_dim={mlp_dim}: {_multiples(mlp_dim, parts, now['mlp_dim'])}")
    layers = sizes.layers or config.layers
    if layers < config.layers and config.distinct:
        raise ValueError(
            f"--layers={layers}: layers share blocks (config.model.distinct = {config.distinct}), "
            f"so that one less saves no weight; set config.model.layers itself"
        )
    period = len(config.pattern)
    if (config.layers - layers) % period:
        right = list(range(config.layers % period or period, config.layers, period))
        raise ValueError(
            f"--layers={layers}: their kinds alternate with a period of {period} "
            f"(config.model.pattern), and whole periods are removed; choose one of {right}"
        )
    changes: dict[str, Any] = dict(heads=heads, kv_heads=kv_heads, layers=layers)
    if config.experts.number and config.experts.mlp_dim:
        changes["experts"] = replace(config.experts, mlp_dim=mlp_dim)
    else:
        changes["mlp_dim"] = mlp_dim
    return replace(config, **changes)


def _check_heads(config: ModelConfig, heads: int, kv_heads: int, parts: int) -> None:
    if (heads, kv_heads) != (config.heads, config.kv_heads) and config.positions == "relative":
        raise ValueError(
            f"--heads={heads}: layers share one bias for each head (config.model.positions = "
            f"'relative'), and each loses heads of its own; leave heads out"
        )
    group = config.heads // config.kv_heads
    if heads % kv_heads or heads // kv_heads > group:
        right = [kv_heads * n for n in range(1, group + 1)]
        raise ValueError(
            f"--heads={heads}: with {kv_heads} key and value heads every one of those serves as "
            f"many query heads, {group} at most; choose heads of {right}, or fewer --kv_heads"
        )
    if heads % parts:
        raise ValueError(f"--heads={heads}: {_multiples(heads, parts, config.heads)}")


def _multiples(size: int, parts: int, most: int) -> str:
    below, above = size // parts * parts, -(-size // parts) * parts
    right = [str(n) for n in (below, above) if 0 < n <= most]
    return f"does not divide by the {parts} parts of the tensor axis; choose {' or '.join(right)}"


def _heads(config: ModelConfig, small: ModelConfig, scores_LN: np.ndarray) -> tuple[Any, Any]:
    """The query heads [blocks, N'] and the key and value heads [blocks, K'] that stay."""
    group, left = config.heads // config.kv_heads, small.heads // small.kv_heads
    scores_LKG = scores_LN.reshape(-1, config.kv_heads, group)
    inner_LKG = _largest(scores_LKG, left)  # the heads of each group that would stay
    of_groups_LK = np.take_along_axis(scores_LKG, inner_LKG, axis=2).sum(2)
    groups_LK = _largest(of_groups_LK, small.kv_heads)
    inner_LKG = np.take_along_axis(inner_LKG, groups_LK[:, :, None], axis=1)
    heads_LKG = groups_LK[:, :, None] * group + inner_LKG
    return heads_LKG.reshape(len(heads_LKG), -1), groups_LK


def _layers(config: ModelConfig, small: ModelConfig, scores_L: np.ndarray) -> np.ndarray:
    """The layers that stay: whole periods of the pattern, and what is beyond the last one."""
    period = len(config.pattern)
    periods = config.layers // period
    of_periods = scores_L[: periods * period].reshape(periods, period).sum(1)
    removed = (config.layers - small.layers) // period
    kept = _largest(of_periods, periods - removed) if config.layers > small.layers else None
    if kept is None:
        return np.arange(config.layers)
    inside = (kept[:, None] * period + np.arange(period)).reshape(-1)
    return np.concatenate([inside, np.arange(periods * period, config.layers)])


def _largest(scores: np.ndarray, number: int) -> np.ndarray:
    """The places of so many largest along the last dim, rising; of equal ones the first."""
    order = np.argsort(-np.asarray(scores, np.float64), axis=-1, kind="stable")
    return np.sort(order[..., :number], axis=-1)


def _taken(array: Any, dims: list[str], dim: str, index: np.ndarray) -> Any:
    """The places `index` [blocks, (E,) n] of one dim of a stacked array."""
    if dim not in dims:
        return array
    assert dims[0] in STACKS, dims
    at = dims.index(dim)
    lead = index.ndim - 1
    shape = [1] * array.ndim
    shape[:lead], shape[at] = index.shape[:-1], index.shape[-1]
    take = np.take_along_axis if isinstance(array, np.ndarray) else jnp.take_along_axis
    return take(array, index.reshape(shape), axis=at)
