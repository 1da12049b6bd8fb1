"""Generates text with a checkpoint, on any mesh. One prompt is streamed; several go in a batch.

    python generate.py --workdir=runs/tiny --prompt="def main("
    python generate.py --hf=DIR --prompts=prompts.txt --json --config.generate.temperature=0.8
    echo "import" | python generate.py --workdir=runs/tiny --prompts=-
    JAX_NUM_CPU_DEVICES=8 python generate.py --workdir=runs/tiny --prompt=import \
        --config.mesh.data=2 --config.mesh.tensor=4

`config.generate` says how: what is drawn from, when a text ends, how the cache is kept. The same
`config.seed` gives the same texts on every mesh. With --json every line of stdout is an object with
`number`, `prompt`, `text`, `tokens` and `reason` (end, stop or length), as texts end.
"""

from __future__ import annotations

import json as json_format
import sys
import time
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
    json: bool,
) -> None:
    """Prompts, mesh, parameters, texts."""
    from generation.prompts import read_prompts

    given = read_prompts(prompt or [], prompts, image or [])
    import jax  # here: a typo on the command line costs no import

    from experiment import read_experiment
    from inference import decoding_rules, lengths_of, make_engine, requests_of, tokenizer_of
    from parallel.compilation import keep_compiled
    from parallel.mesh import make_mesh
    from run_params import saved_params

    keep_compiled()
    experiment = read_experiment(config, jax.device_count(), training=False)
    decoding_rules(experiment)
    tokenizer = tokenizer_of(experiment, workdir)
    requests = requests_of(experiment, given, tokenizer)
    lengths = lengths_of(experiment, requests)
    say = jax.process_index() == 0
    if say:
        for note in experiment.generate.without_effect():
            print(f"note: {note}", file=sys.stderr)

    mesh = make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        model = experiment.build_model()
        _, params = saved_params(experiment, model, mesh, workdir, step, hf)
        engine = make_engine(experiment, model, params, mesh, *lengths)
        del params
        since = time.perf_counter()
        ended = 0
        for request, text, reason in engine.run(requests):
            if not say:
                continue
            one = len(requests) == 1 and not json
            if one:
                print(text, end="\n" if reason else "", flush=True)
            elif reason and json:
                print(json_format.dumps(_object(request, given[request.number].text)), flush=True)
            while not (one or json) and ended < len(requests) and requests[ended].text.reason:
                print(f"--- {given[ended].where}\n{requests[ended].text}", flush=True)
                ended += 1
    if say:
        tokens = sum(len(request.text.tokens) for request in requests)
        seconds = time.perf_counter() - since
        print(
            f"{tokens} tokens in {seconds:.1f} s, compilation included; "
            f"{experiment.describe_layout()}",
            file=sys.stderr,
        )


def _object(request: Any, prompt: str) -> dict[str, Any]:
    return {
        "number": request.number,
        "prompt": prompt,
        "text": str(request.text),
        "tokens": request.text.tokens,
        "reason": request.text.reason,
    }


FLAGS = (
    cli.Flag("step", int, None, "the step to restore; default: the newest"),
    cli.Flag("prompt", str, None, "a text to continue; may be given several times", several=True),
    cli.Flag("prompts", Path, None, "a file of prompts, one a line, or .jsonl; - is stdin"),
    cli.Flag("image", Path, None, "an image for each --prompt, in order", several=True),
    cli.Flag("json", bool, False, "an object a line, as texts end"),
)

if __name__ == "__main__":
    use_huge_pages()
    cli.run(
        main, name="generate.py", about=__doc__, config_from="workdir or checkpoint", flags=FLAGS
    )
