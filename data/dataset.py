"""Open the data of a config: tokeniser, corpus, plans, loaders, and what to write in the log."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.agree import check_agreement
from data.config import DataConfig
from data.corpus import Corpus, open_corpus
from data.loader import HeldOutBatches, Loader, TrainBatches, process_rows
from data.objective import ObjectiveConfig
from data.pack import RowPlan, waste
from data.parts import ImageShape
from data.recipes import Recipe, marks_of, parts_of, plans_of, recipe_of
from data.sources import open_documents, training_texts
from data.token_files import open_tokens
from data.tokens import ByteTokenizer, Tokenizer, open_tokenizer

MIB = 1 << 20


@dataclass(frozen=True)
class Summary:
    """What a run trains on, for its log and its checkpoints.

    Attributes:
      source: `config.data.source`, with the path.
      tokenizer: `config.data.tokenizer`; empty where no text is read.
      objective: `config.objective.name`.
      documents: documents trained on.
      tokens: their tokens, ends included.
      held_out_documents: documents held out.
      held_out_tokens: their tokens.
      rows: rows of an epoch.
      padding_waste: fraction of an epoch's positions that is padding.
      fingerprint: a hash of all tokens, of what is held out and of what is drawn for rows; other
        data have another.
    """

    source: str
    tokenizer: str
    objective: str
    documents: int
    tokens: int
    held_out_documents: int
    held_out_tokens: int
    rows: int
    padding_waste: float
    fingerprint: str

    def __str__(self) -> str:
        made = "" if self.objective == "causal_lm" else f" for {self.objective}"
        if not self.tokenizer:
            return (
                f"data: {self.source}{made}, {self.documents:,} documents, "
                f"{self.held_out_documents:,} held out; {self.fingerprint[:12]}"
            )
        return (
            f"data: {self.source} as {self.tokenizer}{made}, {self.documents:,} documents of "
            f"{self.tokens:,} tokens, {self.held_out_documents:,} of {self.held_out_tokens:,} "
            f"held out; {self.rows:,} rows an epoch, {self.padding_waste:.1%} of them padding; "
            f"{self.fingerprint[:12]}"
        )


@dataclass(frozen=True)
class Data:
    """The data of a run.

    Attributes:
      config: `config.data`.
      seed: decides the order of the training batches.
      tokenizer: text to ids and back, bytes of each token.
      training: documents trained on.
      plans: their rows, by row length.
      evaluation: documents held out.
      held_out_plan: their rows, packed where the objective allows it: one shape.
      recipe: what is drawn for every row.
      summary: for the log and the checkpoint.
    """

    config: DataConfig
    seed: int
    tokenizer: Tokenizer
    training: Corpus
    plans: list[RowPlan]
    evaluation: Corpus
    held_out_plan: RowPlan
    recipe: Recipe
    summary: Summary

    def train(
        self,
        start_step: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        *,
        rows: np.ndarray | None = None,
    ) -> Loader:
        """Endless training batches from number `start_step` on.

        Args:
          start_step: number of the first batch; a resumed run gives the steps done so far.
          process_index: which equal part of the rows to give ...
          process_count: ... of how many.
          rows: the rows to give instead (`local_rows`), for meshes where processes share rows.
        """
        size = self.config.batch_size
        rows = process_rows(size, process_index, process_count) if rows is None else rows
        batches = TrainBatches(self.training, self.plans, self.seed, size, rows, self.recipe)
        return self._loader(batches, start_step, len(rows))

    def held_out(
        self,
        batches: int,
        process_index: int = 0,
        process_count: int = 1,
        *,
        rows: np.ndarray | None = None,
    ) -> Loader:
        """The first `batches` batches of the held-out documents, the same ones every time.

        There are fewer where the documents do not fill them; the last is padded (`segments` = 0).
        """
        size = self.config.batch_size
        rows = process_rows(size, process_index, process_count) if rows is None else rows
        chosen = HeldOutBatches(
            self.evaluation, self.held_out_plan, batches, size, rows, self.recipe
        )
        return self._loader(chosen, 0, len(rows))

    def _loader(self, batches: TrainBatches | HeldOutBatches, start: int, rows: int) -> Loader:
        no_row, key = np.array([-1]), np.zeros(1, np.uint64)
        plans = [(plan, self.training) for plan in self.plans]
        empty = [
            self.recipe(plan.fill(corpus, no_row), key)
            for plan, corpus in (*plans, (self.held_out_plan, self.evaluation))
        ]
        largest = max(sum(array.nbytes for array in row.values()) for row in empty)
        return Loader(batches, start, self.config.prefetch_mib * MIB, rows * largest)


def open_data(
    config: DataConfig,
    vocab_size: int,
    workdir: str | Path,
    *,
    seed: int = 0,
    objective: ObjectiveConfig | None = None,
    image: ImageShape | None = None,
) -> Data:
    """Reads, tokenises and packs the data of a config, or finds it in the cache.

    Args:
      config: `config.data`.
      vocab_size: `config.model.vocab_size`; the tokeniser's ids must be below it.
      workdir: folder of the run: a trained BPE and (without `config.data.cache`) the cached tokens.
      seed: `config.seed`; decides the order of the training batches and what is drawn for their
        rows, and nothing else.
      objective: `config.objective`; None: every token predicts the next.
      image: the images that the model takes, where the source has some.

    Raises:
      ValueError: data that is missing, malformed, too little, or at odds with the vocabulary or the
        objective; names the config key, its value and what would be right.
    """
    objective = ObjectiveConfig() if objective is None else objective
    check_agreement(config, objective)
    parts = parts_of(config, objective, image)
    workdir = Path(workdir)
    documents = None if config.source == "tokens" else open_documents(config, parts)
    texts = lambda: training_texts(documents) if documents is not None else iter(())
    tokenizer: Tokenizer = ByteTokenizer()  # where there is no text
    if parts.text:
        tokenizer = open_tokenizer(config, vocab_size, workdir, texts, marks_of(objective))
    cache = Path(config.cache).expanduser() if config.cache else workdir / "cache"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        key = "config.data.cache" if config.cache else "--workdir"
        raise ValueError(
            f"{key} = '{cache}': cannot be made ({error.strerror}); choose a folder that you may "
            "write to"
        ) from error
    if documents is None:
        training, evaluation = open_tokens(config, tokenizer, cache, vocab_size)
    else:
        training, evaluation = open_corpus(config, tokenizer, documents, cache, parts)
    plans = plans_of(config, objective, parts, tokenizer, training)
    (held_out_plan,) = plans_of(config, objective, parts, tokenizer, evaluation, one_shape=True)
    for key, name, count in (
        ("path", "train on", sum(plan.rows for plan in plans)),
        ("eval_path" if config.eval_path else "path", "hold out", held_out_plan.rows),
    ):
        if not count:
            raise ValueError(
                f"config.data.{key} = '{getattr(config, key)}': too little text, nothing is left "
                f"to {name}; give more documents"
            )
    summary = Summary(
        source=f"{config.source} {config.path}".strip(),
        tokenizer=config.tokenizer if parts.text else "",
        objective=objective.name,
        documents=len(training.starts),
        tokens=int(training.lengths.sum()) if parts.text else 0,
        held_out_documents=len(evaluation.starts),
        held_out_tokens=int(evaluation.lengths.sum()) if parts.text else 0,
        rows=sum(plan.rows for plan in plans),
        padding_waste=waste(plans) if parts.text else 0.0,
        fingerprint=fingerprint_of(training, objective),
    )
    recipe = recipe_of(config, objective, tokenizer, vocab_size)
    return Data(
        config, seed, tokenizer, training, plans, evaluation, held_out_plan, recipe, summary
    )


def fingerprint_of(corpus: Corpus, objective: ObjectiveConfig) -> str:
    """The corpus's own, and what the objective draws, where it draws."""
    drawn = {
        "masked_lm": (objective.mask_rate,),
        "span_corruption": (objective.mask_rate, objective.span_length),
        "prefix_lm": (),
    }.get(objective.name)
    if drawn is None:
        return corpus.fingerprint
    words = f"{corpus.fingerprint} {objective.name} {drawn}"
    return hashlib.blake2b(words.encode(), digest_size=16).hexdigest()
