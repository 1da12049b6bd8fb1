"""Positions against formulas of the papers, and the properties that they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.positions import RopeConfig, rotate, sinusoidal
from parallel.mesh import MeshConfig
from parallel.rules import ParallelConfig, make_rules

LLAMA3 = RopeConfig(500_000.0, "llama3", 8.0, 1.0, 4.0, 8192)


def rotation_by_paper(x_BTNH, positions_BT, frequencies):
    """Equation 34 of Su et al. 2021 in float64, one complex number for each pair (i, i + H / 2)."""
    half = x_BTNH.shape[-1] // 2
    z = x_BTNH[..., :half].astype(np.float64) + 1j * x_BTNH[..., half:]
    z = z * np.exp(1j * positions_BT[:, :, None, None] * frequencies)
    return np.concatenate([z.real, z.imag], -1)


def frequencies_by_paper(config, head_dim):
    """One wave at a time, as the Llama 3 reference code describes it in words."""
    out = []
    for i in range(head_dim // 2):
        frequency = config.theta ** (-2 * i / head_dim)
        wave = 2 * np.pi / frequency
        if config.scaling == "linear":
            frequency /= config.factor
        if config.scaling == "llama3":
            if wave > config.original_length / config.low_freq_factor:
                frequency /= config.factor
            elif wave > config.original_length / config.high_freq_factor:
                low, high = config.low_freq_factor, config.high_freq_factor
                smooth = (config.original_length / wave - low) / (high - low)
                frequency = (1 - smooth) * frequency / config.factor + smooth * frequency
        out.append(frequency)
    return np.array(out)


@pytest.mark.parametrize(
    "config",
    [RopeConfig(), RopeConfig(scaling="linear", factor=4.0), LLAMA3],
    ids=lambda c: c.scaling,
)
def test_rotation_is_that_of_the_paper(use_mesh, config):
    frequencies = frequencies_by_paper(config, 64)
    # float32 keeps 24 bits
    np.testing.assert_allclose(config.frequencies(64), frequencies, rtol=1e-7)
    random = np.random.default_rng(0)
    x_BTNH = random.normal(size=(2, 5, 3, 64)).astype(np.float32)
    positions_BT = np.array([[0, 1, 2, 3, 4], [0, 1, 0, 1000, 8191]], np.int32)
    with use_mesh():
        got = jax.jit(lambda x, p: rotate(x, p, config))(x_BTNH, positions_BT)
    # The angle 8191 has an error of half a unit in float32's last place: 8191 x 6e-8 = 5e-4 rad.
    error = np.abs(np.asarray(got) - rotation_by_paper(x_BTNH, positions_BT, frequencies))
    assert error.max() < 4e-3
    assert error[:, :3].max() < 2e-6
    assert np.all(np.asarray(got)[:, 0] == x_BTNH[:, 0])  # position 0 does not turn


def test_llama3_bands():
    plain, scaled = RopeConfig(500_000.0).frequencies(128), LLAMA3.frequencies(128)
    ratio = plain / scaled
    assert np.all(ratio[:20] == 1.0)  # short waves are left alone
    np.testing.assert_allclose(ratio[-20:], 8.0, rtol=1e-6)  # long ones are slowed by the factor
    assert np.all(np.diff(ratio) >= -1e-6)
    assert np.any((ratio > 1.1) & (ratio < 7.9))


def test_scores_depend_on_distance_alone(use_mesh):
    random = np.random.default_rng(0)
    q, k = random.normal(size=(2, 1, 1, 1, 32)).astype(np.float32)

    @jax.jit
    def score(at_q, at_k):
        turned_q, turned_k = (
            rotate(x, jnp.full((1, 1), at), RopeConfig()) for x, at in ((q, at_q), (k, at_k))
        )
        return jnp.sum(turned_q * turned_k)

    with use_mesh():
        near = [float(score(p + 7, p)) for p in (0, 3, 50, 200)]
        # 32 products of size 1 at angles up to 200 rad, each with an error of 1e-5
        np.testing.assert_allclose(near, near[0], atol=3e-4)
        assert abs(float(score(9, 3)) - near[0]) > 1e-2
        assert abs(float(score(0, 7)) - near[0]) > 1e-2  # the sign of the distance counts


def test_sinusoidal_is_that_of_the_paper(use_mesh):
    positions_BT = np.array([[0, 1, 2, 700]], np.int32)
    with use_mesh():
        got_BTD = jax.jit(lambda p: sinusoidal(p, 16))(positions_BT)
    for t, position in enumerate(positions_BT[0]):
        for i in range(8):
            angle = position / 10000 ** (2 * i / 16)
            # float32 angles: 700 x 6e-8
            assert abs(got_BTD[0, t, 2 * i] - np.sin(angle)) < 1e-4
            assert abs(got_BTD[0, t, 2 * i + 1] - np.cos(angle)) < 1e-4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_positions_are_sharded_as_what_they_turn(use_mesh, dtype):
    sizes = MeshConfig(data=2, tensor=4).sizes()
    rules = make_rules(
        ParallelConfig(), sizes, {"heads": (4, "heads"), "kv_heads": (4, "kv_heads")}
    )
    x_BTNH = np.random.default_rng(0).normal(size=(4, 6, 4, 8)).astype(dtype)
    positions_BT = np.tile(np.arange(6, dtype=np.int32), (4, 1))
    with use_mesh():
        want = np.asarray(jax.jit(lambda x, p: rotate(x, p, RopeConfig()))(x_BTNH, positions_BT))
    with use_mesh(data=2, tensor=4):
        x = jax.device_put(x_BTNH, rules.spec("batch seq act_heads head_dim"))
        positions = jax.device_put(positions_BT, rules.spec("batch seq"))
        got = jax.jit(lambda x, p: rotate(x, p, RopeConfig()))(x, positions)
        assert jax.typeof(got) == jax.typeof(x)
        table = jax.jit(lambda p: sinusoidal(p, 8))(positions)
        assert jax.typeof(table).sharding.spec[0] == rules.spec("batch")[0]
        np.testing.assert_array_equal(np.asarray(got), want)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"scaling": "yarn"},
            "config.model.rope_scaling = 'yarn': choose one of none, linear, llama3",
        ),
        ({"theta": 0.0}, "config.model.rope_theta = 0.0: choose a number above 0"),
        ({"factor": 2.0}, "config.model.rope_factor = 2.0 has no effect"),
        (
            {"scaling": "llama3", "low_freq_factor": 4.0},
            (
                "config.model.rope_low_freq_factor = 4.0: must be below "
                "config.model.rope_high_freq_factor = 4.0"
            ),
        ),
    ],
)
def test_bad_configs_name_the_key(fields, message):
    with pytest.raises(ValueError) as error:
        RopeConfig(**fields)
    assert str(error.value).startswith(message)


def test_odd_widths_are_refused():
    with pytest.raises(ValueError) as error:
        RopeConfig().frequencies(7)
    assert str(error.value).startswith("config.model.head_dim = 7: ")
    with pytest.raises(ValueError) as error:
        sinusoidal(np.zeros((1, 1), np.int32), 7)
    assert str(error.value).startswith("config.model.embed_dim = 7: ")
