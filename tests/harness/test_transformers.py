"""Tasks have the scores that lm-eval's own backend for transformers gives them, on any layout.

Contexts are up to three times as long as what the model reads, texts up to eight times.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from types import SimpleNamespace

import jax
import pytest

from config_border import with_values
from config_sources import with_checkpoint
from configs import base
from data.objective import ObjectiveConfig
from data.tokens import JsonTokenizer
from experiment import read_experiment
from harness.evaluation import run_tasks
from harness.tasks import load_tasks
from parallel.mesh import make_mesh
from parallel.precision import PrecisionConfig
from run_params import saved_params
from task_texts import TaskTexts
from tests.harness import local
from tests.hf import synthetic
from tests.hf.parity import TEXT
from tests.small import CAUSAL_LM, layout

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
make_lm = pytest.importorskip("harness.lm").make_lm  # it imports lm-eval

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # theirs are not ours to mend
]
torch.set_num_threads(1)  # its threads and those of 8 simulated devices wait for each other
# Float32 in another order: log-probabilities of a text are sums of hundreds of terms of about 6.
CLOSE = {"rel": 1e-6, "abs": 1e-4}
LAYOUTS = {
    "one device": {},
    "tensor 4 x data 2": {"tensor": 4, "data": 2},
    "fsdp 8": {"fsdp": 8, "zero": 3},
    "fsdp 2 x tensor 2, zero 1, sequence": {"fsdp": 2, "tensor": 2, "zero": 1, "sequence": True},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint and tasks."""
    folder = tmp_path_factory.mktemp("transformers")
    checkpoint = local.checkpoint(folder / "checkpoint")
    return SimpleNamespace(
        checkpoint=checkpoint,
        tasks=local.task_folder(folder / "tasks"),
        tokenizer=JsonTokenizer(checkpoint / "tokenizer.json"),
    )


def requests_of(kind: str, tasks: dict) -> list:
    """Every request of a kind that tasks make."""
    found = []
    for task in tasks["tasks"].values():
        task.set_config(key="num_fewshot", value=0)
        task.build_all_requests(limit=None, rank=0, world_size=1)
        found += [one for one in task.instances if one.request_type == kind]
    assert found
    return found


def answers(lm, folder, more: list) -> tuple[list, list, dict]:
    """Log-probabilities of continuations, of texts, and metrics."""
    load = lambda: load_tasks(["choices", "texts"], folder, generates=False)
    continuations = lm.loglikelihood(requests_of("loglikelihood", load()) + more)
    texts = lm.loglikelihood_rolling(requests_of("loglikelihood_rolling", load()))
    return continuations, texts, run_tasks(lm, load(), None)


@pytest.fixture(scope="module")
def theirs(files):
    """What lm-eval's backend says."""
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=str(files.checkpoint), device="cpu", batch_size=4, dtype="float32")
    assert lm.max_length == local.GPT2.max_length
    tasks = load_tasks(["choices"], files.tasks, generates=False)
    more = most_likely(lm, files.tokenizer, requests_of("loglikelihood", tasks)[::3])
    return more, *answers(lm, files.tasks, more)


def most_likely(lm, tokenizer, requests) -> list:
    """Contexts with what greedy decoding makes of them, where that is one whole token of text; and
    one without a context.
    """
    from lm_eval.api.instance import Instance

    found = [("", TEXT[:30])]
    for context in (request.args[0].rstrip() for request in requests):
        ids = tokenizer.encode(context).tolist()
        with torch.no_grad():
            logits = lm.model(torch.tensor([ids[-lm.max_length :]])).logits[0, -1]
        best = int(logits.argmax())
        text = tokenizer.decode([best])
        if tokenizer.encode(context + text).tolist() == [*ids, best]:
            found.append((context, text))
    assert len(found) > 4, "greedy decoding is not compared"
    return [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(found)]


@contextmanager
def ours(checkpoint, config=local.GPT2, objective=CAUSAL_LM, **sizes):
    """A checkpoint here."""
    with layout(config=config, objective=objective, length=48, source_length=48, **sizes) as laid:
        params = synthetic.read(laid, config, checkpoint)
        tokenizer = JsonTokenizer(checkpoint / "tokenizer.json")
        precision, tokens = PrecisionConfig(), 16 * 48
        yield make_lm(laid.model, params, config, precision, laid.mesh, tokenizer, tokens=tokens)


