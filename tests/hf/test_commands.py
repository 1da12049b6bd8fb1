"""train.py, evaluate.py and export.py on checkpoints of others, and what they refuse."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import cli
import evaluate
import export
import train
from data.tokens import train_bpe
from hf.files import open_folder
from tests.hf import synthetic
from tests.runs import arguments, rows, saved_steps, write_texts

STEP = cli.Flag("step", int, None, "the step to restore")
EXPORT = [
    cli.Flag("out", Path, None, "", required=True),
    STEP,
    cli.Flag("like", Path, None, ""),
    cli.Flag("dtype", str, None, "", export.DTYPES),
    cli.Flag("shard_gb", float, 5.0, ""),
]
PROGRAMS = {
    "train.py": (train.main, {"config_from": "file"}),
    "evaluate.py": (evaluate.main, {"config_from": "workdir or checkpoint", "flags": [STEP]}),
    "export.py": (export.main, {"config_from": "workdir", "flags": EXPORT}),
}
CONFIG = replace(synthetic.QWEN3, vocab_size=300, layers=2)
MIXTURE = replace(synthetic.QWEN3_MOE, vocab_size=300, layers=2)


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """Keeps compiled programs with the tests, not with the user."""
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("commands") / "texts")


def folder_of(path: Path, config) -> Path:
    """A checkpoint of 300 tokens, with its tokeniser."""
    synthetic.write_folder(path, config, synthetic.random_tensors(config))
    train_bpe(["mesh shard tensor loss gradient step"] * 20, 290, path / "tokenizer.json")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Qwen 3."""
    return folder_of(tmp_path_factory.mktemp("commands") / "checkpoint", CONFIG)


def run(capsys, program: str, *argv: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    capsys.readouterr()
    main, how = PROGRAMS[program]
    with pytest.raises(SystemExit) as stop:
        cli.run(main, name=program, about="", argv=[*map(str, argv)], **how)
    return stop.value.code, *capsys.readouterr()


@pytest.mark.slow
def test_tuned_evaluated_and_exported(capsys, folder, texts, tmp_path):
    workdir, out = tmp_path / "run", tmp_path / "out"
    keys = {"init_from": folder, "train.steps": 2, "model.dropout": 0.0, "data.batch_size": 8}
    flags = list(arguments(workdir, texts, **keys))
    code, _, err = run(capsys, "train.py", *flags, "--config.optimizer.learning_rate=1e-9")
    assert code == 0, err
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["model"]["layers"] == 2
    assert saved["model"]["qk_norm"]
    assert saved["model"]["vocab_size"] == 300
    assert saved["data"]["tokenizer"] == str(folder / "tokenizer.json")
    assert len(rows(workdir)) == 2

    # The rate is next to nothing: a run and its checkpoint have the loss of the folder.
    code, first, err = run(capsys, "evaluate.py", f"--workdir={workdir}")
    assert code == 0, err
    same = [a for a in flags if a.startswith(("--config=", "--config.data."))]
    code, second, err = run(capsys, "evaluate.py", f"--hf={folder}", *same)
    assert code == 0, err
    results = [json.loads(text.splitlines()[-1]) for text in (first, second)]
    assert results[1]["step"] is None
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], abs=1e-5)

    code, text, err = run(capsys, "export.py", f"--workdir={workdir}", f"--out={out}")
    assert code == 0, err
    assert "step 2 as Qwen3ForCausalLM" in text
    ours, theirs = open_folder(out, "--hf"), open_folder(folder, "--hf")
    assert ours.config == theirs.config
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, stored in ours.tensors.items():
        np.testing.assert_allclose(stored.map(), theirs.tensors[name].map(), atol=1e-7)
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()

    listed = sorted(tmp_path.iterdir())
    code, _, err = run(capsys, "export.py", f"--workdir={workdir}", f"--out={out}")
    assert (code, sorted(tmp_path.iterdir())) == (2, listed)
    assert f"--out={out}: is there already" in err


