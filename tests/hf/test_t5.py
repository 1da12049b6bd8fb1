"""T5 computes what `transformers` computes, on sources with and without padding, and goes back."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data.objective import ObjectiveConfig
from hf.exporting import export_params
from hf.families import read_model
from hf.files import open_folder
from hf.importing import find_params, read_params
from models.config import ModelConfig
from models.encoder_decoder import EncoderDecoder
from parallel.precision import PrecisionConfig
from parallel.remat import RematConfig
from tests.hf.parity import GRADIENTS, LOGITS, LOSS, ROUND_TRIP, TEXT, in_layout_of
from tests.small import layout
from training.micro_batches import counted
from training.naming import named

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to mend

SEQ2SEQ = ObjectiveConfig(name="seq2seq")
ROWS = 2

T5 = {
    "vocab_size": 300,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
NEW = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
CASES = {  # settings, tokens of source and target
    "1.0": (T5, 23, 14),
    "1.0, few buckets": (
        T5
        | {
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 12,
            "num_decoder_layers": 2,
        },
        12,
        40,
    ),
    "1.1": (T5 | NEW, 40, 24),
    "1.1, wide heads": (T5 | NEW | {"d_kv": 24, "num_heads": 2, "num_decoder_layers": 1}, 17, 17),
}


def random_model(settings, seed):
    """Their model with the weights it starts with, but for gains, biases of positions and a head of
    its own where the version has one: logits are of order one.
    """
    torch.manual_seed(seed)
    config = transformers.T5Config(**settings)
    model = transformers.T5ForConditionalGeneration(config).eval()
    if not config.scale_decoder_outputs:
        model.lm_head.weight = torch.nn.Parameter(model.shared.weight.clone())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "bias" in name:
                parameter.normal_(0.0, 0.5)
            elif name == "lm_head.weight":  # a parameter of its own: features are not scaled
                parameter.normal_(0.0, 0.2)
    return model


def batch_of(seed, source, target):
    """Real text; the sources of all rows but the first are padded, and so are their targets."""
    data = np.frombuffer(TEXT.encode(), np.uint8)
    rng = np.random.default_rng(seed)

    def cut(length):
        starts = rng.integers(0, len(data) - length, ROWS)
        return np.stack([data[s : s + length] for s in starts]).astype(np.int32)

    batch = {"source_tokens": cut(source), "targets": cut(target)}
    batch["tokens"] = np.pad(batch["targets"][:, :-1], ((0, 0), (1, 0)))  # begins with pad, 0
    for name, length in (("source_", source), ("", target)):
        stop = np.array([[length], [length - 5]])
        index = np.arange(length, dtype=np.int32)[None].repeat(ROWS, 0)
        batch |= {f"{name}segments": (index < stop).astype(np.int32), f"{name}positions": index}
    return batch


def their_logits(model, batch, grad=False):
    with torch.set_grad_enabled(grad):
        long = {name: torch.tensor(value.astype(np.int64)) for name, value in batch.items()}
        return model(
            input_ids=long["source_tokens"],
            attention_mask=long["source_segments"],
            decoder_input_ids=long["tokens"],
        ).logits


def their_loss_and_gradients(model, batch):
    model.zero_grad()
    logits = their_logits(model, batch, grad=True)
    target = torch.tensor(np.where(batch["segments"] > 0, batch["targets"], -100).astype(np.int64))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
    loss.backward()
    return loss.item(), {name: p.grad.numpy() for name, p in model.named_parameters()}


def compiled(laid, config):
    """A (params, batch) -> (logits, (mean loss, gradients))."""
    build = lambda: EncoderDecoder(config, laid.model.rules, RematConfig(), nnx.Rngs(params=0))
    graph, _ = nnx.split(nnx.eval_shape(build))

    def logits(params, batch):
        model = nnx.merge(graph, params)
        head = model.head()
        table = head.weight if head.axes.startswith("vocab") else head.weight.T
        return jnp.einsum("btd,vd->btv", model(batch), table)[..., : config.vocab_size]

    def mean(params, batch):
        weights = counted(batch)
        return laid.model.loss(params, batch, weights, None)[0] / jnp.sum(weights.tokens_BT)

    return jax.jit(
        lambda params, batch: (logits(params, batch), jax.value_and_grad(mean)(params, batch))
    )


def read(laid, config, folder):
    opened = open_folder(folder, "--hf")
    found = find_params(opened, config, laid.model, PrecisionConfig())
    return read_params(found, laid.model, PrecisionConfig(), laid.mesh)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_logits_loss_gradients_and_back(name, tmp_path):
    settings, source, target = CASES[name]
    random_model(settings, 0).save_pretrained(tmp_path / "0")
    config = ModelConfig(**read_model(tmp_path / "0", "--hf"), attention="xla")
    assert config.tied == config.head_scale == (name.startswith("1.0"))
    with layout(config=config, objective=SEQ2SEQ, rows=ROWS, length=target) as laid:
        run = compiled(laid, config)
        for seed in (0, 1, 2):
            theirs, folder = random_model(settings, seed), tmp_path / str(seed)
            theirs.save_pretrained(folder)
            batch = batch_of(seed, source, target)
            params = read(laid, config, folder)
            logits, (loss, gradients) = run(params, laid.placed(batch))
            expected, real = their_logits(theirs, batch).numpy(), batch["segments"] > 0
            assert 0.3 < expected.std() < 3
            their_loss, their_gradients = their_loss_and_gradients(theirs, batch)
            wanted = in_layout_of(laid.model, config, their_gradients)
            got = {n: np.asarray(g) for n, g in named(gradients).items()}
            assert got.keys() == wanted.keys()
            apart = {n: np.abs(got[n] - wanted[n]).max() for n in wanted}
            worst = {
                "logits": np.abs(np.asarray(logits) - expected)[real].max(),
                "loss": abs(float(loss) - their_loss),
                "gradients": max(apart.values()),
            }
            print(f"t5 {name}, seed {seed}:", ", ".join(f"{k} {v:.1e}" for k, v in worst.items()))
            assert worst["logits"] < LOGITS
            assert worst["loss"] < LOSS
            assert worst["gradients"] < GRADIENTS, apart
            assert all(np.abs(g).max() > 0 for g in wanted.values())

        # And back: to the folder as it was, and to one of which only the parameters are known.
        for out, like in (("like", folder), ("alone", None)):
            opened = None if like is None else open_folder(like, "--like")
            export_params(params, config, laid.model.axes, tmp_path / out, like=opened)
            loaded, report = type(theirs).from_pretrained(tmp_path / out, output_loading_info=True)
            assert not any(report.values()), report
            assert np.abs(their_logits(loaded, batch).numpy() - expected)[real].max() < ROUND_TRIP
    stored = {n: (t.shape, t.dtype) for n, t in open_folder(folder, "--hf").tensors.items()}
    back = {
        n: (t.shape, t.dtype) for n, t in open_folder(tmp_path / "like", "--hf").tensors.items()
    }
    assert back == stored
    configs = [json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "like")]
    assert configs[0] == configs[1]
