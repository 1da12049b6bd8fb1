"""The arrays of a batch: what each family and objective reads, without any data."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from data.objective import ObjectiveConfig
from models.config import ModelConfig
from parallel.rules import Rules


class BatchArray(NamedTuple):
    """One array of a batch: its dims but for the batch's, its dtype, and a bound of its values."""

    dims: tuple[int, ...]
    dtype: str
    below: int


def batch_arrays(
    config: ModelConfig, objective: ObjectiveConfig, length: int, source_length: int = 0
) -> dict[str, BatchArray]:
    """Name -> array, for rows of `length` tokens, whose sources are of `source_length`."""
    images = {}
    if config.vision.image_size:
        vision = config.vision
        images["patches"] = BatchArray((vision.patches, vision.patch_dim), "float32", 1)
    labels = {f"label_{task}": BatchArray((), "int32", classes) for task, classes in config.tasks}
    if config.family == "vision":
        return images | labels
    tokens = BatchArray((length,), "int32", config.vocab_size)
    arrays = {
        "tokens": tokens,
        "targets": tokens,
        "segments": tokens._replace(below=2),
        "positions": tokens._replace(below=length),
    }
    if objective.name == "prefix_lm":
        arrays["counted"] = tokens._replace(below=2)
        arrays["prefix"] = BatchArray((), "int32", length)
    if objective.name == "masked_lm":
        arrays["counted"] = tokens._replace(below=2)
    if config.family == "encoder_decoder":
        source = BatchArray((source_length,), "int32", config.vocab_size)
        arrays["source_tokens"] = source
        arrays["source_segments"] = source._replace(below=2)
        arrays["source_positions"] = source._replace(below=source_length)
    if not config.token_head:
        del arrays["targets"]
    return arrays | images | labels


def batch_spec(rules: Rules, ndim: int) -> P:
    """The partition of an array of a batch."""
    return P(*tuple(rules.spec("batch seq"))[:ndim])


def abstract_batch(
    arrays: dict[str, BatchArray], rows: int, rules: Rules, mesh: Any
) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch of `rows` rows as shapes with shardings."""
    return {
        name: jax.ShapeDtypeStruct(
            (rows, *array.dims),
            array.dtype,
            sharding=NamedSharding(mesh, batch_spec(rules, 1 + len(array.dims))),
        )
        for name, array in arrays.items()
    }


def random_batch(
    arrays: dict[str, BatchArray], rows: int, rules: Rules, mesh: Any
) -> dict[str, jax.Array]:
    """A batch that a step can be timed on: whole rows without padding, values drawn at random."""
    batch = {}
    for number, (name, array) in enumerate(arrays.items()):
        shape, spec = (rows, *array.dims), batch_spec(rules, 1 + len(array.dims))
        if array.dtype == "float32":
            batch[name] = jax.random.normal(jax.random.key(number), shape, out_sharding=spec)
        elif name.endswith("segments") or name == "counted":
            batch[name] = jnp.ones(shape, array.dtype, out_sharding=spec)
        elif name.endswith("positions"):
            batch[name] = jax.lax.broadcasted_iota(array.dtype, shape, 1, out_sharding=spec)
        else:
            batch[name] = jax.random.randint(
                jax.random.key(number), shape, 0, array.below, array.dtype, out_sharding=spec
            )
    return batch
