"""Zeros after training: magnitude, Wanda and SparseGPT against what they are by definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.sparse import BCOO

from compress.bcoo import bcoo_bytes
from compress.prune import prune_by_magnitude
from compress.prune_layers import Prune, prune
from compress.sparsegpt import sparsegpt
from compress.wanda import wanda
from tests.compress.walked import walked
from tests.small import MIXTURE, initial_params, layout
from training.naming import named

PATTERN = dict(unstructured=0.6) | {"2:4": 0.5}


def drawn(tokens=400, rows=192, columns=24):
    """A matrix and inputs that go together, of sizes that differ, one of them always zero."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(tokens, rows)) @ (np.eye(rows) + 0.3 * rng.normal(size=(rows, rows)))
    x *= rng.uniform(0.2, 3, size=rows)
    x[:, 5] = 0
    return rng.normal(size=(rows, columns)).astype(np.float32), x.astype(np.float32)


def by_magnitude(w, share, pattern):
    """Of one matrix that is not stacked."""
    made = prune_by_magnitude({"w": w}, {"w": "embed -> mlp"}, {"w"}, share, pattern=pattern)
    (found,) = (np.asarray(array) for _, _, array in made)
    return found


def squared_error(w, pruned, x):
    return np.sum((x.astype(np.float64) @ (pruned.astype(np.float64) - w)) ** 2)


def obs(w, moment, sparsity, pattern, damp=0.01, block=128):
    """SparseGPT by its definition: the inverse of what is left of H, made anew for every row."""
    w, h = np.array(w, np.float64), np.array(moment, np.float64)
    dead = np.diag(h) == 0
    h[dead, dead], w[dead] = 1, 0
    h += damp * np.mean(np.diag(h)) * np.eye(len(h))
    rows, columns = w.shape
    inverses = [np.linalg.inv(h[k:, k:]) for k in range(rows)]
    lost = [inverse[0, 0] for inverse in inverses]
    zero = np.zeros(w.shape, bool)
    for k in range(rows):
        if pattern == "2:4" and k % 4 == 0:
            for m in range(columns):
                cost = [w[k + i, m] ** 2 / lost[k + i] for i in range(4)]
                zero[k + np.argsort(cost)[:2], m] = True
        if pattern != "2:4" and k % block == 0:
            cost = w[k : k + block] ** 2 / np.array(lost[k : k + block])[:, None]
            limit = np.sort(cost.reshape(-1))[round(sparsity * cost.size) - 1]
            zero[k : k + block] = cost <= limit
        error = np.where(zero[k], w[k], 0) / lost[k]
        w[k:] -= np.outer(inverses[k][:, 0], error)
        w[k, zero[k]] = 0
    return w


@pytest.mark.parametrize("pattern", PATTERN)
def test_sparsegpt_is_optimal_brain_surgery_row_by_row(pattern):
    w, x = drawn()
    moment = (x.T @ x).astype(np.float32)
    got = sparsegpt(w, moment, PATTERN[pattern], pattern=pattern)
    want = obs(w, moment, PATTERN[pattern], pattern)
    # Two ways of inverting in float64: a cost that is equal to another's to 1e-9 may be on either
    # side, and carry its channel's later rows along.
    near = np.isclose(got, want, rtol=1e-4, atol=1e-5)
    assert np.mean(~near) <= 1e-4
    assert not got[5].any()


@pytest.mark.parametrize("pattern", PATTERN)
def test_each_method_does_what_it_is_for(pattern):
    """Knowing inputs is better than not, and making good better than that."""
    w, x = drawn()
    moment = x.T @ x
    share = PATTERN[pattern]
    with layout():
        plain = by_magnitude(w, share, pattern)
    found = {
        "magnitude": plain,
        "wanda": wanda(w, np.diag(moment), share, pattern=pattern),
        "sparsegpt": sparsegpt(w, moment, share, pattern=pattern),
    }
    errors = {name: squared_error(w, pruned, x) for name, pruned in found.items()}
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"], errors
    for name, pruned in found.items():
        zeros = pruned == 0
        assert zeros.mean() == pytest.approx(share, abs=6e-3), name  # a dead input's row beside it
        if pattern == "2:4":
            assert (zeros.reshape(-1, 4, w.shape[1]).sum(1) >= 2).all(), name
    if pattern != "2:4":
        assert ((found["wanda"] == 0).sum(0) == round(share * len(w))).all()
    kept = found["wanda"] != 0
    np.testing.assert_array_equal(found["wanda"][kept], w[kept])


def test_wanda_by_hand():
    w = np.array([[3.0, 1], [-1, 1], [2, -5], [0.5, 2]], np.float32)
    squares = np.array([1.0, 100, 4, 1])  # norms 1, 10, 2, 1
    # scores of the first channel 3 10 4 0.5, of the second 1 10 10 2
    want = np.array([[0.0, 0], [-1, 1], [2, -5], [0, 0]], np.float32)
    np.testing.assert_array_equal(wanda(w, squares, 0.5), want)
    np.testing.assert_array_equal(wanda(w, squares, 0.5, pattern="2:4"), want)


