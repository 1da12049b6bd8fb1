"""A run that was killed, stopped or damaged, then continued, is the run nothing happened to."""

from __future__ import annotations

import random
import resource
import shutil
import signal
import time
from types import SimpleNamespace

import jax
import numpy as np
import orbax.checkpoint as ocp
import psutil
import pytest

from tests.runs import (
    EVERY,
    STEPS,
    arguments,
    finish,
    losses,
    rows,
    saved_steps,
    start,
    wait_until,
    write_texts,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The run that nothing happens to; its texts, and the folder of compiled programs for all."""
    folder = tmp_path_factory.mktemp("resume")
    texts, compiled = write_texts(folder / "texts"), folder / "compiled"
    finish(start("train.py", *arguments(folder / "run", texts), compiled=compiled))
    return SimpleNamespace(texts=texts, compiled=compiled, workdir=folder / "run")


@pytest.fixture(scope="module")
def killed(reference, tmp_path_factory):
    """The workdir of a run that got SIGKILL at a random moment after its first checkpoint."""
    workdir = tmp_path_factory.mktemp("killed") / "run"
    process = begin(reference, workdir)
    moment = random.Random(2)
    row, seconds = moment.randint(EVERY + 1, STEPS // 2), moment.uniform(0, 0.1)
    wait_until(process, lambda: saved_steps(workdir) and len(rows(workdir)) >= row)
    time.sleep(seconds)
    process.kill()
    finish(process, -signal.SIGKILL)
    assert saved_steps(workdir)
    assert len(rows(workdir)) < STEPS
    return workdir


def begin(reference, workdir, devices=1, **keys):
    """Starts train.py on the texts of the reference."""
    command = arguments(workdir, reference.texts, **keys)
    return start("train.py", *command, devices=devices, compiled=reference.compiled)


def state(workdir, step=STEPS):
    """All tensors of a checkpoint as NumPy: parameters, moments, counters."""
    folder = workdir / "checkpoints" / str(step) / "state"
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(folder).item_metadata.tree
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return reader.restore(folder, ocp.args.PyTreeRestore(restore_args=how))


def assert_bitwise(workdir, reference):
    """Every loss and the final state equal the reference's; every step has one row."""
    assert losses(workdir) == losses(reference.workdir)
    assert len(losses(workdir)) == STEPS
    jax.tree.map(np.testing.assert_array_equal, state(workdir), state(reference.workdir))


def test_killed_and_continued(reference, killed, tmp_path):
    workdir = shutil.copytree(killed, tmp_path / "run")
    last = saved_steps(workdir)[-1]
    out, _ = finish(begin(reference, workdir))
    assert f"continuing from step {last}\n" in out
    assert_bitwise(workdir, reference)


def test_killed_and_continued_on_another_mesh(reference, killed, tmp_path):
    workdir = shutil.copytree(killed, tmp_path / "run")
    mesh = {"mesh__data": 1, "mesh__fsdp": 2, "mesh__tensor": 2, "parallel__sequence": True}
    out, _ = finish(begin(reference, workdir, devices=4, **mesh))
    assert "fsdp 2 x tensor 2" in out
    here, there = losses(workdir), losses(reference.workdir)
    assert here != there, "another order of summing leaves its traces; was it another mesh?"
    # Sums in another order: float32 rounding, which a few steps of Adam amplify.
    assert here == pytest.approx(there, rel=1e-5, abs=0)


def test_continued_out_of_a_pipeline(reference, tmp_path):
    """Stages of two chunks each, then two devices of FSDP with the same micro-batches."""
    short, workdir = {"model__layers": 4, "train__steps": 2 * EVERY}, tmp_path / "run"
    alone = short | {"train__grad_accumulation": 4}
    finish(begin(reference, tmp_path / "alone", **alone))
    stages = {"mesh__pipe": 2, "pipeline__schedule": "interleaved", "pipeline__microbatches": 4}
    out, _ = finish(begin(reference, workdir, 2, **short | stages | {"train__steps": EVERY}))
    assert "mesh pipe 2, interleaved" in out
    out, _ = finish(begin(reference, workdir, 2, **alone, mesh__fsdp=2))
    assert f"continuing from step {EVERY}\n" in out
    # Sums in another order: float32 rounding, which a few steps of Adam amplify.
    want = losses(tmp_path / "alone")
    assert len(want) == 2 * EVERY
    assert losses(workdir) == pytest.approx(want, rel=1e-5, abs=0)


def test_killed_while_a_checkpoint_is_being_written(reference, tmp_path):
    workdir = tmp_path / "run"
    process = begin(reference, workdir)
    half = workdir / "checkpoints" / f"{3 * EVERY}.tmp"
    wait_until(process, half.exists, pause=0)
    process.kill()
    finish(process, -signal.SIGKILL)
    assert saved_steps(workdir) == [EVERY, 2 * EVERY]
    assert half.exists()
    out, err = finish(begin(reference, workdir))
    assert f"warning: {half} was interrupted while being written and is removed" in err
    assert f"continuing from step {2 * EVERY}\n" in out
    assert_bitwise(workdir, reference)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_and_continued(reference, tmp_path, number):
    workdir, shorter = tmp_path / "run", {"train__steps": STEPS - 2}
    process = begin(reference, workdir, **shorter)
    wait_until(process, lambda: len(rows(workdir)) >= EVERY + 2)
    process.send_signal(number)
    out, err = finish(process)
    assert err == ""
    step = saved_steps(workdir)[-1]
    assert f"stopped after step {step}; the same command continues\n" in out
    assert [row["step"] for row in rows(workdir)] == list(range(1, step + 1))
    if number == signal.SIGTERM:
        out, _ = finish(begin(reference, workdir, **shorter))
        assert f"continuing from step {step}\n" in out
        assert len(losses(workdir)) == STEPS - 2
        out, _ = finish(begin(reference, workdir))  # A run that has ended goes on to more steps.
        assert f"continuing from step {STEPS - 2}\n" in out
        assert_bitwise(workdir, reference)


def test_damaged_checkpoints_are_passed_over(reference, tmp_path):
    workdir = shutil.copytree(reference.workdir, tmp_path / "run")
    newest, before = (workdir / "checkpoints" / str(step) for step in (STEPS, STEPS - EVERY))
    large = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    with large.open("r+b") as file:
        file.truncate(large.stat().st_size // 2)
    (before / "metadata.json").unlink()
    out, err = finish(begin(reference, workdir))
    name = large.relative_to(newest)
    assert f"step {STEPS} in {newest.parent} is damaged: {name}: " in err
    assert f"step {STEPS - EVERY} in {newest.parent} is damaged: metadata.json: missing" in err
    assert f"step {STEPS} is set aside as {newest}.damaged" in err
    assert all(line.startswith("warning: ") for line in err.splitlines()), err
    assert f"continuing from step {STEPS - 2 * EVERY}\n" in out
    assert_bitwise(workdir, reference)


def test_a_disk_that_is_full_for_a_while(reference, tmp_path):
    """Only the steps that did not fit are lost, and the run does not end for them."""
    workdir = tmp_path / "run"
    process = begin(reference, workdir)
    wait_until(process, lambda: saved_steps(workdir))
    # No file may grow beyond this: rows of metrics fit, a checkpoint does not.
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    psutil.Process(process.pid).rlimit(resource.RLIMIT_FSIZE, (20_000, unlimited[1]))
    _, err = finish(process, 2)
    first = saved_steps(workdir)[-1]
    assert first < STEPS
    *warnings, error = err.splitlines()
    assert all(line.startswith("warning: ") for line in warnings), err
    assert f"step {first + EVERY} could not be saved" in warnings[0]
    assert error.startswith(f"error: --workdir: step {STEPS} could not be saved in {workdir}")
    assert f"Steps kept: {saved_steps(workdir)}" in error
    assert losses(workdir) == losses(reference.workdir)
    out, err = finish(begin(reference, workdir))
    assert err == ""
    assert f"continuing from step {first}\n" in out
    assert_bitwise(workdir, reference)
