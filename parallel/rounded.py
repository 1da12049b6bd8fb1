"""A weight in training that is rounded to codes wherever it is used.

The forward pass has the numbers that the codes stand for (Jacob et al. 2017, section 3,
https://arxiv.org/abs/1712.05877), the backward pass, too; the gradient goes to the array as if
nothing had been rounded (Bengio et al. 2013, https://arxiv.org/abs/1308.3432). Between the two only
the array is kept, divided as it is: it is gathered and rounded once more.

Scales are of the weight as a whole, so that the layout changes no code: of a channel that several
devices have parts of, its largest number is found over all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from parallel.codes import Code, decode, encode, scales_of, through_second_level
from parallel.contract import axes_of, by_device, gathered
from parallel.mesh import PIPE
from parallel.rules import FSDP
from parallel.stored import Coded, Matrix, untwinned
from parallel.twin import Twin


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["master", "limit"],
    meta_fields=["code", "matrix", "inputs"],
)
@dataclass(frozen=True)
class Rounded(Coded):
    """An array that is trained, and the code that it is rounded to.

    Attributes:
      master: the weight's array, or `Twin`, in compute dtype.
      inputs, limit: as in `Coded`; each token has its own scale.
    """

    master: Any
    code: Code
    matrix: Matrix
    inputs: str = ""
    limit: None = None

    def cast(self, dtype: Any) -> Rounded:
        """The array in another dtype."""
        return replace(self, master=jax.tree.map(lambda a: a.astype(dtype), self.master))

    def main(self) -> jax.Array:
        """The array to compute with."""
        return untwinned(self.master)

    def trained(self) -> jax.Array:
        """See `Packed`."""
        return self.master.part if isinstance(self.master, Twin) else self.master

    def computed(self) -> Rounded:
        """See `Packed`."""
        return replace(self, master=self.main())

    def dense(self, dtype: Any) -> jax.Array:
        """See `Packed`."""
        w, scales = self._scaled()
        back = self._as_stored(scales) if self.code.kind == "nf4" else scales

        def round_trip(w: jax.Array, scales: jax.Array, back: jax.Array) -> jax.Array:
            codes = encode(self.code, w, scales)
            return decode(self.code, codes, back, dtype)

        return self._on_matrices(round_trip, w, (scales, back), _spec(w))

    def coded(self) -> tuple[jax.Array, jax.Array]:
        """See `Coded`."""
        assert not self.code.group, self.code
        w, scales = self._scaled()
        codes = self._on_matrices(partial(encode, self.code), w, (scales,), _spec(w))
        return codes, jnp.squeeze(scales, self.matrix.several)

    def unpacked(self, dtype: Any) -> jax.Array:
        """It has parts on several devices, which know too little each."""
        raise AssertionError("dense() rounds over all devices")

    def _scaled(self) -> tuple[jax.Array, jax.Array]:
        """The array as it is rounded, and its scales [lead, G, dims that are not contracted]."""
        w = self._whole_groups(gathered(self.main(), FSDP, PIPE))
        first, middle = self.matrix.several, self.matrix.several + self.matrix.contracted
        spec = _spec(w)
        over = tuple(sorted(axes_of(spec[first:middle])))
        grouped = self.code.group > 0
        out = (*spec[:first], spec[first] if grouped else None, *spec[middle:])

        find = partial(scales_of, self.code, over=() if grouped else over)
        return w, self._on_matrices(find, w, (), out)

    def _whole_groups(self, w: jax.Array) -> jax.Array:
        """Gathered over what would cut groups of rows in two."""
        first, middle = self.matrix.several, self.matrix.several + self.matrix.contracted
        spec = _spec(w)
        sizes = jax.sharding.get_abstract_mesh().shape
        parts = math.prod(sizes[axis] for axis in axes_of(spec[first : first + 1]))
        groups = self.code.groups(self.matrix.rows)
        inner = spec[first + 1 : middle]
        if not self.code.group or (groups % parts == 0 and not axes_of(inner)):
            return w
        return jax.reshard(w, P(*spec[:first], *[None] * self.matrix.contracted, *spec[middle:]))

    def _as_stored(self, scales: jax.Array) -> jax.Array:
        """NF4's scales by way of their own codes, which are made of all of a weight's."""
        matrix, spec = self.matrix, _spec(scales)
        lead = matrix.several
        whole = jax.reshard(scales, P(*spec[:lead], *[None] * (scales.ndim - lead)))
        flat = whole.reshape(*whole.shape[: lead + 1], matrix.columns)
        found = through_second_level(flat).reshape(whole.shape)
        return jax.reshard(found, P(*spec))

    def _on_matrices(
        self,
        function: Callable[..., jax.Array],
        w: jax.Array,
        scales: tuple[jax.Array, ...],
        out: tuple[Any, ...],
    ) -> jax.Array:
        """`function` of every device's part as [lead, K, M], and of scales as [lead, G, M]."""
        first, middle = self.matrix.several, self.matrix.several + self.matrix.contracted

        def local(w: jax.Array, *scales: jax.Array) -> jax.Array:
            lead, others = w.shape[:first], w.shape[middle:]
            rows = math.prod(w.shape[first:middle])
            columns = math.prod(others)
            flat = w.reshape(*lead, rows, columns).astype(jnp.float32)
            found = function(flat, *[s.reshape(*s.shape[: first + 1], columns) for s in scales])
            if len(out) == w.ndim and found.shape[-2] == rows:
                return found.reshape(w.shape)
            return found.reshape(*lead, found.shape[-2], *others)

        specs = [P(*_spec(a)) for a in (w, *scales)]
        return by_device(local, tuple(specs), P(*out))(w, *scales)


def _spec(array: jax.Array) -> tuple[Any, ...]:
    return tuple(jax.typeof(array).sharding.spec)
