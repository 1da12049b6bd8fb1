"""Prompts as the tokens that a model reads, and what of a prompt it cannot read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.images import read_image, to_patches
from data.parts import ImageShape
from data.recipes import marks_of
from data.tokens import Tokenizer, open_tokenizer
from experiment import Experiment
from generation.prompts import Prompt
from generation.rows import Request
from generation.text import Text


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
