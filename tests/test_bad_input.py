"""What a user may get wrong ends in one line that names the key, its value and what would be right.

Every case goes through the code of the command line itself, in this process, where there are 8
devices; `tests/test_commands.py` runs some as a user does.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import cli
import evaluate
import train
from tests.runs import arguments, rows, saved_steps, write_texts
from training import manifest

STEP = cli.Flag("step", int, None, "the step to restore")
PROGRAMS = {
    "train.py": (train.main, {"config_from": "file"}),
    "evaluate.py": (
        evaluate.main,
        {"config_from": "workdir or checkpoint", "flags": [STEP]},
    ),
}


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
    return write_texts(tmp_path_factory.mktemp("bad") / "texts")


def run(capsys, program, *argv: object) -> tuple[int, str]:
    """The exit code and stderr of a command."""
    capsys.readouterr()
    main, how = PROGRAMS[program]
    with pytest.raises(SystemExit) as stop:
        cli.run(main, name=program, about="", argv=[*map(str, argv)], **how)
    return stop.value.code, capsys.readouterr().err


@pytest.fixture
def refused(capsys):
    """Asserts that a command is refused in one line that has all of `words`."""

    def check(program, argv, words, code=2):
        got, err = run(capsys, program, *argv)
        print(err)
        assert got == code, err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        assert len(err) < 500, "nobody reads that"
        for word in words:
            assert word in err

    return check


# Overrides of a good config, and words of the line: the key, its value, what would be right.
BAD_KEYS = {
    # mesh
    "mesh.dta=2": ("config.mesh.dta: no such key", "did you mean config.mesh.data?"),
    "mesh.data=two": ("config.mesh.data = 'two'", "a whole number"),
    "mesh.data=3": ("config.mesh = data 3 needs 3 devices", "there are 8", "or set one axis to -1"),
    "mesh.fsdp=3": ("config.mesh.data = -1", "fsdp 3", "product divides 8"),
    "mesh.fsdp=-1": ("config.mesh.fsdp = -1", "config.mesh.data is -1 already"),
    "mesh.tensor=0": ("config.mesh.tensor = 0", "at least 1, or -1"),
    "mesh.tensor=-2": ("config.mesh.tensor = -2", "at least 1, or -1"),
    "mesh.context=2": ("config.mesh.context = 2", "not built yet; only 1"),
    "mesh.expert=2": ("config.mesh.expert = 2", "no experts to divide", "set it to 1"),
    "experts.number=1": ("config.experts.number = 1", "2 or more, or 0"),
    # layout
    "parallel.zero=4": ("config.parallel.zero = 4", "0, 1, 2 or 3"),
    "parallel.zero=-1": ("config.parallel.zero = -1", "0, 1, 2 or 3"),
    "parallel.zero=true": ("config.parallel.zero = 'true'", "a whole number"),
    "parallel.preset=megatrn": ("config.parallel.preset = 'megatrn'", "megatron"),
    "parallel.rules={'embd': ['fsdp']}": ("config.parallel.rules.embd", "embed"),
    "parallel.rules={'embed': ['fspd']}": ("config.parallel.rules.embed = ('fspd',)", "fsdp"),
    "parallel.rules={'embed': 'fsdp'}": ("config.parallel.rules.embed = 'fsdp'", "a list"),
    "parallel.rules={'layers': ['fsdp']}": ("config.parallel.rules.layers", "only pipe"),
    "parallel.rules={'seq': ['data']}": ("config.parallel.rules", "twice", "data"),
    "parallel.rules={'embed': ['tensor']}": ("config.parallel.rules", "twice", "tensor"),
    "parallel.rules={'head_dim': ['tensor']}": ("config.parallel.rules", "twice", "tensor"),
    "parallel.rules={'act_embed': ['data']}": ("config.parallel.rules", "twice", "data"),
    "data.batch_size=12": ("config.data.batch_size = 12", "config.mesh.data = 8", "multiple of 8"),
    "data.batch_size=0": ("config.data.batch_size = 0", "at least 1"),
    "train.grad_accumulation=3": (
        "config.train.grad_accumulation = 3",
        "multiple of 3, or for config.train.grad_accumulation 1",
    ),
    "train.grad_accumulation=2": ("config.train.grad_accumulation = 8 / 2", "multiple of 8"),
    "mesh.pipe=2 model.layers=1": ("config.model.layers = 1", "config.mesh.pipe", "at least 2"),
    "mesh.pipe=2 pipeline.schedule=interleaved model.layers=3": (
        "config.model.layers = 3",
        "= 4 chunks",
        "at least 4",
    ),
    "mesh.pipe=2 model.layers=2 model.window=4 model.pattern=('local','global')": (
        "config.model.layers = 2",
        "2 kinds in config.model.pattern",
        "at least 4",
    ),
    "mesh.pipe=2 model.layers=5 model.window=4 model.pattern=('local','global')": (
        "config.model.layers = 5",
        "multiple of 2",
    ),
    "pipeline.balance=costs": ("config.pipeline.balance = 'costs'", "equal, cost"),
    "mesh.pipe=2 model.layers=4 pipeline.layers=(1,2,1)": (
        "config.pipeline.layers = (1, 2, 1)",
        "2 chunks want one each, or () to leave it to config.pipeline.balance",
    ),
    "mesh.pipe=2 model.layers=4 pipeline.layers=(4,0)": (
        "config.pipeline.layers = (4, 0)",
        "not 0",
    ),
    "mesh.pipe=2 model.layers=4 pipeline.layers=(3,2)": (
        "config.pipeline.layers = (3, 2)",
        "together 5",
        "config.model.layers = 4",
    ),
    "mesh.pipe=2 pipeline.schedule=gpip": ("config.pipeline.schedule = 'gpip'", "gpipe"),
    "mesh.pipe=2 pipeline.form=lien": ("config.pipeline.form = 'lien'", "lean"),
    # without stages, too
    "pipeline.schedule=gpip": ("config.pipeline.schedule = 'gpip'", "gpipe"),
    "pipeline.schedule=zb_h1 pipeline.form=nonsense": (
        "config.pipeline.form = 'nonsense'",
        "zb_h1 comes as wide, lean, single",
    ),
    "mesh.pipe=2 pipeline.orders=/no/such.py": (
        "config.pipeline.orders = '/no/such.py'",
        "no such file",
        "defines orders(stages, microbatches)",
    ),
    "mesh.pipe=2 pipeline.orders=train.py": (
        "config.pipeline.orders = 'train.py'",
        "defines no function orders",
    ),
    "mesh.pipe=2 pipeline.chunks=3 model.layers=6": ("config.pipeline.chunks = 3", "wants 1"),
    "mesh.pipe=2 model.layers=4 pipeline.microbatches=3": (
        "config.pipeline.microbatches = 3",
        "multiple of 3, or for config.pipeline.microbatches 2",
    ),
    "mesh.pipe=8 pipeline.microbatches=4 model.layers=8": (
        "config.pipeline.microbatches = 4",
        "at least 8",
    ),
    "pipeline.microbatches=0": ("config.pipeline.microbatches = 0", "at least 1"),
    "mesh.pipe=2 model.layers=4 train.grad_accumulation=2": (
        "config.train.grad_accumulation = 2",
        "config.pipeline.microbatches",
    ),
    "mesh.pipe=2 remat.policy=custom remat.offload=query": (
        "config.remat.offload = ['query']",
        "config.mesh.pipe = 2",
    ),
    "mesh.pipe=2 optimizer.offload=true": ("config.optimizer.offload", "config.mesh.pipe = 2"),
    "mesh.pipe=2 parallel.rules={'embed': ['pipe']}": ("config.parallel.rules.embed", "pipe"),
    "mesh.tensor=8 model.heads=4 model.kv_heads=4": (
        "config.model.heads = 4",
        "config.mesh.tensor = 8",
        "multiple of 8",
    ),
    "mesh.tensor=4 model.heads=12 model.kv_heads=3": ("config.model.kv_heads = 3", "multiple of 4"),
    "mesh.tensor=4 model.mlp_dim=66": ("config.model.mlp_dim = 66", "multiple of 4"),
    "mesh.tensor=4 parallel.sequence=true data.sequence_length=30": (
        "config.data.sequence_length = 30",
        "config.mesh.tensor = 4",
        "multiple of 4",
    ),
    # model
    "model.layers=0": ("config.model.layers = 0", "at least 1"),
    "model.layers=2.5": ("config.model.layers = '2.5'", "a whole number"),
    "model.vocab_size=-1": ("config.model.vocab_size = -1", "at least 1"),
    "model.kv_heads=3": ("config.model.kv_heads = 3", "config.model.heads = 8"),
    "model.head_dim=5": ("config.model.head_dim = 5", "even"),
    "model.family=encoder": ("config.model.family = 'encoder'", "masked_lm or class"),
    "model.activation=swish": ("config.model.activation = 'swish'", "silu"),
    "model.dropout=1.0": ("config.model.dropout = 1.0", "[0, 1)"),
    "model.dropout=nan": ("config.model.dropout = nan", "a finite number"),
    "model.norm_eps=nan": ("config.model.norm_eps = nan", "a finite number"),
    "model.init_std=inf": ("config.model.init_std = inf", "a finite number"),
    "model.window=8": ("config.model.window = 8", "config.model.pattern", "'local'"),
    "model.pattern=lokal": ("config.model.pattern = ['lokal']", "'local' and 'global'"),
    "model.distinct=2": ("config.model.distinct = 2", "1 to 1", "config.model.layers"),
    "model.sharing=ring": ("config.model.sharing = 'ring'", "cycle, repeat"),
    "model.embed_rank=32": ("config.model.embed_rank = 32", "1 to 31"),
    "model.tied=perhaps": ("config.model.tied = 'perhaps'", "true or false"),
    "data.sequence_length=64": ("config.data.sequence_length = 64", "config.model.max_length = 32"),
    "data.sequence_length=0": ("config.data.sequence_length = 0", "at least 1"),
    # objective
    "objective.name=mlm": ("config.objective.name = 'mlm'", "masked_lm"),
    "objective.mask_rate=1": ("config.objective.mask_rate = 1.0", "between 0 and 1"),
    "objective.mask_rate=nan": ("config.objective.mask_rate = nan", "a finite number"),
    "objective.span_length=0": ("config.objective.span_length = 0.0", "at least 1"),
    "objective.task_weight=0": ("config.objective.task_weight = 0.0", "above 0"),
    "objective.tasks={'kind': 1}": ("config.objective.tasks.kind = 1", "at least 2"),
    "objective.tasks={'kind': 'x'}": ("config.objective.tasks.kind = 'x'", "a whole number"),
    "objective.tasks=kind": ("config.objective.tasks = 'kind'", "a mapping"),
    "objective.name=classification": ("config.objective.tasks = {}", "such as {'digit': 10}"),
    "objective.name=prefix_lm": ("config.data.packing = 'packed'", "set it to buckets or none"),
    "data.source_length=0": ("config.data.source_length = 0", "at least 1"),
    "data.source_field=code": ("config.data.source_field = 'code'", "'jsonl'", "leave it empty"),
    "data.source=jsonl data.source_field=code": (
        "config.data.source_field = 'code'",
        "config.objective.name = 'causal_lm' reads no source",
    ),
    "data.source=docstrings": ("config.data.path", "reads no path", "leave it empty"),
    "data.source=docstrings data.path=": (
        "config.data.source = 'docstrings'",
        "config.objective.name = 'causal_lm'",
        "learns from",
    ),
    "data.source=images": ("config.data.source = 'images'", "learns from"),
    # remat and precision
    "remat.policy=some": ("config.remat.policy = 'some'", "full"),
    "remat.save=query": ("config.remat.save = ['query']", "'custom'"),
    "remat.offload=query remat.policy=full": ("config.remat.offload = ['query']", "'custom'"),
    "remat.save=quary remat.policy=custom": ("config.remat.save", "'quary'", "query"),
    "remat.save=query remat.offload=query remat.policy=custom": ("config.remat.offload", "'query'"),
    "remat.policy=custom": ("config.remat.policy = 'custom'", "use 'full'"),
    "precision.params=float16": ("config.precision.params = 'float16'", "float32"),
    "precision.compute=fp16": ("config.precision.compute = 'fp16'", "float16"),
    "precision.scale=0": ("config.precision.scale = 0.0", "at least 1"),
    # optimizer, loss, loop
    "optimizer.frozen=stak/*": (
        "config.optimizer.frozen = ['stak/*']",
        "names no parameter",
        "stack",
    ),
    "optimizer.frozen=*": ("config.optimizer.frozen = ['*']", "nothing is left to train"),
    "init_new=heads/*": ("config.init_new = ['heads/*']", "without config.init_from"),
    "optimizer.name=adam": ("config.optimizer.name = 'adam'", "adamw"),
    "optimizer.schedule=linear": ("config.optimizer.schedule = 'linear'", "cosine"),
    "optimizer.learning_rate=-1": ("config.optimizer.learning_rate = -1.0", "above 0"),
    "optimizer.learning_rate=nan": ("config.optimizer.learning_rate = nan", "a finite number"),
    "optimizer.learning_rate=inf": ("config.optimizer.learning_rate = inf", "a finite number"),
    "optimizer.warmup_steps=-1": ("config.optimizer.warmup_steps = -1", "0 (no warm-up)"),
    "optimizer.weight_decay=-0.1": ("config.optimizer.weight_decay = -0.1", "0 (off) or more"),
    "optimizer.weight_decay=inf": ("config.optimizer.weight_decay = inf", "a finite number"),
    "optimizer.clip_norm=-1": ("config.optimizer.clip_norm = -1.0", "0 (off) or more"),
    "optimizer.name=sgd optimizer.momentum=0 optimizer.offload=true": (
        "config.optimizer.offload = True",
        "sgd without momentum",
    ),
    "optimizer.rank=0": ("config.optimizer.rank = 0", "at least 1"),
    "optimizer.refresh=0": ("config.optimizer.refresh = 0", "at least 1"),
    "optimizer.projection_scale=-1": ("config.optimizer.projection_scale = -1.0", "0 (the method"),
    "optimizer.name=galore optimizer.rank=32": (
        "config.optimizer.rank = 32",
        "the largest smaller side of one is 32",
        "choose a rank below it",
    ),
    "optimizer.stochastic_rounding=true": (
        "config.optimizer.stochastic_rounding = True",
        "float32",
        "config.precision.params to 'bfloat16'",
    ),
    "optimizer.b2=1": ("config.optimizer.b2 = 1.0", "below 1"),
    "loss.chunk=0": ("config.loss.chunk = 0", "at least 1"),
    "loss.z_loss=nan": ("config.loss.z_loss = nan", "a finite number"),
    "train.steps=-5": ("config.train.steps = -5", "at least 1"),
    "train.steps=1e3": ("config.train.steps = '1e3'", "a whole number"),
    "train.log_every=0": ("config.train.log_every = 0", "at least 1"),
    "train.max_skipped=0": ("config.train.max_skipped = 0", "at least 1"),
    "train=5": ("config.train = '5'", "a whole section", "set its keys", "config.train."),
    "checkpoint.every=0": ("config.checkpoint.every = 0", "at least 1"),
    "checkpoint.keep=0": ("config.checkpoint.keep = 0", "at least 1"),
    "checkpoint.best=accuracy": ("config.checkpoint.best = 'accuracy'", "loss"),
    "eval.every=-1": ("config.eval.every = -1", "0 (at the end alone) or more"),
    "eval.batches=0": ("config.eval.batches = 0", "at least 1"),
    "seed=-1": ("config.seed = -1", "0 to 4294967295"),
    "seed=4294967296": ("config.seed = 4294967296", "0 to 4294967295"),
    "seed=a": ("config.seed = 'a'", "a whole number"),
    # data
    "data.source=txt": ("config.data.source = 'txt'", "text"),
    "data.path=": ("config.data.path = ''", "a file or a glob"),
    "data.path=/no/such.txt": ("config.data.path = '/no/such.txt'", "no such file", "give"),
    "data.path=/no/*.txt": ("config.data.path = '/no/*.txt'", "no file matches", "give"),
    "data.eval_path=/no/such.txt": ("config.data.eval_path = '/no/such.txt'", "no such file"),
    "data.source=stdlib": ("config.data.path", "reads no path", "leave it empty"),
    "data.source=dataset data.path=/no/such": ("config.data.path = '/no/such'", "no such folder"),
    "data.source=tokens data.tokenizer=bpe": ("config.data.tokenizer = 'bpe'", "tokenizer.json"),
    "data.packing=dense": ("config.data.packing = 'dense'", "packed"),
    "data.buckets=16,32": (
        "config.data.buckets = (16, 32)",
        "config.data.packing",
        "leave it empty",
    ),
    "data.packing=buckets data.buckets=32,16": ("config.data.buckets = (32, 16)", "rising order"),
    "data.packing=buckets data.buckets=8,x": ("config.data.buckets", "'x'", "a whole number"),
    "data.packing=buckets data.buckets=8,16": (
        "config.data.buckets = (8, 16)",
        "sequence_length = 32",
    ),
    "data.prefetch_mib=0": ("config.data.prefetch_mib = 0", "at least 1"),
    "data.tokenizer=none.json": (
        "config.data.tokenizer = 'none.json'",
        "no such file",
        "bytes, bpe",
    ),
    "data.tokenizer=": ("config.data.tokenizer = ''", "bytes, bpe"),
    "model.vocab_size=200": ("config.model.vocab_size = 200", "at least 257", "'bytes'"),
    "model.vocab_size=200 data.tokenizer=bpe": ("config.model.vocab_size = 200", "at least 257"),
}


@pytest.mark.parametrize("bad", BAD_KEYS)
def test_keys(refused, texts, tmp_path, bad):
    keys = [f"--config.{key}" for key in bad.replace("': ", "':").split()]
    refused("train.py", arguments(tmp_path / "w", texts) + keys, BAD_KEYS[bad])
    assert not saved_steps(tmp_path / "w")


def write(folder: Path, name: str, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


# The content of a file (its name tells the source), more overrides, and words of the line.
BAD_FILES = {
    "empty": ("a.txt", b"", {}, ("a.txt' is empty", "give another file")),
    "a byte": ("a.txt", b"a", {}, ("too little text", "give more documents")),
    "binary": ("a.txt", b"text\0\1\2", {}, ("a.txt' is binary", "give UTF-8 text")),
    "latin-1": (
        "a.txt",
        "caf\xe9 au lait".encode("latin-1"),
        {},
        ("not UTF-8 (byte 3)", "give UTF"),
    ),
    "no JSON": (
        "a.jsonl",
        b'{"text": "fine"}\n{"text": "torn\n',
        {},
        ("a.jsonl:2: not JSON (column ", "give one object a line"),
    ),
    "no object": (
        "a.jsonl",
        b"[1, 2]\n",
        {},
        ("a.jsonl:1: list, not an object", "one object a line"),
    ),
    "no field": (
        "a.jsonl",
        b'{"body": "fine"}\n',
        {},
        ("a.jsonl:1", "config.data.text_field = 'text'", "only body", "name the field"),
    ),
    "no text in the field": (
        "a.jsonl",
        b'{"text": 7}\n',
        {},
        ("a.jsonl:1", "config.data.text_field = 'text'", "holds int, not text", "name a field"),
    ),
    "no lines": ("a.jsonl", b"\n\n", {}, ("no document", "give files that hold text")),
    "odd size": (
        "a.bin",
        b"123",
        {},
        ("3 bytes", "config.data.token_dtype = 'uint16'", "whole file"),
    ),
    "ids too large": (
        "a.bin",
        np.arange(300, dtype=np.uint16).tobytes(),
        {},
        ("holds token 299", "config.model.vocab_size = 257", "raise it"),
    ),
    "wrong dtype": (
        "a.npy",
        b"",
        {},
        ("holds float32 [8]", "uint16 or uint32"),
    ),
    "torn npy": ("b.npy", b"\x93NUMPY\1", {}, ("not a whole .npy file",)),
    "tokenizer that is no JSON": (
        "a.txt",
        b"text",
        {"data.tokenizer": b"once upon a time"},
        ("config.data.tokenizer", "not a tokenizer.json"),
    ),
    "tokenizer that is JSON": (
        "a.txt",
        b"text",
        {"data.tokenizer": b"{}"},
        ("config.data.tokenizer", "not a tokenizer.json"),
    ),
    "tokenizer that is binary": (
        "a.txt",
        b"text",
        {"data.tokenizer": b"\xff\0"},
        ("config.data.tokenizer", "not a tokenizer.json"),
    ),
}


@pytest.mark.parametrize("bad", BAD_FILES)
def test_files(refused, tmp_path, bad):
    name, content, keys, words = BAD_FILES[bad]
    file = write(tmp_path / "data", name, content)
    if name == "a.npy":
        np.save(file, np.zeros(8, np.float32))
    kind = {".txt": "text", ".jsonl": "jsonl"}.get(file.suffix, "tokens")
    more = {
        key.replace(".", "__"): write(tmp_path, "tokenizer.json", text)
        for key, text in keys.items()
    }
    command = arguments(tmp_path / "w", str(file), data__source=kind, **more)
    refused("train.py", command, ("config.data.", *words))


def test_a_folder_where_a_file_is_wanted(refused, texts, tmp_path):
    folder = str(Path(texts).parent)
    refused(
        "train.py",
        arguments(tmp_path / "w", folder),
        (f"config.data.path = '{folder}'", "a folder", "glob such as"),
    )
    refused(
        "train.py",
        arguments(tmp_path / "w", texts, data__tokenizer=folder),
        (f"config.data.tokenizer = '{folder}'", "no such file"),
    )
    file = write(tmp_path, "file", b"")
    refused(
        "train.py",
        arguments(tmp_path / "w", texts, data__cache=file),
        (str(file), "config.data.cache"),
    )


def test_a_tokenizer_for_another_vocabulary(refused, texts, tmp_path):
    from data.tokens import train_bpe

    file = tmp_path / "tokenizer.json"
    train_bpe(["to be or not to be, that is the question"] * 9, 270, file)
    keys = {"data__tokenizer": file}
    refused(
        "train.py",
        arguments(tmp_path / "w", texts, **keys),
        (f"config.data.tokenizer = '{file}'", "config.model.vocab_size = 257", "at least 2"),
    )
    refused(
        "train.py",
        arguments(tmp_path / "w", texts, **keys, data__end_token="<eos>", model__vocab_size=300),
        ("config.data.end_token = '<eos>'", "name the token"),
    )


BAD_COMMANDS = {
    "--config=configs/tny.py": ("--config=configs/tny.py: no such file", "configs/tiny.py?"),
    "--config=configs": ("--config=configs: a folder", "such as configs/tiny.py"),
    "--config=": ("--config=: a folder", "such as configs/tiny.py"),
    "--config=/no/tiny.py": ("--config=/no/tiny.py: no such file", "such as configs/tiny.py"),
    "--config=train.py": ("--config=train.py", "defines no get_config()"),
    "--wrkdir=x": ("--wrkdir: no such flag of train.py", "--workdir?"),
    "--steps=3": ("--steps: no such flag of train.py", "did you mean --config.train.steps?"),
    "--learning_rate=1": ("--learning_rate: no such flag", "--config.optimizer.learning_rate?"),
    "--workdir": ("--workdir", "expected one argument"),
    "--workdir=": ("--workdir", "the run's folder"),
    "--workdir=FILE": ("--workdir=", "a file; give the run's folder"),
    "--workdir=FILE/run": ("--workdir", "FILE/run", "Not a directory", "choose a"),
    "--workdir=/proc/run": ("--workdir", "/proc/run", "choose a directory that you may write to"),
    "--num_processes=2": ("--num_processes=2: --coordinator is missing",),
    "--num_processes=two": ("--num_processes: 'two'", "a whole number"),
    "--num_processes=0 --process_id=0 --coordinator=x:1": ("--num_processes=0", "at least 1"),
    "--num_processes=2 --process_id=2 --coordinator=x:1": ("--process_id=2", "0 to 1 are right"),
    "--num_processes=2 --process_id=0 --coordinator=x": ("--coordinator=x", "HOST:PORT"),
    "--num_processes=2 --process_id=0 --coordinator=x:0": ("--coordinator=x:0",),
    "--step=3": ("--step: no such flag of train.py",),
    "configs/tiny.py": ("configs/tiny.py: not a flag", "did you mean --config=configs/tiny.py?"),
    "--config.data": ("config.data", "a whole section"),
    "--config.logging.wandb=true": ("config.logging.wandb = True", "pip install", "False"),
}


# wandb is looked for when the run begins to log: its state has been made by then.
SLOW = [pytest.param(bad, marks=pytest.mark.slow) for bad in BAD_COMMANDS if "wandb" in bad]


@pytest.mark.parametrize("bad", [bad for bad in BAD_COMMANDS if "wandb" not in bad] + SLOW)
def test_flags(refused, texts, tmp_path, monkeypatch, bad):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)  # as where it is not installed
    write(tmp_path, "FILE", b"")
    extra = bad.replace("=FILE", f"={tmp_path}/FILE").split()
    words = (word.replace("FILE", f"{tmp_path}/FILE") for word in BAD_COMMANDS[bad])
    refused("train.py", arguments(tmp_path / "w", texts) + extra, words)
    assert (tmp_path / "FILE").read_bytes() == b""


@pytest.fixture(scope="module")
def finished(texts, tmp_path_factory):
    """The workdir of a run of six steps that ended well."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    command = arguments(workdir, texts, train__steps=6, checkpoint__every=3)
    with pytest.raises(SystemExit) as stop:
        cli.run(train.main, name="train.py", about="", config_from="file", argv=command)
    assert stop.value.code == 0
    assert saved_steps(workdir) == [3, 6]
    return workdir


