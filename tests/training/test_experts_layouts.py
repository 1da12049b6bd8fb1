"""Experts on an axis of their own beside others, rematerialised, in stages: as on one device.

Some of what `benchmarks/family_layouts.py` has of both forms.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallel.precision import PrecisionConfig
from parallel.remat import RematConfig
from tests.families import FAMILIES
from tests.small import MIXTURE, initial_params, layout
from tests.training.cells import CELLS, alone, assert_same, drawn
from training.step import loss_and_grads

LAYOUTS = [
    ("experts", CELLS["expert and all"]),
    ("experts", CELLS["expert, 1f1b"]),
    # Some tokens are dropped: which, no layout changes.
    ("experts with slots", CELLS["expert, fsdp and data"]),
    # Losses of routers come in by their gradients; a micro-batch has its own.
    ("experts with slots", CELLS["expert, zb_h1"]),
    ("experts", dict(expert=2, remat=RematConfig("custom", save=("expert_input",)))),
]


@pytest.mark.slow
@pytest.mark.parametrize(("form", "kind"), LAYOUTS, ids=str)
def test_a_layout(form, kind):
    assert_same(form, **kind)


def test_losses_of_routers_have_gradients():
    """Without them, the router's differ."""
    metrics, gradients = alone("experts", 1)[0]
    assert 2 <= metrics["balance"] < 3
    assert 0 < alone("experts with slots", 1)[0][0]["dropped"] < 0.5
    family = FAMILIES["experts"]
    experts = replace(family.config.experts, balance_loss=0.0, z_loss=0.0)
    with layout(config=family.config, experts=experts) as laid:
        grads_of = jax.jit(loss_and_grads(laid.model, PrecisionConfig()))
        key = jax.random.fold_in(jax.random.key(7), 0)
        params = laid.params(drawn("experts"))
        _, without = grads_of(params, laid.placed(family.batch(0)), key, jnp.float32(1))
    router = lambda tree: np.asarray(tree["stack"]["blocks"]["mlp"]["router"]["router"])
    assert np.linalg.norm(router(gradients) - router(without)) > 0.01


def test_an_expert_axis_divides_experts():
    """1/e of their weights at rest and as they are used; all else is whole."""
    with layout(config=MIXTURE, expert=4, data=2) as laid:
        params = laid.params(initial_params(MIXTURE))
        block = params["stack"]["blocks"]["mlp"]
        for name in ("up", "gate", "down"):
            here = block[name].addressable_shards[0].data
            assert here.nbytes * 4 == block[name].nbytes
            assert here.shape[1] * 4 == MIXTURE.experts.number
        router = block["router"]["router"]
        assert router.addressable_shards[0].data.nbytes == router.nbytes
