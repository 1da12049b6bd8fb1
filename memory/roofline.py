"""How long a step takes at best: arithmetic, memory traffic and links.

`step_time` says it in closed form, `counted_time` from what a compiled program does.

A roofline (Williams et al. 2009, https://doi.org/10.1145/1498765.1498785) for each kind of work.
Matrix products run at a share of the chip's peak; what is no product streams through memory, one
after the other; collectives over `tensor` stand between two products and are waited for; those
that bring weights or take gradients away run beside the products, where the platform does so.
Volumes of collectives: Megatron (Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198,
section 4.2), ZeRO (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054, section 7); a ring
of n moves (n - 1) / n of the whole for a gather or a scatter, twice that for both.
"""

from __future__ import annotations

from memory.branches import Branches
from memory.experts_exchange import exchanged, over_tensor
from memory.hlo_costs import Counts
from memory.job import Job
from memory.stage_time import bubble_share, busiest_stage, stage_time
from memory.stage_work import Actions
from memory.step_time import CEILINGS, StepTime, exposed
from memory.terms import Terms
from models.flops import (
    dropped_parameters,
    empty_slots,
    stream_share,
)
from parallel.mesh import PIPE
from parallel.remat import PRESETS
from parallel.rules import EXPERT
from parallel.targets import Target


def step_time(job: Job, target: Target) -> StepTime:
    """The roofline of one step of `job` on `target`."""
    ceilings, chip = CEILINGS[target.chip.kind], target.chip
    terms = Terms(job, chip)
    if job.pipeline is not None:
        return stage_time(actions_of(job, target), model_flops(job))
    peak = chip.flops(job.precision.compute)
    return _together(
        job,
        target,
        compute=flops(job, terms) / (peak * ceilings.matrix),
        memory=streamed_bytes(job, terms) / (chip.memory_bandwidth * ceilings.stream),
        links=communication_seconds(job, terms, target),
        host=_host_seconds(job, terms, target),
    )


def actions_of(job: Job, target: Target) -> Actions:
    """What the actions of a job's pipeline do."""
    return Actions(job, target, layers_again(job, Terms(job, target.chip).form))


def branch_shares(job: Job, target: Target) -> Branches | None:
    """How often the compiled step of a pipeline takes its branches on the stage with most work."""
    if job.pipeline is None:
        return None
    actions = actions_of(job, target)
    stages, period = actions.stages, len(job.model.pattern)
    units = tuple(layers / period for layers in stages.division)
    return Branches(stages.table, busiest_stage(actions), units)


def counted_time(job: Job, target: Target, counts: Counts) -> StepTime:
    """The same roofline of the work that the compiled step of `job` holds.

    What is moved to the host is as predicted: the program's copies do not say what waits for them.
    Of a pipeline, `counts` are one stage's (`memory/branches.py`), and the bubble is the predicted
    one in proportion to what a stage does.
    """
    ceilings, chip = CEILINGS[target.chip.kind], target.chip
    peak = chip.flops(job.precision.compute)
    links: dict[str, float] = {}
    for c in counts.collectives:
        rounds = {"all-reduce": 2.0, "collective-permute": c.group / (c.group - 1)}.get(c.kind, 1.0)
        moved = c.bytes * c.count * rounds * (c.group - 1) / c.group
        hops = (c.axis, c.kind) == (PIPE, "collective-permute")
        axes = tuple(c.axis.split("+"))
        bandwidth = target.hop(job.sizes, PIPE) if hops else target.bandwidth(job.sizes, axes)
        links[c.axis] = links.get(c.axis, 0.0) + moved / bandwidth
    return _together(
        job,
        target,
        compute=counts.flops / (peak * ceilings.matrix),
        memory=counts.streamed_bytes / (chip.memory_bandwidth * ceilings.stream),
        links=links,
        host=_host_seconds(job, Terms(job, chip), target),
        bubble=0.0 if job.pipeline is None else bubble_share(actions_of(job, target)),
    )


def _together(
    job: Job,
    target: Target,
    *,
    compute: float,
    memory: float,
    links: dict[str, float],
    host: float,
    bubble: float = 0.0,
) -> StepTime:
    """The step time of work whose parts take so many seconds; `links` at their full rate, `bubble`
    as a share of all else.
    """
    ceilings = CEILINGS[target.chip.kind]
    communication = {axis: seconds / ceilings.link for axis, seconds in links.items() if seconds}
    waits = exposed(communication, compute + memory if ceilings.overlap else 0.0)
    whole = compute + memory + sum(waits.values()) + host
    mfu = model_flops(job) / (target.chip.flops(job.precision.compute) * whole * (1 + bubble))
    return StepTime(compute, memory, communication, waits, host, bubble * whole, mfu)


def model_flops(job: Job) -> float:
    """FLOPs of the model on one device in a step, none of them repeated; as if `tensor` divided
    attention and head as it does the feed-forward, which the preset "megatron" does, and stages
    all alike.
    """
    tokens = job.tokens * job.micro_steps
    whole = job.flops_per_token * tokens
    return whole / job.rules.parts("act_mlp") / job.sizes[PIPE]


def flops(job: Job, terms: Terms) -> float:
    """All FLOPs on one device in a step: repeated ones, those on slots without tokens, and those of
    a teacher.
    """
    share = stream_share(job.model, job.sequence_length)
    empty = empty_slots(job.model, job.stream_length) * share
    taught = 0.0 if job.teacher is None else model_flops(job.teacher) / 3  # forward alone
    return model_flops(job) * (1 + recomputed(job, terms) + empty / job.flops_per_token) + taught


def kept_names(job: Job) -> set[str]:
    """The tensors that the remat policy keeps, here or on the host; "none" has no names."""
    remat = job.remat
    return set(
        (*remat.save, *remat.offload) if remat.policy == "custom" else PRESETS[remat.policy] or ()
    )