@pytest.mark.parametrize("pattern", PATTERN)
def test_wanda_is_a_reference_in_float64(pattern):
    w, x = drawn()
    got = wanda(w, np.diag(x.T @ x), PATTERN[pattern], pattern=pattern)
    scores = np.abs(w.astype(np.float64)) * np.linalg.norm(x.astype(np.float64), axis=0)[:, None]
    want = np.array(w)
    for m in range(w.shape[1]):
        if pattern == "2:4":
            for k in range(0, len(w), 4):
                want[k + np.argsort(scores[k : k + 4, m], kind="stable")[:2], m] = 0
        else:
            number = round(PATTERN[pattern] * len(w))
            want[np.argsort(scores[:, m], kind="stable")[:number], m] = 0
    # Norms in float32: scores that are equal to 1e-7 may change places.
    assert np.mean((got == 0) != (want == 0)) <= 1e-4
    np.testing.assert_array_equal(got[(got != 0) & (want != 0)], w[(got != 0) & (want != 0)])


def test_magnitude_takes_matrices_of_experts_one_by_one():
    names = {"stack/blocks/mlp/up", "stack/blocks/mlp/down"}
    with layout(config=MIXTURE, expert=2, fsdp=2, tensor=2, zero=3) as laid:
        params = laid.params(initial_params(MIXTURE))
        found = []
        for name, layer, array in prune_by_magnitude(params, laid.model.axes, names, 0.3):
            dense = named(params)[name][layer]
            assert jax.typeof(array) == jax.typeof(dense)
            found.append((name, layer))
            pruned = np.asarray(array)
            of_each = (pruned == 0).sum(axis=(1, 2))
            assert (of_each == round(0.3 * pruned[0].size)).all(), name
            kept = pruned != 0
            np.testing.assert_array_equal(pruned[kept], np.asarray(dense)[kept])
    assert found == [(name, layer) for name in sorted(names) for layer in range(MIXTURE.layers)]


def test_one_threshold_for_all_layers_of_all_matrices():
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=(3, 8, 16)).astype(np.float32) for name in "ab"}
    params["a"][0] *= 0.1  # nearly all of them go
    axes = dict.fromkeys("ab", "layers embed -> mlp")
    with layout():
        made = prune_by_magnitude(params, axes, {"a", "b"}, 0.5, scope="global")
        found = {(name, layer): np.asarray(array) for name, layer, array in made}
    limit = np.median(np.abs(np.stack([params[name] for name in "ab"])))
    for (name, layer), array in found.items():
        dense = params[name][layer]
        np.testing.assert_array_equal(array, np.where(np.abs(dense) <= limit, 0, dense))
    assert len(found) == 6


def test_bytes_of_bcoo_are_those_of_jax():
    w = np.random.default_rng(0).normal(size=(32, 16)).astype(np.float32)
    w[np.abs(w) < np.median(np.abs(w))] = 0
    array = BCOO.fromdense(jnp.asarray(w))
    size = array.data.nbytes + array.indices.nbytes
    assert bcoo_bytes(array.nse, 4) == size == 1.5 * w.nbytes


@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_zeros_anywhere_are_not_packed(sparsity):
    why = {
        0.5: "BCOO takes 12,288 bytes, 1.50 times the 8,192 of the array; it is smaller above 67% "
        "zeros",
        0.75: "BCOO takes 6,144 bytes, 0.75 times the 8,192 of the array; but its products gather "
        "and scatter, and it is not built",
    }
    names, how = ["stack/blocks/attention/query"], Prune("magnitude", sparsity, packed=True)
    with walked() as it, pytest.raises(ValueError) as error:
        prune(how, names, it.laid.model, it.params, None)
    assert str(error.value) == (
        f"--packed: of {names[0]}, at {sparsity:.0%} zeros anywhere, {why[sparsity]}. Give "
        f"--pattern=2:4, or remove whole channels by python -m compress shrink"
    )


@pytest.mark.parametrize(
    ("share", "pattern", "message"),
    [
        (0.0, "unstructured", "--sparsity=0.0: the share of weights to make zero, in (0, 1)"),
        (1.0, "unstructured", "--sparsity=1.0: the share of weights to make zero, in (0, 1)"),
        (float("nan"), "unstructured", "--sparsity=nan: the share"),
        (0.6, "2:4", "--sparsity=0.6: 2:4 makes two of every four zero"),
        (0.5, "1:4", "pattern '1:4': choose one of unstructured, 2:4"),
    ],
)
def test_a_share_that_cannot_be_is_refused(share, pattern, message):
    w, x = drawn(tokens=8, rows=8, columns=2)
    for call in (
        lambda: wanda(w, np.ones(8), share, pattern=pattern),
        lambda: sparsegpt(w, x.T @ x, share, pattern=pattern),
        lambda: by_magnitude(w, share, pattern),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert message in str(error.value)
