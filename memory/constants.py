"""What XLA adds to what must be stored, as factors of tensors a formula knows: one set a platform.

Fitted by `benchmarks/fit_constants.py` on compiled cells that are in no published table.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Constants:
    """Factors of the terms in `memory/phases.py`; tensors are in the compute dtype.

    Attributes:
      logits: over what the loss head must hold: logits, their gradient and the table's.
      scattered: gradients of the head's table, float32, on their way to being divided.
      loss_narrow: tensors [tokens, D] beside them.
      gradients_twice: share of the layers' gradients that lives twice as they fill.
      early_gradients: share of their buffers that is there already while the loss head runs.
      gathered: one layer's gathered weights: 1, and what is gathered ahead.
      layer_gradient: gradients of one layer's weights before they are divided.
      wide, narrow, heads: tensors [tokens, F], [tokens, D], [tokens, heads x head_dim] of one
        layer that live at the worst moment of its backward pass.
      scores: quadratic tensors of attention.
      forward_scores: those of one layer of an encoder on its way forward.
      hidden: for each attention of an encoder-decoder, what hides scores, made before all layers.
      biases: biases of the scores by relative positions, and gradients of them.
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
    scattered: float = 0.5
    loss_narrow: float = 2.0
    gradients_twice: float = 0.0
    early_gradients: float = 0.0
    gathered: float = 1.5
    layer_gradient: float = 1.0
    wide: float = 5.0
    narrow: float = 6.0
    heads: float = 6.0
    scores: float = 1.0
    forward_scores: float = 2.0
    hidden: float = 1.25
    biases: float = 4.0
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
        logits=1.13,
        scattered=0.1,
        loss_narrow=2.82,
        gradients_twice=0.0,
        early_gradients=0.25,
        gathered=3.82,
        layer_gradient=0.85,
        wide=2.31,
        narrow=2.13,
        heads=19.05,
        scores=1.21,
        hidden=0.4,  # of two compiled cells of T5 small
        lookup=2.88,
        lookup_narrow=2.57,
        period=0.82,
        regathered=0.95,
        accumulated_twice=0.07,
        update=0.09,
        packing=1.0,
        on_chip=0.0,
    ),
    "tpu": Constants(
        logits=1.01,
        scattered=0.01,
        loss_narrow=0.28,
        gradients_twice=0.22,
        early_gradients=1.0,
        gathered=5.25,
        layer_gradient=0.64,
        wide=6.55,
        narrow=2.54,
        heads=16.74,
        scores=1.95,
        lookup=4.56,
        lookup_narrow=0.37,
        period=0.38,
        regathered=0.49,
        accumulated_twice=0.72,
        update=0.38,
        packing=1.1,
        on_chip=119.88,
    ),
    "cpu": Constants(),
}
