"""Greedy texts are those of `transformers`, token for token: every decoder, T5, any cache."""

from __future__ import annotations

import functools
import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest

from config_sources import with_checkpoint
from configs import base
from experiment import read_experiment
from generation.engine import Engine
from generation.prompts import Prompt
from inference import decoder_weights, make_engine
from parallel.mesh import make_mesh
from prompt_tokens import lengths_of, requests_of, tokenizer_of
from run_params import saved_params
from tests.hf import parity

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.hf import test_parity, test_t5  # noqa: E402

torch.set_num_threads(1)  # products are small: threads would wait for each other

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # theirs are not ours

VOCAB, NEW, ROWS = 300, 64, 4
LENGTHS = (1, 5, 12, 33, 20, 7)  # more prompts than rows: two are read into rows that were used
CONTEXT = max(LENGTHS) + NEW
# Of the two likeliest tokens: each side's logits may be off by LOGITS. A smaller one would leave
# the choice to rounding, and the case would want another seed.
GAP = 2 * parity.LOGITS
# A text that says one thing again and again would hide a wrong cache.
DISTINCT = 10
CASES = {  # a seed that gives such texts
    "gpt2": 0,
    "llama3": 0,
    "qwen3": 0,
    "qwen3, window, biases": 0,
    "mistral, window": 0,
    "gemma3": 1,
    "gemma3, linear, softcap": 1,
    "mixtral": 5,
    "mixtral, window, wide heads": 0,
    "qwen3 moe": 2,
    "qwen3 moe, weights as they are, window, biases, tied": 3,
    "t5 1.0": 1,
    "t5 1.0, few buckets": 3,
    "t5 1.1": 0,
}


class Texts(NamedTuple):
    """What they generate: tokens of each prompt, and the least gap of two likeliest ones."""

    tokens: list[list[int]]
    gap: float


def their_model(name: str, seed: int) -> Any:
    """With random weights and a context that is long enough.

    What layers add is larger than what a tied table says of the last token itself: texts of the
    weights as they are drawn soon repeat it.
    """
    if name.startswith("t5"):
        model = test_t5.random_model(test_t5.CASES[name.removeprefix("t5 ")][0], seed)
    else:
        key = "n_positions" if name.startswith("gpt2") else "max_position_embeddings"
        model = test_parity.random_model(name, seed, **{key: CONTEXT})
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            of_layers = any(part in parameter_name for part in (".layers.", ".block.", ".h."))
            if "post_" in parameter_name and name.startswith("gemma3"):  # after the products
                parameter.add_(5.0)
            elif parameter.ndim > 1 and of_layers and "relative" not in parameter_name:
                parameter.mul_(6.0 if name.startswith("t5 1.0") else 3.0)
    return model


def prompts_of(seed: int) -> list[list[int]]:
    """Bytes of real text."""
    rows = parity.tokens(seed, VOCAB, len(LENGTHS), max(LENGTHS))
    return [row[:length].tolist() for row, length in zip(rows, LENGTHS, strict=True)]


def their_texts(model: Any, prompts: list[list[int]], end: int | None = None) -> Texts:
    """Each prompt alone: nothing is padded."""
    texts, gaps = [], []
    for prompt in prompts:
        given = torch.tensor([prompt])
        model.generation_config.eos_token_id = end
        model.generation_config.pad_token_id = 0 if end is None else end
        out = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            max_new_tokens=NEW,
            return_dict_in_generate=True,
            output_logits=True,
        )
        first = 1 if model.config.is_encoder_decoder else len(prompt)
        texts.append(out.sequences[0, first:].tolist())
        two = torch.stack(out.logits)[:, 0].topk(2).values
        gaps.append(float((two[:, 0] - two[:, 1]).min()))
    return Texts(texts, min(gaps))


@functools.cache
def theirs(name: str) -> tuple[Any, Texts]:
    """Their model of a case, and its texts without an end."""
    seed = CASES[name]
    model = their_model(name, seed)
    return model, their_texts(model, prompts_of(seed))


