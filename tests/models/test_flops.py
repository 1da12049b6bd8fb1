"""Counted operations against those of the traced program."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import ModelConfig
from models.flops import flops_before_stack, flops_per_token
from models.masks import Mask, MaskArrays, visible
from tests.families import FAMILIES, Family
from tests.jaxpr import inside
from tests.small import all_count, layout, numpy_batch

T = 12
TINY = ModelConfig(
    vocab_size=256, layers=4, embed_dim=16, mlp_dim=40, heads=4, kv_heads=2, head_dim=6,
    attention="xla", window=5, pattern=("local", "local", "global"),
)  # fmt: skip
CASES = {
    "decoder": Family(TINY, batch=lambda seed: numpy_batch(seed, rows=2, length=T)),
    "not gated": Family(
        replace(TINY, gated=False), batch=lambda seed: numpy_batch(seed, rows=2, length=T)
    ),
} | {
    name: FAMILIES[name]
    for name in (
        *("encoder", "encoder, classes", "encoder, tokens and classes", "2017", "t5"),
        *("vision", "captioning", "captioning, gated"),
    )
}


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


def hidden_keys(config: ModelConfig, length: int) -> float:
    """Keys that self-attention hides from the queries of a row, in all layers: the unblocked form
    computes them too.
    """
    stream, prefix = length + config.image_tokens, config.image_tokens > 0
    index, hidden = jnp.arange(stream), 0
    for layer in range(config.layers):
        local = config.pattern[layer % len(config.pattern)] == "local"
        mask = Mask(config.causal, config.window if local else None, prefix=prefix)
        seen = visible(mask, index, index, MaskArrays(prefix_B=jnp.full(1, config.image_tokens)))
        hidden += stream**2 - int(np.sum(np.broadcast_to(seen, (1, 1, stream, stream))))
    return hidden


@pytest.mark.parametrize("name", CASES)
def test_operations_are_those_of_the_traced_program(name):
    family = CASES[name]
    config = replace(family.config, vocab_size=256)  # without padding
    arrays = family.batch(0)
    first = arrays["patches" if config.family == "vision" else "tokens"]
    rows, length = first.shape[:2]
    source_length = arrays["source_tokens"].shape[1] if "source_tokens" in arrays else 0
    if config.family == "vision_language" and config.cross != "none":
        source_length = config.vision.patches
    laid_out = layout(config=config, objective=family.objective, rows=rows, length=length)
    with laid_out as laid:
        weights = all_count((rows, length), out_sharding=laid.model.rules.spec("batch seq"))
        batch = laid.placed(arrays)
        shapes = jax.eval_shape(laid.model.init, jax.random.key(0))
        params = laid.params(jax.tree.map(lambda s: np.zeros(s.shape, np.float32), shapes))
        grad = jax.grad(lambda p: laid.model.loss(p, batch, weights, None)[0])
        counted = products(jax.make_jaxpr(grad)(params).jaxpr) / (rows * length)
    each = 12 * config.heads * config.head_dim / length  # forward and backward, for a key
    want = flops_per_token(config, length, source_length)
    assert counted - each * hidden_keys(config, length) == pytest.approx(want, rel=1e-12)


def test_what_stands_before_the_stack_is_a_good_part_of_it():
    """So that the test above would see it left out."""
    for name in ("2017", "t5", "captioning", "captioning, gated"):
        config = FAMILIES[name].config
        length = config.vision.patches if config.family == "vision_language" else 24
        before = flops_before_stack(config, length) / 16
        assert 0.1 < before / flops_per_token(config, 16, length) < 0.7, name
    assert flops_before_stack(FAMILIES["decoder"].config, 0) == 0
