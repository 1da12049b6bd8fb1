"""Generates text with a checkpoint, on any mesh. One prompt is streamed; several go in a batch.

    python generate.py --workdir=runs/tiny --prompt="def main("
    python generate.py --hf=DIR --prompts=prompts.txt --json --config.generate.temperature=0.8
    echo "import" | python generate.py --workdir=runs/tiny --prompts=-
    python generate.py --workdir=runs/base --prompt=import --adapter=runs/lora1 \
        --prompt=import --adapter=runs/lora2
    JAX_NUM_CPU_DEVICES=8 python generate.py --workdir=runs/tiny --prompt=import \
        --config.mesh.data=2 --config.mesh.tensor=4

`config.generate` says how: what is drawn from, when a text ends, how the cache is kept. The same
`config.seed` gives the same texts on every mesh. With --json every line of stdout is an object with
`number`, `prompt`, `text`, `tokens` and `reason` (end, stop or length), as texts end.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from json import dumps
from pathlib import Path
from typing import Any

import cli
from parallel.huge_pages import use_huge_pages


def main(
    config: Any,
    workdir: Path | None,
    hf: Path | None,
    step: int | None,
    prompt: list[str] | None,
    prompts: Path | None,
    image: list[Path] | None,
    adapter: list[Path] | None,
    json: bool,
) -> None:
    """Prompts, mesh, parameters, texts."""
    if hf is not None and step is not None:
        raise ValueError(f"--step={step}: --hf has no steps; leave it out")
    from generation.prompts import read_prompts, with_adapters

    given = with_adapters(read_prompts(prompt or [], prompts, image or []), adapter or [])
    adapters = [*dict.fromkeys(each.adapter for each in given if each.adapter is not None)]
    import jax  # here: a typo on the command line costs no import

    import run_adapters
    from config_border import with_values
    from experiment import read_experiment
    from inference import decoder_weights, decoding_rules, make_engine
    from inference_plan import fits_here
    from parallel.compilation import keep_compiled
    from parallel.mesh import make_mesh
    from parallel.several import NONE
    from prompt_tokens import lengths_of, requests_of, tokenizer_of
    from run_params import saved_params

    keep_compiled()
    experiment = read_experiment(config, jax.device_count(), training=False)
    generate, parts = experiment.generate, decoding_rules(experiment).parts("batch")
    wanted = -(-len(given) // parts) * parts  # rows that prompts are there for
    generate = replace(generate, batch_size=min(generate.batch_size, wanted))
    experiment = replace(experiment, generate=generate)
    tokenizer = tokenizer_of(experiment, workdir)
    requests = requests_of(experiment, given, tokenizer)
    lengths = lengths_of(experiment, requests)
    first = jax.process_index() == 0

    def say(line: str) -> None:
        if first:
            print(line, file=sys.stderr)

    rows = {"config.generate.batch_size": generate.batch_size}
    fits_here(with_values(config, rows), *lengths, say)
    for note in generate.without_effect():
        say(f"note: {note}")

    mesh = make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        model = experiment.build_model()
        read = saved_params(experiment, model, mesh, workdir, step, hf)
        params = read.params
        if adapters:
            on = experiment, model, params, read.step, workdir
            model, params = run_adapters.with_adapters(*on, adapters, mesh)
            for request, one in zip(requests, given, strict=True):
                request.adapter = adapters.index(one.adapter) if one.adapter else NONE
        del read
        weights = decoder_weights(experiment, model, params)
        del params
        engine = make_engine(experiment, weights, mesh, *lengths, adapters=bool(adapters))
        since = time.perf_counter()
        show = shown_as_json if json else streamed if len(requests) == 1 else in_order
        for text in show(engine.run(requests), given):
            if first:
                print(text, end="", flush=True)
    tokens = sum(len(request.text.tokens) for request in requests)
    seconds = time.perf_counter() - since
    say(f"{tokens} tokens in {seconds:.1f} s with compilation, {experiment.describe_layout()}")


def streamed(pieces: Iterable[Any], given: Sequence[Any]) -> Iterator[str]:
    """One text as it comes."""
    del given
    for _, text, reason in pieces:
        yield text + ("\n" if reason else "")


def in_order(pieces: Iterable[Any], given: Sequence[Any]) -> Iterator[str]:
    """Whole texts, each after its prompt, in the order of those."""
    ended: dict[int, str] = {}
    following = 0
    for request, _, reason in pieces:
        if reason:
            prompt = given[request.number].text or given[request.number].where
            ended[request.number] = f"--- {prompt}\n{request.text}\n"
        while following in ended:
            yield ended.pop(following)
            following += 1


def shown_as_json(pieces: Iterable[Any], given: Sequence[Any]) -> Iterator[str]:
    """An object a line for each text that has ended."""
    for request, _, reason in pieces:
        if reason:
            row = {"number": request.number, "prompt": given[request.number].text}
            row |= {"text": str(request.text), "tokens": request.text.tokens, "reason": reason}
            yield dumps(row) + "\n"


FLAGS = (
    cli.Flag("step", int, None, "the step to restore; default: the newest"),
    cli.Flag("prompt", str, None, "a text to continue; may be given several times", several=True),
    cli.Flag("prompts", Path, None, "a file of prompts, one a line, or .jsonl; - is stdin"),
    cli.Flag("image", Path, None, "an image for each --prompt, in order", several=True),
    cli.Flag("adapter", Path, None, "a run of lora on --workdir, for each --prompt", several=True),
    cli.Flag("json", bool, False, "an object a line, as texts end"),
)

if __name__ == "__main__":
    use_huge_pages()
    cli.run(
        main, name="generate.py", about=__doc__, config_from="workdir or checkpoint", flags=FLAGS
    )
