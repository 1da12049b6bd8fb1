"""What each policy keeps: by name, by bytes, and without changing a gradient."""

from __future__ import annotations

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import print_saved_residuals

from models.attention import IMPLEMENTATIONS
from models.block import Block
from models.config import ModelConfig
from models.rows import Memory, Rows
from parallel.mesh import MeshConfig
from parallel.remat import (
    CORE,
    CROSS_CORE,
    CROSS_DOTS,
    CROSS_TENSORS,
    DOTS,
    NAMES,
    PRESETS,
    TENSORS,
    RematConfig,
    remat,
    tag,
)
from parallel.rules import ParallelConfig, make_rules
from tests.drawn import decoder_of, drawn_params, put
from tests.jaxpr import names
from tests.small import layout, numpy_batch

L, B, T = 4, 2, 32
TINY = ModelConfig(
    vocab_size=250, layers=L, embed_dim=16, mlp_dim=64, heads=4, kv_heads=2, head_dim=8,
    attention="xla", qk_norm=True, dropout=0.1,
)  # fmt: skip
CROSS = replace(TINY, family="encoder_decoder", encoder_layers=1, cross="plain")
ONLY_UNBLOCKED = {"attention_probs", "cross_probs"}
ONLY_BLOCKED = {"attention_lse", "cross_lse"}
FORMS = sorted(set(IMPLEMENTATIONS) - {"auto", "cudnn"})


@functools.cache
def features_under(policy: str, *save: str, dropout: float = 0.1):
    """(temporaries of the gradient in bytes, the gradient) of a scanned decoder."""
    config, policies = replace(TINY, dropout=dropout), RematConfig(policy=policy, save=save)
    with layout(config=config, rows=B, length=T) as laid:
        build, params = decoder_of(laid, config, policies), laid.params(drawn_params(laid, config))
        batch, key = put(laid, numpy_batch(rows=B, length=T)), jax.random.key(0)
        value = lambda params, batch: jnp.sum(jnp.sin(build(params)(batch, key)))
        compiled = jax.jit(jax.grad(value)).lower(params, batch).compile()
        gradient = jax.tree.map(np.asarray, compiled(params, batch))
        return compiled.memory_analysis().temp_size_in_bytes, gradient


def assert_same_gradient(got, want):
    """To 1e-6 of each tensor's norm, or of 1e-3 of the global one (a key bias has none)."""
    norm = lambda leaves: np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in leaves))
    floor = 1e-3 * norm(jax.tree.leaves(want))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert norm([w]) > 0
        assert norm([g - w]) <= 1e-6 * max(norm([w]), floor)


@pytest.mark.parametrize("policy", ["full", "dots", "attention"])
def test_gradients_are_those_of_none(policy):
    assert_same_gradient(features_under(policy)[1], features_under("none")[1])


def test_temporaries_fall_as_the_names_say():
    none, attention, dots, full = (
        features_under(policy)[0] for policy in ("none", "attention", "dots", "full")
    )
    assert none > attention > full
    assert none > dots > full
    token = 4 * L * B * T  # bytes of one float32 a token and layer
    # What is dropped is at least the quadratic probabilities, and what is left at least what is
    # saved by name: queries, keys, values (here and below they stay until the whole layer is done).
    assert none - attention > token * 4 * T
    assert dots - full > token * (32 + 16 + 16)
    assert attention - full > token * (16 + 32 + 16 + 16)


@pytest.mark.slow
def test_custom_lists_lie_between_and_cost_their_tensors():
    """Counted where nothing else is alive at the peak; without dropout, whose masks are."""
    lists = [(), ("query",), ("query", "attention_norm", "key", "value")]
    lists.append((*lists[-1], "mlp_act", "mlp_up", "mlp_gate"))
    sizes = [
        features_under("custom" if names else "full", *names, dropout=0.0)[0] for names in lists
    ]
    sizes.append(features_under("none", dropout=0.0)[0])
    assert sizes == sorted(set(sizes))
    token = 4 * L * B * T
    assert (sizes[1] - sizes[0]) / token == pytest.approx(32, rel=1e-2)
    assert (sizes[2] - sizes[1]) / token == pytest.approx(48, rel=1e-2)
    assert_same_gradient(
        features_under("custom", "query", dropout=0.0)[1], features_under("none", dropout=0.0)[1]
    )


# --- By name -------------------------------------------------------------------------------------


def one_block(use_mesh, config, then):
    """`then(function of (params, x_BTD), params, x_BTD)` of a block under the mesh of ones."""
    with use_mesh():
        dims = config.dims() | {"batch": (B, "batch")}
        rules = make_rules(ParallelConfig(), MeshConfig(data=1).sizes(), dims)
        graph, state = nnx.split(Block(config, rules, nnx.Rngs(0)))
        rows = Rows(jnp.ones((B, T), jnp.int32), jnp.tile(jnp.arange(T)[None], (B, 1)))
        rows = jax.tree.map(lambda a: jax.reshard(a, rules.spec("batch seq")), rows)
        x_BTD = jax.device_put(
            np.random.default_rng(0).normal(size=(B, T, config.embed_dim)).astype(np.float32),
            rules.spec("batch seq act_embed"),
        )
        if config.cross != "none":  # over itself
            rows = rows._replace(memory=Memory(x_BTD, rows.segments))
        call = lambda params, x: nnx.merge(graph, params)(x, rows)[0]
        return then(call, nnx.to_pure_dict(state), x_BTD)


