"""How the rows of each objective are made: which plan, and what is drawn for every row."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from data.agree import packings_of
from data.config import IMAGES, DataConfig
from data.corpus import Corpus
from data.examples import ExamplePlan
from data.images import brightest
from data.masking import mask_tokens
from data.objective import ObjectiveConfig
from data.pack import Batch, RowPlan, make_plans
from data.parts import ImageShape, Parts
from data.prefix import draw_prefix
from data.spans import Spans, corrupt_spans
from data.tokens import MASK, SENTINELS, Tokenizer

Recipe = Callable[[Batch, np.ndarray], Batch]  # (rows, a key for each) -> rows


def parts_of(data: DataConfig, objective: ObjectiveConfig, image: ImageShape | None) -> Parts:
    """What of each document the objective wants."""
    images = data.source in IMAGES
    assert not images or image is not None, "the model says what images it takes"
    return Parts(
        text=not (images and objective.name == "classification"),
        source=objective.name == "seq2seq",
        tasks=objective.tasks,
        image=image if images else None,
    )


def marks_of(objective: ObjectiveConfig) -> tuple[str, ...]:
    """The tokens that the objective needs, beside those of texts."""
    return {"masked_lm": (MASK,), "span_corruption": SENTINELS}.get(objective.name, ())


def plans_of(
    data: DataConfig,
    objective: ObjectiveConfig,
    parts: Parts,
    tokenizer: Tokenizer,
    corpus: Corpus,
    *,
    one_shape: bool = False,
) -> list[RowPlan]:
    """The rows of a corpus.

    Args:
      data: lengths and packing.
      objective: of the run.
      parts: of documents.
      tokenizer: its ends and starts.
      corpus: documents.
      one_shape: one plan, packed where the objective allows it: held-out documents.

    Raises:
      ValueError: lengths that hold no span.
    """
    if parts.source or parts.image is not None:
        plan = ExamplePlan(
            rows=len(corpus.starts),
            length=data.sequence_length,
            tokens=int(np.minimum(corpus.lengths, data.sequence_length).sum()),
            parts=parts,
            source_length=data.source_length,
            start_id=tokenizer.start_id,
            end_id=tokenizer.end_id,
            brightest=brightest(data.source),
        )
        return [plan]
    packing, buckets, length = data.packing, data.buckets, data.sequence_length
    if one_shape:
        packing, buckets = ("packed" if "packed" in packings_of(data, objective) else "none"), ()
    if objective.name == "span_corruption":
        length = piece_length(data, objective, tokenizer)
    return [*make_plans(corpus, length, packing, buckets)]


def piece_length(data: DataConfig, objective: ObjectiveConfig, tokenizer: Tokenizer) -> int:
    """Tokens of the pieces whose spans are left out.

    Raises:
      ValueError: rows too short for any, or so long that there are too few sentinels.
    """
    spans = Spans(objective.mask_rate, objective.span_length)
    length = spans.piece_length(data.source_length, data.sequence_length)
    shown = (
        f"config.data.source_length = {data.source_length}, config.data.sequence_length = "
        f"{data.sequence_length}"
    )
    if not length:
        raise ValueError(
            f"{shown}: too short for config.objective.name = 'span_corruption'; 3 is the least"
        )
    most = int(spans.counts(np.arange(1, length + 1))[1].max())
    if most > len(tokenizer.sentinels):
        raise ValueError(
            f"{shown}: rows of {most} spans, but there are {len(tokenizer.sentinels)} sentinels; "
            f"shorten them, or raise config.objective.span_length = {objective.span_length}"
        )
    return length


def recipe_of(
    data: DataConfig, objective: ObjectiveConfig, tokenizer: Tokenizer, vocab_size: int
) -> Recipe:
    """What is done to rows of texts; draws come from the rows' keys alone.

    Args:
      data: lengths.
      objective: of the run.
      tokenizer: its special tokens.
      vocab_size: `config.model.vocab_size`; tokenised files may hold ids up to it.
    """
    if objective.name == "masked_lm":
        assert tokenizer.mask_id is not None
        special = np.ones(vocab_size, bool)
        special[: len(tokenizer.special)] = tokenizer.special
        return partial(
            mask_tokens, rate=objective.mask_rate, mask_id=tokenizer.mask_id, special=special
        )
    if objective.name == "prefix_lm":
        return draw_prefix
    if objective.name == "span_corruption":
        return partial(
            corrupt_spans,
            spans=Spans(objective.mask_rate, objective.span_length),
            sentinels=tokenizer.sentinels,
            start_id=tokenizer.start_id,
            end_id=tokenizer.end_id,
            source_length=data.source_length,
            target_length=data.sequence_length,
        )
    if objective.name == "classification":
        return without_targets
    return as_it_is


def as_it_is(batch: Batch, keys: np.ndarray) -> Batch:
    """Nothing is drawn."""
    return batch


def without_targets(batch: Batch, keys: np.ndarray) -> Batch:
    """No token is predicted, only labels are."""
    return {name: array for name, array in batch.items() if name != "targets"}
