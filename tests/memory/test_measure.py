"""What is measured of memory: rows, profiles, compilations, and running out of it."""

from __future__ import annotations

import gc
import gzip
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

from memory.measure import MemoryWatch, OutOfMemory, device_memory, is_out_of_memory, live_bytes
from parallel.precision import PrecisionConfig
from tests.processes import ROOT
from tests.runs import arguments, environment, finish, rows, wait_until, write_texts
from tests.small import layout
from training.state import abstract_state, create_state
from training.step import make_step


def alive() -> int:
    return live_bytes(jax.live_arrays())


def out_of_memory() -> None:
    jnp.zeros(2**46, jnp.float32).block_until_ready()  # 256 TiB: more than an address can name


def test_bytes_are_those_of_one_device(use_mesh):
    with use_mesh(fsdp=8):
        mesh = jax.sharding.get_mesh()
        gc.collect()
        before = alive()
        array = jax.device_put(jnp.zeros(8 * 1024), jax.NamedSharding(mesh, jax.P("fsdp")))
        assert alive() - before == 4 * 1024
        del array
        assert alive() == before
    assert device_memory() is None  # no allocator that counts, on CPU


def test_an_allocator_is_believed(monkeypatch):
    class Device:
        def __init__(self, in_use, peak):
            self.stats = {"bytes_in_use": in_use, "peak_bytes_in_use": peak}

        def memory_stats(self):
            return self.stats

    monkeypatch.setattr(jax, "local_devices", lambda: [Device(5, 9), Device(7, 8)])
    assert device_memory() == (7, 9)


def test_a_row(tmp_path):
    with MemoryWatch(tmp_path) as watch:
        first = watch.row()
        kept = jnp.zeros(2**20, jnp.float32) + 1
        with_more = watch.row()
        del kept
        last = watch.row()
    assert with_more["device_bytes"] >= first["device_bytes"] + 2**22
    assert with_more["live_arrays"] >= first["live_arrays"] + 1
    assert with_more["live_array_bytes"] == with_more["device_bytes"]
    assert last["device_bytes"] == with_more["device_bytes"] - 2**22
    assert last["device_peak_bytes"] == with_more["device_bytes"]
    assert last["host_bytes"] > 2**24  # Python and JAX alone are more


def test_compilations_are_counted(tmp_path):
    double = jax.jit(lambda x: x * 2)
    x, y = jnp.zeros(3), jnp.zeros(4)
    with MemoryWatch(tmp_path) as watch:
        for argument in (x, x, y, x):
            double(argument)
        assert watch.compilations == 2
    jax.jit(lambda x: x * 3)(x)
    assert watch.compilations == 2


def test_a_step_compiled_again_is_a_warning(tmp_path, caplog):
    step = jax.jit(lambda batch: batch["tokens"].sum())
    watch = MemoryWatch(tmp_path)
    for length in (32, 64):
        shape = jax.ShapeDtypeStruct((8, length), jnp.int32)
        batch = {"tokens": shape, "targets": shape, "fixed": jax.ShapeDtypeStruct((2,), jnp.int32)}
        assert watch.compiled(step.lower(batch).compile(), batch) >= 8 * length * 4
    (record,) = caplog.records
    expected = "the step is compiled again: targets, tokens: int32[8,32] -> int32[8,64]"
    assert record.getMessage() == expected


def test_a_leak_is_a_warning(tmp_path, caplog):
    kept, watch = [], MemoryWatch(tmp_path)
    for step in range(1, 21):
        kept.append(jnp.zeros((2, 9)))
        watch.after(step)
    (record,) = caplog.records
    assert "test_measure.py:" in record.getMessage()
    assert "float32[2,9]" in record.getMessage()
    assert watch.seconds_blocked > 0


def test_a_signal_asks_for_a_profile(tmp_path, capsys):
    kept = jnp.zeros((3, 3))
    before = signal.getsignal(signal.SIGUSR1)
    with MemoryWatch(tmp_path / "memory") as watch:
        watch.after(1)
        assert not (tmp_path / "memory").exists()
        os.kill(os.getpid(), signal.SIGUSR1)
        watch.after(2)
        watch.after(3)
    assert signal.getsignal(signal.SIGUSR1) == before
    (file,) = (tmp_path / "memory").iterdir()
    assert file.name == "step-2.prof"
    assert str(file) in capsys.readouterr().out
    assert os.path.basename(__file__).encode() in gzip.decompress(file.read_bytes())
    del kept


def test_out_of_memory_is_one_line_and_a_profile(tmp_path):
    step = jax.jit(lambda batch: batch["tokens"].sum())
    batch = {"tokens": jnp.zeros((1024, 1024), jnp.int32)}
    watch = MemoryWatch(tmp_path)
    watch.compiled(step.lower(batch).compile(), batch)
    watch.after(6)
    with pytest.raises(OutOfMemory) as raised, watch:
        out_of_memory()
    message = str(raised.value)
    assert message.startswith("out of memory at step 7; it was compiled for 4 MiB per device: Out")
    assert "config.remat.policy=full" in message
    assert "\n" not in message
    file = tmp_path / "step-7-out-of-memory.prof"
    assert f"in {file}, for pprof" in message
    assert file.exists()
    assert is_out_of_memory(raised.value)


def test_other_errors_pass(tmp_path):
    with pytest.raises(KeyError, match="x"), MemoryWatch(tmp_path):
        raise KeyError("x")
    assert not is_out_of_memory(ValueError("RESOURCE_EXHAUSTED"))
    assert list(tmp_path.iterdir()) == []


