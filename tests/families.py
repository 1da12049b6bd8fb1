"""A small model of every family and objective, with a batch for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from data.objective import ObjectiveConfig
from models.config import ModelConfig
from models.vision_config import VisionConfig
from tests.small import CAUSAL_LM, DECODER, MIXTURE, SLOTS, B, T, numpy_batch

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Family:
    """One of them.

    Attributes:
      batch: seed -> a batch of `B` rows.
      rate: of gradient descent, with which its loss falls in a few steps.
    """

    config: ModelConfig
    objective: ObjectiveConfig = CAUSAL_LM
    batch: Callable[[int], Batch] = numpy_batch
    rate: float = 0.3


def prefix_batch(seed: int) -> Batch:
    """Rows of one document each, their tokens after a prefix counted."""
    batch = numpy_batch(seed)
    prefix = np.random.default_rng(seed).integers(1, T // 2, B).astype(np.int32)
    index = np.arange(T, dtype=np.int32)[None]
    segments = (index < T - 2).astype(np.int32).repeat(B, 0)
    counted = ((index >= prefix[:, None]) & (segments > 0)).astype(np.int32)
    positions = index.repeat(B, 0)
    return batch | {
        "segments": segments,
        "positions": positions,
        "prefix": prefix,
        "counted": counted,
    }


def image_batch(seed: int) -> Batch:
    """An image a row with both labels, brighter ones of higher digits."""
    rng = np.random.default_rng(seed)
    digit = rng.integers(0, 10, B).astype(np.int32)
    noise = rng.random((B, IMAGES.patches, IMAGES.patch_dim), np.float32)
    patches = noise * (digit[:, None, None] + np.float32(1)) / 10
    return {"patches": patches, "label_digit": digit, "label_parity": digit % 2}


def caption_batch(seed: int) -> Batch:
    """An image and a caption a row, of several lengths."""
    batch = numpy_batch(seed)
    index = np.arange(T, dtype=np.int32)[None].repeat(B, 0)
    lengths = np.random.default_rng(seed).integers(T // 2, T + 1, (B, 1))
    batch |= {"segments": (index < lengths).astype(np.int32), "positions": index}
    return batch | {"patches": image_batch(seed)["patches"]}


def encoder_batch(seed: int) -> Batch:
    """Rows of two texts of two types, some tokens of them masked and counted, and two labels."""
    batch, rng = numpy_batch(seed), np.random.default_rng(seed)
    tokens, segments = batch["tokens"], (batch["segments"] > 0).astype(np.int32)
    counted = (rng.random((B, T)) < 0.3) & (segments > 0)
    counted[:, 1] = True
    hidden = np.where(counted, DECODER.vocab_size - 1, tokens)
    positions = np.arange(T, dtype=np.int32)[None].repeat(B, 0)
    batch |= {"tokens": hidden, "targets": tokens, "segments": segments, "positions": positions}
    batch |= {"token_types": (positions > T // 2) * segments, "counted": counted}
    # Some classes are rare: five steps teach that much.
    batch |= {"label_digit": tokens[:, 0] % 3, "label_parity": tokens[:, 0] % 5 == 0}
    return {name: np.ascontiguousarray(array, np.int32) for name, array in batch.items()}


S = 24  # tokens of a source


def source_batch(seed: int) -> Batch:
    """Rows of two sources and their targets, of other lengths, and padding on both sides."""
    rng = np.random.default_rng(seed)
    batch = numpy_batch(seed)
    cut, end = rng.integers(3, S - 6, (B, 1)), rng.integers(S - 4, S + 1, (B, 1))
    index = np.arange(S)[None]
    source = {
        "source_tokens": rng.integers(0, DECODER.vocab_size, (B, S)),
        "source_segments": np.where(index < cut, 1, 2) * (index < end),
        "source_positions": np.where(index < cut, index, index - cut),
    }
    return batch | {name: array.astype(np.int32) for name, array in source.items()}


DEEP = replace(DECODER, layers=4)
BERT = replace(
    DEEP,
    family="encoder",
    kv_heads=8,
    norm="layer",
    norm_position="post",
    positions="learned",
    position_offset=2,
    max_length=T,
    token_types=2,
    embed_norm=True,
    activation="gelu",
    gated=False,
    qk_norm=False,
    head_transform=True,
    head_bias=True,
    pooler=True,
)
TASKS = {"digit": 10, "parity": 2}
LABELLED = replace(BERT, tasks=tuple(TASKS.items()))
MASKED_LM = ObjectiveConfig("masked_lm")
MULTI_TASK = ObjectiveConfig("masked_lm", tasks=TASKS, task_weight=0.5)
CLASSIFICATION = ObjectiveConfig("classification", tasks=TASKS)
IMAGES = VisionConfig(image_size=8, patch_size=2, channels=1)
VISION = replace(
    DEEP, family="vision", vision=IMAGES, tasks=tuple(TASKS.items()), norm="layer", max_length=16,
    positions="learned", activation="gelu", gated=False, qk_norm=False, kv_heads=8,
    token_head=False,
)  # fmt: skip
SEEING = replace(IMAGES, layers=3, embed_dim=24, mlp_dim=40, heads=8, projector="mlp")
SEQ2SEQ, SPANS = ObjectiveConfig(name="seq2seq"), ObjectiveConfig(name="span_corruption")
TRANSFORMER_2017 = replace(
    DEEP,
    family="encoder_decoder",
    encoder_layers=3,
    cross="plain",
    norm="layer",
    norm_position="post",
    positions="sinusoidal",
    activation="relu",
    gated=False,
    qk_norm=False,
    embed_scale=True,
)
T5 = replace(
    DEEP,
    family="encoder_decoder",
    encoder_layers=3,
    source_tied=False,
    cross="plain",
    positions="relative",
    relative_buckets=8,
    relative_distance=12,
    head_scale=True,
    query_scale=1.0,
    qkv_bias=False,
    attention_out_bias=False,
    mlp_bias=False,
    qk_norm=False,
)
FAMILIES = {
    "decoder": Family(DEEP),
    "prefix": Family(DEEP, ObjectiveConfig(name="prefix_lm"), prefix_batch),
    "shared": Family(replace(DEEP, distinct=2)),
    "shared neighbours": Family(
        replace(DEEP, distinct=2, sharing="repeat", window=5, pattern=("local", "global"), layers=8)
    ),
    "factorised": Family(replace(DEEP, embed_rank=16)),
    "experts": Family(replace(MIXTURE, layers=4)),
    "2017": Family(TRANSFORMER_2017, SEQ2SEQ, source_batch),
    "t5": Family(T5, SPANS, source_batch, rate=1.0),
    "t5, shared": Family(
        replace(T5, distinct=2, encoder_layers=4, embed_rank=16, source_tied=True),
        SPANS,
        source_batch,
        rate=3.0,
    ),
    "experts with slots": Family(replace(SLOTS, layers=4)),
    "encoder": Family(BERT, MASKED_LM, encoder_batch),
    "encoder, classes": Family(replace(LABELLED, token_head=False), CLASSIFICATION, encoder_batch),
    "encoder, tokens and classes": Family(LABELLED, MULTI_TASK, encoder_batch),
    "encoder, shared": Family(
        replace(LABELLED, distinct=1, embed_rank=16), MULTI_TASK, encoder_batch
    ),
    "vision": Family(VISION, CLASSIFICATION, image_batch, rate=0.01),
    "captioning": Family(
        replace(DEEP, family="vision_language", vision=SEEING),
        ObjectiveConfig("captioning"),
        caption_batch,
    ),
    "captioning, gated": Family(
        replace(DEEP, family="vision_language", vision=SEEING, cross="gated"),
        ObjectiveConfig("captioning"),
        caption_batch,
    ),
    "captioning, shared": Family(
        replace(DEEP, family="vision_language", vision=SEEING, distinct=2, embed_rank=16),
        ObjectiveConfig("captioning"),
        caption_batch,
    ),
}
