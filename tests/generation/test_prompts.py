"""Prompts from everywhere, and what is wrong with them in one line."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from config_border import with_values
from configs import tiny, tiny_captions, tiny_encoder, tiny_seq2seq
from data.tokens import ByteTokenizer
from experiment import read_experiment
from generation.prompts import Prompt, read_prompts, with_adapters
from inference import cache_shape, decoding_rules
from prompt_tokens import lengths_of, requests_of, tokenizer_of

BYTES = ByteTokenizer()


def experiment(shape=tiny, devices=1, **keys):
    values = {f"config.{key.replace('__', '.')}": value for key, value in keys.items()}
    values.setdefault("config.data.tokenizer", "bytes")
    return read_experiment(with_values(shape.get_config(), values), devices, training=False)


def test_prompts_of_flags_a_file_and_standard_input(tmp_path, monkeypatch):
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n two\n")
    assert [p.text for p in read_prompts(["zero"], file)] == ["zero", "one", " two"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\n"))
    assert [p.text for p in read_prompts([], Path("-"))] == ["a", "b"]


def test_a_jsonl_has_tokens_and_images(tmp_path):
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a"}, {"tokens": [1, 2]}, {"prompt": "b", "image": "c.png"}]
    file.write_text("\n".join(map(json.dumps, lines)))
    first, second, third = read_prompts([], file)
    assert (first.text, second.tokens, third.image) == ("a", (1, 2), tmp_path / "c.png")


def test_adapters_of_lines_and_of_the_flag(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "adapter": "lora"}\n{"prompt": "b"}\n')
    prompts = read_prompts([], file)
    assert [p.adapter for p in prompts] == [tmp_path / "lora", None]
    assert with_adapters(prompts, []) == prompts
    with pytest.raises(ValueError) as error:
        with_adapters(prompts, [Path("other")])
    assert str(error.value) == (
        f"--adapter: --prompts={file}, line 1 names {tmp_path / 'lora'}; leave one of them out"
    )


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", None, "no such file; one prompt a line"),
        ("a.txt", b"\n  \n", "empty; give one prompt a line"),
        ("a.txt", b"\xff\xfe\xfa", "cannot be read as UTF-8 text"),
        ("a.jsonl", b"{", "line 1: not JSON"),
        ("a.jsonl", b'{"prompt": "a"}\n[1]', "line 2: give an object with prompt, tokens or image"),
        ("a.jsonl", b'{"text": "a"}', "line 1: give an object with prompt, tokens or image"),
        ("a.jsonl", b'{"tokens": [1, "2"]}', "a list of whole numbers"),
        ("a.jsonl", b'{"prompt": 1}', "prompt, image and adapter are strings"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path, name, content, said):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=f"--prompts=.*{name}.*{said}"):
        read_prompts([], file)


def test_no_prompt_at_all_is_refused():
    with pytest.raises(ValueError, match="--prompt: missing; give --prompt=TEXT"):
        read_prompts([], None)


def test_images_without_their_prompts_are_refused():
    with pytest.raises(ValueError, match="2 images for 1 prompts"):
        read_prompts(["a"], None, [Path("a.png"), Path("b.png")])


LONG = "x" * 200


@pytest.mark.parametrize(
    ("keys", "prompt", "said"),
    [
        ({}, Prompt("--prompt='x'", LONG), "200 tokens, and the model's context .* room for 127"),
        ({}, Prompt("p", tokens=(1, 400)), "token 400 is none of the vocabulary; .* 0 to 256"),
        ({}, Prompt("p", tokens=(-1,)), "token -1 is none"),
        ({}, Prompt("p", "a", image=Path("a.png")), "'decoder' reads none"),
        ({"generate__prompt_length": 4}, Prompt("p", "abcdef"), "6 tokens, .*prompt_length = 4"),
    ],
)
def test_a_prompt_that_the_model_cannot_read_is_refused(keys, prompt, said):
    keys = {"model__vocab_size": 257} | keys
    with pytest.raises(ValueError, match=said):
        requests_of(experiment(**keys), [prompt], BYTES)


@pytest.mark.parametrize(
    ("shape", "keys", "said"),
    [
        (tiny, {"generate__max_new_tokens": 100}, "with a prompt of 60 tokens .* at most 68"),
        (tiny_captions, {"generate__max_new_tokens": 10}, "60 tokens and 16 of an image"),
        (tiny, {"mesh__data": 1, "mesh__pipe": 2}, "config.mesh.pipe = 2: text is generated"),
        (tiny_encoder, {}, "config.model.family = 'encoder': gives no text"),
        (tiny, {"generate__batch_size": 3, "mesh__data": 2}, "config.generate.batch_size = 3 does"),
        (
            tiny,
            {"generate__cache": "paged", "generate__blocks": 3, "generate__max_new_tokens": 4},
            "needs 4 of 16; give at least that",
        ),
        (
            tiny,
            {"generate__cache": "paged", "generate__blocks": 9, "mesh__data": 2},
            "blocks = 9 does not divide by the 2 parts",
        ),
    ],
)
def test_what_cannot_be_generated_is_refused(shape, keys, said):
    devices = 2 if {"mesh__data", "mesh__pipe"} & set(keys) else 1
    made = experiment(shape, devices, **keys)
    with pytest.raises(ValueError, match=said):
        cache_shape(made, decoding_rules(made), 60)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("temperature", -1.0, "0 .the likeliest token. or more"),
        ("top_p", 0.0, "above 0"),
        ("min_p", 1.5, "0 .all tokens. to 1"),
        ("top_k", -1, "0 or more"),
        ("stop", ("",), "ends nothing"),
        ("cache", "ring", "choose one of contiguous, paged"),
        ("cache_dtype", "int4", "choose one of compute, int8"),
    ],
)
def test_bad_values_are_refused(key, value, said):
    with pytest.raises(ValueError, match=rf"config\.generate\.{key} = .*{said}"):
        experiment(**{f"generate__{key}": value})


def test_what_does_nothing_is_said():
    made = experiment(generate__top_k=5, generate__blocks=64)
    assert made.generate.without_effect() == [
        "config.generate.top_k has no effect: config.generate.temperature is 0",
        "config.generate.blocks has no effect: config.generate.cache is contiguous",
    ]


def test_a_source_ends_as_in_training_and_the_decoder_begins_so():
    made = experiment(tiny_seq2seq)
    tokenizer = BYTES
    (request,) = requests_of(made, [Prompt("p", "ab")], tokenizer)
    assert request.source == [97, 98, tokenizer.end_id]
    assert request.prompt == [tokenizer.start_id]
    assert lengths_of(made, [request]) == (1, 3)


def test_an_empty_prompt_follows_the_end_of_another_text():
    (request,) = requests_of(experiment(model__vocab_size=257), [Prompt("p", "")], BYTES)
    assert request.prompt == [BYTES.end_id]


def test_an_image_is_read_as_training_reads_it(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    image.fromarray(pixels).save(tmp_path / "a.png")
    made = experiment(tiny_captions)
    (request,) = requests_of(made, [Prompt("p", "", image=tmp_path / "a.png")], BYTES)
    assert request.patches.shape == (16, 4)
    np.testing.assert_allclose(request.patches[0], pixels[:2, :2].ravel() / 255, rtol=1e-6)
    with pytest.raises(ValueError, match="the model reads an image; give --image=FILE"):
        requests_of(made, [Prompt("p", "")], BYTES)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"config\.model\.vocab_size = 100"):
        tokenizer_of(experiment(model__vocab_size=100), None)


def test_a_run_without_its_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no tokenizer\.json in"):
        tokenizer_of(experiment(data__tokenizer="bpe", model__vocab_size=512), tmp_path)