@pytest.mark.slow
def test_experts_over_devices(capsys, texts, tmp_path):
    """From a folder to divided experts, to other divided ones, and to a folder."""
    folder, workdir, out = folder_of(tmp_path / "in", MIXTURE), tmp_path / "run", tmp_path / "out"
    mesh = [f"--config.mesh.{axis}=2" for axis in ("expert", "fsdp", "tensor")]
    keys = {"init_from": folder, "train.steps": 1, "model.dropout": 0.0, "checkpoint.every": 1}
    flags = [*arguments(workdir, texts, **keys), *mesh]
    code, _, err = run(capsys, "train.py", *flags, "--config.optimizer.learning_rate=1e-9")
    assert code == 0, err
    saved = json.loads((workdir / "config.json").read_text())["experts"]
    assert (saved["number"], saved["per_token"], saved["mlp_dim"]) == (8, 3, 48)
    assert rows(workdir)[0]["balance"] > 3

    data = [a for a in flags if a.startswith(("--config=", "--config.data."))]
    code, text, err = run(capsys, "evaluate.py", f"--hf={folder}", *data, "--config.mesh.expert=8")
    assert code == 0, err
    assert "mesh expert 8" in text
    loss = json.loads(text.splitlines()[-1])["loss"]
    assert loss == pytest.approx(rows(workdir)[-1]["eval_loss"], abs=1e-5)

    code, text, err = run(capsys, "export.py", f"--workdir={workdir}", f"--out={out}")
    assert code == 0, err
    assert "step 1 as Qwen3MoeForCausalLM" in text
    ours, theirs = open_folder(out, "--hf"), open_folder(folder, "--hf")
    assert ours.config == theirs.config
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, stored in ours.tensors.items():
        np.testing.assert_allclose(stored.map(), theirs.tensors[name].map(), atol=1e-7)


# Overrides, and words of the line that refuses them.
REFUSED = {
    "init_from=/no/such": ("config.init_from = '/no/such'", "no such folder"),
    "model.layers=3": ("tensors missing, 11", "config.model.layers = 3 (2 there)"),
    "model.distinct=1": ("tensors unexpected, 11", "config.model.distinct = 1 (0 there)"),
    "model.embed_rank=8": ("config.model.embed_rank = 8", "set it to 0"),
    "init_new=heads/*": ("config.init_new = ['heads/*']", "for a run's folder alone"),
    "model.mlp_dim=96": ("of another shape, 6", "is [32, 64] and should be [32, 96]"),
    "model.vocab_size=280": (
        "/tokenizer.json' has ",
        "tokens, more than config.model.vocab_size = 280",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", REFUSED)
def test_what_does_not_fit_is_refused_and_nothing_is_written(
    capsys, folder, texts, tmp_path, change
):
    workdir = tmp_path / "run"
    flags = [*arguments(workdir, texts, init_from=folder), f"--config.{change}"]
    if change == "model.vocab_size=280":  # weights that fit, a tokeniser that does not
        smaller = replace(CONFIG, vocab_size=280)
        other = tmp_path / "other"
        synthetic.write_folder(other, smaller, synthetic.random_tensors(smaller))
        (other / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
        flags = arguments(workdir, texts, init_from=other)
    code, _, err = run(capsys, "train.py", *flags)
    assert code == 2, err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in REFUSED[change]:
        assert word in err
    assert not (workdir / "config.json").exists()


def damaged(folder: Path, kind: str) -> None:
    """Makes a folder one that is refused."""
    weights, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "architecture":
        config["architectures"] = ["LlamaForSequenceClassification"]
    elif kind == "not computed":
        config["rope_scaling"] = {"rope_type": "yarn", "factor": 4.0}
    elif kind == "extra":
        config |= {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    elif kind == "index":
        where = {"weight_map": {"model.norm.weight": f"../{folder.name}/model.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(where))
    elif kind == "tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps(config))


DAMAGED = {
    "truncated": "model.safetensors': truncated or corrupt",
    "architecture": "architectures = ['LlamaForSequenceClassification']: not read here",
    "not computed": "rope_scaling.rope_type = 'yarn': not computed here",
    "extra": "tensors unexpected, 11: model.layers.1.",
    "index": "model.safetensors.index.json names '../in/model.safetensors', which is not there",
    "tokenizer": "tokenizer.json': not a tokenizer.json of the tokenizers library",
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_folder_is_one_line_and_no_run(capsys, folder, texts, tmp_path, kind):
    shutil.copytree(folder, tmp_path / "in")
    damaged(tmp_path / "in", kind)
    workdir = tmp_path / "run"
    code, _, err = run(capsys, "train.py", *arguments(workdir, texts, init_from=tmp_path / "in"))
    assert code == 2, err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert DAMAGED[kind] in err
    assert not (workdir / "config.json").exists()
    assert not saved_steps(workdir)


def test_flags_of_evaluate(capsys, folder, tmp_path):
    def line(*argv: object) -> str:
        code, _, err = run(capsys, "evaluate.py", *argv)
        assert code == 2
        return err

    assert "--workdir" in line()
    assert "--hf = '/no/such': no such folder" in line("--hf=/no/such")
    assert "--step=3: --hf has no steps" in line(f"--hf={folder}", "--step=3")
    given = line(f"--workdir={tmp_path}", "--config=configs/tiny.py")
    assert "evaluate.py takes the config from --workdir" in given
