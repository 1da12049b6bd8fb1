"""Metrics arrive one step late, complete, and where they should."""

import io
import json
import os
import resource
import sys
import time

import jax
import jax.numpy as jnp
import pytest

from parallel.chips import peak_flops
from training import metrics as metrics_module
from training.metrics import LoggingConfig, Metrics
from training.writers import JsonLines, Progress

QUIET = LoggingConfig(tensorboard=False)


def scalars(loss, finite=True, tokens=100):
    return {
        "loss": jnp.float32(loss),
        "grad_norm": jnp.float32(0.5),
        "learning_rate": jnp.float32(1e-3),
        "tokens": jnp.int32(tokens),
        "finite": jnp.asarray(finite),
    }


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def make(workdir, config=QUIET, **changes):
    arguments = {"total_steps": 7, "log_every": 3, "max_skipped": 2} | changes
    return Metrics(workdir, config, **arguments)


def test_rows_are_written_one_step_late(tmp_path):
    metrics = make(tmp_path)
    for step in range(1, 8):
        metrics.push(step, scalars(step / 3))
        assert [row["step"] for row in rows(tmp_path)] == [s for s in (1, 3, 6, 7) if s < step]
    metrics.close()
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [1, 3, 6, 7]
    # The float32 itself, not a rounding of it.
    assert [row["loss"] for row in found] == [float(jnp.float32(s / 3)) for s in (1, 3, 6, 7)]
    names = "loss grad_norm learning_rate step_seconds tokens_per_second"
    assert all(set(names.split()) <= set(row) for row in found)


def test_the_host_waits_for_the_step_before_only(tmp_path):
    # Three steps of which each needs the one before, all dispatched at once: when `push` returns,
    # the first is done and the last is not.
    work = jnp.ones((700, 700))
    step = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, x: jnp.tanh(x @ x), x))
    step(work).block_until_ready()
    metrics = make(tmp_path)
    outputs = [step(work)]
    metrics.push(1, scalars(0) | {"loss": outputs[0].mean()})
    outputs += [step(outputs[-1])]
    outputs += [step(outputs[-1])]
    metrics.push(2, scalars(0) | {"loss": outputs[-1].mean()})
    assert outputs[0].is_ready()
    assert not outputs[-1].is_ready()
    metrics.close()
    assert outputs[-1].is_ready()


def test_rates_are_means_over_the_steps_since_the_last_row(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics_module.time, "perf_counter", lambda: now[0])
    metrics = make(tmp_path, total_steps=9, log_every=4)
    for step in range(1, 10):
        metrics.push(step, scalars(1.0))
        now[0] += 2.0  # A step takes two seconds; `push` sees the one before end.
        if step == 5:
            with metrics.paused() as row:
                now[0] += 1000.0
                row["eval_loss"] = 3.0
    metrics.close()
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [1, 4, 5, 8, 9]
    assert [row["step_seconds"] for row in found] == [2.0] * 5
    assert [row["tokens_per_second"] for row in found] == [50.0] * 5
    assert [row.get("eval_loss") for row in found] == [None, None, 3.0, None, None]
    assert metrics.seconds_blocked == 0.0


def test_a_resumed_run_cuts_later_rows_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 3, 6)]
    path.write_text("".join(lines) + '{"step": 2, "lo')
    metrics = make(tmp_path, step=3)
    assert path.read_text() == "".join(lines[:2])
    for step in (4, 5, 6, 7):
        metrics.push(step, scalars(2.0))
    metrics.close()
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [
        (1, 1),
        (3, 1),
        (6, 2),
        (7, 2),
    ]
    make(tmp_path).close()  # From step 0: nothing of the earlier run is left.
    assert rows(tmp_path) == []


