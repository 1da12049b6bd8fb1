"""Canonical names of a state's tensors: the path in its tree, such as `params/blocks/mlp/up`.

NamedTuples, dicts and sequences give the same kind of name, and empty nodes give none, so that what
is on disk depends on what a state holds and not on the classes that hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

PyTree = Any

# The first part of the names of parameters that a model has while it is trained alone, and that
# whoever evaluates, exports or continues from it as another run does not ask for.
TRAINING_ONLY = "distill"


def named(tree: PyTree) -> dict[str, Any]:
    """The leaves of `tree` by name, in the order of `jax.tree.leaves`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    assert len(names) == len(leaves), "two leaves with one name"
    return names


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Names and leaves as nested dicts."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *path, last = name.split("/")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def completed(part: PyTree, whole: PyTree) -> PyTree:
    """`whole` with what `part` has in its places; None stands for what that does not have."""
    return _by_part(lambda new, old: old if new is None else new, part, whole)


def restricted(whole: PyTree, part: PyTree) -> PyTree:
    """What `whole` has where `part` has something, else None."""
    return _by_part(lambda new, old: None if new is None else old, part, whole)


def _by_part(choose: Callable[[Any, Any], Any], part: PyTree, whole: PyTree) -> PyTree:
    return jax.tree.map(choose, part, whole, is_leaf=lambda leaf: leaf is None)


def is_key(leaf: Any) -> bool:
    """Whether an array, real or abstract, holds typed random keys."""
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def to_data(leaf: jax.Array) -> jax.Array:
    """An array as it is stored: random keys as their bits."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def abstract_data(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The abstract array that is read from disk in order to get `leaf`."""
    assert leaf.sharding is not None, "restore needs to know the sharding"
    if not is_key(leaf):
        return leaf
    data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)


def from_data(array: jax.Array, leaf: jax.ShapeDtypeStruct, tensor: Mapping[str, Any]) -> jax.Array:
    """The inverse of `to_data`, given what `describe` said of the array that was stored."""
    return jax.random.wrap_key_data(array, impl=tensor["key"]) if is_key(leaf) else array


def describe(leaf: jax.Array) -> dict[str, Any]:
    """What the manifest says of a tensor: shape, dtype, and the generator of random keys."""
    described = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    return described | ({"key": str(jax.random.key_impl(leaf))} if is_key(leaf) else {})


def compare(
    wanted: Mapping[str, Any], saved: Mapping[str, Mapping[str, Any]], path: Path, partial: bool
) -> None:
    """Checks that a checkpoint holds the tensors that are wanted.

    Args:
      wanted: name -> abstract array.
      saved: name -> what `describe` said.
      path: the checkpoint's folder, for the message.
      partial: whether the checkpoint may hold more than is wanted: other branches of the state's
        tree, such as moments beside parameters, and what training alone has, but not other
        tensors in a branch that is wanted.

    Raises:
      ValueError: it does not; the message names the first tensor that differs, parameters first.
    """
    if partial:
        branches = {name.partition("/")[0] for name in wanted}
        aside = f"params/{TRAINING_ONLY}/"
        saved = {
            name: t
            for name, t in saved.items()
            if name.partition("/")[0] in branches and (name in wanted or not name.startswith(aside))
        }
    for name in sorted(
        set(wanted) | set(saved), key=lambda name: (not name.startswith("params"), name)
    ):
        here = tuple(wanted[name].shape) if name in wanted else None
        there = tuple(saved[name]["shape"]) if name in saved else None
        kinds = [is_key(wanted[name]), "key" in saved[name]] if here == there is not None else [0]
        if here == there and len(set(kinds)) == 1:
            continue
        section = "config.model" if name.startswith("params") else "config.optimizer"
        raise ValueError(
            f"{section}: {path} was written by another one; {name} is "
            f"{'absent' if there is None else there} on disk and "
            f"{'absent' if here is None else here} in this run (of {len(saved)} and {len(wanted)} "
            f"tensors). Use the config of the run that wrote it, or another --workdir"
        )