def recomputed(job: Job, terms: Terms) -> float:
    """FLOPs that the backward pass computes again, as a share of forward and backward."""
    again = layers_again(job, terms.form)
    if (encoder := terms.encoder) is not None:
        share = encoder.job.sequence_length / job.sequence_length
        again += layers_again(encoder.job, encoder.form) * share
    return again / job.flops_per_token


def layers_again(job: Job, form: str) -> float:
    """FLOPs of one token that the layers compute again.

    Args:
      form: of attention; cuDNN's kernel keeps nothing that a policy could name.
    """
    if job.remat.policy == "none":
        return 0.0
    saved = kept_names(job)
    model = job.model
    share = stream_share(model, job.sequence_length)
    source_share = job.source_length / job.sequence_length
    again = dropped_parameters(model, saved, source_share) * model.layers * share
    core = job.attention_flops_per_token / 3
    if form == "xla":  # two products: scores, and their sum over values
        core *= 1.0 - 0.5 * ("attention_probs" in saved) - 0.5 * ("attention_out" in saved)
    elif form != "cudnn" and {"attention_out", "attention_lse"} <= saved:
        core = 0.0
    return 2 * again + core


def streamed_bytes(job: Job, terms: Terms) -> float:
    """Bytes that what is no matrix product reads and writes on one device in a step."""
    layer = terms.bytes_of(terms.residuals)
    # How often each tensor of a layer crosses, counted in compiled programs for H100: what all
    # layers keep is copied into one array and out of it, what is repeated is not.
    passes = 7 if job.remat.policy == "none" else 5.5
    layers = passes * layer * job.model.layers
    if terms.encoder is not None:
        encoder = terms.encoder
        layers += passes * encoder.bytes_of(encoder.residuals) * encoder.job.model.layers
    columns = job.model.token_head * job.model.padded_vocab // job.rules.parts("act_vocab")
    logits = 6 * 4 * job.tokens * columns
    moments = sum(sum(parts) for parts in terms.moments.values())
    update = 2 * (terms.updated + moments) + 2 * (terms.layer_gradients + terms.outer_gradients)
    return job.micro_steps * (layers + logits) + update


def communication_seconds(job: Job, terms: Terms, target: Target) -> dict[str, float]:
    """Mesh axis -> seconds of its collectives at the links' full rate."""
    sizes, micro = job.sizes, job.micro_steps
    seconds: dict[str, float] = {}

    def add(axis: str, whole: float, rounds: float) -> None:
        n = sizes[axis]
        if n > 1:
            moved = whole * (n - 1) / n * rounds
            seconds[axis] = seconds.get(axis, 0.0) + moved / target.bandwidth(sizes, (axis,))

    # Two all-reduces a layer each way, or a gather and a scatter in place of each. Where the
    # forward pass is repeated: the one inside the layer; with a divided sequence the gathers
    # before products, too, be their outputs saved or not.
    sequence = job.parallel.sequence
    none = job.remat.policy == "none"
    again = 0 if none else 2 if "attention_projection" in kept_names(job) else 3
    passes = 8 + (again if sequence else 2 * (again == 3))
    sublayers = 3 if job.model.cross != "none" else 2
    add("tensor", terms.narrow * job.model.layers, passes * micro * sublayers / 2)
    half = 3 if sequence else 2  # of a table that `tensor` divides
    tables = (job.model.family != "vision") + job.model.token_head
    add("tensor", terms.narrow, half * tables * micro)
    if terms.encoder is not None:
        encoder = terms.encoder
        add("tensor", encoder.narrow * encoder.job.model.layers, passes * micro)
        add("tensor", encoder.narrow, half * (encoder.job.model.family == "encoder") * micro)
    # Of the features that layers attend to: the gradient of each layer, and where the sequence is
    # divided what each gathers.
    gathered = 1 + (not none) if sequence else 0
    read = (1 if sequence else 2) + gathered
    add("tensor", terms.whole_memory * job.model.layers, read * micro)
    for axis in ("data", "fsdp"):  # the gradient of what positions add to scores, in each layer
        add(axis, terms.all_biases, 2 * micro)

    if job.model.experts.number:
        add(EXPERT, exchanged(terms) * job.model.layers, micro)
        add("tensor", over_tensor(terms) * job.model.layers, micro)
        add(EXPERT, terms.shared_gradients, 2 * micro)  # as over data
    arrays = terms.arrays
    stacked, outside = (terms.as_used(of, "gathered") for of in (arrays.stacked, arrays.outside))
    gradients = [terms.as_used(of, "gathered") for of in terms.trained]
    # Of a block that layers share, each of them gathers the weights and reduces the gradients.
    whole, back = stacked * terms.uses + outside, gradients[0] * terms.uses + gradients[1]
    parted = terms.layer_gradients * terms.uses + terms.outer_gradients
    if job.parallel.zero == 3:
        add("fsdp", whole, 2 * micro)  # gathered forward and backward
        add("fsdp", back, micro)  # scattered
        add("data", parted, 2 * micro)
    elif job.parallel.zero == 0:
        add("fsdp", back, 2 * micro)
        add("data", back, 2 * micro)
    else:
        # One gather of the weights a step; gradients scattered, or at level 1 reduced whole.
        add("fsdp", stacked + outside, 1)
        add("fsdp", back, (1 if job.parallel.zero == 2 else 2) * micro)
        add("data", parted, 2 * micro)
    return seconds


def _host_seconds(job: Job, terms: Terms, target: Target) -> float:
    """Offloaded state is read and written once a step, activations once each: two ways at once."""
    moved = sum(terms.offloaded.values()) * job.micro_steps + terms.offloaded_state
    return moved / target.chip.host_link
