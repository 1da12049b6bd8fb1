"""Two factors: the best of their rank, for weights or for outputs, and ranks within a budget."""

from __future__ import annotations

import numpy as np
import pytest

from compress.budget import mixed
from compress.factorize import Factorize, choices, factorize, rank_candidates
from compress.gptq import output_error
from compress.tables import factor_tables
from compress.watch import Inputs
from tests.compress.walked import PLAIN, loss_of, walked
from training.naming import named


def inputs_of(rows: int, seed: int = 0) -> tuple[np.ndarray, Inputs]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4 * rows, rows)) @ rng.normal(size=(rows, rows)) * rng.random(rows) * 5
    moment = (x.T @ x).astype(np.float32)
    return x, Inputs(moment, np.abs(x).sum(0), np.abs(x).max(0), None, len(x))


def test_whitened_factors_change_outputs_least():
    x, inputs = inputs_of(48)
    w = np.random.default_rng(1).normal(size=(48, 32)).astype(np.float32)
    errors = {}
    for method in ("svd", "asvd", "whitened"):
        into, out_of = Factorize(method).factors(w, 8, inputs)
        assert into.shape == (48, 8)
        assert out_of.shape == (8, 32)
        errors[method] = output_error(inputs.moment, into @ out_of - w)
    # Eckart and Young: no matrix of rank 8 is nearer to X W than its own largest singular values.
    squares = np.linalg.svd(x @ w, compute_uv=False) ** 2
    assert errors["whitened"] == pytest.approx(squares[8:].sum(), rel=1e-3)
    assert errors["whitened"] < errors["asvd"]
    assert errors["whitened"] < errors["svd"]
    into, out_of = Factorize("svd").factors(w, 8, None)
    least = np.sum(np.linalg.svd(w, compute_uv=False)[8:] ** 2)
    assert np.sum((into @ out_of - w) ** 2) == pytest.approx(least, rel=1e-4)


def test_ranks_share_a_budget_and_tables_are_factored():
    with walked() as it:
        names = list(it.forms("int8"))
        how = Factorize()
        found = rank_candidates(how, names, it.laid.model, it.params, it.text)
        forms = mixed(found, 32 * 0.7, flag="keep")
        made = factorize(how, forms, it.laid.model, it.params, it.text)
        kept = sum(
            part.size
            for layers in made.nodes().values()
            for node in layers
            for part in named({"": node}).values()
        )
        whole = sum(named(it.params)[name].size for name in names)
        assert 0.6 * whole < kept <= 0.7 * whole
        laid = it.stored(made.forms())
        assert np.isfinite(loss_of(laid, made.finished(laid.model, laid.mesh)))
        with pytest.raises(ValueError, match=r"--keep=0.01: the smallest forms make"):
            mixed(found, 32 * 0.01, flag="keep")
    assert choices(100) == [8 * i for i in range(1, 13)]
    rng = np.random.default_rng(0)
    table = (rng.normal(size=(256, 8)) @ rng.normal(size=(8, 32))).astype(np.float32)
    parts = factor_tables(PLAIN, {"embedding": table}, 8)
    product = parts["embedding"] @ parts["embedding_projection"]
    np.testing.assert_allclose(product, table, atol=1e-4)
    with pytest.raises(ValueError) as error:
        factor_tables(PLAIN, {"embedding": table}, 29)
    assert str(error.value) == (
        "--embedding_rank=29: saves nothing of 256 x 32; two factors are smaller up to 28"
    )
