"""From a checkpoint folder to parameters laid out at rest, on any mesh, piece by piece.

Every device's part of a parameter is made once, of zeros, and filled in place: one piece of one
tensor at a time is read, turned, and copied to each device whose part it belongs to. On the host
there are never more than the pages of one tensor and a few pieces.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from hf.checking import check_heads, check_names, located
from hf.families import family_of
from hf.files import CheckpointFolder, Stored
from hf.layout import Place, places
from models.config import ModelConfig
from parallel.mesh import NO_MESH
from parallel.precision import PrecisionConfig
from training.state import Model, Tree, abstract_params

PIECE = 8 << 20  # bytes of a piece in the parameter's dtype; there are at most three copies of it
Region = tuple[tuple[int, int], ...]  # [start, stop) in every dim


class Found(NamedTuple):
    """A parameter and its tensors, in the order of `Place.indices`."""

    place: Place
    tensors: list[Stored]


def find_params(
    folder: CheckpointFolder, config: ModelConfig, model: Model, precision: PrecisionConfig
) -> list[Found]:
    """Where every parameter is, in the order of the tree's leaves; nothing is read.

    Raises:
      ValueError: the folder is not of this model (`hf.checking.located`), or for other heads.
    """
    family = family_of(folder.config, f"{folder.key} = '{folder.path}': config.json")
    if config.embed_rank:
        raise ValueError(
            f"config.model.embed_rank = {config.embed_rank}: {folder.key} = '{folder.path}' has a "
            f"table that is not factorised; set it to 0"
        )
    check_heads(folder, config)
    links = family.links_of(config, folder.tensors)
    check_names(folder, config, links, model.axes)
    wanted = places(links, config, model.axes, abstract_params(model, precision))
    stored = located(folder, family, config, wanted)
    return [Found(place, [stored[name] for name in place.names]) for place in wanted.values()]


def read_params(
    found: Sequence[Found], model: Model, precision: PrecisionConfig, mesh: jax.sharding.Mesh
) -> Tree:
    """The parameters, divided as `rules.at_rest`, in `precision.params`.

    Rows of the padded vocabulary are zero. Every process reads what its own devices hold.
    """
    with jax.set_mesh(NO_MESH):
        arrays = [
            _read(
                place,
                tensors,
                NamedSharding(mesh, model.rules.at_rest(place.axes, place.shape)),
                jnp.dtype(precision.params),
            )
            for place, tensors in found
        ]
    return jax.tree.unflatten(jax.tree.structure(model.axes), arrays)


def _read(
    place: Place, stored: Sequence[Stored], sharding: NamedSharding, dtype: np.dtype
) -> jax.Array:
    """One parameter, of one tensor or one an index."""
    owners: dict[Region, list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(place.shape).items():
        assert index is not None
        owners.setdefault(_region(index, place.shape), []).append(device)
    buffers: dict[jax.Device, jax.Array] = {}
    for region, devices in owners.items():
        shape = tuple(stop - start for start, stop in region)
        for device in devices:
            buffers[device] = jnp.zeros(shape, dtype, device=device)
    lead = len(place.lead)
    for number, tensor in zip(place.indices, stored, strict=True):
        view = place.ours(tensor.map())
        for region, devices in owners.items():
            outer, inner = region[:lead], region[lead:]
            if not all(start <= i < stop for i, (start, stop) in zip(number, outer, strict=True)):
                continue
            at = [i - start for i, (start, _) in zip(number, outer, strict=True)]
            for piece in pieces(view, inner, dtype.itemsize):
                part = view[tuple(slice(*span) for span in piece)].astype(dtype, order="C")
                part = part.reshape((1,) * lead + part.shape)
                offsets = (*at, *(p[0] - r[0] for p, r in zip(piece, inner, strict=True)))
                for device in devices:
                    buffers[device] = _fill(
                        buffers[device], jax.device_put(part, device), np.asarray(offsets, np.int32)
                    )
                jax.block_until_ready([buffers[device] for device in devices])
        del view  # and the pages that were read of it
    return jax.make_array_from_single_device_arrays(place.shape, sharding, list(buffers.values()))


@jax.jit(donate_argnums=0)
def _fill(buffer: jax.Array, part: jax.Array, offsets: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(buffer, part, tuple(offsets))


def _region(index: tuple[slice, ...], shape: tuple[int, ...]) -> Region:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def pieces(view: np.ndarray, region: Sequence[tuple[int, int]], itemsize: int) -> Iterator[Region]:
    """Cuts what a region has of a view into pieces of at most `PIECE` bytes, or of one element.

    They are cut across the dims whose neighbours are farthest apart in the file: read in its order.
    """
    spans = [
        (start, min(stop, size)) for (start, stop), size in zip(region, view.shape, strict=True)
    ]
    if any(start >= stop for start, stop in spans):
        return  # padding alone
    dims = sorted(range(view.ndim), key=lambda dim: -view.strides[dim])
    yield from _cut(tuple(spans), dims, itemsize)


def _cut(spans: Region, dims: Sequence[int], itemsize: int) -> Iterator[Region]:
    size = math.prod(stop - start for start, stop in spans) * itemsize
    if size <= PIECE or not dims:
        yield spans
        return
    dim, *others = dims
    start, stop = spans[dim]
    step = max(1, PIECE * (stop - start) // size)
    for at in range(start, stop, step):
        part = at, min(at + step, stop)
        yield from _cut((*spans[:dim], part, *spans[dim + 1 :]), others, itemsize)
