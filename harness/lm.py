"""A model as lm-eval sees it (`lm_eval.api.model.TemplateLM`): strings in, scores out.

Contexts and continuations are cut into tokens, and rows longer than the model into windows, by
lm-eval's own functions, so that scores are those of its backend for transformers.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
from lm_eval import utils
from lm_eval.api.model import TemplateLM, hash_args

from data.tokens import Tokenizer
from harness.answers import Answers
from harness.rows import Row, RowShape
from harness.scoring import Scorer
from models.config import ModelConfig
from parallel.precision import PrecisionConfig
from training.state import Model

Generate = Callable[[list[str], list[dict[str, Any]]], list[str]]
TOGETHER = 64  # prompts that are handed over at once, and whose texts are then kept
REPORT = 30.0  # seconds between two lines of progress


class HarnessLM(TemplateLM):
    """Answers lm-eval's requests; every process of a program gets all of them.

    Args:
      scorer: of rows.
      tokenizer: `config.data.tokenizer`; its end is the token before a text without a context, as
        lm-eval takes a tokenizer's end where it has no start.
      answers: what is known already, and where new answers are kept.
      generate: (prompts, lm-eval's `generation_kwargs` of each) -> texts that go on from them; None
        where only probabilities are asked for. It cuts prompts that are too long from the left.
    """

    def __init__(
        self,
        scorer: Scorer,
        tokenizer: Tokenizer,
        answers: Answers,
        generate: Generate | None = None,
    ) -> None:
        super().__init__()
        self.backend = "seq2seq" if scorer.shape.sources else "causal"
        self.max_length = scorer.shape.longest
        self._scorer, self._tokens = scorer, tokenizer
        self._answers, self._generate = answers, generate

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._tokens.end_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokens of a text; those of an encoder-decoder's source end with the end token."""
        ends = self.backend == "seq2seq" and add_special_tokens is not False
        return self._tokens.encode(string).tolist() + ([self.eot_token_id] if ends else [])

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding gives it) of each (context, continuation).

        Raises:
          ValueError: a continuation without a token, or with more than the model reads.
        """

        def ask(keys: list[str], rest: list[Any]) -> None:
            del keys  # made anew from each pair of texts, which is all that lm-eval passes on
            for request in rest:
                _check(request.args, len(request.args[1]), self.max_length)
            super(HarnessLM, self).loglikelihood(rest, disable_tqdm=True)

        return [
            (log_prob, greedy) for log_prob, greedy in self._all("loglikelihood", requests, ask)
        ]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        for texts, _, wanted in requests:
            _check(texts, len(wanted), self.max_length, "tokens")
        keys = [hash_args("loglikelihood", texts) for texts, _, _ in requests]
        found: dict[str, tuple[float, bool]] = {}
        progress = _Progress(len(requests), "continuations")
        for batch in self._scorer([Row(given, wanted) for _, given, wanted in requests]):
            new = {keys[one.number]: (one.log_prob, one.greedy) for one in batch}
            self._answers.keep(new)
            found |= new
            progress.add(len(batch))
        return [found[key] for key in keys]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[float]:
        """The log-probability of each text, every token after as many as the model reads."""
        return self._all("loglikelihood_rolling", requests, self._roll)

    def _roll(self, keys: list[str], requests: list[Any]) -> None:
        rows: list[Row] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            rows += [Row(*utils.make_disjoint_window(window)) for window in windows]
            owners += [number] * (len(rows) - len(owners))
        left, total = Counter(owners), [0.0] * len(requests)
        self._answers.keep({key: 0.0 for number, key in enumerate(keys) if not left[number]})
        progress = _Progress(len(rows), "windows")
        for batch in self._scorer(rows):
            for one in batch:
                left[owners[one.number]] -= 1
                total[owners[one.number]] += one.log_prob
            whole = {owners[one.number] for one in batch if left[owners[one.number]] == 0}
            self._answers.keep({keys[n]: total[n] for n in sorted(whole)})
            progress.add(len(batch))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Texts that go on from each context, up to the first of its `until`.

        Raises:
          ValueError: no generator was given.
        """
        if self._generate is None:
            raise ValueError(
                f"--tasks: {_named(requests)} generates text, and no generator is here"
            )
        return self._all("generate_until", requests, self._write)

    def _write(self, keys: list[str], requests: list[Any]) -> None:
        assert self._generate is not None
        progress = _Progress(len(requests), "texts")
        order = sorted(range(len(requests)), key=lambda n: -len(requests[n].args[0]))
        for start in range(0, len(order), TOGETHER):
            some = order[start : start + TOGETHER]
            prompts = [requests[n].args[0] for n in some]
            how = [dict(requests[n].args[1]) for n in some]
            texts = self._generate(prompts, how)
            cut = [_until(text, one.get("until")) for text, one in zip(texts, how, strict=True)]
            self._answers.keep({keys[n]: text for n, text in zip(some, cut, strict=True)})
            progress.add(len(some))

    def _all(
        self,
        kind: str,
        requests: Sequence[Any],
        ask: Callable[[list[str], list[Any]], None],
    ) -> list[Any]:
        """The answers to requests, of which `ask` finds and keeps those that are not known."""
        keys = _keys(kind, requests)
        known = self._answers.find(keys)
        rest = {key: r for key, r in zip(keys, requests, strict=True) if key not in known}
        if rest:
            ask(list(rest), list(rest.values()))
            known |= self._answers.find(list(rest))
        return [known[key] for key in keys]


