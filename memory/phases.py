"""What lives in each phase of a step: what must, and what the compiler adds while it works.

    gather      ZeRO 1 and 2: weights as they arrive and as they are used
    loss        the head's table, its gradient, the logits of a chunk
    backward    gradients of the layers as they fill, and one layer's own tensors and weights
    embedding   the gradient of the lookup, whole before it is divided
    encoder     beside a decoder: its forward pass, beside buffers of what the layers will keep, and
                its backward pass, after all layers that read it
    update      gradients and what the optimizer makes of them
    teacher     the forward pass of a teacher, before all others (memory/taught.py)

What the compiler adds has one factor a term and platform, fitted on compiled programs
(`memory/constants.py`).
"""

from __future__ import annotations

from memory.constants import Constants
from memory.taught import lesson, taught_head, taught_phases
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
    always |= {"saved: embedding": 0 if terms.arrays.below else terms.embedding_saved}
    saved = {f"saved: {name}": size for name, size in terms.saved.items()}
    of_encoder = beside(terms, k)
    kept = always | saved | of_encoder
    gradients = {"gradients": terms.layer_gradients + terms.outer_gradients}
    filling = gradients | {"gradients twice": int(k.gradients_twice * terms.layer_gradients)}
    early = {name: int(k.early_gradients * size) for name, size in filling.items()}
    found = {
        "gather": kept | {"gathered weights twice": int(k.regathered * terms.gathered_copy)},
        "loss": kept
        | early
        | loss_head(terms, k)
        | lesson(terms)
        | {"hidden states": int(k.loss_narrow * terms.narrow)},
        "backward": kept | filling | one_layer(terms, k),
        "embedding": always
        | gradients
        | {
            "gradient of the lookup": int(k.lookup * terms.looked_up * terms.item),
            "hidden states": int(k.lookup_narrow * terms.narrow),
        },
        "update": {
            "gradients": terms.accumulated or gradients["gradients"],
            "update": int(k.update * terms.updated),
        },
    }
    found |= taught_phases(terms)
    encoder = terms.encoder
    if encoder is not None:
        if not terms.arrays.beside:
            twice = {"gradients twice": int(k.gradients_twice * encoder.layer_gradients)}
            one = one_layer(encoder, k)
            found["encoder, backward"] = always | of_encoder | gradients | twice | one
        attention = k.heads * encoder.heads + k.forward_scores * encoder.scores
        forward = {"one layer: attention": int(attention)}
        found["encoder, forward"] = kept | forward | hidden(terms, k)
        if terms.job.remat.policy != "none":  # masked again where scores are computed again
            for name in {"backward", "encoder, backward"} & found.keys():
                found[name] |= hidden(terms, k)
    return found


def hidden(terms: Terms, k: Constants) -> Parts:
    """What hides scores in all attentions of a decoder that attends to an encoder's features, and
    of that encoder; in a ViT none are.
    """
    if terms.encoder is None or terms.job.model.cross == "none":
        return {}
    tokens = terms.encoder.job.model.family == "encoder"
    scores = terms.all_scores + (terms.encoder.all_scores if tokens else [])
    return {"hidden scores": int(k.hidden * sum(scores))}


def beside(terms: Terms, k: Constants) -> Parts:
    """What is kept of an encoder beside the decoder: by its layers until their backward pass, which
    is the last one; its features, with the sum of their gradients, where the decoder attends to
    them; and biases of both stacks.
    """
    if terms.encoder is None:
        return {}
    saved: dict[str, int] = {}
    if not terms.arrays.beside:
        saved = terms.encoder.saved | {"embedding": terms.encoder.embedding_saved}
    parts = {f"saved by the encoder: {name}": n for name, n in saved.items()}
    biases = int(k.biases * (terms.bias + terms.encoder.bias))
    parts["the encoder's features and their gradient"] = 2 * terms.memory
    return parts | {"relative positions": biases}


def one_layer(terms: Terms, k: Constants) -> Parts:
    """The backward pass of one iteration of the layers' loop."""
    job = terms.job
    # Layers of one period of a pattern are one iteration: what one of them computes again may live
    # beside what the others do.
    together = 1 + k.period * (len(job.model.pattern) - 1)
    gathered = terms.layer_read if terms.gathers_layers else 0
    gradients = terms.layer_differentiated
    attention = k.heads * together * terms.heads + k.scores * terms.scores
    return {
        "gathered weights": int(k.gathered * together * gathered),
        "made of codes, or rounded": int(together * terms.layer_made),
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
    if not job.model.token_head:
        return {}
    chunks = -(-job.tokens // job.loss.chunk)
    rows = -(-job.tokens // chunks)
    logits = rows * job.model.padded_vocab // job.rules.parts("act_vocab")
    parts = {
        "loss head: table": terms.table * terms.product_item if terms.gathers_layers else 0,
        "loss head: logits": int(k.logits * (4 + terms.product_item) * logits),
        "loss head: saved": terms.head_saved,
    }
    parts |= taught_head(terms, k, rows)
    if chunks > 1:
        parts["loss head: gradient of the table"] = int(k.logits * 4 * terms.head_gradient)
    if job.parallel.zero >= 2 and job.sizes["fsdp"] > 1:
        scattered = int(k.scattered * 4 * terms.head_gradient)
        parts["loss head: gradient of the table before it is divided"] = scattered
    return parts
