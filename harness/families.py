"""Which models can be asked."""

from __future__ import annotations

from models.config import ModelConfig

FAMILIES = ("decoder", "encoder_decoder")


def check_family(config: ModelConfig) -> None:
    """Refuses a model that gives a text no probability.

    Raises:
      ValueError: naming the key.
    """
    if config.family not in FAMILIES:
        raise ValueError(
            f"config.model.family = {config.family!r}: --tasks wants the probability of a text "
            f"after another; only {' and '.join(FAMILIES)} have one"
        )