def _keys(kind: str, requests: Sequence[Any]) -> list[str]:
    """A key of each request. Equal ones have one, and are asked once, unless an answer is drawn."""
    keys = [hash_args(kind, request.args) for request in requests]
    seen: Counter[str] = Counter()
    for number, request in enumerate(requests):
        if kind == "generate_until" and request.args[1].get("do_sample"):
            seen[keys[number]] += 1
            keys[number] += f", {seen[keys[number]]}"
    return keys


def _check(texts: tuple[str, str], length: int, longest: int, what: str = "") -> None:
    """Refuses a continuation that lm-eval's other backends stop at with an assertion."""
    shown = f"the continuation {texts[1][:40]!r} of a request"
    if not length:
        raise ValueError(f"--tasks: {shown} has no token; see doc_to_choice and doc_to_target")
    if what and length > longest:
        raise ValueError(
            f"--tasks: {shown} has {length} tokens, more than config.model.max_length = {longest}"
        )


def _named(requests: Sequence[Any]) -> str:
    names = {str(getattr(request, "task_name", None) or "a task") for request in requests}
    return ", ".join(sorted(names))


def _until(text: str, stops: str | list[str] | None) -> str:
    """What stands before the first of the strings that end it."""
    for stop in [stops] if isinstance(stops, str) else stops or []:
        text = text.split(stop)[0] if stop else text
    return text


class _Progress:
    """A line now and then, of process 0."""

    def __init__(self, total: int, what: str) -> None:
        self._total, self._what, self._done, self._said = total, what, 0, time.monotonic()

    def add(self, count: int) -> None:
        """So many more are done."""
        self._done += count
        now = time.monotonic()
        if now - self._said > REPORT and jax.process_index() == 0:
            self._said = now
            print(f"{self._done:,} of {self._total:,} {self._what}", flush=True)


def make_lm(
    model: Model,
    params: Any,
    config: ModelConfig,
    precision: PrecisionConfig,
    mesh: jax.sharding.Mesh,
    tokenizer: Tokenizer,
    *,
    tokens: int,
    prefix: bool = False,
    answers: Answers | None = None,
    generate: Generate | None = None,
) -> HarnessLM:
    """The model of a config for lm-eval; use it inside `jax.set_mesh(mesh)`.

    Args:
      params: master parameters at rest.
      tokens: positions of a batch at most, over all devices.
      prefix: contexts are prefixes, whose tokens see each other.
      answers: kept ones; default: none are.
      generate: see `HarnessLM`.
    """
    shape = RowShape(
        longest=config.max_length,
        sources=config.family == "encoder_decoder",
        start_id=tokenizer.start_id,
        prefix=prefix,
        multiple=model.rules.parts("residual_seq"),
    )
    scorer = Scorer(model, params, precision, mesh, shape, tokens)
    return HarnessLM(scorer, tokenizer, answers or Answers(), generate)
