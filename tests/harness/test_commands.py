"""evaluate.py --tasks as typed: a run, killed and continued; two processes; no network."""

from __future__ import annotations

import json
import signal

import pytest

from tests.harness import local
from tests.processes import free_port
from tests.runs import finish, start, wait_until

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow

NAMES = "--tasks=choices,texts,answers"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint, tasks, and a cache of data sets that is not the user's."""
    folder = tmp_path_factory.mktemp("commands")
    local.checkpoint(folder / "checkpoint")
    local.task_folder(folder / "tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(folder / "home"))
        yield folder


def command(files, workdir, *flags: object) -> list:
    shape = "--config.data.sequence_length=48"
    model = [f"--hf={files / 'checkpoint'}", f"--workdir={workdir}", shape]
    return ["evaluate.py", *model, NAMES, f"--task_folder={files / 'tasks'}", *flags]


def result(out: str) -> dict:
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def whole(files):
    """The result of a run that was let alone, and that the network does not answer."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            patch.setenv(name, "http://127.0.0.1:9")
        out, err = finish(start(*command(files, files / "whole"), devices=1))
    assert err == ""
    return result(out)


def kept(folder) -> list[str]:
    files = (folder / "tasks").glob("*.jsonl")
    return [line for file in files for line in file.read_text().splitlines()]


def test_the_last_line_is_one_object(whole):
    assert whole["step"] is None
    assert set(whole["tasks"]) == {"choices", "texts", "answers"}
    assert whole["tasks"]["answers"]["samples"] == 24
    choices = whole["tasks"]["choices"]
    assert set(choices) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "samples"}
    assert choices["samples"] == 24


def test_a_killed_run_is_continued_by_two_processes(files, whole):
    """They hear from the first of them what is known, and run the same batches."""
    workdir, batch = files / "killed", "--config.data.batch_size=4"
    process = start(*command(files, workdir, batch), devices=1)
    wait_until(process, lambda: len(kept(workdir)) > 4)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = kept(workdir)
    assert 4 < len(before) < 80

    mesh = ["--config.mesh.data=2", "--config.mesh.tensor=2", "--num_processes=2"]
    both = command(files, workdir, *mesh, f"--coordinator=127.0.0.1:{free_port()}")
    processes = [start(*both, f"--process_id={i}", devices=2) for i in range(2)]
    outs = [finish(process)[0] for process in processes]
    assert "step" not in outs[1], "one process alone prints"
    assert kept(workdir)[: len(before) - 1] == before[:-1], "the last line may have been torn"
    assert len(kept(workdir)) == len(kept(files / "whole")) == 104
    for task, metrics in whole["tasks"].items():
        # Perplexities of texts are exponentials of sums in another order.
        assert result(outs[0])["tasks"][task] == pytest.approx(metrics, rel=1e-4)
