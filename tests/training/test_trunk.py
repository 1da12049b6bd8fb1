"""Parameters of another run: those that agree to the bit, on any mesh, and the rest by name."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from parallel.precision import PrecisionConfig
from tests.small import DECODER, initial_params, layout
from training.checkpoint import CheckpointConfig, Checkpoints
from training.naming import named
from training.trunk import trunk_params

FLOAT32 = PrecisionConfig()
TIED = replace(DECODER, layers=2)
UNTIED = replace(TIED, tied=False)
WHERE = "config.init_from = 'runs/a'"


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """Checkpoints of a model with a head of its own, written from a mesh of 4, and its values."""
    path = tmp_path_factory.mktemp("trunk")
    with layout(config=UNTIED, fsdp=4, zero=3) as laid:
        params = jax.tree.map(lambda a: a + 1, initial_params(UNTIED))
        writer = Checkpoints(path, CheckpointConfig())
        writer.save(
            20, {"params": laid.params(params), "opt_state": {"m": laid.params(params)}}, {}
        )
        writer.close()
    return path, named(params)


def read(path, config, seed=0, **how):
    """The parameters by name as NumPy, read onto another mesh."""
    with layout(config=config, data=2, tensor=2, zero=0) as laid:
        source = Checkpoints(path)
        params = trunk_params(source, WHERE, laid.model, FLOAT32, seed, laid.mesh, **how)()
        for array, names in zip(*map(jax.tree.leaves, (params, laid.model.axes)), strict=True):
            assert array.sharding.spec == laid.model.rules.at_rest(names, array.shape)
        return {name: np.asarray(a) for name, a in named(params).items()}


def test_what_agrees_is_read_and_the_rest_is_drawn_from_the_seed(untied):
    path, there = untied
    for config, how in (
        (UNTIED, {}),
        (TIED, dict(drop=("head_*",))),
        (
            replace(UNTIED, qk_norm=False, mlp_dim=32),
            dict(drop=("*_norm/gain", "*mlp*"), new=("*mlp*",)),
        ),
        (replace(UNTIED, vocab_size=400), dict(drop=("head_*", "emb*"), new=("head_*", "emb*"))),
    ):
        found = read(path, config, **how)
        want = named(initial_params(config))
        assert found.keys() == want.keys()
        read_names = [n for n in found if n in there and there[n].shape == found[n].shape]
        assert len(read_names) > 10
        for name, array in found.items():
            np.testing.assert_array_equal(array, there[name] if name in read_names else want[name])


def test_a_new_head_beside_a_trunk(untied, tmp_path):
    """From tied to untied: the head is the seed's, another seed's another one."""
    path = tmp_path
    with layout(config=TIED) as laid:
        writer = Checkpoints(path, CheckpointConfig())
        writer.save(3, {"params": laid.params(initial_params(TIED))}, {})
        writer.close()
    found = read(path, UNTIED, new=("head_*",))
    np.testing.assert_array_equal(found["head_weight"], initial_params(UNTIED)["head_weight"])
    other = read(path, UNTIED, seed=1, new=("head_*",))
    assert not np.array_equal(found["head_weight"], other["head_weight"])
    np.testing.assert_array_equal(found["embedding"], other["embedding"])


REFUSED = {
    "extra": (TIED, {}, ("step 20 has head_weight of shape (32, 256)", "config.init_drop")),
    "missing": (
        replace(UNTIED, embed_rank=16),
        dict(drop=("emb*", "head*"), new=("embedding", "head*")),
        ("has no embedding_projection, which is (16, 32)", "config.init_new"),
    ),
    "another shape": (
        replace(UNTIED, vocab_size=400),
        dict(new=("*",)),
        ("has embedding as (256, 32), this run as (512, 32)", "config.init_drop and"),
    ),
    "fewer layers": (
        replace(UNTIED, layers=1),
        {},
        ("stack/blocks/attention/key as (2, 32, 2, 8), this run as (1, 32, 2, 8)",),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_named_is_refused_before_anything_is_read(untied, name):
    config, how, words = REFUSED[name]
    with pytest.raises(ValueError, match=r"^config\.init_from = 'runs/a': step 20 has") as error:
        read(untied[0], config, **how)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
