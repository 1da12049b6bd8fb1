"""Processes find each other, or say why not."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from parallel import distributed
from tests.processes import ROOT, free_port, launch, outputs


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("h:1", None, None), "--coordinator=h:1: --num_processes is missing"),
        ((None, 2, 0), "--num_processes=2, --process_id=0: --coordinator is missing"),
        (("h:1", 2, None), "--process_id is missing"),
        (("h:1", 0, 0), "--num_processes=0: at least 1"),
        (("h:1", 2, 2), "--process_id=2: 0 to 1 are right"),
        (("h:1", 2, -1), "--process_id=-1: 0 to 1 are right"),
        (("h", 2, 0), "--coordinator=h: HOST:PORT"),
        (("h:70000", 2, 0), "--coordinator=h:70000: HOST:PORT"),
        (("http://h:80", 2, 0), "--coordinator=http://h:80: HOST:PORT"),
    ],
)
def test_wrong_flags(flags, message):
    with pytest.raises(ValueError, match=message):
        distributed.start(*flags)


def test_one_process_starts_nothing(monkeypatch):
    def fail(**_):
        raise AssertionError

    monkeypatch.setattr(distributed.jax.distributed, "initialize", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for name in ("JOB_COMPLETION_INDEX", "SLURM_STEP_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    distributed.start()
    distributed.start("localhost:1", 1, 0)


def started(monkeypatch, environ):
    """The arguments that JAX is started with."""
    calls = []
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda **k: calls.append(k))
    monkeypatch.setattr(distributed.jax.config, "update", lambda *_: None)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    distributed.start()
    return calls[0]


def test_found_on_kubernetes(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        environ = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "4"}
        found = started(monkeypatch, environ | {"JOB_COMPLETION_INDEX": "3"})
    assert found["coordinator_address"] == address
    assert (found["num_processes"], found["process_id"]) == (4, 3)
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES=four"):
        started(monkeypatch, {"JAX_NUM_PROCESSES": "four"})


@pytest.mark.parametrize(("tasks", "devices"), [("1(x2)", [0, 1, 2, 3]), ("4(x2)", None)])
def test_found_under_slurm(monkeypatch, tasks, devices):
    environ = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_GPUS_ON_NODE": "4"}
    found = started(monkeypatch, environ | {"SLURM_STEP_TASKS_PER_NODE": tasks})
    assert found["cluster_detection_method"] == "slurm"
    assert found.get("local_device_ids") == devices


def test_nobody_there():
    port = free_port()
    with pytest.raises(ValueError, match=rf"--coordinator=127.0.0.1:{port}: not reachable"):
        distributed.start(f"127.0.0.1:{port}", 2, 1, timeout=1)


def test_nobody_came():
    code = "import sys; from parallel import distributed; distributed.start(sys.argv[1], 2, 0, 1)"
    result = subprocess.run(
        [sys.executable, "-c", code, f"127.0.0.1:{free_port()}"],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert result.returncode == 1
    assert "not all processes came within 1 s" in result.stderr
    assert "stack trace" not in result.stderr


def test_the_port_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ValueError, match=f"--coordinator: port {port} cannot be used"):
            distributed.start(f"127.0.0.1:{port}", 2, 0)


SUM = """
import jax, numpy as np
mesh = jax.make_mesh((8,), ("data",))
x = jax.make_array_from_callback(
    (16,), jax.NamedSharding(mesh, jax.P("data")), lambda i: np.arange(16.0, dtype=np.float32)[i])
with jax.set_mesh(mesh):
    print(index, jax.process_count(), float(jax.jit(lambda x: (x * x).sum())(x)))
"""


@pytest.mark.slow
def test_two_processes_are_one_mesh():
    assert outputs(launch(SUM)) == ["0 2 1240.0\n", "1 2 1240.0\n"]


STEPS = """
import time
from training.stop import StopSignal
with StopSignal() as stop:
    for step in range(1, 10**6):
        time.sleep(0.005 * (1 + 2 * index))  # Host loops drift: nothing here waits for the other.
        if step == 5:
            print("ready")
        if stop.requested(step):
            break
print(step)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_stops_all_after_the_same_step(number):
    processes = launch(STEPS, devices=1)
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    processes[1].send_signal(number)
    first, second = outputs(processes)
    assert first == second
    assert int(first) < 10**6 - 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_only_process_stops_it(number):
    from training.stop import StopSignal

    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.requested(1)
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert stop.requested(2)
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
    assert signal.getsignal(number) is before
