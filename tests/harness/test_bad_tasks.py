"""What a user may get wrong with tasks ends in one line, before a checkpoint is looked for."""

from __future__ import annotations

import json
import sys

import pytest

import cli
import evaluate
from tests.harness import local
from tests.runs import get_config

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run's folder with its config and no checkpoint: what is refused later says that."""
    folder = tmp_path_factory.mktemp("bad_tasks") / "run"
    folder.mkdir()
    config = get_config()
    config.data.path = "corpus/*.txt"
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


@pytest.fixture
def tasks(tmp_path):
    return local.task_folder(tmp_path / "tasks", documents=3)


@pytest.fixture
def refused(capsys, workdir):
    """Asserts that evaluate.py refuses flags in one line that has all of `words`."""

    def check(flags, *words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.run(
                evaluate.main,
                name="evaluate.py",
                about="",
                config_from="workdir or checkpoint",
                flags=evaluate.FLAGS,
                argv=[f"--workdir={workdir}", *map(str, flags)],
            )
        err = capsys.readouterr().err
        assert stop.value.code == 2, err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert len(err) < 600, "nobody reads that"
        for word in words:
            assert word in err
        assert [path.name for path in workdir.iterdir()] == ["config.json"], "something was begun"

    return check


def test_right_tasks_get_as_far_as_the_checkpoint(refused, tasks):
    flags = ["--tasks=choices,texts", f"--task_folder={tasks}"]
    refused(flags, "no undamaged checkpoint")


FLAGS = {
    "--limit=3": ("--limit=3", "--tasks=NAME"),
    "--task_folder=x": ("--task_folder=x", "--tasks=NAME"),
    "--tasks=choices --limit=0": ("--limit=0", "at least 1"),
    "--tasks=choices --limit=some": ("--limit", "a whole number"),
    "--tasks=": ("--tasks=", "give names"),
    "--tasks=choices, --task_folder=TASKS": ("--tasks=choices,", "give names"),
    "--tasks=choices --task_folder=/no/such": ("--task_folder=/no/such", "no such folder"),
    "--tasks=choices --task_folder=TASKS/data": ("--task_folder=", "no *.yaml"),
    "--tasks=choices --config.model.vocab_size=200": (
        "config.data.tokenizer = 'bytes' has 257 tokens",
        "config.model.vocab_size = 200",
    ),
    "--tasks=choices --config.data.tokenizer=bpe": ("'bpe'", "there is no tokenizer.json in"),
    "--tasks=choices --config.model.family=encoder --config.objective.name=masked_lm": (
        "config.model.family = 'encoder'",
        "decoder and encoder_decoder",
    ),
}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags(refused, tasks, flags):
    given = [flag.replace("TASKS", str(tasks)) for flag in flags.split(" ")]
    if "config." in flags:
        given.append(f"--task_folder={tasks}")
    refused(given, *FLAGS[flags])


# What a task file has in place of something, and words of the line.
FILES = {
    "no YAML": ("task: choices", "task: [choices", ("--task_folder=", "choices.yaml cannot be")),
    "no mapping": (None, "choices", ("choices.yaml cannot be read", "Expected YAML dict")),
    "no include": ("task:", "include: other\ntask:", ("choices.yaml cannot be read", "other")),
    "no data": ("data/choices", "data/no", ("--tasks=choices", "choices.yaml", "data/no.jsonl")),
    "no split": ("{test: data/", "{train: data/", ("--tasks=choices", "choices.yaml", "'test'")),
    "no such kind": ("multiple_choice", "essay", ("--tasks=choices", "'essay'")),
    "no such field": ("choice: choices", "choice: options", ("--tasks=choices", "malformed")),
    "no such metric": ("metric: acc,", "metric: elo,", ("--tasks=choices", "metric 'elo'")),
    "no function": (
        '"{{question}}"',
        "!function functions.question",
        ("--tasks=choices", "choices.yaml", "functions"),
    ),
    "unsafe": ("task: choices", "task: choices\nunsafe_code: true", ("--tasks=choices", "code")),
}


@pytest.mark.parametrize("kind", FILES)
def test_files(refused, tasks, kind):
    old, new, words = FILES[kind]
    file = tasks / "choices.yaml"
    content = file.read_text()
    assert old is None or old in content
    file.write_text(new if old is None else content.replace(old, new))
    refused(["--tasks=choices", f"--task_folder={tasks}"], *words)


def test_data_that_is_no_json(refused, tasks):
    (tasks / "data" / "choices.jsonl").write_text('{"question": "torn\n')
    refused(
        ["--tasks=choices", f"--task_folder={tasks}"], "--tasks=choices", "choices.yaml", "JSON"
    )


def test_a_name_that_nobody_has(refused, tasks, monkeypatch):
    """The 13,000 files of lm-eval, which it would read for that, are left out here."""
    from lm_eval import tasks as theirs

    whole = theirs.TaskManager
    few = lambda **how: whole(**{**how, "include_defaults": False})
    monkeypatch.setattr(theirs, "TaskManager", few)
    flags = ["--tasks=choises", f"--task_folder={tasks}"]
    refused(flags, "--tasks=choises", f"--task_folder={tasks}", "did you mean choices?")
    refused(["--tasks=zzz"], "--tasks=zzz", "give --task_folder=DIR for tasks of your own")


def test_without_lm_eval(refused, tasks, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    flags = ["--tasks=choices", f"--task_folder={tasks}"]
    refused(flags, "--tasks: lm_eval is not installed; run pip install -e '.[tasks]'")
