"""A run measured for a report: sizes, held-out loss, tokens a second, and on what machine."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from compressed_size import device_bytes, sizes
from data.loader import device_batches, local_rows
from generation.rows import Request
from generation.text import Text
from inference import decoder_weights, make_engine
from parallel.compilation import safe_compilation
from parallel.mesh import make_mesh
from run_params import saved_params
from training.checkpoint import Checkpoints
from training.evaluation import evaluate, make_eval_step

Row = dict[str, Any]
TIMES = 3  # of which the median is taken
OF_TEXT = ("loss", "perplexity", "bits_per_byte")


def machine_name() -> str:
    """The devices, and the processor where they are CPUs."""
    found = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    if jax.default_backend() != "cpu":
        return found
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return f"{found} on {os.cpu_count()} cores of {name}"


def measured(experiment: Any, folder: Path, data: Any, prompt: int, tokens: int) -> Row:
    """Sizes, held-out loss and speeds of a run's newest step."""
    mesh = make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        model = experiment.build_model()
        read = saved_params(experiment, model, mesh, folder, None, None)
        state = read.source / "state"
        disk = sum(file.stat().st_size for file in state.rglob("*") if file.is_file())
        row = {"step": read.step, "disk_bytes": disk, "optimizer_on_disk": training_state(read)}
        row |= sizes(experiment, read.params)
        row |= evaluated(experiment, model, mesh, data, read.params)
        return row | decoded(experiment, model, mesh, data, read.params, prompt, tokens)


def training_state(read: Any) -> bool:
    """Whether a checkpoint has more than parameters."""
    _, tensors = Checkpoints(read.source.parent).tensors(read.step)
    return not all(name.startswith("params/") for name in tensors)


def evaluated(experiment: Any, model: Any, mesh: Any, data: Any, params: Any) -> Row:
    """Losses, the compiled step's arguments, and its speed."""
    spec = model.rules.spec("batch seq")
    rows = local_rows(mesh, spec, experiment.data.batch_size)
    step = make_eval_step(model, experiment.precision, data.tokenizer.token_bytes())
    with data.held_out(experiment.eval.batches, rows=rows) as loader:
        batches = list(device_batches(loader, mesh, spec))
    # Kept though unused: what a batch holds besides is then known.
    jitted = jax.jit(step, compiler_options=safe_compilation(), keep_unused=True)
    compiled = jitted.lower(params, batches[0]).compile()
    analysis = compiled.memory_analysis()
    result = evaluate(compiled, params, batches)  # and warm
    count = result.get("tokens") or result["rows"]
    seconds = median(lambda: evaluate(compiled, params, batches))
    row = {name: result[name] for name in OF_TEXT if name in result}
    row |= {"evaluation_tokens": count, "evaluation_tokens_per_second": count / seconds}
    if analysis is not None:
        arguments = analysis.argument_size_in_bytes - device_bytes(batches[0])
        row["compiled_argument_bytes"] = arguments
    return row


def decoded(
    experiment: Any, model: Any, mesh: Any, data: Any, params: Any, prompt: int, tokens: int
) -> Row:
    """Tokens a second of greedy decoding after held-out text, of all rows; params are used up.

    Nothing of a model that gives no text, or reads more than text.
    """
    import numpy as np

    if experiment.model.family != "decoder":
        return {}
    with data.held_out(1, rows=np.arange(experiment.data.batch_size)) as loader:
        texts = np.asarray(next(iter(loader))["tokens"])[:, :prompt]
    rows = [texts[n % len(texts)].tolist() for n in range(experiment.generate.batch_size)]
    weights = decoder_weights(experiment, model, params)
    engine = make_engine(experiment, weights, mesh, prompt, 0)

    def generated() -> int:
        requests = [
            Request(n, list(row), Text(data.tokenizer.decode), tokens) for n, row in enumerate(rows)
        ]
        for _ in engine.run(requests):
            pass
        return sum(len(request.text.tokens) for request in requests)

    count = generated()  # and warm
    seconds = median(generated)
    return {"decoding_tokens": count, "decoding_tokens_per_second": count / seconds}


def median(function: Callable[[], Any]) -> float:
    """Seconds of a call that waits for what it computes."""
    found = []
    for _ in range(TIMES):
        since = time.perf_counter()
        function()
        found.append(time.perf_counter() - since)
    return statistics.median(found)