def test_a_cut_that_is_interrupted_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 9}\n')

    def kill(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(path), "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        JsonLines(path, 1)
    assert path.read_text() == '{"step": 1}\n{"step": 9}\n'


def test_a_full_disk_delays_rows_and_tears_none(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    writer = JsonLines(path, 0)
    writer.write({"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 3, hard))
    try:
        writer.write({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text().startswith('{"step": 1}\n')
    assert "--workdir" in caplog.text
    writer.write({"step": 3})
    writer.close()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3]


def test_skipped_steps_in_a_row_end_the_run(tmp_path):
    metrics = make(tmp_path, log_every=1)
    for step, (loss, finite) in enumerate(((1.0, False), (1.0, True), (float("nan"), True)), 1):
        metrics.push(step, scalars(loss, finite))
    metrics.push(4, scalars(1.0, False))
    with pytest.raises(ValueError, match=r"config\.train\.max_skipped = 2: step 4 .* 2 in a row"):
        metrics.push(5, scalars(1.0, False))
    # The row that shows it is there, and JSON that any reader takes.
    assert [row["loss"] for row in rows(tmp_path)] == [1.0, 1.0, None, 1.0]


def test_tensorboard_without_tensorflow(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def run(steps, first, loss):
        metrics = make(tmp_path, LoggingConfig(tensorboard=True), step=first)
        for step in steps:
            metrics.push(step, scalars(loss))
        metrics.close()

    run((1, 2, 3, 4, 5, 6), 0, 2.0)
    time.sleep(1.1)  # Event files are ordered by a name that has the second in it.
    run((4, 5, 6, 7), 3, 1.0)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(1, 2.0), (3, 2.0), (6, 1.0), (7, 1.0)]
    assert "tensorflow" not in sys.modules


def test_weights_and_biases_is_an_offline_extra(tmp_path, monkeypatch):
    config = LoggingConfig(tensorboard=False, wandb=True)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"config\.logging\.wandb = True: .*'\.\[wandb\]'"):
        make(tmp_path, config)

    calls = []

    class Wandb:
        @classmethod
        def init(cls, **arguments):
            calls.append(arguments)
            return cls

        @classmethod
        def log(cls, row, step):
            calls.append(step)

        @classmethod
        def finish(cls):
            calls.append("finish")

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    metrics = make(tmp_path, config, run_config={"seed": 0})
    metrics.push(1, scalars(1.0))
    metrics.close()
    first, *rest = calls
    assert first["mode"] == "offline"
    assert first["config"] == {"seed": 0}
    assert rest == [1, "finish"]


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    metrics = make(tmp_path, LoggingConfig(tensorboard=True))
    metrics.push(1, scalars(1.0))
    metrics.close()
    assert os.listdir(tmp_path) == []


def test_mfu_where_the_peak_is_known(tmp_path, monkeypatch):
    kinds = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "TPU v5 lite": 197e12}
    assert {kind: peak_flops(kind) for kind in kinds} == kinds
    assert peak_flops(jax.devices()[0].device_kind) is None
    monkeypatch.setattr(metrics_module, "peak_flops", lambda kind: 1e6)
    metrics = make(tmp_path, flops_per_token=6e3)
    metrics.push(1, scalars(1.0))
    metrics.close()
    (row,) = rows(tmp_path)
    assert row["mfu"] == pytest.approx(6e3 * row["tokens_per_second"] / (8 * 1e6))


def test_a_row_has_what_the_watch_says(tmp_path):
    calls = []
    metrics = make(tmp_path, watch=lambda: calls.append(0) or {"live_arrays": len(calls)})
    for step in range(1, 8):
        metrics.push(step, scalars(1.0))
    metrics.close()
    assert [row["live_arrays"] for row in rows(tmp_path)] == [1, 2, 3, 4]


ROW = {
    "step": 20,
    "loss": 3.25,
    "tokens_per_second": 12345.6,
    "step_seconds": 2,
    "device_bytes": 2**30,
    "device_peak_bytes": 3 * 2**29,
}


def test_progress_on_a_terminal_and_in_a_file():
    line = (
        "step  20/100 | loss 3.2500 | 12,346 tokens/s | memory 1.00 GiB, peak 1.50 | 0:02:40 left"
    )
    stream = io.StringIO()
    Progress(100, stream).write(ROW)
    assert stream.getvalue() == line + "\n"
    stream = io.StringIO()
    stream.isatty = lambda: True
    Progress(100, stream).write(ROW)
    assert stream.getvalue().endswith(line + "\r")


def test_bad_config(tmp_path):
    with pytest.raises(ValueError, match=r"config\.train\.log_every = 0"):
        make(tmp_path, log_every=0)
