"""A vocabulary's tables as two factors: [V, r] [r, D], as `config.model.embed_rank` has them."""

from __future__ import annotations

from typing import Any

import numpy as np

from models.config import ModelConfig


def factor_tables(config: ModelConfig, arrays: dict[str, Any], rank: int) -> dict[str, np.ndarray]:
    """The arrays that take the place of `embedding` and `head_weight`.

    Args:
      arrays: the dense model's, by canonical name.
      rank: r.

    Raises:
      ValueError: a rank that saves nothing, or tables that are factors already.
    """
    rows, dim = arrays["embedding"].shape
    most = (rows * dim - 1) // (rows + dim)
    if config.embed_rank:
        raise ValueError(
            f"--embedding_rank={rank}: the tables are factors already (config.model.embed_rank = "
            f"{config.embed_rank}); leave it out"
        )
    if not 1 <= rank <= min(most, dim - 1):
        raise ValueError(
            f"--embedding_rank={rank}: saves nothing of {rows} x {dim}; two factors are smaller "
            f"up to {min(most, dim - 1)}"
        )
    table, project = _factors(np.asarray(arrays["embedding"], np.float64), rank)
    found = {"embedding": table, "embedding_projection": project}
    if "head_weight" in arrays:
        into, out_of = _factors(np.asarray(arrays["head_weight"], np.float64), rank)
        found |= {"head_projection": into, "head_weight": out_of}
    return found


def _factors(table: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    u, s, v = np.linalg.svd(table, full_matrices=False)
    root = np.sqrt(s[:rank])
    return (u[:, :rank] * root).astype(np.float32), (root[:, None] * v[:rank]).astype(np.float32)
