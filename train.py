"""Trains the model of a config; the same command again continues a run that was stopped or killed.

    python train.py --config=configs/tiny.py --workdir=runs/tiny
    JAX_NUM_CPU_DEVICES=8 python train.py --config=configs/tiny.py --workdir=runs/tiny8 \
        --config.mesh.fsdp=4 --config.mesh.tensor=2

The workdir gets `config.json`, `metrics.jsonl`, `tensorboard/` and `checkpoints/`.
"""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Any

import cli
from parallel.huge_pages import use_huge_pages


def main(config: Any, workdir: Path) -> None:
    """The plan, then the run; a layout that was chosen and runs out of memory gives way."""
    from before_run import with_plan  # here: a typo on the command line costs no import of JAX

    with_plan(config, lambda config: train(config, workdir), say)


def train(config: Any, workdir: Path) -> None:
    """Config, mesh, data, state, step, loop."""
    import jax

    from before_run import beginning, check_same_inputs, check_trainable
    from config_border import check_same_run, has_config, read_config, write_config
    from config_types import plain
    from data.loader import device_batches, local_rows
    from experiment import read_experiment
    from memory.measure import MemoryWatch
    from models.flops import flops_per_token
    from parallel.compilation import keep_compiled, safe_compilation
    from parallel.mesh import make_mesh
    from teacher import open_teacher
    from training.checkpoint import Checkpoints
    from training.compiled_step import CompiledStep
    from training.evaluation import COUNTS, evaluate, make_eval_step
    from training.metrics import Metrics
    from training.optim import make_optimizer
    from training.schedules import make_schedule
    from training.sparsity import make_sparsity
    from training.state import abstract_state, count_of, create_state
    from training.step import make_step
    from training.stop import StopSignal

    began = time.perf_counter()

    # --- Config and mesh ----------------------------------------------------------------------
    keep_compiled()
    watch = MemoryWatch(workdir / "memory")
    experiment = read_experiment(config, jax.device_count())
    checkpoints = Checkpoints(workdir / "checkpoints", experiment.checkpoint)
    check_trainable(checkpoints, workdir)
    if checkpoints.latest() is not None and has_config(workdir):
        check_same_run(read_config(workdir), config)
    mesh = make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        model = experiment.build_model()
        spec = model.rules.spec("batch seq")
        settings = experiment.train
        sparsity = make_sparsity(experiment.sparsity, model)
        trained = model.trained(model.axes)
        optimizer = make_optimizer(experiment.optimizer, settings.steps, trained, sparsity.names)
        kind, count = jax.devices()[0].device_kind, jax.device_count()
        checkpoints, params_of = beginning(checkpoints, workdir, experiment, model, mesh)
        say(f"devices: {count} x {kind}; {experiment.describe_layout()}")
        for note in experiment.without_effect(jax.default_backend()):
            say(f"note: {note}")

        # --- Data -----------------------------------------------------------------------------
        data = experiment.open_data(workdir)
        rows = local_rows(mesh, spec, experiment.data.batch_size)
        say(str(data.summary))

        # --- Teacher --------------------------------------------------------------------------
        teacher = open_teacher(config, experiment, model, data.tokenizer, mesh)
        fingerprints = {"data": data.summary.fingerprint, "teacher": teacher.fingerprint}
        if teacher.line:
            say(teacher.line)

        # --- State: restored, read from config.init_from, or drawn from the seed --------------
        start, state = 0, None
        if checkpoints.latest() is not None:
            abstract = abstract_state(model, optimizer, experiment.precision, mesh)
            start, state = checkpoints.restore(None, abstract)
            check_same_inputs(checkpoints.metadata(start), fingerprints, config, workdir)
            say(f"continuing from step {start}")
        else:
            state = create_state(
                model, optimizer, experiment.precision, experiment.seed, mesh, params_of()
            )
        if jax.process_index() == 0:  # only now is nothing refused any more
            write_config(workdir, config)
        every, trained = (count_of(tree) for tree in (state.params, model.trained(state.params)))
        part = "" if trained == every else f", {trained:,} of them trained"
        padded = experiment.model.padded_vocab
        table = f", vocabulary padded to {padded}" if padded else ""
        say(f"model: {every:,} parameters{part}{table}")

        # --- Step -----------------------------------------------------------------------------
        step_fn = make_step(
            model,
            optimizer,
            make_schedule(experiment.optimizer, settings.steps),
            experiment.precision,
            seed=experiment.seed,
            micro_steps=experiment.micro_steps,
            sparsity=sparsity,
            stochastic=experiment.optimizer.stochastic_rounding,
            distillation=teacher.distillation,
        )
        jitted = jax.jit(step_fn, donate_argnums=0, compiler_options=safe_compilation())
        eval_step = jax.jit(
            make_eval_step(model, experiment.precision, data.tokenizer.token_bytes()),
            compiler_options=safe_compilation(),
        )

        def held_out_loss(params: Any) -> dict[str, float]:
            with data.held_out(experiment.eval.batches, rows=rows) as loader:
                return evaluate(eval_step, params, device_batches(loader, mesh, spec))

        # --- Loop -----------------------------------------------------------------------------
        metrics = Metrics(
            workdir,
            experiment.logging,
            total_steps=settings.steps,
            log_every=settings.log_every,
            max_skipped=settings.max_skipped,
            step=start,
            flops_per_token=flops_per_token(
                experiment.model, experiment.data.sequence_length, experiment.source_length
            ),
            run_config=plain(config),
            watch=watch.row,
        )
        run_step = CompiledStep(jitted, metrics.paused, watch.compiled, say)
        every, eval_every = experiment.checkpoint.every, experiment.eval.every
        if start >= settings.steps:
            say(f"nothing to do: config.train.steps is {settings.steps}")
        with (
            watch,
            data.train(start, rows=rows) as loader,
            closing(checkpoints),
            closing(metrics),
            StopSignal() as stop,
        ):
            batches = device_batches(loader, mesh, spec)
            for step in range(start + 1, settings.steps + 1):
                state, measured = run_step(state, next(batches), *teacher.arguments)
                metrics.push(step, measured)
                watch.after(step)
                stopping, done = stop.requested(step), step == settings.steps
                saving = done or stopping or step % every == 0
                due = done or (eval_every > 0 and step % eval_every == 0)
                held_out: dict[str, float] = {}
                if due or (saving and experiment.checkpoint.best):
                    with metrics.paused() as row:
                        held_out = held_out_loss(state.params)
                        row |= {f"eval_{n}": v for n, v in held_out.items() if n not in COUNTS}
                # The row comes first, so that a kill in between loses neither; and steps that are
                # skipped push no good checkpoint out.
                if saving and (metrics.flush() or done or stopping):
                    kept = {"config": plain(config), "metrics": held_out}
                    checkpoints.save(step, state, fingerprints | kept)
                if done:
                    say(f"on held-out files: {format_result(held_out)}")
                if stopping:
                    say(f"stopped after step {step}; the same command continues")
                    break
        say(f"ended after {time.perf_counter() - began:.0f} s; to evaluate the newest checkpoint:")
        say(f"    {cli.this_python()} evaluate.py --workdir={workdir}")


def format_result(result: dict[str, float]) -> str:
    """A result of `evaluate` for a person."""
    words = {"perplexity": "perplexity {:.2f}", "bits_per_byte": "{:.3f} bits per byte"}
    shown = [n for n in result if n in words or n.endswith(("loss", "_accuracy"))]
    form = lambda name: words.get(name, f"{name.replace('_', ' ')} {{:.4f}}")
    return ", ".join(form(name).format(result[name]) for name in shown)


def say(line: str) -> None:
    """Prints on one process alone."""
    import jax

    if jax.process_index() == 0:
        print(line, flush=True)


if __name__ == "__main__":
    use_huge_pages()
    cli.run(main, name="train.py", about=__doc__, config_from="file")
