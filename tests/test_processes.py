"""Two processes are one program: the losses of one, and a checkpoint that one can read."""

from __future__ import annotations

import json
import signal

import pytest

from tests.processes import free_port
from tests.runs import arguments, finish, losses, rows, saved_steps, start, wait_until, write_texts

pytestmark = pytest.mark.slow

STEPS = 8
KEYS = {
    "mesh__data": 2,
    "mesh__fsdp": 2,
    "mesh__tensor": 2,
    "train__steps": STEPS,
    "optimizer__warmup_steps": 2,
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("processes") / "texts")


def begin(workdir, texts, **keys):
    """Starts train.py in two processes of four devices each."""
    together = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
    command = arguments(workdir, texts, **KEYS | keys) + together
    return [start("train.py", *command, f"--process_id={i}", devices=4) for i in range(2)]


def test_two_processes_train_what_one_trains(texts, tmp_path):
    alone = start("train.py", *arguments(tmp_path / "one", texts, **KEYS), devices=8)
    out, _ = finish(alone)
    assert "devices: 8 x cpu; mesh data 2 x fsdp 2 x tensor 2" in out
    workdir = tmp_path / "two"
    outs = [finish(process)[0] for process in begin(workdir, texts)]
    assert "devices: 8 x cpu; mesh data 2 x fsdp 2 x tensor 2" in outs[0]
    assert "step" not in outs[1], "one process alone prints"

    one, two = losses(tmp_path / "one"), losses(workdir)
    assert len(one) == STEPS
    # Gloo sums in another order than XLA does within one process.
    assert two == pytest.approx(one, rel=1e-6, abs=0)

    evaluation = [f"--workdir={workdir}", "--config.mesh.data=1", "--config.mesh.fsdp=1"]
    out, err = finish(start("evaluate.py", *evaluation, "--config.mesh.tensor=1"))
    assert err == ""
    result, last = json.loads(out.splitlines()[-1]), rows(workdir)[-1]
    assert result["step"] == STEPS
    # One device sums in another order than eight.
    assert result["loss"] == pytest.approx(last["eval_loss"], rel=1e-6)
    assert result["bits_per_byte"] == pytest.approx(last["eval_bits_per_byte"], rel=1e-6)


def test_two_processes_stop_together(texts, tmp_path):
    workdir = tmp_path / "run"
    both = begin(workdir, texts, train__steps=100_000, checkpoint__every=100_000)
    wait_until(both[1], lambda: len(rows(workdir)) > 2)
    both[1].send_signal(signal.SIGTERM)  # To one; the other has to be told.
    out, _ = finish(both[0])
    finish(both[1])
    (step,) = saved_steps(workdir)
    assert f"stopped after step {step}; the same command continues\n" in out
    assert list(losses(workdir)) == list(range(1, step + 1))
