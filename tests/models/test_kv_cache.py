"""A cache's bytes: what its kind says, in the compiled program; and what int8 loses."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.decode import Decoding, abstract_weights, make_decoding
from models.kv_cache import CacheShape, to_int8
from parallel.precision import PrecisionConfig
from tests.models.test_decode import ALL, LOCAL, decoded, uncached
from tests.small import CAUSAL_LM, DECODER, layout
from training.state import abstract_params

PLAIN = replace(DECODER, dropout=0.0, layers=4)
B = 8


def bytes_of(
    config, shape, compute="float32", objective=CAUSAL_LM, **sizes
) -> tuple[int, int, Decoding]:
    """(bytes of the cache on a device, bytes that a compiled step writes in place, decoding)."""
    with layout(config=config, objective=objective, rows=shape.rows, **sizes) as laid:
        rules = laid.model.rules
        decoding = make_decoding(config, rules, shape, compute)
        params = abstract_params(laid.model, PrecisionConfig())
        weights = abstract_weights(params, laid.model.axes, rules, compute, laid.mesh)
        cache = jax.eval_shape(decoding.empty)
        batch = jax.NamedSharding(laid.mesh, rules.spec("batch"))
        row = jax.ShapeDtypeStruct((shape.rows,), jnp.int32, sharding=batch)
        two = jax.NamedSharding(laid.mesh, jax.P(*rules.spec("batch"), None))
        tokens = jax.ShapeDtypeStruct((shape.rows, 1), jnp.int32, sharding=two)
        table = None
        if shape.block:
            sizes_of = shape.rows, shape.row_blocks
            table = jax.ShapeDtypeStruct(sizes_of, jnp.int32, sharding=two)
        step = jax.jit(decoding.go_on, donate_argnums=1)
        program = step.lower(weights, cache, tokens, row, row, None, table).compile()
        per_device = sum(
            np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(cache)
        )
        return int(per_device), program.memory_analysis().alias_size_in_bytes, decoding


@pytest.mark.parametrize("block", [0, 4])
@pytest.mark.parametrize("sizes", [{}, {"tensor": 4, "data": 2}, {"fsdp": 8, "zero": 3}])
def test_the_cache_is_written_in_place_and_as_large_as_it_says(sizes, block):
    """Where K/V heads are fewer than the parts of `tensor`, each has the one that it reads."""
    parts = sizes.get("data", 1) * sizes.get("fsdp", 1)
    shape = CacheShape(B, 32, block=block, blocks=B // parts * 8 if block else 0)
    size, aliased, _ = bytes_of(PLAIN, shape, **sizes)
    heads = 1 if "tensor" in sizes else PLAIN.kv_heads
    tokens = 32 * B // parts
    assert size == 2 * PLAIN.layers * tokens * heads * PLAIN.head_dim * 4
    assert aliased >= size  # and no more than padding of its arrays
    assert aliased <= size + 64 * 8 * PLAIN.layers


def test_int8_is_half_of_bfloat16_and_its_scales():
    wide, narrow = (
        bytes_of(PLAIN, CacheShape(B, 32, int8=int8), "bfloat16")[0] for int8 in (False, True)
    )
    scales = 2 * PLAIN.layers * B * 32 * PLAIN.kv_heads * 4
    assert narrow == wide // 2 + scales


def test_windows_are_flat_beyond_the_window():
    config = replace(LOCAL.config, pattern=("local",))
    sizes = [bytes_of(config, CacheShape(B, slots))[0] for slots in (4, 5, 64, 512)]
    assert sizes[0] < sizes[1] == sizes[2] == sizes[3]


def test_int8_is_off_by_half_a_step_at_most():
    x = jax.random.normal(jax.random.key(0), (5, 7, 64)) * jnp.arange(1.0, 8.0)[None, :, None]
    whole, scale = to_int8(x)
    error = np.abs(np.asarray(whole, np.float32) * np.asarray(scale)[..., None] - x)
    # Half a step, and the rounding of the product.
    assert np.all(error <= 0.5 * np.asarray(scale)[..., None] * (1 + 1e-5))
    assert np.abs(np.asarray(whole)).max() == 127
    zeros, _ = to_int8(jnp.zeros((2, 3)))
    assert not np.any(zeros)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("name", ["decoder", "windows"])
def test_int8_is_near(name, paged):
    """A key's relative error of 1/254 moves scores of these sizes by a few per cent at most."""
    found, _ = decoded(name, {}, paged=paged, int8=True)
    want = uncached(name)
    assert np.abs(found - want).max() <= 0.05 * np.abs(want).max()
    later = np.abs(found - want)[:, 1:]
    assert later.max() > 1e-5  # what was kept has been rounded


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("t5", 4 * (40 + 24)),  # its own and the source's, in each of 4 layers
        ("captioning", 4 * 40),
        ("captioning, gated", 4 * (40 + 16)),  # and the image's
        ("windows", 2 * 40 + 3 * 5),  # local, global, local, global, local
    ],
)
def test_every_family_keeps_what_its_layers_read(name, tokens):
    config = ALL[name].config
    source = {"t5": 24, "captioning, gated": 16}.get(name, 0)
    size, aliased, _ = bytes_of(
        config, CacheShape(B, 40, source=source), objective=ALL[name].objective
    )
    segments = B * source * 4 if name == "t5" else 0
    assert size == 2 * B * config.kv_heads * config.head_dim * 4 * tokens + segments
    assert aliased >= size
