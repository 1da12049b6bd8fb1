"""Weights as codes and scales; what they are multiplied with may be codes, too."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from parallel.codes import (
    Code,
    decode,
    encode,
    pack,
    scales_of,
    second_level,
    spread,
    unpack,
    wide,
)
from parallel.rules import Rules
from parallel.stored import UNDIVIDED, Coded, Matrix, aligned_names


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales", "steps", "mean", "limit"],
    meta_fields=["code", "matrix", "inputs"],
)
@dataclass(frozen=True)
class Quantised(Coded):
    """A weight [lead, K, M] as codes in bytes, and scales.

    Attributes:
      codes: packed, [lead, K bits / 8, M].
      scales: [lead, G, M]; of NF4 int8.
      steps, mean: of NF4's scales (`codes.second_level`), else None.
      inputs, limit: as in `Coded`.
    """

    codes: Any
    scales: Any
    steps: Any
    mean: Any
    limit: Any
    code: Code
    matrix: Matrix
    inputs: str = ""

    def cast(self, dtype: Any) -> Quantised:
        """The same: none of it is computed with as it is."""
        del dtype
        return self

    def main(self) -> jax.Array:
        """The codes."""
        return self.codes

    def dense(self, dtype: Any) -> jax.Array:
        """See `Packed`."""
        if self.steps is None:
            return super().dense(dtype)
        # The second level knows no parts of a row; it is 1/256 of the first.
        here: Any = self.gathered()
        first = replace(here, scales=here.first_level(), steps=None, mean=None)
        return first.dense(dtype)

    def first_level(self) -> jax.Array:
        """NF4's scales [lead, G, M] in float32."""
        spec = jax.typeof(self.scales).sharding.spec
        step = jax.reshard(wide(self.steps, self.matrix.columns), spec)
        mean = jax.reshard(self.mean[..., None], jax.P())
        return self.scales.astype(jnp.float32) * step + mean

    def coded(self) -> tuple[jax.Array, jax.Array]:
        """See `Coded`."""
        assert not self.code.group, self.code
        here: Any = self.gathered()
        codes = here.laid_out(lambda node: unpack(node.code, node.codes))
        return codes, here.laid_out(lambda node: node.scales[..., 0, :], contracted=False)

    def unpacked(self, dtype: Any) -> jax.Array:
        """See `Packed`; not of a second level."""
        return decode(self.code, unpack(self.code, self.codes), self.scales, dtype)


def quantised(
    code: Code,
    matrix: Matrix,
    w: jax.Array,
    scales: jax.Array | None = None,
    *,
    codes: jax.Array | None = None,
    inputs: str = "",
    limit: jax.Array | None = None,
) -> Quantised:
    """A matrix [..., K, M] by rounding to the nearest code.

    Args:
      scales: None: of the whole range.
      codes: not packed, where they were found otherwise.
      inputs, limit: as in `Quantised`.
    """
    scales = scales_of(code, w) if scales is None else scales
    found = encode(code, w, scales) if codes is None else codes
    packed = pack(code, found)
    if code.kind != "nf4":
        return Quantised(packed, scales, None, None, limit, code, matrix, inputs)
    return Quantised(packed, *second_level(scales), None, code, matrix)


def quantised_axes(
    code: Code, matrix: Matrix, stack: str, rules: Rules, inputs: str = "", *, static: bool = False
) -> Quantised:
    """The logical axes of all arrays of it; `stack` is "layers " or nothing.

    Args:
      static: whether it has a `limit`.
    """
    groups = code.groups(matrix.rows)
    units = groups if code.group else matrix.rows // code.per_unit
    rows, columns = aligned_names(matrix, rules, units)
    lead = stack + matrix.lead_names
    of_scales = rows if code.group else UNDIVIDED
    twice = code.kind == "nf4"
    return Quantised(
        f"{lead}{rows} -> {columns}",
        f"{lead}{of_scales} -> {columns}",
        f"{lead}{UNDIVIDED} {UNDIVIDED}" if twice else None,
        f"{lead}{UNDIVIDED}" if twice else None,
        f"{stack}{UNDIVIDED}" if static else None,
        code,
        matrix,
        inputs,
    )


def rounding_error(code: Code, w: jax.Array, scales: jax.Array) -> jax.Array:
    """What rounding changes, [..., K, M] in halves of a step: at most 1 where none is cut off."""
    back = decode(code, encode(code, w, scales), scales)
    return jnp.abs(back - w) / (0.5 * spread(scales.astype(jnp.float32), w.shape[-2]))
