"""Runs a piece of code in several processes that form one program."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

PRELUDE = """
import faulthandler, os, sys
faulthandler.enable()  # SIGABRT prints where every thread is
sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # Gloo greets on standard output, in pieces
from parallel import distributed
count, index, port, *arguments = sys.argv[1:]
count, index = int(count), int(index)
distributed.start(f"127.0.0.1:{port}", count, index, timeout=60)
"""


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def launch(code: str, *arguments: object, count: int = 2, devices: int = 4) -> list:
    """Starts `code` in `count` processes of `devices` CPU devices each.

    It finds `arguments` (strings), `index` and `count` defined.
    """
    environ = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-c", PRELUDE + code, str(count), str(index), str(port)]
            + [str(argument) for argument in arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environ,
        )
        for index in range(count)
    ]


def outputs(processes: list, timeout: float = 120) -> list[str]:
    """What each process printed, once all have ended well.

    Where one does not end, the error tells of all: it may be waiting for one that failed.
    """
    results: list = [None] * len(processes)
    try:
        for i, process in enumerate(processes):
            results[i] = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        for process in processes:
            process.send_signal(signal.SIGABRT)
    finally:
        for i, process in enumerate(processes):
            if results[i] is None:
                try:
                    results[i] = process.communicate(timeout=10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    results[i] = process.communicate()
    told = "\n".join(
        f"--- process {i}: exit code {process.returncode}\n{stderr[-4000:]}"
        for i, (process, (_, stderr)) in enumerate(zip(processes, results, strict=True))
    )
    assert all(process.returncode == 0 for process in processes), told
    return [stdout for stdout, _ in results]
