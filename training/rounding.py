"""Stochastic rounding to bfloat16: up or down by chance, so that the mean is the number itself.

Rounded to the nearest, an update smaller than 2^-9 of a parameter is lost, however often it comes.
Rounded by chance, it arrives in one of so many steps. What is drawn is a function of the step, of
the name of the array, of the layer and of the place in it: the same on every mesh, since threefry
is partitionable.

Sources: Gupta et al. 2015, https://arxiv.org/abs/1502.02551; for training in bfloat16 alone,
Zamirai et al. 2021, https://arxiv.org/abs/2010.06192.
"""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from training.by_layer import Place
from training.naming import named

Tree = Any


def widened(tree: Tree) -> Tree:
    """The same numbers, those in bfloat16 as float32."""
    return jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, tree)


def rounded(tree: Tree, like: Tree, key: Array, place: Place) -> Tree:
    """Float32 arrays rounded by chance, where the same one of `like` is bfloat16.

    Args:
      key: of this step.
      place: name of an array -> its layers.
    """
    new = []
    for (name, array), old in zip(named(tree).items(), jax.tree.leaves(like), strict=True):
        if old.dtype == jnp.bfloat16:
            of_name = jax.random.fold_in(key, zlib.crc32(name.encode()))
            array = stochastic(array, _bits(of_name, array, place(name)))
        new.append(array)
    return jax.tree.unflatten(jax.tree.structure(tree), new)


def stochastic(array: Array, bits: Array) -> Array:
    """float32 to one of the two bfloat16 around it, by 16 random bits for each number.

    The lower half of a float32 is how far it is from the bfloat16 below it, in 2^-16 of the way to
    the next one. Added to so many random bits it overflows with just this probability.
    """
    wide = jax.lax.bitcast_convert_type(array, jnp.uint32) + bits.astype(jnp.uint32)
    high = (wide >> 16).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(high, jnp.bfloat16)


def _bits(key: Array, like: Array, layers: Array | None) -> Array:
    """16 random bits for each number; each layer's are drawn by its own key."""
    sharding = jax.typeof(like).sharding
    entries = tuple(sharding.spec) + (None,) * (like.ndim - len(sharding.spec))

    def draw(key: Array, shape: tuple[int, ...], entries: tuple[Any, ...]) -> Array:
        out = None if sharding.mesh.empty else PartitionSpec(*entries)
        return jax.random.bits(key, shape, jnp.uint16, out_sharding=out)

    if layers is None:
        return draw(key, like.shape, entries)
    if not sharding.mesh.empty:
        layers = jax.reshard(layers, PartitionSpec(entries[0]))
    of_layer = lambda layer: draw(jax.random.fold_in(key, layer), like.shape[1:], entries[1:])
    return jax.vmap(of_layer)(layers)
