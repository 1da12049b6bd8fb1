"""Evaluation: the training loss without dropout, bits per byte by hand, and its errors."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.config import ModelConfig
from models.encoder_heads import EncoderWithHeads
from parallel.precision import PrecisionConfig
from parallel.remat import RematConfig
from tests.drawn import decoder_of, drawn_params, put
from tests.families import FAMILIES
from tests.small import layout, numpy_batch
from tests.training.line import line, tokens
from training.causal_lm import causal_lm
from training.evaluation import EvalConfig, evaluate, make_eval_step, results
from training.losses import LossConfig
from training.step import loss_and_grads

FLOAT32 = PrecisionConfig()
TINY = ModelConfig(
    vocab_size=250, layers=2, embed_dim=16, mlp_dim=16, heads=2, kv_heads=1, head_dim=8,
    attention="xla",
)  # fmt: skip


@pytest.mark.parametrize(
    "sizes",
    [{}, pytest.param({"data": 2, "fsdp": 2, "tensor": 2, "zero": 3}, marks=pytest.mark.slow)],
    ids=str,
)
def test_it_is_the_training_loss_without_dropout_and_z_loss(sizes):
    """And both are the mean of -log p in float64 from the decoder's features."""
    batches = [numpy_batch(seed) for seed in (0, 1)]
    sizes_of = np.arange(250) % 9
    config = replace(TINY, dropout=0.3)
    with layout(config=config, **sizes) as laid:
        rules, initial = laid.model.rules, drawn_params(laid, config)
        params, there = laid.params(initial), [put(laid, batch) for batch in batches]
        eval_step = jax.jit(make_eval_step(laid.model, FLOAT32, sizes_of))
        got = evaluate(eval_step, params, there)
        trained = causal_lm(TINY, LossConfig(chunk=16, z_loss=0.01), rules, RematConfig())
        of_batch = jax.jit(loss_and_grads(trained, FLOAT32))
        losses = [of_batch(params, batch, None, jnp.float32(1))[0] for batch in there]
        features = jax.jit(lambda params, batch: decoder_of(laid, TINY)(params)(batch))
        hidden = [np.asarray(features(params, batch), np.float64) for batch in there]

    nll, lse_squared, counts, text, right = [], [], [], 0, 0
    for x_BTD, batch in zip(hidden, batches, strict=True):
        logits = x_BTD @ np.asarray(initial["embedding"][:250], np.float64).T
        lse = np.log(np.sum(np.exp(logits), -1))
        counted = batch["segments"] > 0
        picked = np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
        nll.append(np.sum((lse - picked)[counted]))
        lse_squared.append(np.sum((lse**2)[counted]))
        counts.append(counted.sum())
        text += int(sizes_of[batch["targets"]][counted].sum())
        right += int(np.sum((logits.argmax(-1) == batch["targets"])[counted]))
    assert got["tokens"] == sum(counts)
    assert got["bytes"] == text
    assert got["accuracy"] == pytest.approx(right / sum(counts), abs=1e-9)
    # float32 sums of 120 terms
    assert got["loss"] == pytest.approx(sum(nll) / sum(counts), rel=1e-6)
    assert got["perplexity"] == pytest.approx(math.exp(got["loss"]))
    assert got["bits_per_byte"] == pytest.approx(sum(nll) / math.log(2) / text, rel=1e-6)
    for sums, n, z, count in zip(losses, nll, lse_squared, counts, strict=True):
        assert float(sums["nll"]) == pytest.approx(n / count, rel=1e-6)
        assert float(sums["loss"]) == pytest.approx((n + 0.01 * z) / count, rel=1e-6)


def test_bits_per_byte_by_hand():
    """Two batches: 3 ln 2 nats over 2 tokens and 5 bytes, 1 ln 2 over 1 token and 3 bytes: 4 bits
    for 8 bytes. Sums are added before they are divided.
    """
    sums = [
        {"nll": 3 * math.log(2), "correct": 1.0, "tokens": 2.0, "bytes": 5.0},
        {"nll": 1 * math.log(2), "correct": 1.0, "tokens": 1.0, "bytes": 3.0},
    ]
    got = evaluate(lambda _, batch: sums[batch], None, [0, 1])
    assert got["bits_per_byte"] == pytest.approx(4 / 8)
    assert got["loss"] == pytest.approx(4 * math.log(2) / 3)
    assert got["perplexity"] == pytest.approx(2 ** (4 / 3))
    assert got["accuracy"] == pytest.approx(2 / 3)
    assert (got["tokens"], got["bytes"]) == (3, 8)


