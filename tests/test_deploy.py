"""The examples for several hosts are well formed and agree with themselves and with the code."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from config_border import load_config, override, write_config

DEPLOY = Path(__file__).parent.parent / "deploy"
TINY = str(DEPLOY.parent / "configs" / "tiny.py")


def job_spec(name: str) -> tuple[dict, str]:
    """The spec of the Job in a manifest, and the host name its pod 0 gets."""
    *others, main = yaml.safe_load_all((DEPLOY / name).read_text())
    pod_0 = f"{main['metadata']['name']}-0.{main['metadata']['name']}"
    if main["kind"] == "JobSet":
        (replicated,) = main["spec"]["replicatedJobs"]
        name = main["metadata"]["name"]
        return replicated["template"]["spec"], f"{name}-{replicated['name']}-0-0.{name}"
    (service,) = others
    assert service["spec"]["clusterIP"] == "None"
    assert service["metadata"]["name"] == main["spec"]["template"]["spec"]["subdomain"]
    assert service["spec"]["selector"] == {"job-name": main["metadata"]["name"]}
    return main["spec"], pod_0


@pytest.mark.parametrize("name", ["kubernetes.yaml", "jobset.yaml"])
def test_a_manifest_agrees_with_itself(name):
    job, pod_0 = job_spec(name)
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    env = {variable["name"]: variable["value"] for variable in container["env"]}
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"] == int(env["JAX_NUM_PROCESSES"])
    assert env["JAX_COORDINATOR_ADDRESS"].rpartition(":")[0] == pod_0
    assert int(env["JAX_COORDINATOR_ADDRESS"].rpartition(":")[2]) in [
        port["containerPort"] for port in container["ports"]
    ]
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    gpus = job["completions"] * container["resources"]["limits"]["nvidia.com/gpu"]
    flags = dict(argument.split("=", 1) for argument in container["args"])
    assert int(flags["--config.mesh.fsdp"]) == gpus
    assert flags["--workdir"] == container["command"][1]
    assert (DEPLOY.parent / flags["--config"]).is_file()


@pytest.mark.parametrize("name", ["slurm.sbatch", "to_the_end.sh"])
def test_a_script_is_well_formed(name):
    subprocess.run(["bash", "-n", str(DEPLOY / name)], check=True, timeout=10)
    assert (DEPLOY / "to_the_end.sh").stat().st_mode & 0o111


def test_slurm_passes_the_flags_on(tmp_path):
    """With stand-ins for srun and scontrol: what runs; an unfinished job is queued again."""
    for name, code in (("srun", 0), ("scontrol", 0)):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\nexit {code}\n')
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", str(DEPLOY / "slurm.sbatch"), "configs/tiny.py", "w", "--config.mesh.fsdp=2"],
        env={
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "SLURM_SUBMIT_DIR": str(DEPLOY.parent),
            "SLURM_JOB_ID": "7",
        },
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert "train.py --config=configs/tiny.py --workdir=w --config.mesh.fsdp=2\n" in done.stdout
    assert done.stdout.endswith("scontrol requeue 7\n")
    assert done.returncode == 75


@pytest.fixture
def to_the_end(tmp_path):
    """Starts `to_the_end.sh` on a run of 300 steps whose checkpoints are the given steps."""
    processes = []

    def start(command: str, *steps: int) -> subprocess.Popen:
        write_config(tmp_path, override(load_config(TINY), ["--config.train.steps=300"]))
        for step in steps:
            (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
        arguments: list[str] = [str(DEPLOY / "to_the_end.sh"), str(tmp_path), "bash", "-c", command]
        processes.append(subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.stdout.close()


@pytest.mark.parametrize(
    ("command", "steps", "code"),
    [("exit 0", (200, 300), 0), ("exit 0", (200,), 75), ("exit 2", (300,), 2)],
)
def test_to_the_end_tells_whether_the_run_is_complete(to_the_end, command, steps, code):
    assert to_the_end(command, *steps).wait(timeout=10) == code


def test_to_the_end_hands_sigterm_on(to_the_end):
    process = to_the_end('trap "echo saved; exit 0" TERM; echo ready; while :; do sleep 0.05; done')
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 75
    assert process.stdout.read() == "saved\n"
