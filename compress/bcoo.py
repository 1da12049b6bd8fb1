"""What `jax.experimental.sparse.BCOO` would take, and why weights are not stored so here.

It keeps for each number that is not zero one index of every dim: 8 bytes beside 4 in a matrix of
float32. At half zeros that is 1.5 times the dense matrix; it is smaller from two thirds of zeros
on, and of bfloat16 from four fifths on. Its products gather and scatter and run on no matrix unit.
"""

from __future__ import annotations

INDEX_BYTES = 4  # int32, one of every dim


def bcoo_bytes(nonzeros: int, item_bytes: int, dims: int = 2) -> int:
    """Bytes of a BCOO array.

    Args:
      nonzeros: numbers that are not zero.
      item_bytes: of one.
      dims: of the array.
    """
    return nonzeros * (item_bytes + dims * INDEX_BYTES)


def check_bcoo(name: str, shape: tuple[int, ...], nonzeros: int, item_bytes: int) -> None:
    """Refuses to store a weight in a form that is larger than the weight.

    Raises:
      ValueError: with both sizes, and the share of zeros from which it would be smaller.
    """
    size = 1
    for n in shape:
        size *= n
    dense, sparse = size * item_bytes, bcoo_bytes(nonzeros, item_bytes, len(shape))
    if sparse < dense:
        return
    least = 1 - item_bytes / (item_bytes + len(shape) * INDEX_BYTES)
    raise ValueError(
        f"{name}: at {1 - nonzeros / size:.0%} zeros BCOO takes {sparse:,} bytes, "
        f"{sparse / dense:.2f} times the {dense:,} of the array; it is smaller above {least:.0%} "
        f"zeros. Store 2:4, or remove whole channels"
    )
