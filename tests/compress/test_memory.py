"""Compressed weights in the compiled program, and what compressing them holds at once."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compress import prune_layers, quantize
from compress.prune_layers import Prune, prune
from parallel.precision import PrecisionConfig
from parallel.remat import FORWARD, RematConfig
from tests.compress.walked import PLAIN, walked
from tests.small import layout
from training.adapters import AdapterConfig, adapted
from training.evaluation import make_eval_step
from training.state import abstract_params
from training.step import loss_and_grads
from training.stored import WeightsConfig, stored

LAYERS = 6
CONFIG = replace(
    PLAIN, layers=LAYERS, embed_dim=128, mlp_dim=256, heads=4, kv_heads=4, head_dim=32, unroll=1
)
K, M = CONFIG.embed_dim, CONFIG.mlp_dim
WEIGHTS = 4 * K * K + 3 * K * M  # of one layer's matrices


@functools.cache
def compiled_eval(
    form: str, *, layers: int = LAYERS, params: str = "float32", compute: str = "float32"
):
    """An evaluation step's own figures."""
    precision = PrecisionConfig(params=params, compute=compute)
    remat = RematConfig(FORWARD)
    with layout(config=replace(CONFIG, layers=layers), remat=remat, rows=2, length=32) as laid:
        model = stored(laid.model, WeightsConfig({"stack/*": form} if form else {}))
        step = make_eval_step(model, precision, np.ones(256, np.int32))
        batch = laid.batch(rows=2, length=32)
        lowered = jax.jit(step).lower(abstract_params(model, precision), batch)
        return lowered.compile().memory_analysis()


# Scales by channel: of each layer 4 K^2 + 2 K M weights have K rows, K M have M.
CHANNEL = 32 * (4 * K + 2 * M + K) / WEIGHTS


@pytest.mark.parametrize(
    ("form", "params", "bits"),
    [
        ("int8", "float32", 8 + CHANNEL),
        ("int4:128", "float32", 4.125),
        ("nf4:64", "float32", 4 + 8 / 64 + 32 / (64 * 256)),
        ("fp8", "float32", 8 + CHANNEL),
        ("2:4", "bfloat16", 0.5625 * 16),
    ],
)
def test_argument_bytes_of_the_compiled_program(form, params, bits):
    before, after = (compiled_eval(f, params=params) for f in ("", form))
    dense = LAYERS * WEIGHTS * jnp.dtype(params).itemsize
    matrices = after.argument_size_in_bytes - (before.argument_size_in_bytes - dense)
    assert 8 * matrices / (LAYERS * WEIGHTS) == pytest.approx(bits, rel=0.01)


@pytest.mark.parametrize("form", ["int8", "int4:128", "nf4:64", "fp8", "2:4", "rank:32"])
def test_one_layer_at_a_time_is_made_dense(form):
    """Against the dense model, which computes with its arguments."""
    temporaries = lambda f, layers: compiled_eval(f, layers=layers).temp_size_in_bytes
    before, after = temporaries("", LAYERS), temporaries(form, LAYERS)
    assert after - before <= 1.01 * 4 * WEIGHTS, (before, after)  # and some scales
    more = temporaries(form, 2 * LAYERS)
    # What loops count with; a byte for each weight that was added would be much more.
    assert more - after < LAYERS * WEIGHTS / 20, (after, more)


@functools.cache
def compiled_lora(form: str, layers: int, policy: str):
    """The temporaries of a step's gradients: LoRA on a base that is stored so."""
    config = replace(CONFIG, layers=layers)
    with layout(config=config, remat=policy, rows=2, length=32) as laid:
        model = stored(laid.model, WeightsConfig({"stack/*": form} if form else {}))
        model = adapted(model, AdapterConfig("lora", base="dense"))
        batch = laid.batch(rows=2, length=32)
        step = loss_and_grads(model, PrecisionConfig())
        params = abstract_params(model, PrecisionConfig())
        lowered = jax.jit(step).lower(params, batch, None, jnp.float32(1))
        return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["none", "full"])
def test_no_dense_layer_is_kept_for_the_backward_pass(policy):
    form = "int4:128"
    few, many = ((compiled_lora(f, n, policy) for f in ("", form)) for n in (LAYERS, 2 * LAYERS))
    before, after = few
    assert after - before <= 1.01 * 4 * WEIGHTS, (before, after)
    more_before, more_after = many
    # An int8 for each weight that is kept would be all of LAYERS * WEIGHTS.
    grown = (more_after - after) - (more_before - before)
    assert grown < LAYERS * WEIGHTS / 20


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gptq", "sparsegpt"])
def test_one_layer_at_a_time_is_made_smaller(name, monkeypatch, tmp_path):
    """Beside the model there are a few copies of one layer, its sums, and the calibration text."""
    alive = lambda: sum(a.nbytes for a in jax.live_arrays())
    module, seen = (quantize, []) if name == "gptq" else (prune_layers, [])
    solve = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: seen.append(alive()) or solve(*a, **k))
    with walked(replace(CONFIG, layers=2 * LAYERS)) as it:
        of_model, forms = (it.laid.model, it.params), it.forms("int4:128")
        before = alive()
        if name == "gptq":
            how = quantize.Quantize(name)
            quantize.quantize(how, forms, it.config, *of_model, it.text, scratch=tmp_path)
        else:
            prune(Prune(name), list(forms), *of_model, it.text, scratch=tmp_path)
        stream = sum(b["tokens"].size for b in it.text.batches) * K * 4
    layer, sums = 4 * WEIGHTS, 4 * (3 * K * K + M * M)
    assert len(seen) == 2 * LAYERS * 7
    assert max(seen) - before <= 4 * layer + 2 * sums + stream
    # What is done waits in files.
    assert len(list(tmp_path.iterdir())) == len(forms) * 2 * LAYERS
