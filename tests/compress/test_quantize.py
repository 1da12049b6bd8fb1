"""Codes: the same as references', better where calibration says so, the same on every layout."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress import host
from compress.budget import candidates, mixed
from compress.fold import apply_fold, folds_of
from compress.gptq import gptq, output_error
from compress.quantize import Quantize, quantize
from compress.ranges import limit_of
from compress.result import text_of
from compress.round import best_clip, nearest
from compress.watch import Inputs
from parallel import codes as device
from parallel.forms import read_form
from parallel.quantised import quantised, rounding_error
from parallel.stored import Matrix
from tests.compress.walked import PLAIN, loss_of, walked
from tests.small import layout
from training.naming import named
from training.stored import dense_layer

CODES = ["int8", "int4:16", "int3:16", "int2:16", "nf4:16", "fp8"]


def drawn(rows: int = 64, columns: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


def moment_of(rows: int, seed: int = 0) -> np.ndarray:
    """Of inputs that hang together."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4 * rows, rows)) @ rng.normal(size=(rows, rows)) * rng.random(rows) * 3
    return (x.T @ x).astype(np.float32)


@pytest.mark.parametrize("name", CODES)
def test_host_and_device_round_alike_and_bytes_come_back(name):
    code, w = read_form(name, "form").code, drawn()
    values, on_host, host_scales = nearest(code, w)
    # XLA multiplies by the reciprocal of a constant: a last bit of float32, and so of float16.
    rtol = 2e-3 if code.scale_dtype == "float16" else 3e-7
    scales = device.scales_of(code, jnp.asarray(w))
    np.testing.assert_allclose(np.asarray(scales), host_scales, rtol=rtol)
    scales = jnp.asarray(host_scales)
    found = device.encode(code, jnp.asarray(w), scales)
    # The largest of a group is half-way between two codes by construction: either is right.
    x = np.abs(w) / device_spread(host_scales.astype(np.float32), len(w))
    inside = x < code.limit * (1 - 1e-5) if code.kind == "int" else np.ones(x.shape, bool)
    found = jnp.where(jnp.asarray(inside), found, jnp.asarray(on_host))
    np.testing.assert_array_equal(np.asarray(found), on_host)
    decoded = np.asarray(device.decode(code, found, scales))
    np.testing.assert_allclose(decoded, values, rtol=1e-6)
    back = device.unpack(code, device.pack(code, found))
    np.testing.assert_array_equal(np.asarray(back), on_host)
    if code.kind == "int":  # (2^(b-1) - 1/2) s on either side: nothing is cut off
        error = np.asarray(rounding_error(code, jnp.asarray(w), scales))
        # float16 scales may be rounded down by 2^-11, which half a step of b bits notices.
        assert error.max() <= 1 + 2 ** (code.bits - 11 if code.group else code.bits - 20)


def test_groups_of_zeros_cost_the_others_nothing():
    """NF4's scales have a scale and a mean of their own, which are those of what is there."""
    code, w = read_form("nf4:64", "form").code, 0.002 * drawn(256, 256)
    matrix = Matrix(w.shape, "embed -> mlp")

    def error(w):
        with layout():
            back = np.asarray(dense_layer(quantised(code, matrix, jnp.asarray(w))))
        assert (back[w == 0] == 0).all()
        return np.sum((back - w) ** 2) / np.sum(w**2)

    wanted = error(w)
    w[:, 7] = 0  # an output that was pruned
    w[64:128, 9] = 0
    assert error(w) == pytest.approx(wanted, rel=0.02)  # one channel less in the mean


@pytest.mark.parametrize("name", ["int4:16", "int3:32", "int8", "nf4:16"])
def test_gptq_is_the_reference_row_by_row(name):
    """Against the update of optimal brain surgery with an explicit inverse, in float64."""
    code, w, moment = read_form(name, "form").code, drawn(192, 12), moment_of(192)
    found, scales = gptq(code, w, moment, damp=0.01)
    wanted = reference_gptq(code, w, moment, damp=0.01)
    assert np.mean(found != wanted) <= 1e-4
    rounded = host.decode(code, found, device_spread(scales, 192))
    plain, _, _ = nearest(code, w)
    assert output_error(moment, rounded - w) < output_error(moment, plain - w)


