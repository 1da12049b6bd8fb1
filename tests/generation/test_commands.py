"""generate.py as a user types it: streamed, in a batch, as JSON, on another mesh; its errors."""

from __future__ import annotations

import json

import pytest

from tests.runs import arguments, finish, start, write_texts

pytestmark = pytest.mark.slow
SHORT = ("--config.generate.max_new_tokens=12",)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    texts = write_texts(folder / "texts")
    finish(start("train.py", *arguments(folder / "run", texts, train__steps=12), devices=1))
    return folder / "run"


def generate(workdir, *flags, devices=1):
    return finish(start("generate.py", f"--workdir={workdir}", *SHORT, *flags, devices=devices))


def objects(out: str) -> list[dict]:
    rows = [json.loads(line) for line in out.splitlines()]
    return sorted(rows, key=lambda row: row["number"])


def test_one_prompt_and_several_give_the_same(workdir, tmp_path):
    alone, err = generate(workdir, "--prompt=mesh ")
    assert "12 tokens in" in err
    file = tmp_path / "prompts.txt"
    file.write_text("shard\nmesh \nloss\n")
    several, _ = generate(workdir, f"--prompts={file}")
    parts = several.split("--- ")
    assert [part.partition("\n")[0] for part in parts] == ["", "shard", "mesh ", "loss"]
    assert parts[2] == f"mesh \n{alone}"
    rows = objects(generate(workdir, f"--prompts={file}", "--json")[0])
    assert rows[1]["text"] + "\n" == alone
    assert all(len(row["tokens"]) == 12 and row["reason"] == "length" for row in rows)


def test_a_seed_gives_the_same_texts_on_another_mesh(workdir, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": word}) for word in ("a", "bc", "def ", "e")))
    flags = f"--prompts={file}", "--json", "--config.generate.temperature=1.0"
    one = objects(generate(workdir, *flags)[0])
    mesh = ("--config.mesh.data=2", "--config.mesh.tensor=4")
    paged = ("--config.generate.cache=paged", "--config.generate.block_size=4")
    assert objects(generate(workdir, *flags, *mesh, *paged, devices=8)[0]) == one
    other = objects(generate(workdir, *flags, "--config.seed=1")[0])
    assert [row["text"] for row in other] != [row["text"] for row in one]


def test_a_text_ends_before_a_stop(workdir):
    (whole,) = objects(generate(workdir, "--prompt=mesh ", "--json")[0])
    stop = whole["text"][5:7]
    (short,) = objects(
        generate(workdir, "--prompt=mesh ", "--json", f"--config.generate.stop=('{stop}',)")[0]
    )
    assert short["text"] == whole["text"][: whole["text"].index(stop)]
    assert short["reason"] == "stop"


def test_a_wrong_prompt_ends_in_one_line(workdir):
    process = start("generate.py", f"--workdir={workdir}", f"--prompt={'x' * 60}", devices=1)
    out, err = process.communicate()
    assert process.returncode == 2
    assert out == ""
    assert err.startswith("error: --prompt='xxx")
    assert "60 tokens, and the model's context (config.model.max_length = 32)" in err
    assert err.count("\n") == 1