def write(model: Any, folder: Path, end: int) -> Path:
    """Their folder, with a tokenizer.json of a word for each token."""
    model.save_pretrained(folder)
    names = {"<pad>": 0} | {f"t{number}": number for number in range(1, VOCAB)}
    del names[f"t{end}"]
    tokenizer = {
        "model": {"type": "WordLevel", "vocab": names | {"</s>": end}, "unk_token": "<pad>"},
        "version": "1.0",
        "added_tokens": [],
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@contextmanager
def engine_of(folder: Path, prompts: list[list[int]], devices: int, *overrides: str):
    """As generate.py makes it: (the engine, its requests)."""
    seq2seq = json.loads((folder / "config.json").read_text()).get("is_encoder_decoder")
    flags = [
        f"--config.data.sequence_length={CONTEXT}",
        f"--config.generate.batch_size={ROWS}",
        f"--config.generate.max_new_tokens={NEW}",
        *(
            (
                "--config.objective.name=seq2seq",
                "--config.data.source=docstrings",
                "--config.data.packing=none",
            )
            * bool(seq2seq)
        ),
        *overrides,
    ]
    config = with_checkpoint(base.get_config(), folder, "--hf", flags)
    experiment = read_experiment(config, devices, training=False)
    tokenizer = tokenizer_of(experiment, None)
    given = [Prompt(f"prompt {i}", tokens=tuple(tokens)) for i, tokens in enumerate(prompts)]
    requests = requests_of(experiment, given, tokenizer)
    mesh = make_mesh(experiment.mesh, jax.devices()[:devices])
    with jax.set_mesh(mesh):
        model = experiment.build_model()
        params = saved_params(experiment, model, mesh, None, None, folder).params
        weights = decoder_weights(experiment, model, params)
        yield make_engine(experiment, weights, mesh, *lengths_of(experiment, requests)), requests


def generated(engine: Engine, requests: list[Any]) -> list[list[int]]:
    for _ in engine.run(requests):
        pass
    return [request.text.tokens for request in requests]


GO_ON = "--config.generate.ignore_end=True"
MESH = "--config.mesh.tensor=2", "--config.mesh.data=2"


def check(name: str, tmp_path: Path, devices: int, *overrides: str) -> None:
    model, want = theirs(name)
    print(f"{name}: gap {want.gap:.1e}, distinct {[len(set(t)) for t in want.tokens]}")
    assert want.gap > GAP, "a tie: choose another seed"
    assert max(len(set(tokens)) for tokens in want.tokens) >= DISTINCT
    folder, prompts = write(model, tmp_path / "in", end=1), prompts_of(CASES[name])
    with engine_of(folder, prompts, devices, GO_ON, *overrides) as (engine, requests):
        assert generated(engine, requests) == want.tokens
        slots = {layer["key"].shape[2] for layer in engine._state.cache.layers}
        windows = any(kind in name for kind in ("window", "gemma3"))
        assert (min(slots) < 10) == windows, "rings that wrap, where there are windows"


@pytest.mark.parametrize("name", CASES)
def test_texts_are_theirs(name, tmp_path):
    check(name, tmp_path, 1)


@pytest.mark.parametrize("name", ["llama3", "mistral, window", "gemma3", "qwen3 moe", "t5 1.1"])
def test_texts_are_theirs_from_a_pool_on_a_mesh(name, tmp_path):
    paged = "--config.generate.cache=paged", "--config.generate.block_size=16"
    check(name, tmp_path, 4, *MESH, *paged)


@pytest.mark.parametrize("name", ["llama3", "t5 1.1"])
def test_texts_end_where_theirs_end(name, tmp_path):
    model, endless = theirs(name)
    first = {token: i for i, token in reversed(list(enumerate(endless.tokens[3])))}
    end = next(token for token, i in first.items() if 8 < i < NEW - 8 and token > 1)
    prompts = prompts_of(CASES[name])
    want = their_texts(model, prompts, end).tokens
    assert want[3] == endless.tokens[3][: first[end] + 1]
    with engine_of(write(model, tmp_path / "in", end), prompts, 1) as (engine, requests):
        got = generated(engine, requests)
    for request, mine, other in zip(requests, got, want, strict=True):
        ended = other[-1] == end
        assert request.text.reason == ("end" if ended else "length")
        assert mine == (other[:-1] if ended else other)
