"""What XLA adds to what must be stored, as factors of tensors a formula knows: one set a platform.

Fitted by `benchmarks/fit_constants.py` on compiled cells that are in no published table.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Constants:
    """Factors of the terms in `memory/predict.py`; tensors are in the compute dtype.

    Attributes:
      logits: over what the loss head must hold: logits, their gradient and the table's.
      loss_narrow: tensors [tokens, D] beside them.
      gradients_twice: share of the layers' gradients that lives twice as they fill.
      gathered: one layer's gathered weights: 1, and what is gathered ahead.
      layer_gradient: gradients of one layer's weights before they are divided.
      wide, narrow, heads: tensors [tokens, F], [tokens, D], [tokens, heads x head_dim] of one
        layer that live at the worst moment of its backward pass.
      scores: quadratic tensors of attention.
      lookup: whole gradients of the embedding table.
      lookup_narrow: tensors [tokens, D] beside them.
      period: share of the other layers of a pattern's period that live beside one.
      regathered: weights gathered whole that live twice.
      accumulated_twice: share of the sum of gradients over micro-steps that lives twice.
      update: temporaries of the optimizer, in master copies.
      packing: allocated over live.
      on_chip: MiB of temporaries that a TPU keeps beside its cores and not in the device's memory.
    """

    logits: float = 1.0
    loss_narrow: float = 2.0
    gradients_twice: float = 0.0
    gathered: float = 1.5
    layer_gradient: float = 1.0
    wide: float = 5.0
    narrow: float = 6.0
    heads: float = 6.0
    scores: float = 1.0
    lookup: float = 2.0
    lookup_narrow: float = 2.0
    period: float = 0.5
    regathered: float = 1.0
    accumulated_twice: float = 0.0
    update: float = 0.1
    packing: float = 1.02
    on_chip: float = 0.0


CONSTANTS = {
    "gpu": Constants(
        logits=1.16,
        loss_narrow=2.59,
        gradients_twice=0.0,
        gathered=3.99,
        layer_gradient=0.19,
        wide=3.25,
        narrow=1.91,
        heads=19.15,
        scores=1.7,
        lookup=2.8,
        lookup_narrow=4.36,
        period=0.93,
        regathered=0.63,
        accumulated_twice=0.06,
        update=0.06,
        packing=1.0,
        on_chip=0.0,
    ),
    "tpu": Constants(
        logits=1.12,
        loss_narrow=0.41,
        gradients_twice=0.18,
        gathered=3.81,
        layer_gradient=2.2,
        wide=7.31,
        narrow=0.76,
        heads=16.21,
        scores=4.21,
        lookup=2.92,
        lookup_narrow=4.25,
        period=0.4,
        regathered=0.46,
        accumulated_twice=0.84,
        update=1.63,
        packing=1.11,
        on_chip=117.23,
    ),
    "cpu": Constants(),
}
