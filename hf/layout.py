"""One of our parameters beside the tensors that hold it: shapes, and views both ways."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hf.family import Link
from models.config import ModelConfig
from parallel.rules import is_stacked
from training.naming import named
from training.state import Tree

EXPERTS = "experts"  # the logical dim


@dataclass(frozen=True)
class Place:
    """A parameter and where it is.

    Attributes:
      link: its name here and there.
      axes: its logical axis string.
      shape: at rest; [L, ...] where it is stacked, the vocabulary padded.
      lead: sizes of the first dims, of which every index is a tensor of theirs: (layers, experts),
        (layers,) or ().
      dims: the others, the vocabulary as long as it really is.
    """

    link: Link
    axes: str
    shape: tuple[int, ...]
    lead: tuple[int, ...]
    dims: tuple[int, ...]

    @property
    def names(self) -> list[str]:
        """Their names, in the order of `indices`."""
        return [self.link.theirs.format(*index) for index in self.indices]

    @property
    def indices(self) -> list[tuple[int, ...]]:
        """Where each of their tensors is in ours."""
        return list(np.ndindex(self.lead))

    @property
    def their_shape(self) -> tuple[int, ...]:
        """The shape of one of those tensors, other parts of it included."""
        parts = self.link.parts
        if "->" not in self.axes:
            return (math.prod(self.dims) * parts,)
        before = _logical(self.axes.partition("->")[0])[len(self.lead) :]
        experts = self.dims[: before.count(EXPERTS)]
        rows = math.prod(self.dims[len(experts) : len(before)])
        columns = math.prod(self.dims[len(before) :])
        if self.link.transposed:
            return *experts, columns * parts, rows
        return *experts, rows, columns * parts

    def ours(self, theirs: np.ndarray) -> np.ndarray:
        """A view of one of their tensors as our `dims`."""
        out = -2 if self.link.transposed else -1
        width = theirs.shape[out] // self.link.parts
        part = slice(self.link.part * width, (self.link.part + 1) * width)
        if self.link.transposed:
            view = np.asarray(theirs)[..., part, :].swapaxes(-1, -2)
        else:
            view = np.asarray(theirs)[..., part]
        return view.reshape(self.dims)


def places(links: list[Link], config: ModelConfig, axes: Tree, abstract: Tree) -> dict[str, Place]:
    """The place of every parameter by canonical name, in the order of `training.naming.named`.

    Args:
      links: of the family.
      config: the model.
      axes: `Model.axes`.
      abstract: shapes of the parameters.
    """
    by_name = {link.ours: link for link in links}
    shapes = {name: leaf.shape for name, leaf in named(abstract).items()}
    assert by_name.keys() == shapes.keys(), by_name.keys() ^ shapes.keys()
    found = {}
    for name, names in named(axes).items():
        shape = tuple(shapes[name])
        lead = by_name[name].theirs.count("{}")
        logical = _logical(names)
        assert lead == 0 or is_stacked(names), by_name[name]
        assert lead < 2 or logical[1] == EXPERTS, by_name[name]
        real = tuple(
            config.vocab_size if dim == "vocab" else size
            for dim, size in zip(logical, shape, strict=True)
        )
        found[name] = Place(by_name[name], names, shape, shape[:lead], real[lead:])
    return found


def _logical(axes: str) -> list[str]:
    return axes.replace("->", " ").split()
