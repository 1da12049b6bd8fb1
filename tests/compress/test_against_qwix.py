"""Codes and scales are those of qwix, Google's library of quantisation for JAX.

It is no dependency but of these tests (extra `dev`); without it they are skipped.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress.gptq import gptq
from parallel.codes import Code, decode, encode, scales_of
from parallel.forms import read_form
from tests.compress.test_quantize import drawn, moment_of

qwix = pytest.importorskip("qwix")
from qwix.contrib import gptq_core  # noqa: E402

ROWS, COLUMNS = 512, 48


def in_groups(code: Code, w: np.ndarray) -> np.ndarray:
    """[G, rows of a group, M]: a group as a matrix of its own."""
    groups = code.groups(len(w))
    return w.reshape(groups, len(w) // groups, w.shape[1])


@pytest.mark.parametrize(
    ("form", "qtype"),
    [
        ("int8", jnp.int8),
        ("int4", jnp.int4),
        ("int4:128", jnp.int4),
        ("int3:128", "int3"),
        ("nf4:64", "nf4"),
        ("fp8", jnp.float8_e4m3fn),
    ],
)
def test_codes_and_scales_are_the_same(form, qtype):
    code, w = read_form(form, "form").code, drawn(ROWS, COLUMNS)
    tiles = {0: code.group} if code.group else {}
    theirs = qwix.quantize(jnp.asarray(w), qtype, channelwise_axes=(1,), tiled_axes=tiles)
    # Of a channel in float32: that of a group is then rounded to float16, which qwix does not do.
    by_group = jnp.asarray(in_groups(code, w))
    scales = scales_of(Code(code.kind, code.bits, 0), by_group)[:, 0]
    # A compiler may divide by a constant or multiply with its reciprocal: one last bit.
    np.testing.assert_allclose(scales, theirs.scale, rtol=1.2e-7)
    codes = np.asarray(encode(code, jnp.asarray(w), theirs.scale)).astype(np.float32)
    wanted = np.asarray(theirs.qvalue.astype(jnp.float32))
    # The largest of a group is (2^(b-1) - 1/2) s: half-way between two integers, either is right.
    largest = np.abs(in_groups(code, w)) == np.abs(in_groups(code, w)).max(1, keepdims=True)
    there = largest.reshape(w.shape) if code.kind == "int" else np.zeros(w.shape, bool)
    assert there.mean() <= 1 / (code.group or ROWS)
    np.testing.assert_array_equal(codes[~there], wanted[~there])
    assert np.abs(codes - wanted).max() <= 1
    # The numbers they stand for, but for those.
    back = np.asarray(decode(code, jnp.asarray(codes).astype(theirs.qvalue.dtype), theirs.scale))
    np.testing.assert_allclose(back[~there], np.asarray(qwix.dequantize(theirs))[~there], rtol=3e-7)


@pytest.mark.parametrize(("form", "qtype"), [("int8", jnp.int8), ("int4", jnp.int4)])
def test_gptq_finds_nearly_the_same_codes(form, qtype):
    code, w, moment = read_form(form, "form").code, drawn(64, 24), moment_of(64)
    codes, scales = gptq(code, w, moment)
    how = gptq_core.qarray.HowToQuantize(qtype=qtype, channelwise_axes=(0,))
    with jax.numpy_rank_promotion("allow"):
        theirs = jax.jit(lambda w, h: gptq_core.quantize_weight(w, h, how)[0])(w.T, moment)
    np.testing.assert_allclose(scales[0], np.asarray(theirs.scale)[:, 0], rtol=3e-7)
    different = np.mean(codes != np.asarray(theirs.qvalue.astype(jnp.int32)).T)
    # A code is as good as its neighbour where float32 (theirs) and float64 differ in the last bit.
    assert different <= 1e-4
