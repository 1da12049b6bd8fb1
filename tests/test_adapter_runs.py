"""train.py with adapters on another run: what is written, read back, refused, merged."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import SingleDeviceSharding

import cli
import evaluate
import generate
import train
from compress import __main__ as compress
from tests.runs import arguments, write_texts
from training.checkpoint import Checkpoints
from training.naming import named, nested

LORA = dict(
    adapter__method="lora",
    adapter__rank=2,
    adapter__names="stack/*/query,stack/*/down",
    train__steps=2,
    train__grad_accumulation=1,
    mesh__data=8,
    checkpoint__every=1,
)
OF_CONFIG = {train: "file", evaluate: "workdir or checkpoint", generate: "workdir or checkpoint"}


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """Keeps compiled programs with the tests, not with the user."""
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


def run(program, capsys, *flags, code=0):
    """stdout, stderr of a command in this process."""
    capsys.readouterr()
    name = f"{program.__name__}.py"
    given = dict(name=name, about="", config_from=OF_CONFIG[program])
    given |= {} if program is train else {"flags": program.FLAGS}
    with pytest.raises(SystemExit) as stop:
        cli.run(program.main, argv=[*map(str, flags)], **given)
    out, err = capsys.readouterr()
    assert stop.value.code == code, (out, err)
    return out, err


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("adapters") / "texts")


@pytest.fixture(scope="module")
def base(tmp_path_factory, texts):
    """A run of one step."""
    workdir = tmp_path_factory.mktemp("adapters") / "base"
    flags = arguments(workdir, texts, model__dropout=0.0, train__steps=1, mesh__data=8)
    with pytest.raises(SystemExit) as stop:
        cli.run(train.main, name="train.py", about="", argv=flags, config_from="file")
    assert stop.value.code == 0
    return workdir


@pytest.fixture(scope="module")
def lora(tmp_path_factory, texts, base):
    """Adapters on it, trained for two steps; what the base's files were before."""
    workdir, before = tmp_path_factory.mktemp("adapters") / "lora", hashes(base)
    flags = arguments(workdir, texts, adapter__base=base, model__dropout=0.0, **LORA)
    with pytest.raises(SystemExit) as stop:
        cli.run(train.main, name="train.py", about="", argv=flags, config_from="file")
    assert stop.value.code == 0
    return workdir, before


