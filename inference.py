"""From an experiment to the generation of text: layout, cache, prompts as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data.images import read_image, to_patches
from data.parts import ImageShape
from data.recipes import marks_of
from data.tokens import Tokenizer, open_tokenizer
from experiment import Experiment
from generation.engine import Engine
from generation.prompts import Prompt
from generation.rows import Request
from generation.sampling import Sampling
from generation.steps import Steps
from generation.text import Text
from models.beside import beside_length
from models.decode import kind_of, make_decoding, weights_of
from models.kv_cache import CacheShape
from parallel.rules import Rules, make_rules
from training.state import Model


def decoding_rules(experiment: Experiment) -> Rules:
    """The layout of generation: one token does not divide, and there are no stages.

    Raises:
      ValueError: a dim does not divide, or the mesh has stages.
    """
    kind_of(experiment.model)
    if experiment.mesh.pipe > 1:
        raise ValueError(
            f"config.mesh.pipe = {experiment.mesh.pipe}: text is generated without stages; set it "
            f"to 1, and config.mesh.tensor or fsdp higher"
        )
    dims = experiment.model.dims()
    dims["batch"] = experiment.generate.batch_size, "config.generate.batch_size"
    return make_rules(replace(experiment.parallel, sequence=False), experiment.mesh.sizes(), dims)


def prompt_length(experiment: Experiment) -> int:
    """Tokens of the longest prompt where none is given, of a decoder."""
    if experiment.model.family == "encoder_decoder":
        return 1  # the prompt is the source, and what the decoder begins with is one token
    if experiment.generate.prompt_length:
        return experiment.generate.prompt_length
    longest = experiment.model.max_length - experiment.generate.max_new_tokens
    return max(1, min(experiment.data.sequence_length, longest))


def cache_shape(experiment: Experiment, rules: Rules, prompt: int, source: int = 0) -> CacheShape:
    """The sizes of the cache for prompts of so many tokens, sources of so many.

    Raises:
      ValueError: the model's context is shorter than prompt and text.
    """
    model, generate = experiment.model, experiment.generate
    new, image = generate.max_new_tokens, model.image_tokens
    room = model.max_length - image - prompt
    if new > room:
        before = f"a prompt of {prompt} tokens" + (f" and {image} of an image" if image else "")
        right = f"at most {room}" if room > 0 else f"a prompt is at most {prompt + room - 1} tokens"
        raise ValueError(
            f"config.generate.max_new_tokens = {new}: with {before} that is more than "
            f"config.model.max_length = {model.max_length}; {right}"
        )
    slots = image + prompt + new
    beside = 0
    if model.cross != "none":
        beside = beside_length(model, source or experiment.data.source_length)
    if generate.cache == "contiguous":
        return CacheShape(
            generate.batch_size, slots, int8=generate.cache_dtype == "int8", source=beside
        )
    parts = rules.parts("batch")
    needed = generate.batch_size * -(-slots // generate.block_size)
    blocks = generate.blocks or needed
    if blocks % parts:
        raise ValueError(
            f"config.generate.blocks = {blocks} does not divide by the {parts} parts of the "
            f"batch; choose a multiple of {parts}"
        )
    least = parts * -(-slots // generate.block_size)
    if blocks < least:
        raise ValueError(
            f"config.generate.blocks = {blocks}: one text of {slots} tokens in each of {parts} "
            f"parts of the batch needs {least} of {generate.block_size}; give at least that"
        )
    return CacheShape(
        generate.batch_size,
        slots,
        int8=generate.cache_dtype == "int8",
        block=generate.block_size,
        blocks=blocks // parts,
        source=beside,
    )


def tokenizer_of(experiment: Experiment, workdir: Path | None) -> Tokenizer:
    """The tokenizer of a run, or of a checkpoint.

    Raises:
      ValueError: the run has none, or one with more tokens than the model.
    """
    data, marks = experiment.data, marks_of(experiment.objective)
    folder = workdir or Path()
    if data.tokenizer == "bpe" and not (folder / "tokenizer.json").is_file():
        raise ValueError(
            f"config.data.tokenizer = 'bpe': there is no tokenizer.json in "
            f"{folder if workdir else 'a workdir'}; give --config.data.tokenizer=PATH of one"
        )
    return open_tokenizer(data, experiment.model.vocab_size, folder, lambda: (), marks)


def requests_of(
    experiment: Experiment, prompts: Sequence[Prompt], tokenizer: Tokenizer
) -> list[Request]:
    """Prompts as tokens, in order.

    Raises:
      ValueError: naming the prompt: it is too long, a token of it is none of the vocabulary, or it
        has an image that the model does not read, or lacks one.
    """
    model, generate = experiment.model, experiment.generate
    end = None if generate.ignore_end else tokenizer.end_id
    requests = []
    for number, prompt in enumerate(prompts):
        if prompt.tokens is not None:
            tokens = list(prompt.tokens)
        else:
            tokens = tokenizer.encode_prompt(prompt.text).tolist()
        _check_tokens(tokens, prompt, model.vocab_size)
        text = Text(tokenizer.decode, generate.stop, end)
        request = Request(number, tokens, text, generate.max_new_tokens)
        if model.family == "encoder_decoder":
            if prompt.tokens is None:
                tokens.append(tokenizer.end_id)  # as sources end in training
            request.source, request.prompt = tokens, [tokenizer.start_id]
        elif model.family == "vision_language":
            # A caption follows the token that training begins it with.
            request.prompt = [tokenizer.start_id, *tokens]
            request.patches = _patches_of(experiment, prompt)
        elif not tokens:
            request.prompt = [tokenizer.end_id]  # what stands before a text
        if prompt.image is not None and model.family != "vision_language":
            raise ValueError(
                f"{prompt.where}: image = {prompt.image}: config.model.family = "
                f"{model.family!r} reads none"
            )
        limit = generate.prompt_length
        length = len(tokens) if request.source is not None else len(request.prompt)
        if limit and length > limit:
            raise ValueError(
                f"{prompt.where}: {length} tokens, and config.generate.prompt_length = {limit}; "
                f"give {length} or more, or 0"
            )
        longest = model.max_length - (0 if request.source is not None else 1 + model.image_tokens)
        if length > longest:
            raise ValueError(
                f"{prompt.where}: {length} tokens, and the model's context "
                f"(config.model.max_length = {model.max_length}) has room for {longest}; shorten it"
            )
        requests.append(request)
    return requests


def _check_tokens(tokens: list[int], prompt: Prompt, vocab_size: int) -> None:
    wrong = [token for token in tokens if not 0 <= token < vocab_size]
    if wrong:
        raise ValueError(
            f"{prompt.where}: token {wrong[0]} is none of the vocabulary; tokens are 0 to "
            f"{vocab_size - 1} (config.model.vocab_size = {vocab_size})"
        )


def _patches_of(experiment: Experiment, prompt: Prompt) -> np.ndarray:
    vision = experiment.model.vision
    if prompt.image is None:
        raise ValueError(
            f"{prompt.where}: the model reads an image; give --image=FILE beside each --prompt, or "
            f'{{"image": FILE}} in the .jsonl of --prompts'
        )
    shape = ImageShape(vision.image_size, vision.patch_size, vision.channels)
    pixels = read_image(prompt.image, prompt.where, shape)
    return to_patches(pixels[None].astype(np.float32) / 255.0, vision.patch_size)[0]


def lengths_of(experiment: Experiment, requests: Sequence[Request]) -> tuple[int, int]:
    """Tokens of the longest prompt of the decoder, and of the longest source."""
    given = experiment.generate.prompt_length
    prompt = max(len(request.prompt) for request in requests)
    source = max(len(request.source or ()) for request in requests)
    if source:
        return prompt, max(source, given)
    return max(prompt, given), 0


def make_engine(
    experiment: Experiment,
    model: Model,
    params: Any,
    mesh: jax.sharding.Mesh,
    prompt: int,
    source: int,
) -> Engine:
    """What generates texts after prompts of so many tokens, and sources; `params` are used up."""
    generate, rules = experiment.generate, decoding_rules(experiment)
    compute = experiment.precision.compute
    decoding = make_decoding(
        experiment.model,
        rules,
        cache_shape(experiment, rules, prompt, source),
        compute,
        prefix=experiment.objective.name == "prefix_lm",
    )
    sampling = Sampling(generate.temperature, generate.top_k, generate.top_p, generate.min_p)
    weights = weights_of(params, model.axes, rules, compute)
    return Engine(Steps(decoding, sampling), weights, mesh, experiment.seed)
