"""The texts that tasks ask for: prompts in, what follows them out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax

from data.tokens import Tokenizer
from experiment import Experiment
from generation.engine import Engine
from generation.rows import Request
from generation.text import Text
from inference import decoder_weights, make_engine
from models.decode import DecoderWeights
from training.state import Model

MOST = 256  # new tokens where a task does not say, as in lm-eval
ROUND = 64  # lengths are rounded up to a multiple: few programs


class TaskTexts:
    """(prompts, lm-eval's `generation_kwargs` of each) -> texts.

    Greedy unless a task says `do_sample`; then `temperature`, `top_k`, `top_p` and `min_p` are the
    task's. A prompt that is too long for the model is cut from the left.

    Args:
      params: kept; the weights of generation are a copy of them in compute dtype.
    """

    def __init__(
        self,
        experiment: Experiment,
        model: Model,
        params: Any,
        mesh: jax.sharding.Mesh,
        tokenizer: Tokenizer,
    ) -> None:
        self._experiment, self._model, self._params = experiment, model, params
        self._mesh, self._tokenizer = mesh, tokenizer
        self._weights: DecoderWeights | None = None
        self._engine: tuple[Any, Engine] | None = None

    def __call__(self, prompts: list[str], how: list[dict[str, Any]]) -> list[str]:
        texts = [""] * len(prompts)
        kinds = [_sampling_of(one) for one in how]
        for kind in sorted(set(kinds)):
            chosen = [n for n, other in enumerate(kinds) if other == kind]
            requests = [self._request(n, prompts[n], how[n]) for n in chosen]
            for request, _, _ in self._engine_for(kind, requests).run(requests):
                texts[request.number] = str(request.text)
        return texts

    def _request(self, number: int, prompt: str, how: dict[str, Any]) -> Request:
        model, tokenizer = self._experiment.model, self._tokenizer
        most = int(how.get("max_gen_toks") or MOST)
        until = how.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        text = Text(tokenizer.decode, [stop for stop in stops if stop], tokenizer.end_id)
        if model.family == "encoder_decoder":
            most = min(most, model.max_length - 1)
            source = [*tokenizer.encode(prompt).tolist(), tokenizer.end_id]
            return Request(
                number, [tokenizer.start_id], text, most, source=source[-model.max_length :]
            )
        most = min(most, model.max_length // 2)
        tokens = tokenizer.encode(prompt).tolist() or [tokenizer.end_id]
        return Request(number, tokens[-(model.max_length - most) :], text, most)

    def _engine_for(self, kind: tuple[float, ...], requests: list[Request]) -> Engine:
        """That of the last call if it has room, else a new one: there is one cache at a time."""
        longest = self._experiment.model.max_length
        most = min(longest - 1, _rounded(max(r.most for r in requests)))
        prompt = min(longest - most, _rounded(max(len(r.prompt) for r in requests)))
        source = _rounded(max(len(r.source or ()) for r in requests))
        wanted = kind, most, prompt, source
        if self._engine is None or self._engine[0] != wanted:
            self._engine = None
            temperature, top_k, top_p, min_p = kind
            generate = replace(
                self._experiment.generate,
                max_new_tokens=most,
                temperature=temperature,
                top_k=int(top_k),
                top_p=top_p,
                min_p=min_p,
            )
            experiment = replace(self._experiment, generate=generate)
            if self._weights is None:
                self._weights = decoder_weights(experiment, self._model, self._params, keep=True)
            made = make_engine(experiment, self._weights, self._mesh, prompt, source)
            self._engine = wanted, made
        return self._engine[1]


def _sampling_of(how: dict[str, Any]) -> tuple[float, ...]:
    """(temperature, top_k, top_p, min_p) of a task."""
    if not how.get("do_sample"):
        return 0.0, 0, 1.0, 0.0
    names = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    return tuple(float(how.get(name) or default) for name, default in names.items())


def _rounded(length: int) -> int:
    return -(-length // ROUND) * ROUND
