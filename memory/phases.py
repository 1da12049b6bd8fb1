"""What lives in each phase of a step: what must, and what the compiler adds while it works.

    gather      ZeRO 1 and 2: weights as they arrive and as they are used
    loss        the head's table, its gradient, the logits of a chunk
    backward    gradients of the layers as they fill, and one layer's own tensors and weights
    embedding   the gradient of the lookup, whole before it is divided
    update      gradients and what the optimizer makes of them

What the compiler adds has one factor a term and platform, fitted on compiled programs
(`memory/constants.py`).
"""

from __future__ import annotations

from memory.constants import Constants
from memory.terms import Terms

Parts = dict[str, int]


def phases(terms: Terms, k: Constants) -> dict[str, Parts]:
    """Phase -> component -> bytes of temporaries on one device."""
    always = {
        "weights in compute dtype": terms.copy,
        "weights cut by the pattern": terms.cut,
        "summed gradients": terms.accumulated,
        "summed gradients twice": int(k.accumulated_twice * terms.accumulated),
    }
    kept = always | {f"saved: {name}": size for name, size in terms.saved.items()}
    gradients = {"gradients": terms.layer_gradients + terms.outer_gradients}
    filling = gradients | {"gradients twice": int(k.gradients_twice * terms.layer_gradients)}
    early = {name: int(k.early_gradients * size) for name, size in filling.items()}
    return {
        "gather": kept | {"gathered weights twice": int(k.regathered * terms.gathered_copy)},
        "loss": kept
        | early
        | loss_head(terms, k)
        | {"hidden states": int(k.loss_narrow * terms.narrow)},
        "backward": kept | filling | one_layer(terms, k),
        "embedding": always
        | gradients
        | {
            "gradient of the lookup": int(k.lookup * terms.table * terms.item),
            "hidden states": int(k.lookup_narrow * terms.narrow),
        },
        "update": {
            "gradients": terms.accumulated or gradients["gradients"],
            "update": int(k.update * terms.master),
        },
    }


def one_layer(terms: Terms, k: Constants) -> Parts:
    """The backward pass of one iteration of the layers' loop."""
    job = terms.job
    # Layers of one period of a pattern are one iteration: what one of them computes again may live
    # beside what the others do.
    together = 1 + k.period * (len(job.model.pattern) - 1)
    gathered = terms.layer_weights * terms.product_item if terms.gathers_layers else 0
    gradients = terms.layer_weights * terms.item
    attention = k.heads * together * terms.heads + k.scores * terms.scores
    return {
        "gathered weights": int(k.gathered * together * gathered),
        "gradients of one layer": int(k.layer_gradient * together * gradients),
        "one layer: feed-forward": int(k.wide * together * terms.wide),
        "one layer: residual stream": int(k.narrow * together * terms.narrow),
        "one layer: attention": int(attention),
    }


def loss_head(terms: Terms, k: Constants) -> Parts:
    """The loop over chunks: logits in float32, their gradient in compute dtype, and the sum of the
    table's gradient, which one chunk alone does not need.
    """
    job = terms.job
    chunks = -(-job.tokens // job.loss.chunk)
    rows = -(-job.tokens // chunks)
    logits = rows * job.model.padded_vocab // job.rules.parts("act_vocab")
    parts = {
        "loss head: table": terms.table * terms.product_item if terms.gathers_layers else 0,
        "loss head: logits": int(k.logits * (4 + terms.product_item) * logits),
    }
    if chunks > 1:
        parts["loss head: gradient of the table"] = int(k.logits * 4 * terms.table)
    if job.parallel.zero >= 2 and job.sizes["fsdp"] > 1:
        scattered = int(k.scattered * 4 * terms.table)
        parts["loss head: gradient of the table before it is divided"] = scattered
    return parts
