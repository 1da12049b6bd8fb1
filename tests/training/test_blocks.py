"""Numbers in 8 and 4 bits against NumPy, block by block, and the same bits on every mesh."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from training.blocks import FIRST, SECOND, read, tile_of, write, zeros

CODINGS = {
    f"{moment}{bits}": of[bits]
    for moment, of in (("first", FIRST), ("second", SECOND))
    for bits in (8, 4)
}
AXES, SHAPE = "layers embed -> heads head_dim", (2, 64, 6, 20)


def numbers(coding, shape=SHAPE, seed=0):
    """Moments of very different sizes, as a model's are; half a row of zeros."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=shape) * np.exp(2 * rng.normal(size=shape))).astype(np.float32)
    x[0, 3, :3] = 0
    return x if coding.map.signed else x**2


def levels(coding):
    """All numbers that codes stand for, in float64, by code."""
    top = coding.map.levels
    codes = np.arange(-top, top + 1) if coding.map.signed else np.arange(1, top + 1)
    return np.sign(codes) * (np.abs(codes) / top) ** coding.map.power


@pytest.mark.parametrize("name", CODINGS)
def test_codes_stand_for_their_powers_and_take_what_is_near(name):
    coding = CODINGS[name]
    values = levels(coding)
    assert len(values) <= 2**coding.bits
    codes = jnp.arange(len(values), dtype=jnp.uint8)
    np.testing.assert_allclose(coding.map.decode(codes), values, rtol=1e-6)
    np.testing.assert_array_equal(coding.map.encode(coding.map.decode(codes)), codes)
    u = np.linspace(-1 if coding.map.signed else 0, 1, 5001)
    root = lambda x: np.sign(x) * np.abs(x) ** (1 / coding.map.power)
    far = np.abs(root(u)[:, None] - root(values)).min(1)  # in roots levels are evenly spaced
    got = np.asarray(coding.map.decode(coding.map.encode(jnp.float32(u))), np.float64)
    np.testing.assert_allclose(np.abs(root(got) - root(u)), far, atol=1e-6)
    # 4 bits of a second moment have no code for zero: it is divided by.
    assert (0 in values) == coding.map.signed


def by_block(coding, x):
    """What is read again, block by block in float64."""
    tile = tile_of(AXES, x.shape, coding.block)
    values, found = levels(coding), np.zeros(x.shape)
    root = lambda a: np.sign(a) * np.abs(a) ** (1 / coding.map.power)
    for corner in itertools.product(*(range(0, n, t) for n, t in zip(x.shape, tile, strict=True))):
        at = tuple(slice(c, c + t) for c, t in zip(corner, tile, strict=True))
        scale = np.abs(x[at]).max()
        if scale:
            near = np.abs(root(x[at] / scale)[..., None] - root(values)).argmin(-1)
            found[at] = values[near] * scale
    return found


@pytest.mark.parametrize("name", CODINGS)
def test_blocks_are_rounded_as_numpy_does_and_alike_on_every_mesh(use_mesh, name):
    coding = CODINGS[name]
    x = numbers(coding)

    def there_and_back(x):
        kept = write(coding, AXES, x)
        return kept, read(coding, AXES, kept, x)

    kept, got = jax.jit(there_and_back)(x)
    # Where two codes are as near, float32 may choose the other: a few in many thousands.
    off = ~np.isclose(got, by_block(coding, x), rtol=1e-5, atol=0)
    assert off.mean() < 1e-3
    assert kept["codes"].size * 8 == x.size * coding.bits
    # Head dim is divided inside of a block, then every dim is.
    for spec in (P(None, ("fsdp", "data"), None, "tensor"), P("data", "fsdp", "tensor", None)):
        with use_mesh(data=2, fsdp=2, tensor=2):
            placed = jax.device_put(x, spec)
            ours = jax.jit(there_and_back)(placed)
            empty = zeros(coding, AXES, placed)
        jax.tree.map(np.testing.assert_array_equal, ours, (kept, got))
        assert jax.tree.map(jax.typeof, empty) == jax.tree.map(jax.typeof, ours[0])


def test_blocks_are_of_the_shape_and_the_names_alone():
    for axes, shape, tile in [
        ("layers embed -> mlp", (3, 128, 384), (1, 2, 128)),
        ("layers embed -> heads head_dim", (3, 768, 12, 64), (1, 1, 4, 64)),
        ("layers heads head_dim -> embed", (3, 12, 64, 768), (1, 1, 1, 256)),
        ("layers experts embed -> mlp", (3, 8, 64, 32), (1, 1, 8, 32)),
        ("vocab -> embed", (384, 128), (1, 128)),  # a token's row has its own scales
        ("embed -> vocab", (1024, 384), (256, 1)),
        ("embed -> mlp", (101, 77), (1, 77)),  # no power of two
        ("embed -> mlp", (257, 3), (257, 3)),
    ]:
        assert tile_of(axes, shape, 256) == tile
        assert all(n % t == 0 for n, t in zip(shape, tile, strict=True))


def test_bytes_a_number():
    shape = (2, 128, 384)
    for bits, want in ((8, 1 + 4 / 256), (4, 0.5 + 4 / 128)):
        for coding in (FIRST[bits], SECOND[bits]):
            layout = coding.layout("layers embed -> mlp", shape)
            held = math.prod(layout.codes) + 4 * math.prod(layout.scales)
            assert held / math.prod(shape) == want
