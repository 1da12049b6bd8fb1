"""Cross-entropy and the divergence from a teacher's distribution, of one chunk of logits at a time.

    (1 - w) nll + w T^2 KL + z_loss log(partition)^2        of every token, weighted

With p = softmax(teacher's logits / T) and q = softmax(student's logits / T), KL is

    forward   KL(p || q) = sum_v p (log p - log q)     d/dz = (q - p) / T
    reverse   KL(q || p) = sum_v q (log q - log p)     d/dz = q (log q - log p - KL) / T

Forward after Hinton et al. 2015, https://arxiv.org/abs/1503.02531, whose T^2 keeps the size of
gradients from depending on T. Reverse is the divergence of MiniLLM (Gu et al. 2023,
https://arxiv.org/abs/2306.08543) of single tokens, on the data's tokens: MiniLLM itself has that of
whole sequences that the student draws, by policy gradient, which this is not.

Both models' logits exist for one chunk, in both directions, as those of `training/losses.py` do:
the gradient is formed while they are at hand, for a cotangent of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P

from parallel.rules import Rules
from training.features import HeadWeights, Predictor
from training.loss_chunks import Chunks, LossHead, psum

KINDS = ("forward", "reverse")


def distillation_loss(
    student: Predictor,
    teacher: Predictor,
    targets_BT: Array,
    weights_BT: Array,
    *,
    rules: Rules,
    vocab_size: int,
    kind: str,
    temperature: float,
    weight: float,
    chunk: int = 1024,
    z_loss: float = 0.0,
) -> tuple[Array, dict[str, Array]]:
    """The weighted sum over tokens of the loss above; only the student has a gradient.

    Args:
      student, teacher: of the same columns; width, dtype, orientation, bias and softcap are each
        one's own.
      targets_BT, weights_BT, rules, vocab_size, chunk, z_loss: as `training.losses.cross_entropy`.
      kind: forward or reverse.
      temperature: T.
      weight: w, in [0, 1].

    Returns:
      The float32 scalar sum, and float32 sums with the same weights that carry no gradient: those
      of `cross_entropy`, and `kl_sum`, without w and T^2.
    """
    assert kind in KINDS, kind

    def head(of: Predictor) -> LossHead:
        return LossHead(rules, vocab_size, of.table_axes, of.softcap)

    static = _Static(head(student), head(teacher), kind, temperature, weight, chunk, z_loss)
    taught = jax.tree.map(lax.stop_gradient, (teacher.x_BTD, teacher.weights))
    loss_sum, aux = _distill(static, student.x_BTD, student.weights, taught, targets_BT, weights_BT)
    return loss_sum, jax.tree.map(lax.stop_gradient, aux)


Outputs = tuple[Array, dict[str, Array]]
Taught = tuple[Array, HeadWeights]  # features and head of the teacher


@dataclass(frozen=True)
class _Static:
    """What is known while tracing."""

    student: LossHead
    teacher: LossHead
    kind: str
    temperature: float
    weight: float
    chunk: int
    z_loss: float


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _distill(
    static: _Static,
    x_BTD: Array,
    weights: HeadWeights,
    taught: Taught,
    targets_BT: Array,
    weights_BT: Array,
) -> Outputs:
    return _island(static, False, x_BTD, weights, taught, targets_BT, weights_BT)[0]


def _forward(static: _Static, *arrays: Any) -> tuple[Outputs, tuple[Any, ...]]:
    return _island(static, True, *arrays)


def _backward(
    static: _Static, gradients: tuple[Array, HeadWeights], cotangents: Any
) -> tuple[Array, HeadWeights, None, None, None]:
    d_loss = cotangents[0]  # the literal 1.0 under jax.grad: XLA drops the products
    scaled = jax.tree.map(lambda g: (g.astype(jnp.float32) * d_loss).astype(g.dtype), gradients)
    return *scaled, None, None, None


_distill.defvjp(_forward, _backward)


def _island(
    static: _Static,
    with_gradient: bool,
    x_BTD: Array,
    weights: HeadWeights,
    taught: Taught,
    targets_BT: Array,
    weights_BT: Array,
) -> tuple[Outputs, tuple[Any, ...]]:
    """Runs `_local` on every device."""
    rules = static.student.rules
    tokens, hidden = rules.spec("batch seq"), rules.spec("batch seq act_embed")
    own, other = (
        tuple(jax.typeof(weight).sharding.spec for weight in of) for of in (weights, taught[1])
    )
    return jax.shard_map(
        partial(_local, static, own, other, with_gradient),
        in_specs=(hidden, own, (hidden, other), tokens, tokens),
        out_specs=((P(), P()), (hidden, own) if with_gradient else ()),
        check_vma=False,
    )(x_BTD, weights, taught, targets_BT, weights_BT)


def _local(
    static: _Static,
    own: tuple[P, ...],
    other: tuple[P, ...],
    with_gradient: bool,
    x_BTD: Array,
    weights: HeadWeights,
    taught: Taught,
    targets_BT: Array,
    w_BT: Array,
) -> tuple[Outputs, tuple[Any, ...]]:
    """One device's tokens against its part of the vocabulary."""
    head = static.student
    batch, vocab = head.divided("batch"), head.divided("act_vocab")
    used, taught_used = head.used(weights, own), static.teacher.used(taught[1], other)
    B, T = targets_BT.shape
    chunks = Chunks(B, T, static.chunk)
    one_chunk = partial(_chunk, static, with_gradient, used, taught_used)
    d_used = tuple(jnp.zeros(w.shape, jnp.float32) for w in used) if with_gradient else None
    xs = tuple(map(chunks.split, (x_BTD, taught[0], targets_BT, w_BT)))
    d_used, (sums, d_x) = lax.scan(one_chunk, d_used, xs)

    nll_sum, z_sum, correct_sum, kl_sum = psum(jnp.sum(sums, axis=0), batch)
    aux = {"nll_sum": nll_sum, "z_sum": z_sum, "correct_sum": correct_sum, "kl_sum": kl_sum}
    scaled = static.weight * static.temperature**2 * kl_sum
    outputs = (1 - static.weight) * nll_sum + scaled + static.z_loss * z_sum, aux
    if d_used is None:
        return outputs, ()
    d_x_BTD = psum(chunks.merge(d_x), vocab)
    return outputs, (d_x_BTD.astype(x_BTD.dtype), head.reduced(d_used, used, own))


