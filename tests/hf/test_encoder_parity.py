"""BERT and RoBERTa compute what `transformers` computes, with padding and types of tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.encoder_heads import EncoderWithHeads
from parallel.remat import RematConfig
from tests.hf import parity
from tests.hf.parity import GRADIENTS, LOGITS, LOSS, ROUND_TRIP, SEEDS
from training.micro_batches import Weights
from training.naming import named

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # theirs are not ours

ROWS, LENGTH = 3, 20
COMMON = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # logits of order one, so that 1e-4 says something
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
WIDE = {"hidden_size": 40, "num_attention_heads": 5, "type_vocab_size": 3, "hidden_act": "gelu_new"}
FAR = {"pad_token_id": 5, "layer_norm_eps": 1e-5, "type_vocab_size": 1}
CASES = {
    "bert": ("BertForMaskedLM", COMMON),
    "bert, 5 heads, 3 types, other gelu": ("BertForMaskedLM", COMMON | WIDE),
    "roberta": ("RobertaForMaskedLM", COMMON),
    "roberta, padding is 5, 1 type": ("RobertaForMaskedLM", COMMON | FAR),
    "bert, 3 classes": ("BertForSequenceClassification", COMMON | {"num_labels": 3}),
    "roberta, 2 classes": ("RobertaForSequenceClassification", COMMON | WIDE),
}


def random_model(name: str, seed: int):
    """Their model with random weights, biases and gains too."""
    kind, settings = CASES[name]
    torch.manual_seed(seed)
    model_class = getattr(transformers, kind)
    config = model_class.config_class(**settings, attn_implementation="eager")
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # gains of 1 and biases of 0 would hide a swap
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def random_batch(seed: int, config) -> dict[str, np.ndarray]:
    """Rows of real text of several lengths, tokens masked, the types of tokens drawn."""
    rng = np.random.default_rng(seed)
    index = np.arange(LENGTH, dtype=np.int32)[None].repeat(ROWS, 0)
    there = index < np.array([[LENGTH], [LENGTH - 3], [LENGTH // 2]])
    targets = parity.tokens(seed, config.vocab_size, ROWS, LENGTH)[:, 1:]
    assert (targets > 8).all(), "ids of padding are no text"
    counted = (rng.random(there.shape) < 0.3) & there
    tokens = np.where(there, np.where(counted, 7, targets), config.pad_token_id)
    types = rng.integers(0, config.type_vocab_size, tokens.shape) * there
    batch = {"tokens": tokens, "targets": targets, "segments": there, "positions": index}
    batch |= {"counted": counted, "token_types": types}
    batch["label_label"] = rng.integers(0, config.num_labels, ROWS)
    return {name: np.ascontiguousarray(array, np.int32) for name, array in batch.items()}


def theirs_of(model, batch, labels=None):
    tensors = {
        "input_ids": batch["tokens"],
        "attention_mask": batch["segments"],
        "token_type_ids": batch["token_types"],
    }
    inputs = {name: torch.tensor(array.astype(np.int64)) for name, array in tensors.items()}
    return model(**inputs, labels=labels)


def their_logits(model, batch) -> np.ndarray:
    with torch.no_grad():
        logits = theirs_of(model, batch).logits.numpy()
    return logits[batch["segments"] > 0] if logits.ndim == 3 else logits


def their_loss_and_gradients(model, batch, token_head):
    labels = np.where(batch["counted"], batch["targets"], -100) if token_head else None
    labels = batch["label_label"] if labels is None else labels
    model.zero_grad()
    loss = theirs_of(model, batch, torch.tensor(labels.astype(np.int64))).loss
    loss.backward()
    pairs = model.named_parameters()
    return loss.item(), {name: p.grad.numpy() for name, p in pairs if p.grad is not None}


def compiled(laid):
    """(params, batch) -> logits, (loss, gradients) of our side."""
    build = lambda: EncoderWithHeads(
        laid.config, laid.model.rules, RematConfig(), nnx.Rngs(params=0)
    )
    graph, _ = nnx.split(nnx.eval_shape(build))
    config = laid.config

    def logits(params, batch):
        encoder = nnx.merge(graph, params)
        x_BTD = encoder.finish(encoder.run_blocks(encoder.embed(batch), batch))
        if not config.token_head:
            return encoder.task_logits(x_BTD)["label"]
        head, hidden_BTD = encoder.head(), encoder.token_features(x_BTD)
        out = jnp.einsum("btd,vd->btv", hidden_BTD, head.weight) + head.bias[None, None]
        return out[..., : config.vocab_size]

    def mean(params, batch):
        tokens, rows = batch["counted"].astype(jnp.float32), jnp.full(ROWS, 1 / ROWS)
        weights = Weights(tokens / jnp.sum(tokens), rows)
        return laid.model.loss(params, batch, weights, None)[0]

    def both(params, batch):
        return logits(params, batch), jax.value_and_grad(mean)(params, batch)

    return jax.jit(both)


@pytest.mark.parametrize("name", CASES)
def test_logits_loss_gradients_and_back(name, tmp_path):
    folder = tmp_path / "0"
    random_model(name, 0).save_pretrained(folder)
    with parity.ours(folder) as laid:
        run = compiled(laid)
        for seed in SEEDS:
            theirs = random_model(name, seed)
            folder = tmp_path / str(seed)
            theirs.save_pretrained(folder)
            batch = random_batch(seed, theirs.config)
            params = laid.read(folder)
            logits, (loss, gradients) = run(params, {k: jnp.asarray(v) for k, v in batch.items()})
            logits = np.asarray(logits)
            got = logits[batch["segments"] > 0] if logits.ndim == 3 else logits
            expected = their_logits(theirs, batch)
            assert expected.std() > 0.1  # a thousand times what is allowed
            wanted_loss, wanted = their_loss_and_gradients(theirs, batch, laid.config.token_head)
            wanted = laid.in_our_layout(wanted)
            gradients = {n: np.asarray(g) for n, g in named(gradients).items()}
            assert gradients.keys() == wanted.keys()
            apart = {n: np.abs(gradients[n] - wanted[n]).max() for n in wanted}
            worst = {
                "logits": np.abs(got - expected).max(),
                "loss": abs(float(loss) - wanted_loss),
                "gradients": max(apart.values()),
            }
            print(f"{name}, seed {seed}:", ", ".join(f"{k} {v:.1e}" for k, v in worst.items()))
            assert worst["logits"] < LOGITS
            assert worst["loss"] < LOSS
            assert worst["gradients"] < GRADIENTS, apart

        # And back: to the folder as it was, and to one of which only the parameters are known.
        for out, like in (("like", folder), ("alone", None)):
            laid.write(params, tmp_path / out, like)
            loaded, report = type(theirs).from_pretrained(
                tmp_path / out, output_loading_info=True, attn_implementation="eager"
            )
            assert not any(report.values()), report
            assert np.abs(their_logits(loaded, batch) - expected).max() < ROUND_TRIP