@pytest.fixture
def workdir(finished, tmp_path):
    """A copy of that run; nothing that is refused may change its checkpoints, rows or config."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    before = contents(workdir)
    yield workdir
    assert contents(workdir) == before


def contents(workdir: Path) -> dict[str, bytes]:
    """What a run must not lose: every file but the cached data."""
    files = (path.relative_to(workdir) for path in workdir.rglob("*") if path.is_file())
    return {str(f): (workdir / f).read_bytes() for f in files if f.parts[0] != "cache"}


# Continuing a run as another one: what is given, and words of the line.
OTHER_RUNS = {
    "seed=1": ("config.seed = 1", "has 0", "another --workdir"),
    "model.layers=3": ("config.model.layers = 3", "has 2", "another --workdir"),
    "model.dropout=0.2": ("config.model.dropout = 0.2", "has 0.1"),
    "model.rope_theta=500": ("config.model.rope_theta = 500.0", "has 10000.0"),
    "data.batch_size=16": ("config.data.batch_size = 16", "has 8"),
    "data.packing=none": ("config.data.packing = 'none'", "has 'packed'"),
    "optimizer.name=lion": ("config.optimizer.name = 'lion'", "has 'adamw'"),
    "optimizer.learning_rate=1": ("config.optimizer.learning_rate = 1.0", "has 0.003"),
    "precision.compute=bfloat16": ("config.precision.compute = 'bfloat16'", "has 'float32'"),
    "mesh.fsdp=3": ("config.mesh.data = -1", "fsdp 3", "8"),
    "remat.policy=all": ("config.remat.policy = 'all'", "full"),
}


@pytest.mark.slow  # the run that they continue
@pytest.mark.parametrize("bad", OTHER_RUNS)
def test_continuing_as_another_run(refused, workdir, bad):
    refused("train.py", [f"--workdir={workdir}", f"--config.{bad}"], OTHER_RUNS[bad])


@pytest.mark.slow
def test_continuing_on_other_data(refused, workdir, tmp_path):
    other = write_texts(tmp_path / "texts", files=20)
    refused(
        "train.py",
        [f"--workdir={workdir}", f"--config.data.path={other}"],
        ("config.data.path", "another --workdir"),
    )


@pytest.mark.slow
def test_continuing_with_other_held_out_files(refused, finished, tmp_path):
    workdir, other = shutil.copytree(finished, tmp_path / "run"), write_texts(tmp_path / "texts")
    words = ("config.data", "have changed", "give the same files", "another --workdir")
    refused("train.py", [f"--workdir={workdir}", f"--config.data.eval_path={other}"], words)


@pytest.mark.slow
def test_refused_data_do_not_reach_the_config(finished, tmp_path):
    workdir, other = shutil.copytree(finished, tmp_path / "run"), write_texts(tmp_path / "texts")
    flags = [f"--workdir={workdir}", f"--config.data.eval_path={other}"]
    with pytest.raises(SystemExit):
        cli.run(train.main, name="train.py", about="", config_from="file", argv=flags)
    assert contents(workdir) == contents(finished)


@pytest.mark.slow
def test_continuing_when_a_file_has_changed(refused, workdir, texts):
    file = Path(texts).parent / "00.txt"
    before = file.read_text()
    file.write_text(before.replace("mesh", "tree"))
    try:
        refused("train.py", [f"--workdir={workdir}"], ("config.data", "have changed", "same files"))
    finally:
        file.write_text(before)


OTHER_CHECKPOINTS = {
    "--config.model.layers=3": ("config.model", "another one", "(2, 32", "(3, 32", "--workdir"),
    "--config.model.embed_dim=64": ("config.model", "another one", "32", "64"),
    "--config.model.tied=true": ("config.model", "another one", "absent"),
    "--config.model.tied=maybe": ("config.model.tied = 'maybe'", "true or false"),
    "--config.model.vocab_size=900": ("config.model", "another one", "(384, 32)", "(1024, 32)"),
    "--config.mesh.data=3": ("config.mesh = data 3 needs 3 devices", "there are 8"),
    "--config.mesh.dta=3": ("config.mesh.dta: no such key", "config.mesh.data?"),
    "--config.data.path=/no/such.txt": ("config.data.path = '/no/such.txt'", "no such file"),
    "--config.data.batch_size=12": ("config.data.batch_size = 12", "multiple of 8"),
    "--step=5": ("--workdir", "no undamaged step 5", "other steps there: 3, 6"),
    "--step=-1": ("--workdir", "no undamaged step -1", "other steps there: 3, 6"),
    "--step=newest": ("--step: 'newest'", "a whole number"),
    "--step": ("--step", "expected one argument"),
    "--config=configs/tiny.py": ("evaluate.py takes the config from --workdir",),
    "--workdir=/no/such": ("--workdir=/no/such: no config.json", "a folder that train.py wrote"),
}


@pytest.mark.slow
@pytest.mark.parametrize("bad", OTHER_CHECKPOINTS)
def test_evaluating_what_is_not_there(refused, workdir, bad):
    refused("evaluate.py", [f"--workdir={workdir}", bad], OTHER_CHECKPOINTS[bad])


@pytest.mark.slow
def test_no_good_checkpoint(refused, finished, texts, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    for folder in workdir.glob("checkpoints/*"):
        (folder / "manifest.json").write_text("")
    before = contents(workdir)
    words = ("--workdir", "no undamaged checkpoint", "choose another")
    refused("evaluate.py", [f"--workdir={workdir}"], words)
    refused("evaluate.py", [f"--workdir={workdir}", "--step=3"], ("no undamaged step 3", "6"))
    refused("train.py", [f"--workdir={workdir}"], words)
    assert contents(workdir) == before
    shutil.rmtree(workdir / "checkpoints")
    refused("evaluate.py", [f"--workdir={workdir}"], words)
    (workdir / "config.json").write_text('{"model": {"layrs": 2}}')
    refused("evaluate.py", [f"--workdir={workdir}"], ("config.model.layrs", "config.model.layers?"))
    (workdir / "config.json").write_text('{"model": ')
    refused("evaluate.py", [f"--workdir={workdir}"], ("config.json", "damaged, not JSON"))
    refused("train.py", [f"--workdir={workdir}"], ("config.json", "damaged, not JSON", "remove it"))


@pytest.mark.slow
def test_a_loss_that_is_not_a_number(refused, texts, tmp_path):
    workdir = tmp_path / "run"
    keys = {"optimizer__learning_rate": 1e30, "train__max_skipped": 3, "checkpoint__every": 1}
    refused(
        "train.py",
        arguments(workdir, texts, **keys),
        (
            "config.train.max_skipped = 3",
            "step 4 is the last of 3 in a row",
            "lower config.optimizer.learning_rate",
            "Earlier checkpoints are intact",
        ),
    )
    assert [row["finite"] for row in rows(workdir)] == [True, False, False, False]
    assert saved_steps(workdir)
    for step in saved_steps(workdir):
        assert manifest.damage(workdir / "checkpoints" / str(step)) is None