@pytest.mark.parametrize(
    ("base", "gated"), [(TINY, True), (TINY, False), (CROSS, True)], ids=["True", "False", "cross"]
)
@pytest.mark.parametrize("form", FORMS)
def test_every_name_is_there(use_mesh, form, base, gated):
    """In the program of the gradient: some are given inside of custom forward passes."""
    config = replace(base, attention=form, gated=gated)
    grad = lambda f, *args: names(jax.make_jaxpr(jax.grad(lambda *a: jnp.sum(f(*a))))(*args).jaxpr)
    missing = ONLY_BLOCKED if form == "xla" else ONLY_UNBLOCKED
    missing = missing if gated else missing | {"mlp_gate"}
    there = {*TENSORS, *CROSS_TENSORS} if base is CROSS else set(TENSORS)
    assert one_block(use_mesh, config, grad) == there - missing


def test_an_unknown_name_is_an_error():
    with pytest.raises(AssertionError, match="atention_out"):
        tag(jnp.ones(1), "atention_out")


@pytest.mark.parametrize("base", [TINY, CROSS], ids=["", "cross"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("policy", ["full", "dots", "attention"])
def test_saved_residuals_are_the_named_ones(use_mesh, capsys, form, policy, base):
    config = replace(base, attention=form, norm_position="sandwich")

    def show(call, params, x_BTD):
        block = remat(call, RematConfig(policy=policy))
        print_saved_residuals(lambda *args: jnp.sum(block(*args)), params, x_BTD)

    one_block(use_mesh, config, show)
    lines = capsys.readouterr().out.splitlines()
    saved = [line.split("'")[1] for line in lines if " named '" in line]
    wanted = PRESETS[policy]
    assert wanted is not None
    there = set(wanted) & {*TENSORS, *(CROSS_TENSORS if base is CROSS else ())}
    there -= ONLY_BLOCKED if form == "xla" else ONLY_UNBLOCKED
    assert sorted(saved) == sorted(there)  # each once
    others = [line for line in lines if " named '" not in line]
    # Else nothing that was computed but the mask's rows: arguments, and constants.
    assert all("from the argument" in line or "constant" in line for line in others), others


def test_presets_are_consistent():
    assert set(DOTS) <= set(TENSORS)
    assert set(CORE) <= set(TENSORS)
    assert set(CROSS_DOTS) | set(CROSS_CORE) <= set(CROSS_TENSORS)
    assert set(PRESETS["attention"] or ()) == set(NAMES) - {*CORE, *CROSS_CORE}


def test_offloaded_tensors_are_in_host_memory(use_mesh):
    """XLA:CPU drops the transfer: it is looked for in the traced program."""
    config = RematConfig("custom", save=("query",), offload=("mlp_up", "mlp_gate"))

    def trace(call, params, x_BTD):
        block = remat(call, config)
        grad = jax.grad(lambda *args: jnp.sum(block(*args)))
        return str(jax.make_jaxpr(grad)(params, x_BTD))

    hosted = re.findall(r"(\w+):f32<host>\[([^]]*)\]", one_block(use_mesh, TINY, trace))
    assert len({variable for variable, _ in hosted}) >= 2
    assert {re.sub(r"@\(.*?\)|@\w+", "", shape) for _, shape in hosted} == {f"{B},{T},64"}
    plain = one_block(use_mesh, TINY, lambda call, *args: str(jax.make_jaxpr(call)(*args)))
    assert "<host>" not in plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"policy": "some"},
            "config.remat.policy = 'some': choose one of none, full, dots, attention, custom",
        ),
        (
            {"policy": "full", "save": ("query",)},
            (
                "config.remat.save = ['query']: has no effect with config.remat.policy = 'full'; "
                "set the policy to 'custom'"
            ),
        ),
        (
            {"offload": ("query",)},
            (
                "config.remat.offload = ['query']: has no effect with config.remat.policy = "
                "'none'; set the policy to 'custom'"
            ),
        ),
        (
            {"policy": "custom", "save": ("querry",)},
            f"config.remat.save names 'querry': no such tensor; there are {', '.join(NAMES)}",
        ),
        (
            {"policy": "custom", "save": ("query", "key"), "offload": ("key",)},
            (
                "config.remat.offload names 'key', which config.remat.save names too; a tensor is "
                "kept in one place"
            ),
        ),
        (
            {"policy": "custom"},
            "config.remat.policy = 'custom' saves nothing: name tensors or use 'full'",
        ),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError) as error:
        RematConfig(**options)
    assert str(error.value) == message
