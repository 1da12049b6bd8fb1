"""What a model weighs, in whatever forms its weights are stored."""

from __future__ import annotations

import math
from typing import Any

import jax

from experiment import Experiment
from training.naming import named
from training.state import Tree
from training.stored import is_matrix


def sizes(experiment: Experiment, params: Tree) -> dict[str, Any]:
    """Bytes of all arrays, on a device and of the matrices; how many numbers they stand for.

    Call it under the mesh.
    """
    dense = experiment.build_dense()
    axes = named(dense.axes)
    shapes = {n: a.size for n, a in named(jax.eval_shape(dense.init, jax.random.key(0))).items()}
    matrices = {n: size for n, size in shapes.items() if is_matrix(n, axes[n])}
    arrays = named(params)
    own = tuple(f"{name}/" for name in matrices)
    of_matrices = sum(a.nbytes for n, a in arrays.items() if f"{n}/".startswith(own))
    return {
        "bytes": sum(a.nbytes for a in arrays.values()),
        "device_bytes": device_bytes(params),
        "numbers": sum(shapes.values()),
        "bits_per_matrix_weight": 8 * of_matrices / max(sum(matrices.values()), 1),
    }


def device_bytes(tree: Tree) -> int:
    """Bytes of the arrays' parts on one device."""
    part = lambda a: math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
    return sum(part(a) for a in jax.tree.leaves(tree))