def device_spread(scales, rows):
    return np.repeat(scales, rows // len(scales), axis=0)


def reference_gptq(code, w, moment, damp):
    w, rows = w.astype(np.float64).copy(), len(w)
    hessian = moment.astype(np.float64) + damp * np.mean(np.diag(moment)) * np.eye(rows)
    inverse, codes = np.linalg.inv(hessian), np.zeros(w.shape, np.int8)
    group, scale = code.group or rows, None
    for k in range(rows):
        if k % group == 0:
            scale = host.scales_of(code, w[k : k + group])
        codes[k] = host.encode(code, w[k], scale)
        error = (w[k] - host.decode(code, codes[k], scale)) / inverse[k, k]
        w[k:] -= np.outer(inverse[k:, k], error)
        inverse -= np.outer(inverse[:, k], inverse[k]) / inverse[k, k]  # row k leaves
    return codes


def test_folds_keep_the_function():
    config = replace(PLAIN, kv_heads=2)
    with walked(config) as it:
        wanted = loss_of(it.laid, it.params)
        arrays = {n: np.asarray(a) for n, a in named(it.params).items()}
        axes = named(it.laid.model.axes)
        folds = folds_of(config, list(arrays), "stack/blocks/")
        assert len(folds) == 4
        rng = np.random.default_rng(0)
        for fold in folds:
            for layer in range(config.layers):
                mine = {n: a[layer] for n, a in arrays.items() if n.startswith("stack/")}
                matrices = {n: Matrix.of(arrays[n].shape, axes[n]) for n in mine if "->" in axes[n]}
                rows = matrices[fold.targets[0]].rows
                from compress.fold import shared_scale

                scale = shared_scale(fold, rng.uniform(0.2, 5, rows), config.head_dim)
                changed = apply_fold(fold, mine, matrices, scale, config.head_dim)
                for name, array in changed.items():
                    arrays[name] = arrays[name].copy()
                    arrays[name][layer] = array
        tree = jax.tree.unflatten(jax.tree.structure(it.params), list(arrays.values()))
        assert loss_of(it.laid, it.laid.params(tree)) == pytest.approx(wanted, rel=1e-5)


def test_a_mix_spends_its_bits_where_outputs_suffer():
    with walked() as it:
        options = [it.forms(name) for name in ("int2:8", "int4:8", "int8")]
        found = candidates(it.laid.model, it.params, it.text, options)
        forms = mixed(found, 5.0)
        places = [(name, i) for name, layers in found.items() for i in range(len(layers))]
        tables = [[(o.bits, o.cost) for o in found[name][i]] for name, i in places]
        weights = sum(o[0].weights for layers in found.values() for o in layers)
        mine = [
            next((o.bits, o.cost) for o in found[name][i] if o.form == forms[name][i])
            for name, i in places
        ]
        bits, cost = (sum(values) for values in zip(*mine, strict=True))
        assert 4.5 < bits / weights <= 5.0
        rng, tried = np.random.default_rng(0), 0
        for _ in range(2000):  # forms at random, within the budget
            drawn = rng.choice(3, len(tables), p=[0.6, 0.3, 0.1])
            chosen = [table[i] for table, i in zip(tables, drawn, strict=True)]
            other_bits, other_cost = (sum(values) for values in zip(*chosen, strict=True))
            if other_bits <= 5.0 * weights:
                tried += 1
                assert cost <= other_cost
        assert tried > 100
        made = quantize(Quantize(), forms, it.config, it.laid.model, it.params, None)
        laid = it.stored(made.forms())
        params = made.finished(laid.model, laid.mesh)
        assert np.isfinite(loss_of(laid, params))
        assert {text_of(layers) for layers in forms.values()} == set(made.forms().values())
        with pytest.raises(ValueError, match="--bits=1: the smallest forms"):
            mixed(found, 1.0)


def test_clips_and_limits_take_the_least_error():
    w = drawn()
    w[3] *= 20
    code = read_form("int4", "form").code
    clip = best_clip(code, w)
    squares = lambda values: float(np.sum((values - w) ** 2))
    assert squares(nearest(code, w, clip)[0]) < squares(nearest(code, w)[0])
    x = np.abs(np.random.default_rng(0).normal(size=1_000_000)).astype(np.float32)
    x[0] = 30
    bins = np.bincount((x.view(np.int32) >> 20) & 2047, minlength=2048)
    inputs = Inputs(None, None, np.array([30.0]), bins.astype(np.float32), np.float32(len(x)))
    assert limit_of(inputs, "int8", "absmax", 0) == 30
    assert 3.8 < limit_of(inputs, "int8", "percentile", 99.99) < 4.6
    assert 4 < limit_of(inputs, "int8", "mse", 0) < 15  # one of a million is cut off


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(method="obq"), "--method=obq: choose one of rtn, gptq, awq, smoothquant"),
        (dict(percentile=0.0), "--percentile=0.0: above 0, at most 100"),
        (dict(damp=0.0), "--damp=0.0: a part of the mean, between 0 and 1"),
        (dict(damp=0.1), "--damp=0.1: has no effect with --method=rtn; it is of gptq"),
        (dict(exponent=0.8), "--exponent=0.8: has no effect with --method=rtn; it is of smooth"),
        (
            dict(percentile=99.0),
            "--percentile=99.0: has no effect with --ranges=absmax; it is of p",
        ),
        (dict(method="awq", ranges="mse"), "--ranges=mse: is found of the inputs as they are, and"),
    ],
)
def test_bad_flags(how, message):
    with pytest.raises(ValueError) as error:
        Quantize(**how)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("2:4", "--form=2:4: 2:4 is no form of codes; python -m compress prune --pattern=2:4"),
        ("rank:8", "--form=rank:8: rank:8 is no form of codes; python -m compress factorize"),
        ("none", "--form=none: nothing is rounded; give a form such as int4:128"),
    ],
)
def test_forms_that_are_no_codes_are_refused(form, message):
    with pytest.raises(ValueError) as error:
        Quantize().check([read_form(form, "form")], f"--form={form}")
    assert str(error.value).startswith(message)
    with pytest.raises(ValueError, match="--ranges=mse: has no effect with --form=int8; it is of"):
        Quantize(ranges="mse").check([read_form("int8", "form")], "--form=int8")
