"""Counted operations: against the parameters themselves and against the traced program."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import DecoderConfig
from models.flops import flops_per_token, matrix_parameters
from models.masks import Mask, visible
from tests.jaxpr import inside
from tests.small import DECODER, layout

TINY = DecoderConfig(
    vocab_size=256, layers=4, embed_dim=16, mlp_dim=40, heads=4, kv_heads=2, head_dim=6,
    attention="xla", window=5, pattern=("local", "local", "global"),
)  # fmt: skip
T = 12


@pytest.mark.parametrize(
    "config",
    [
        DECODER,
        TINY,
        replace(TINY, tied=False, vocab_size=200),
        replace(TINY, gated=False, qkv_bias=True, mlp_bias=True, norm="layer", positions="learned"),
        replace(TINY, norm_position="sandwich", qk_norm=True, kv_heads=1),
    ],
)
def test_matrix_parameters_are_those_that_tokens_are_multiplied_with(config):
    with layout(config=config) as laid:
        shapes = jax.eval_shape(laid.model.init, jax.random.key(0))
        count = 0
        for (path, shape), names in zip(
            jax.tree.leaves_with_path(shapes), jax.tree.leaves(laid.model.axes), strict=True
        ):
            name = path[-1].key
            lookup = name == "position" or (name == "embedding" and not config.tied)
            if "->" in names and not lookup:
                count += shape.size * config.vocab_size // config.padded_vocab ** ("vocab" in names)
                if "vocab" not in names:
                    count += shape.size - shape.size * config.vocab_size
    assert matrix_parameters(config) == count


def products(jaxpr) -> int:
    """Operations of all matrix products of a program, loops included."""
    total = 0
    for equation in jaxpr.eqns:
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(products(inner) for inner in inside(equation))
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2 * math.prod(out) * math.prod(left[dim] for dim in contracted)
    return total


@pytest.mark.parametrize("gated", [True, False])
def test_operations_are_those_of_the_traced_program(gated):
    """The unblocked attention computes hidden keys too: they are taken off by counting the mask."""
    config = replace(TINY, gated=gated)
    with layout(config=config, rows=2, length=T) as laid:
        weights_BT = jnp.ones((2, T), out_sharding=laid.model.rules.spec("batch seq"))
        batch = laid.batch(rows=2, length=T)
        params = laid.params(
            jax.tree.map(
                lambda s: np.zeros(s.shape, np.float32),
                jax.eval_shape(laid.model.init, jax.random.key(0)),
            )
        )
        grad = jax.grad(lambda p: laid.model.loss(p, batch, weights_BT, None)[0])
        counted = products(jax.make_jaxpr(grad)(params).jaxpr) / (2 * T)
    each = 12 * config.heads * config.head_dim  # forward and backward, for a key
    seen = 0.0
    for layer in range(config.layers):
        window = 5 if layer % 3 < 2 else None
        mask = visible(Mask(window=window), jnp.arange(T), jnp.arange(T), ())
        seen += int(np.sum(np.asarray(mask))) / T
    assert counted - each * config.layers * T + each * seen == pytest.approx(
        flops_per_token(config, T), rel=1e-12
    )
