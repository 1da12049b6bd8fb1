"""What `jax.experimental.sparse.BCOO` would take, and why weights are not stored so here.

It keeps for each number that is not zero one index of every dim: 8 bytes beside 4 in a matrix of
float32. At half zeros that is 1.5 times the dense matrix; it is smaller from two thirds of zeros
on, and of bfloat16 from four fifths on. Its products gather and scatter and run on no matrix unit.
"""

from __future__ import annotations

import math

INDEX_BYTES = 4  # int32, one of every dim


def bcoo_bytes(nonzeros: int, item_bytes: int, dims: int = 2) -> int:
    """Bytes of a BCOO array.

    Args:
      nonzeros: numbers that are not zero.
      item_bytes: of one.
      dims: of the array.
    """
    return nonzeros * (item_bytes + dims * INDEX_BYTES)


def refuse_bcoo(name: str, shape: tuple[int, ...], nonzeros: int, item_bytes: int) -> None:
    """Says why a weight with zeros anywhere is not stored in a form of its own.

    Args:
      shape: of one layer's matrix.

    Raises:
      ValueError: always, with both sizes, and the share of zeros from which BCOO would be smaller.
    """
    size = math.prod(shape)
    dense, sparse = size * item_bytes, bcoo_bytes(nonzeros, item_bytes, len(shape))
    least = 1 - item_bytes / (item_bytes + len(shape) * INDEX_BYTES)
    why = (
        f"it is smaller above {least:.0%} zeros"
        if sparse >= dense
        else "but its products gather and scatter, and it is not built"
    )
    raise ValueError(
        f"--packed: of {name}, at {1 - nonzeros / size:.0%} zeros anywhere, BCOO takes "
        f"{sparse:,} bytes, {sparse / dense:.2f} times the {dense:,} of the array; {why}. Give "
        f"--pattern=2:4, or remove whole channels by python -m compress shrink"
    )
