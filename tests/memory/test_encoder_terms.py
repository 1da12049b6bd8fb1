"""What an encoder keeps beside its layers: as autodiff keeps it, and as the planner counts it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.ad_checkpoint import print_saved_residuals

from memory.terms import Terms
from models.encoder import embedding_residuals
from models.encoder_heads import EncoderWithHeads, token_head_residuals
from parallel.remat import RematConfig, remat
from parallel.targets import parse_target
from tests.families import BERT, encoder_batch
from tests.memory.test_beside import job
from tests.parallel.test_remat import TINY, one_block
from tests.small import CAUSAL_LM, B, T, layout

D = BERT.embed_dim


def kept(config, part) -> Counter:
    """Of `part` of an encoder: (shape without dims of 1, dtype) of what its backward pass keeps of
    every token.
    """
    with layout(config=config) as laid:
        params = jax.eval_shape(laid.model.init, jax.random.key(0))
        make = lambda: EncoderWithHeads(config, laid.model.rules, RematConfig(), nnx.Rngs(params=0))
        graph, _ = nnx.split(nnx.eval_shape(make))
        batch, x_BTD = laid.placed(encoder_batch(0)), jax.ShapeDtypeStruct((B, T, D), jnp.float32)
        run = lambda params, *args: part(nnx.merge(graph, params), batch, *args)
        args = (params,) if part is embed else (params, x_BTD)
        backward = jax.eval_shape(lambda *args: jax.vjp(run, *args)[1], *args)
    found = Counter()
    for leaf in jax.tree.leaves(backward):
        shape = tuple(n for n in leaf.shape if n > 1)
        if shape[:2] == (B, T):
            found[shape, leaf.dtype.name] += 1
    return found


def embed(encoder, batch):
    return encoder.embed(batch, jax.random.key(0))


def head(encoder, batch, x_BTD):
    return encoder.token_features(x_BTD)


def declared(tensors) -> Counter:
    sizes = {"batch": B, "residual_seq": T, "act_embed": D}
    dtypes = {"compute": "float32", "product": "float32"}
    return Counter(
        (tuple(sizes[dim] for dim in tensor.dims.split()), dtypes.get(tensor.dtype, tensor.dtype))
        for tensor in tensors
    )


INDICES = Counter({((B, T), "int32"): 3})  # of the batch: what was looked up in three tables


@pytest.mark.parametrize("embed_norm", [True, False])
def test_what_the_embedding_keeps(embed_norm):
    config = replace(BERT, dropout=0.0, embed_norm=embed_norm)
    assert kept(config, embed) - INDICES == declared(embedding_residuals(config))


def test_dropout_of_the_embedding_keeps_its_mask():
    """And a factor, the same everywhere, which no compiled program stores."""
    more = declared(embedding_residuals(BERT)) - declared(
        embedding_residuals(replace(BERT, dropout=0.0))
    )
    mask = ((B, T, D), "bool")
    assert more == Counter({mask: 1})
    assert kept(BERT, embed)[mask] == 1


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_what_the_head_keeps(activation, norm):
    config = replace(BERT, activation=activation, norm=norm)
    assert kept(config, head) == declared(token_head_residuals(config))


def test_without_a_transform_the_head_keeps_nothing_of_its_own():
    for changes in ({"head_transform": False}, {"token_head": False}):
        assert not token_head_residuals(replace(BERT, **changes))


@pytest.mark.parametrize("policy", ["dots", "attention"])
@pytest.mark.parametrize("position", ["pre", "post", "sandwich"])
def test_what_a_policy_keeps_by_name(use_mesh, capsys, position, policy):
    """A norm after a sublayer reads what the sublayer gives; a sum alone does not."""
    config = replace(TINY, norm_position=position)

    def show(call, params, x_BTD):
        block = remat(call, RematConfig(policy=policy))
        print_saved_residuals(lambda *args: jnp.sum(block(*args)), params, x_BTD)

    one_block(use_mesh, config, show)
    lines = capsys.readouterr().out.splitlines()
    saved = [line.split("'")[1] for line in lines if " named '" in line]
    names = Terms(job(config, CAUSAL_LM, policy), parse_target("cpu:1").chip).saved_names
    assert sorted(saved) == sorted(tensor.name for tensor in names)