@pytest.mark.parametrize("where", LAYOUTS)
def test_tasks_have_the_same_scores(files, theirs, where):
    with ours(files.checkpoint, **LAYOUTS[where]) as lm:
        more, want_continuations, want_texts, want_metrics = theirs
        continuations, texts, metrics = answers(lm, files.tasks, more)
        assert lm._scorer._step._cache_size() <= 5, "a program for each length"
    for got, want in zip(continuations, want_continuations, strict=True):
        assert got[0] == pytest.approx(want[0], **CLOSE)
        assert got[1] == want[1]
    assert texts == pytest.approx(want_texts, **CLOSE)
    assert all(greedy for _, greedy in continuations[1 - len(more) :])
    for name in ("acc", "acc_norm"):
        assert metrics["choices"][name] == want_metrics["choices"][name]
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        got, want = metrics["texts"][name], want_metrics["texts"][name]
        assert math.log(got) == pytest.approx(math.log(want), rel=1e-6)


@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 2, "tensor": 4}])
def test_generated_texts_are_the_same(files, tmp_path, mesh):
    """Greedy, of prompts longer than the model too, up to the first stop."""
    from lm_eval.models.huggingface import HFLM

    checkpoint = local.checkpoint(tmp_path / "gpt2", biases=0)
    theirs = HFLM(pretrained=str(checkpoint), device="cpu", batch_size=4, dtype="float32")
    tasks = load_tasks(["answers"], files.tasks, generates=True)
    requests = requests_of("generate_until", tasks)
    values = {f"config.mesh.{axis}": size for axis, size in mesh.items()}
    values |= {"config.data.sequence_length": 48, "config.data.batch_size": 8}
    config = with_values(base.get_config(), values)
    config = with_checkpoint(config, checkpoint, "--hf", [])
    experiment = read_experiment(config, 8, training=False)
    devices = make_mesh(experiment.mesh)
    with jax.set_mesh(devices):
        model = experiment.build_model()
        params = saved_params(experiment, model, devices, None, None, checkpoint).params
        texts = TaskTexts(experiment, model, params, devices, files.tokenizer)
        got = texts([r.args[0] for r in requests], [dict(r.args[1]) for r in requests])
        assert got == theirs.generate_until(requests)
        assert len(set(got)) > len(got) / 2


def test_an_encoder_decoder_has_the_same_scores(files, tmp_path):
    from lm_eval.models.huggingface import HFLM

    checkpoint = local.checkpoint(tmp_path / "t5", local.T5)
    theirs = HFLM(pretrained=str(checkpoint), device="cpu", batch_size=4, dtype="float32")
    assert (theirs.backend, theirs.max_length) == ("seq2seq", local.T5.max_length)
    tasks = load_tasks(["choices", "texts"], files.tasks, generates=False)
    continuations = requests_of("loglikelihood", tasks)[::2]
    texts = requests_of("loglikelihood_rolling", tasks)[::2]
    seq2seq = ObjectiveConfig("seq2seq")
    with ours(checkpoint, local.T5, seq2seq, tensor=4, data=2) as lm:
        got = lm.loglikelihood(continuations)
        want = theirs.loglikelihood(continuations)
        assert [one[0] for one in got] == pytest.approx([one[0] for one in want], **CLOSE)
        assert [one[1] for one in got] == [one[1] for one in want]
        want = theirs.loglikelihood_rolling(texts)
        assert lm.loglikelihood_rolling(texts) == pytest.approx(want, **CLOSE)


def test_texts_are_longer_than_the_model(files):
    tasks = load_tasks(["choices", "texts"], files.tasks, generates=False)
    encode = lambda text: len(files.tokenizer.encode(text))
    contexts = [encode(r.args[0]) for r in requests_of("loglikelihood", tasks)]
    assert min(contexts) < 24 < 2 * local.GPT2.max_length < max(contexts)
    texts = [encode(r.args[0]) for r in requests_of("loglikelihood_rolling", tasks)]
    assert max(texts) > 4 * local.GPT2.max_length
    assert len(jax.devices()) == 8
