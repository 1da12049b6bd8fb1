"""What XLA adds to what must be stored, as factors of tensors a formula knows: one set a platform.

Fitted by `benchmarks/fit_constants.py` on compiled cells that are in no published table.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Constants:
    """Factors of the terms in `memory/predict.py`; tensors are in the compute dtype.

    Attributes:
      logits: chunks of float32 logits that live at one time in the loss.
      loss_narrow: tensors [tokens, D] beside them.
      gathered: one layer's gathered weights: 1, and what is gathered ahead.
      layer_gradient: gradients of one layer's weights before they are divided.
      wide, narrow, heads: tensors [tokens, F], [tokens, D], [tokens, heads x head_dim] of one
        layer that live at the worst moment of its backward pass.
      scores: quadratic tensors of attention.
      lookup: whole gradients of the embedding table.
      lookup_narrow: tensors [tokens, D] beside them.
      period: share of the other layers of a pattern's period that live beside one.
      regathered: weights gathered whole that live twice.
      twin: of these, at ZeRO level 2, what lives twice all the time.
      accumulated: buffers that sum gradients over micro-steps.
      update: temporaries of the optimizer, in master copies.
      packing: allocated over live.
    """

    logits: float = 2.5
    loss_narrow: float = 2.0
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
    twin: float = 0.5
    accumulated: float = 1.0
    update: float = 0.1
    packing: float = 1.02


CONSTANTS = {
    "gpu": Constants(
        logits=0.97,
        loss_narrow=8.66,
        gathered=1.53,
        layer_gradient=3.88,
        wide=0.2,
        narrow=4.89,
        heads=13.37,
        scores=2.05,
        lookup=1.25,
        lookup_narrow=2.4,
        period=0.99,
        regathered=0.25,
        twin=0.97,
        accumulated=1.23,
        update=0.17,
        packing=1.0,
    ),
    "tpu": Constants(),
    "cpu": Constants(),
}
