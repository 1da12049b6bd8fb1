"""Several processes as one program: found under SLURM, Kubernetes and on TPU pods, or by flags.

- Kubernetes, an indexed Job or JobSet: `JOB_COMPLETION_INDEX`, which Kubernetes sets, and from the
  manifest `JAX_COORDINATOR_ADDRESS` (`host:port` of the pod with index 0) and `JAX_NUM_PROCESSES`.
  (JAX could ask the API server instead; that takes another package and the right to ask.)
- SLURM: `srun` with more than one task.
- TPU pods: JAX asks the machine.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax

log = logging.getLogger(__name__)


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = 300,
) -> None:
    """Joins this process to the others, before anything else of JAX runs; alone, does nothing.

    Collectives between hosts go through NCCL on GPU, Gloo on CPU and the interconnect on TPU.

    Args:
      coordinator: `host:port` of process 0, which listens there.
      num_processes: how many there are. All three flags are given, or none.
      process_id: which one this is, from 0.
      timeout: seconds to wait for the others.

    Raises:
      ValueError: a flag is missing or wrong, the port is taken, or process 0 cannot be reached.
        If fewer processes come than were announced, those that came exit with a message: JAX
        aborts the process in that case, and nothing can be raised.
    """
    given: dict[str, Any] = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    if any(value is not None for value in given.values()):
        _check_complete(given)
        flags, source = given, "flags"
    elif (found := _from_kubernetes()) is not None:
        flags, source = found, "Kubernetes"
    else:
        _start_found(timeout)
        return
    host, port = _check(flags)
    if flags["num_processes"] == 1:
        return
    address = flags["coordinator"]
    if flags["process_id"] == 0:
        _check_free(port)
    else:
        _reach(host, port, timeout)
    _initialize(
        f"--coordinator={address}",
        timeout,
        coordinator_address=address,
        num_processes=flags["num_processes"],
        process_id=flags["process_id"],
        cluster_detection_method="deactivate",
    )
    log.info("process %d of %d, found by %s", jax.process_index(), jax.process_count(), source)


def _check_complete(flags: dict[str, Any]) -> None:
    missing = [name for name, value in flags.items() if value is None]
    if missing:
        given = ", ".join(f"--{name}={value}" for name, value in flags.items() if value is not None)
        raise ValueError(
            f"{given}: --{missing[0]} is missing; several processes need --coordinator=HOST:PORT, "
            f"--num_processes=N and --process_id=I, one process none of them"
        )


def _check(flags: dict[str, Any]) -> tuple[str, int]:
    """The host and port of the coordinator, when everything is in range."""
    count, index = flags["num_processes"], flags["process_id"]
    if count < 1:
        raise ValueError(f"--num_processes={count}: at least 1 is right")
    if not 0 <= index < count:
        raise ValueError(
            f"--process_id={index}: 0 to {count - 1} are right with --num_processes={count}"
        )
    match = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^\s:\[\]/]+):(\d+)", flags["coordinator"])
    if match is None or not 0 < int(match[2]) < 2**16:
        raise ValueError(
            f"--coordinator={flags['coordinator']}: HOST:PORT of process 0 is right, such as "
            f"10.0.0.1:12345, with a port from 1 to 65535"
        )
    return match[1].strip("[]"), int(match[2])


def _from_kubernetes() -> dict[str, Any] | None:
    """The flags of an indexed Job's pod, None elsewhere."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JOB_COMPLETION_INDEX")
    if not all(name in os.environ for name in names):
        return None
    address, *numbers = (os.environ[name] for name in names)
    for name, number in zip(names[1:], numbers, strict=True):
        if not number.isdecimal():
            raise ValueError(f"{name}={number}: a number is right")
    return {
        "coordinator": address,
        "num_processes": int(numbers[0]),
        "process_id": int(numbers[1]),
    }


def _start_found(timeout: int) -> None:
    """Joins the processes of a SLURM step or a TPU pod; does nothing elsewhere."""
    environ = os.environ
    if "SLURM_STEP_NODELIST" in environ and int(environ.get("SLURM_NTASKS", "1")) > 1:
        keywords: dict[str, Any] = {"cluster_detection_method": "slurm"}
        if environ.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0] == "1":
            # JAX gives a task the one GPU with its local number; alone on a node it takes them all.
            gpus = int(environ.get("SLURM_GPUS_ON_NODE", "0"))
            keywords["local_device_ids"] = list(range(gpus)) or None
        _initialize("SLURM", timeout, **keywords)
    elif _on_tpu():
        try:
            _initialize("the TPU pod", timeout)
        except ValueError as error:
            if "coordinator_address should be defined" not in str(error):
                raise
            return  # A TPU that belongs to no pod.
    else:
        return
    log.info("process %d of %d", jax.process_index(), jax.process_count())


def _on_tpu() -> bool:
    """Whether this machine has TPUs that JAX will use."""
    if os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
        return False
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev").glob("vfio/[0-9]*")]
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def _check_free(port: int) -> None:
    """Looks before JAX does: where the port is taken, it sometimes crashes."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        raise ValueError(
            f"--coordinator: port {port} cannot be used on this host ({error.strerror}); choose "
            f"another, the same for all processes"
        ) from error


def _reach(host: str, port: int, timeout: int) -> None:
    """Waits until process 0 listens."""
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), timeout=2).close()
            return
        except OSError as error:  # A name that is not known yet too: pods get theirs late.
            if time.monotonic() > end:
                raise ValueError(
                    f"--coordinator={host}:{port}: not reachable within {timeout} s ({error}); "
                    f"start process 0 there, with the same flags and --process_id=0"
                ) from error
        time.sleep(0.2)


def _initialize(where: str, timeout: int, **keywords: Any) -> None:
    """`jax.distributed.initialize`, with words for when it would wait in vain."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")

    def give_up() -> None:
        print(
            f"{where}: not all processes came within {timeout} s; start each of them once, with "
            f"its own process id and the same code",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # The main thread is inside JAX, which would abort with a stack trace.

    timer = threading.Timer(timeout, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(initialization_timeout=timeout + 60, **keywords)
    finally:
        timer.cancel()
