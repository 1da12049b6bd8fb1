"""What lives in each phase of a step: what must, and what the compiler adds while it works.

    gather      ZeRO 2: weights as they arrive and as they are used
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
from parallel.footprint import Activation

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
    narrow = terms.bytes_of([Activation("", "batch seq act_embed")])
    return {
        "gather": kept | {"gathered weights twice": int(k.regathered * terms.gathered_copy)},
        "loss": kept | _loss_head(terms, k) | {"hidden states": int(k.loss_narrow * narrow)},
        "backward": kept
        | gradients
        | {"gradients twice": int(k.gradients_twice * terms.layer_gradients)}
        | _one_layer(terms, k),
        "embedding": always
        | gradients
        | {
            "gradient of the lookup": int(k.lookup * _table(terms) * terms.item),
            "hidden states": int(k.lookup_narrow * narrow),
        },
        "update": {
            "gradients": terms.accumulated or gradients["gradients"],
            "update": int(k.update * terms.master),
        },
    }


def _one_layer(terms: Terms, k: Constants) -> Parts:
    """The backward pass of one iteration of the layers' loop."""
    job = terms.job
    # Layers of one period of a pattern are one iteration: what one of them computes again may live
    # beside what the others do.
    together = 1 + k.period * (len(job.model.pattern) - 1)
    weights = terms.laid_out(terms.weights[0], "gathered") // job.model.layers * terms.item
    gathered = weights if terms.gathers_layers else 0

    def tensor(dims: str) -> int:
        return terms.bytes_of([Activation("", dims)])

    heads = tensor("batch seq act_heads head_dim")
    return {
        "gathered weights": int(k.gathered * together * gathered),
        "gradients of one layer": int(k.layer_gradient * together * weights),
        "one layer: feed-forward": int(k.wide * together * tensor("batch seq act_mlp")),
        "one layer: residual stream": int(k.narrow * together * tensor("batch seq act_embed")),
        "one layer: attention": int(k.heads * together * heads + k.scores * _scores(terms)),
    }


def _scores(terms: Terms) -> int:
    """What attention holds that is quadratic: scores (xla), or cuDNN's bias."""
    if terms.form == "xla":
        return terms.bytes_of([Activation("", "batch act_heads seq keys", "float32")])
    if terms.form == "cudnn":
        return terms.bytes_of([Activation("", "batch seq keys")])
    return 0


def _table(terms: Terms) -> int:
    """Elements of the head's table on one device while it is used."""
    model = terms.job.model
    return model.padded_vocab // terms.job.rules.parts("act_vocab") * model.embed_dim


def _loss_head(terms: Terms, k: Constants) -> Parts:
    """The loop over chunks: logits in float32, their gradient in compute dtype, and the sum of the
    table's gradient, which one chunk alone does not need.
    """
    job = terms.job
    chunks = -(-job.tokens // job.loss.chunk)
    rows = -(-job.tokens // chunks)
    logits = rows * job.model.padded_vocab // job.rules.parts("act_vocab")
    parts = {
        "loss head: table": _table(terms) * terms.item if terms.gathers_layers else 0,
        "loss head: logits": int(k.logits * (4 + terms.item) * logits),
    }
    if chunks > 1:
        parts["loss head: gradient of the table"] = int(k.logits * 4 * _table(terms))
    return parts