def test_out_of_memory_is_seen_behind_another_error():
    @contextmanager
    def closing_fails():
        try:
            yield
        finally:
            raise RuntimeError("the metrics of a failed step")

    with pytest.raises(RuntimeError, match="metrics") as raised, closing_fails():
        out_of_memory()
    assert is_out_of_memory(raised.value)


@pytest.mark.parametrize(
    "sizes",
    [
        dict(fsdp=8, zero=3),
        pytest.param(dict(data=2, fsdp=2, tensor=2, zero=1), marks=pytest.mark.slow),
        pytest.param(dict(tensor=8, kv_heads=2), marks=pytest.mark.slow),  # replicated heads
    ],
)
def test_state_bytes_between_steps_are_the_compiled_arguments_less_the_batch(sizes):
    """To the byte: nothing else stays on a device from step to step."""
    precision, optimizer = PrecisionConfig(), optax.adamw(1e-3)
    with layout(dropout=0.0, layers=1, **sizes) as laid:
        step = make_step(laid.model, optimizer, lambda _: jnp.float32(0), precision, seed=0)
        batch = laid.batch()
        abstract = abstract_state(laid.model, optimizer, precision, laid.mesh)
        compiled = jax.jit(step, donate_argnums=0).lower(abstract, batch).compile()
        gc.collect()
        before = alive() - live_bytes(batch.values())
        state = create_state(laid.model, optimizer, precision, 0, laid.mesh)
        for _ in range(2):
            state, _ = compiled(state, batch)
        jax.block_until_ready(state)
        del _
        arguments = compiled.memory_analysis().argument_size_in_bytes
        assert alive() - before == arguments
        batch_bytes = live_bytes(batch.values())
        del batch
        assert alive() - before == arguments - batch_bytes
        per_device = Counter()
        for array in jax.tree.leaves(state):
            for shard in array.addressable_shards:
                per_device[shard.device] += shard.data.nbytes
        assert set(per_device.values()) == {arguments - batch_bytes}


# train.py, in a process of its own, with something planted into what it calls after a step.
PLANTED = """
import sys
import cli
cli.hide_cuda()  # as the command line does, before JAX
import jax.numpy as jnp
import train
from training.metrics import Metrics

what, *argv = sys.argv[1:]
push, kept = Metrics.push, []

def planted(self, step, metrics):
    push(self, step, metrics)
    if what == "array":
        kept.append(jnp.full((3, 5), step, jnp.float32))
    if what == "metric":
        kept.append(metrics["loss"])
    if what == "too much" and step == 3:
        jnp.zeros(2**46, jnp.float32).block_until_ready()

Metrics.push = planted
cli.run(train.main, name="train.py", about="", config_from="file", argv=argv)
"""


def train_with(what, tmp_path, **keys):
    """train.py's process with `what` planted, and the file that plants it."""
    file = tmp_path / "planted.py"
    file.write_text(PLANTED)
    texts = write_texts(tmp_path / "texts")
    argv = arguments(tmp_path / "run", texts, mesh__data=1, mesh__fsdp=2, **keys)
    environ = environment(devices=2, compiled=tmp_path.parent / "compiled")
    environ["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(file), what, *argv]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ, cwd=ROOT
    )
    return process, file


@pytest.mark.slow
@pytest.mark.parametrize("what", ["array", "metric"])
def test_a_leak_in_train_is_named_within_twenty_steps(what, tmp_path):
    process, file = train_with(what, tmp_path, train__steps=20)
    _, err = finish(process)
    (warning,) = err.splitlines()
    assert warning.startswith("warning: arrays made at ")
    if what == "array":
        line = next(n for n, text in enumerate(PLANTED.split("\n"), 1) if "jnp.full" in text)
        assert f"{file}:{line} (planted)" in warning
        assert "float32[3,5]" in warning
    else:
        file = "training/compiled_step.py"
        source = (ROOT / file).read_text().splitlines()
        line = next(n for n, text in enumerate(source, 1) if "](state, batch, *more)" in text)
        assert f" {file}:{line} (CompiledStep.__call__)" in warning


@pytest.mark.slow
def test_sixty_steps_with_saves_and_evaluations_warn_of_nothing(tmp_path):
    process, _ = train_with(
        "nothing", tmp_path, train__steps=60, checkpoint__every=9, eval__every=7
    )
    wait_until(process, lambda: rows(tmp_path / "run"))
    process.send_signal(signal.SIGUSR1)
    out, err = finish(process)
    assert err == ""
    (profile,) = re.findall(r"memory profile, for pprof: (\S+)", out)
    assert b"train.py" in gzip.decompress(Path(profile).read_bytes())
    found = rows(tmp_path / "run")
    assert len(found) == 60
    names = "device_bytes device_peak_bytes live_arrays live_array_bytes host_bytes compilations"
    assert all(row[name] > 0 for row in found for name in names.split())
    # The step, the evaluation and what they need: nothing is compiled once both have run.
    assert len({row["compilations"] for row in found[8:]}) == 1
    assert re.search(r"memory 0\.00 GiB, peak 0\.00", out)


@pytest.mark.slow
def test_out_of_memory_in_train_is_one_line(tmp_path):
    process, _ = train_with("too much", tmp_path)
    _, err = finish(process, code=2)
    (line,) = err.splitlines()
    assert line.startswith("error: out of memory at step 3; it was compiled for")
    assert (tmp_path / "run" / "memory" / "step-3-out-of-memory.prof").exists()
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3]
