"""From an experiment to the generation of text: its layout, its cache, what runs it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax

from experiment import Experiment
from generation.engine import Engine
from generation.sampling import Sampling
from generation.steps import Steps
from memory.inference_job import InferenceJob
from models.beside import beside_length
from models.decode import DecoderWeights, kind_of, make_decoding, weights_of
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


def make_engine(
    experiment: Experiment,
    weights: DecoderWeights,
    mesh: jax.sharding.Mesh,
    prompt: int,
    source: int,
    *,
    adapters: bool = False,
) -> Engine:
    """What generates texts after prompts of so many tokens, and sources.

    Args:
      adapters: the weights are of several, of which each request has one or none.
    """
    generate, rules = experiment.generate, decoding_rules(experiment)
    decoding = make_decoding(
        experiment.model,
        rules,
        cache_shape(experiment, rules, prompt, source),
        experiment.precision.compute,
        prefix=experiment.objective.name == "prefix_lm",
    )
    sampling = Sampling(generate.temperature, generate.top_k, generate.top_p, generate.min_p)
    steps = Steps(decoding, sampling)
    return Engine(steps, weights, mesh, experiment.seed, adapters=adapters)


def decoder_weights(
    experiment: Experiment, model: Model, params: Any, *, keep: bool = False
) -> DecoderWeights:
    """The weights of a model as generation takes them; `params` are used up unless kept."""
    compute = experiment.precision.compute
    return weights_of(params, model.axes, decoding_rules(experiment), compute, keep=keep)


def inference_job(experiment: Experiment, prompt: int = 0, source: int = 0) -> InferenceJob:
    """Generation for the planner.

    Args:
      prompt: tokens of the longest prompt; 0: as `prompt_length` says.
      source: tokens of the longest source; 0: `config.data.source_length`.

    Raises:
      ValueError: of `decoding_rules` or `cache_shape`.
    """
    rules = decoding_rules(experiment)
    prompt = prompt or prompt_length(experiment)
    return InferenceJob(
        model=experiment.model,
        mesh=experiment.mesh,
        precision=experiment.precision,
        objective=experiment.objective,
        rules=rules,
        shape=cache_shape(experiment, rules, prompt, source),
        prompt=prompt,
    )
