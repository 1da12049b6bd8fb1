"""How text is generated: `config.generate`."""

from __future__ import annotations

import math
from dataclasses import dataclass

CACHES, CACHE_DTYPES = ("contiguous", "paged"), ("compute", "int8")


@dataclass(frozen=True)
class GenerateConfig:
    """What is generated, and what is kept meanwhile (`config.generate`).

    Attributes:
      batch_size: sequences at a time, over all devices; more prompts wait for a free row.
      prompt_length: tokens of the longest prompt; 0: as long as those that are given are, and to
        the planner `config.data.sequence_length` (`source_length` for an encoder-decoder).
      max_new_tokens: of each text, at most.
      temperature: logits are divided by it; 0: always the likeliest token.
      top_k: of the likeliest tokens one is drawn; 0: of all.
      top_p: of the fewest tokens that together have this probability (Holtzman et al. 2019,
        https://arxiv.org/abs/1904.09751); 1: of all.
      min_p: of tokens that have this part of the likeliest one's probability (Nguyen et al. 2024,
        https://arxiv.org/abs/2407.01082); 0: of all.
      stop: a text ends before any of these.
      ignore_end: it does not end with the tokenizer's end of a document.
      cache: contiguous (a row has room for its longest text) or paged (a row has the blocks that
        its text needs, and rows share those of a common beginning).
      cache_dtype: compute (`config.precision.compute`) or int8.
      block_size: tokens of a block of a paged cache.
      blocks: of its pool, over all devices; 0: as many as all rows need at their longest.
    """

    batch_size: int = 8
    prompt_length: int = 0
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    ignore_end: bool = False
    cache: str = "contiguous"
    cache_dtype: str = "compute"
    block_size: int = 16
    blocks: int = 0

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "prompt_length": 0, "max_new_tokens": 1, "top_k": 0}
        least |= {"block_size": 1, "blocks": 0}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ValueError(
                    f"config.generate.{name} = {getattr(self, name)}: {lowest} or more"
                )
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"config.generate.temperature = {self.temperature}: 0 (the likeliest token) or more"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"config.generate.top_p = {self.top_p}: above 0, and 1 for all tokens")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"config.generate.min_p = {self.min_p}: 0 (all tokens) to 1")
        if "" in self.stop:
            raise ValueError("config.generate.stop = '': an empty text ends nothing; leave it out")
        for name, allowed in (("cache", CACHES), ("cache_dtype", CACHE_DTYPES)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"config.generate.{name} = {getattr(self, name)!r}: choose one of "
                    f"{', '.join(allowed)}"
                )

    def without_effect(self) -> list[str]:
        """What was asked for and does nothing, a sentence each."""
        notes = []
        if self.temperature == 0:
            drawn = {"top_k": self.top_k > 0, "top_p": self.top_p < 1, "min_p": self.min_p > 0}
            notes += [
                f"config.generate.{name} has no effect: config.generate.temperature is 0"
                for name, given in drawn.items()
                if given
            ]
        if self.cache == "contiguous" and self.blocks:
            notes.append(
                "config.generate.blocks has no effect: config.generate.cache is contiguous"
            )
        return notes
