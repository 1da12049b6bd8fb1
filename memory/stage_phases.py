"""What lives on a device of a pipeline in each phase: its buffers and sums, and one action's own.

    forward     a chunk: of one layer at a time what it computes
    backward    a chunk: of one layer at a time tensors, computed again or not, and weights
    loss        on the last stage: logits of a chunk of tokens, gradients of the head
    embedding   on the first stage: the gradient of the lookup
    encoder     on the first stage: of an encoder beside the decoder, whose tensors live in this
                phase alone
    border      after the last tick: gradients of stages become those of the whole model
    update      gradients and what the optimizer makes of them

All stages run one program, so each has room for the phases of all.
"""

from __future__ import annotations

from memory.constants import Constants
from memory.phases import Parts, beside, loss_head, one_layer
from memory.stages import Stages
from models.beside import BESIDE


def stage_phases(stages: Stages, k: Constants) -> dict[str, Parts]:
    """Phase -> component -> bytes of temporaries on one device."""
    terms = stages.terms
    sums = stages.own_sums + stages.outside_sums
    at_hand = {"weights in compute dtype": stages.own_copy + stages.outside_copy}
    always = at_hand | {
        "summed gradients": sums,
        "batch by micro-batches": terms.batch * 5 // 4,  # and the weights of its tokens
    }
    always |= {f"pipeline buffers: {name}": size for name, size in stages.rings.items() if size}
    layer = one_layer(terms, k)
    gathered = "gathered weights"
    streams = {"sent between stages": 3 * stages.stream}
    found = {
        "forward": always | streams | {gathered: layer[gathered]},
        "backward": always | streams | layer,
        "loss": always
        | streams
        | loss_head(terms, k)
        | {
            "gradient of the head": stages.head_gradient,
            "hidden states": int(k.loss_narrow * terms.narrow),
        },
        "embedding": always
        | streams
        | {
            "saved: embedding": terms.embedding_saved,
            "gradient of the lookup": int(k.lookup * terms.looked_up * terms.item),
            "hidden states": int(k.lookup_narrow * terms.narrow),
        },
        "border": {
            "summed gradients": sums,
            "gradients on their way to where they rest": stages.outside_sums
            + (stages.own_sums if stages.moved else 0),
        },
        "update": {
            "gradients": stages.at_rest_gradients,
            "update": int(k.update * terms.master),
        },
    }
    encoder = terms.encoder
    if encoder is not None and not terms.arrays.beside:
        # Computed again in the first stage's backward pass.
        layers = [weight for weight in terms.weights[1] if weight.axes.split()[0] == BESIDE]
        own = {"gradients of the encoder": terms.laid_out(layers, "in_stage") * terms.item}
        found["encoder, backward"] = (
            always | streams | beside(terms, k) | one_layer(encoder, k) | own
        )
    return found