def test_bytes_are_those_of_the_targets_that_count(use_mesh):
    model = line()
    zero = jnp.float32(0)
    sums = lambda *args: (zero, {"nll_sum": zero, "correct_sum": zero})
    with use_mesh():
        eval_step = make_eval_step(replace(model, loss=sums), FLOAT32, np.array([1, 10, 100]))
        batch = tokens([[0, 0, 0]], targets=2, segments=[[1, 2, 0]])
        got = eval_step(model.init(jax.random.key(0)), batch)
    assert float(got["bytes"]) == 200
    assert float(got["tokens"]) == 2


TASK_SUMS = [
    {"a_nll": 6.0, "a_correct": 3.0, "b_nll": 1.0, "b_correct": 4.0, "rows": 4.0},
    {"a_nll": 3.0, "a_correct": 1.0, "b_nll": 2.0, "b_correct": 0.0, "rows": 2.0},
]
TASK_RESULTS = {
    "a_loss": 9 / 6,
    "a_accuracy": 4 / 6,
    "b_loss": 3 / 6,
    "b_accuracy": 4 / 6,
    "rows": 6,
}


def test_tasks_by_hand():
    """Means over rows; without tokens the loss is the sum of the tasks', with them it is theirs."""
    got = evaluate(lambda _, batch: TASK_SUMS[batch], None, [0, 1])
    assert got == pytest.approx({"loss": 2.0} | TASK_RESULTS)
    tokens = {"nll": 10.0, "correct": 2.0, "tokens": 5.0, "bytes": 5.0}
    got = evaluate(lambda _, batch: TASK_SUMS[batch] | tokens, None, [0, 1])
    assert got["loss"] == pytest.approx(2.0)
    assert got["accuracy"] == pytest.approx(0.4)
    assert {name: got[name] for name in TASK_RESULTS} == pytest.approx(TASK_RESULTS)


@pytest.mark.parametrize("name", ["encoder, classes", "encoder, tokens and classes"])
def test_tasks_are_means_over_rows_that_count(name):
    """By logits in float64; an empty row, which fills a batch up, counts for nothing."""
    family = FAMILIES[name]
    config, batch = replace(family.config, layers=1), family.batch(0)
    for key in ("segments", "counted"):
        batch[key][-1] = 0
    with layout(config=config, objective=family.objective) as laid:
        params = laid.params(drawn_params(laid, config))
        eval_step = jax.jit(make_eval_step(laid.model, FLOAT32, np.ones(250, int)))
        got = evaluate(eval_step, params, [laid.placed(batch)])
        make = lambda: EncoderWithHeads(config, laid.model.rules, RematConfig(), nnx.Rngs(params=0))
        graph, _ = nnx.split(nnx.eval_shape(make))

        def logits(params, batch):
            encoder = nnx.merge(graph, params)
            return encoder.task_logits(encoder.run_blocks(encoder.embed(batch), batch))

        of_tasks = jax.jit(logits)(params, laid.placed(batch))
    total = 0.0
    for task, logits_BC in of_tasks.items():
        z = np.asarray(logits_BC, np.float64)[:-1]
        label = batch[f"label_{task}"][:-1]
        nll = np.log(np.exp(z).sum(-1)) - z[np.arange(len(z)), label]
        total += nll.mean()
        assert got[f"{task}_loss"] == pytest.approx(nll.mean(), rel=1e-5)
        assert got[f"{task}_accuracy"] == pytest.approx((z.argmax(-1) == label).mean())
    assert got["rows"] == 7
    if config.token_head:
        assert got["tokens"] == batch["counted"].sum()
    else:
        assert got["loss"] == pytest.approx(total, rel=1e-5)
        assert "perplexity" not in got
    assert set(results(config)) <= got.keys()


@pytest.mark.parametrize("sums", [[], [{"nll": 0.0, "correct": 0.0, "tokens": 0.0, "bytes": 0.0}]])
def test_nothing_to_score_is_an_error(sums):
    with pytest.raises(ValueError) as error:
        evaluate(lambda _, batch: batch, None, sums)
    assert str(error.value) == (
        "config.data.eval_path: the held-out files hold no token to score; give longer ones"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": -1}, "config.eval.every = -1: 0 (at the end alone) or more"),
        ({"batches": 0}, "config.eval.batches = 0: at least 1"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError) as error:
        EvalConfig(**options)
    assert str(error.value) == message