def _chunk(
    static: _Static,
    with_gradient: bool,
    weights: HeadWeights,
    taught: HeadWeights,
    d_weights: Any,  # float32, or None without gradient
    inputs: tuple[Array, Array, Array, Array],
) -> tuple[Any, tuple[Array, Any]]:
    """One chunk of C tokens: its weighted sums, and the gradient of its features."""
    x_CD, taught_CD, targets_C, weights_C = inputs
    head, T, w = static.student, static.temperature, static.weight
    capped_CV, z_CV = head.logits(x_CD, weights)
    _, t_CV = static.teacher.logits(taught_CD, taught)
    assert z_CV.shape == t_CV.shape, "the same columns of the vocabulary"
    axes = head.divided("act_vocab")
    z_max_C, target_C, picked_C = head.of_targets(capped_CV, z_CV, targets_C)
    t_max_C = jnp.max(t_CV, axis=1)
    t_max_C = lax.pmax(t_max_C, axes) if axes else t_max_C

    # Not normalised yet: one sum over devices has all that a token needs.
    exp_CV = jnp.exp(z_CV - z_max_C[:, None])
    q_CV = exp_CV if T == 1 else jnp.exp((z_CV - z_max_C[:, None]) / T)
    p_CV = jnp.exp((t_CV - t_max_C[:, None]) / T)
    # log q - log p but for a constant of the token; 0 in padded columns, where both are masked.
    apart_CV = (z_CV - t_CV) / T
    mean_CV = apart_CV * (q_CV if static.kind == "reverse" else p_CV)
    terms = [jnp.sum(a_CV, axis=1) for a_CV in (exp_CV, q_CV, p_CV, mean_CV)]
    exp_sum_C, q_sum_C, p_sum_C, apart_C, picked_C = psum(jnp.stack([*terms, picked_C]), axes)

    lse_C = z_max_C + jnp.log(exp_sum_C)
    q_lse_C = z_max_C / T + jnp.log(q_sum_C)
    p_lse_C = t_max_C / T + jnp.log(p_sum_C)
    constant_C = p_lse_C - q_lse_C
    if static.kind == "reverse":
        kl_C = apart_C / q_sum_C + constant_C
    else:
        kl_C = -apart_C / p_sum_C - constant_C
    losses = lse_C - picked_C, lse_C * lse_C, (picked_C >= z_max_C).astype(jnp.float32), kl_C
    sums = jnp.stack([jnp.sum(weights_C * loss_C) for loss_C in losses])
    if not with_gradient:
        return d_weights, (sums, None)

    scale_C = weights_C * (1 - w + 2.0 * static.z_loss * lse_C)
    d_logits_CV = exp_CV * (scale_C / exp_sum_C)[:, None]
    column_CV = lax.broadcasted_iota(jnp.int32, z_CV.shape, 1)
    hit_C = weights_C * (1 - w)
    d_logits_CV -= jnp.where(column_CV == target_C[:, None], hit_C[:, None], 0.0)
    q_CV = q_CV / q_sum_C[:, None]
    if static.kind == "reverse":
        d_kl_CV = q_CV * (apart_CV + (constant_C - kl_C)[:, None])
    else:
        d_kl_CV = q_CV - p_CV / p_sum_C[:, None]
    d_logits_CV += d_kl_CV * (weights_C * (w * T))[:, None]
    d_x_CD, d_used = head.pull_back(d_logits_CV, capped_CV, x_CD, weights)
    return tuple(map(jnp.add, d_weights, d_used)), (sums, d_x_CD)