def hashes(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def saved(workdir, step):
    """The state of a checkpoint by name, NumPy."""
    checkpoints, one = Checkpoints(workdir / "checkpoints"), SingleDeviceSharding(jax.devices()[0])
    _, tensors = checkpoints.tensors(step)
    wanted = {
        name: jax.ShapeDtypeStruct(tuple(t["shape"]), t["dtype"], sharding=one)
        for name, t in tensors.items()
    }
    _, state = checkpoints.restore(step, nested(wanted))
    return {name: np.asarray(array) for name, array in named(state).items()}


def loss(capsys, workdir, *flags):
    out, _ = run(evaluate, capsys, f"--workdir={workdir}", *flags)
    return json.loads(out.splitlines()[-1])["loss"]


@pytest.mark.slow
def test_a_checkpoint_holds_the_adapters_alone_and_the_base_stays_as_it_is(lora, base):
    workdir, before = lora
    assert hashes(base) == before
    state = saved(workdir, 2)
    params = {name for name in state if name.startswith("params/")}
    at = "stack/blocks"
    factors = ("into", "out_of")
    of = (f"{at}/attention/query", f"{at}/mlp/down")
    assert params == {f"params/{name}/{factor}" for name in of for factor in factors}
    moments = {n for n in state if n.startswith("opt_state/direction/") and state[n].ndim}
    assert len(moments) == 2 * len(params)
    assert any(np.any(state[f"params/{name}/out_of"]) for name in of)  # it learnt
    metadata = Checkpoints(workdir / "checkpoints").metadata(2)["adapter_base"]
    assert metadata["path"] == str(base)
    assert metadata["step"] == 1
    assert json.loads((workdir / "config.json").read_text())["model"]["layers"] == 2


@pytest.mark.slow
def test_it_goes_on_and_merges(lora, base, texts, tmp_path, capsys):
    workdir = shutil.copytree(lora[0], tmp_path / "lora")
    flags = arguments(workdir, texts, adapter__base=base, model__dropout=0.0, **LORA)
    out, _ = run(train, capsys, *flags, "--config.train.steps=3")
    assert "continuing from step 2" in out
    mine = loss(capsys, workdir)
    assert mine != loss(capsys, base)
    with pytest.raises(SystemExit) as stop:
        compress.run(["merge", f"--workdir={workdir}", f"--out={tmp_path / 'merged'}"])
    assert stop.value.code == 0
    # float32 products in another order
    assert loss(capsys, tmp_path / "merged") == pytest.approx(mine, rel=1e-5)


@pytest.mark.slow
def test_prompts_of_one_batch_have_the_texts_of_their_own_adapters(
    lora, base, texts, tmp_path, capsys
):
    """Two runs of other ranks and matrices, and the base itself, beside each other."""
    other = dict(adapter__rank=4, adapter__names="stack/*/key", optimizer__learning_rate=0.1)
    second = tmp_path / "second"
    keys = LORA | other | dict(adapter__alpha=64.0)
    run(train, capsys, *arguments(second, texts, adapter__base=base, model__dropout=0.0, **keys))
    new = "--config.generate.max_new_tokens=6", "--config.generate.ignore_end=true", "--json"

    def tokens(workdir, *flags):
        out, _ = run(generate, capsys, f"--workdir={workdir}", *flags, *new)
        rows = [json.loads(line) for line in out.splitlines()]
        return [row["tokens"] for row in sorted(rows, key=lambda row: row["number"])]

    alone = [tokens(w, "--prompt=mesh")[0] for w in (lora[0], second, base)]
    assert len(set(map(tuple, alone))) > 1
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "mesh", "adapter": str(w)} for w in (lora[0], second)] + [{"prompt": "mesh"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert tokens(base, f"--prompts={file}", "--config.generate.cache=paged") == alone

    flags = f"--workdir={second}", "--prompt=mesh", f"--adapter={lora[0]}"
    _, err = run(generate, capsys, *flags, *new, code=2)
    assert "is to be its base without adapters" in err


@pytest.mark.slow
def test_another_base_is_refused(lora, base, texts, tmp_path, capsys):
    other = shutil.copytree(base, tmp_path / "other")
    step = other / "checkpoints" / "1"
    manifest = json.loads((step / "manifest.json").read_text())
    name = next(n for n in manifest["files"] if n.startswith("state/"))
    moved = shutil.copytree(base, tmp_path / "moved")
    assert loss(capsys, lora[0], f"--config.adapter.base={moved}") > 0  # the same elsewhere
    (step / name).write_bytes(b"!" + (step / name).read_bytes())
    from training import manifest as of_files

    (step / "manifest.json").unlink()
    of_files.write(step, manifest["tensors"])
    flags = f"--workdir={lora[0]}", f"--config.adapter.base={other}"
    _, err = run(evaluate, capsys, *flags, code=2)
    assert f"config.adapter.base = '{other}': step 1 there has other parameters" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (dict(adapter__method="lora"), "config.adapter.base = '': missing"),
        (dict(adapter__method="lora", adapter__base="nowhere"), "'nowhere': no run's folder"),
        (dict(adapter__base="nowhere"), "has no effect without config.adapter.method"),
    ],
)
def test_what_cannot_be_is_one_line(texts, tmp_path, capsys, keys, words):
    _, err = run(train, capsys, *arguments(tmp_path / "b", texts, **keys), code=2)
    assert words in err
    assert err.count("\n") == 1
    assert not Path(tmp_path / "b" / "config.json").exists()
