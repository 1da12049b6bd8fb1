"""Cross-entropy of tokens: vocabulary divided over devices, logits of one chunk at a time.

The logits of a whole batch are the largest tensor of a small model's step (tokens x vocabulary in
float32). They never exist here: tokens go through in chunks, and the gradient is formed while a
chunk's logits are at hand, so that neither direction keeps or recomputes them (as do Liger, Hsu et
al. 2024, https://arxiv.org/abs/2410.10989, and Cut Cross-Entropy, Wijmans et al. 2024,
https://arxiv.org/abs/2411.09009). The price: the gradient is formed for a cotangent of one and
scaled by the true one later, so whatever scales the loss belongs in `weights_BT`.
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
from training.features import HeadWeights
from training.loss_chunks import Chunks, LossHead, psum


@dataclass(frozen=True)
class LossConfig:
    """The loss head (`config.loss`).

    Attributes:
      chunk: tokens per device whose logits exist at one time.
      z_loss: weight of the squared log-partition (Chowdhery et al. 2022, PaLM section 5,
        https://arxiv.org/abs/2204.02311); 0 turns it off.
    """

    chunk: int = 1024
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"config.loss.chunk = {self.chunk}: at least 1 token at a time")
        if self.z_loss < 0:
            raise ValueError(f"config.loss.z_loss = {self.z_loss}: a weight is 0 (off) or more")


def cross_entropy(
    hidden_BTD: Array,
    table: Array,
    targets_BT: Array,
    weights_BT: Array,
    *,
    rules: Rules,
    vocab_size: int,
    table_axes: str = "vocab -> embed",
    bias: Array | None = None,
    chunk: int = 1024,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> tuple[Array, dict[str, Array]]:
    """The weighted sum over tokens of -log p(target) and z_loss * log(partition)^2.

    Args:
      hidden_BTD: last hidden states in compute dtype, partitioned as "batch seq act_embed".
      table: [V, D] (a tied embedding) or [D, V], in compute dtype, V padded. Mesh axes but those of
        `act_vocab` (FSDP's) are gathered here, and the gradient is reduced and scattered over them.
      targets_BT: int32, below `vocab_size`, partitioned as "batch seq".
      weights_BT: float32, partitioned as "batch seq"; zero for tokens that do not count. Holds
        1 / (tokens of the step) and the loss scale, so that gradients are scaled before any cast.
      rules: which mesh axes divide the batch and the vocabulary.
      vocab_size: the true number of tokens; later columns are padding and take no probability.
      table_axes: "vocab -> embed" or "embed -> vocab", the table's orientation.
      bias: [V] in compute dtype, added to the logits, partitioned as "vocab"; None for none.
      chunk: tokens per device whose logits exist at one time.
      softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2,
        https://arxiv.org/abs/2408.00118).
      z_loss: weight of the squared log-partition.

    Returns:
      The float32 scalar sum, and float32 sums with the same weights that carry no gradient:
      `nll_sum`, `z_sum` (of the squared log-partition, without `z_loss`), `correct_sum` (tokens
      whose target has the largest logit).
    """
    head = _Head(rules, vocab_size, table_axes, softcap, chunk, z_loss)
    weights = (table,) if bias is None else (table, bias)
    loss_sum, aux, _ = _cross_entropy(head, hidden_BTD, weights, targets_BT, weights_BT)
    return loss_sum, jax.tree.map(lax.stop_gradient, aux)


def token_scores(
    hidden_BTD: Array,
    table: Array,
    targets_BT: Array,
    *,
    rules: Rules,
    vocab_size: int,
    table_axes: str = "vocab -> embed",
    bias: Array | None = None,
    chunk: int = 1024,
    softcap: float | None = None,
) -> tuple[Array, Array]:
    """Of every token -log p(target) and 1 where no logit is larger, float32 [B, T]; no gradient."""
    head = _Head(rules, vocab_size, table_axes, softcap, chunk, 0.0)
    weights = (table,) if bias is None else (table, bias)
    ones_BT = jnp.ones(targets_BT.shape, jnp.float32, out_sharding=rules.spec("batch seq"))
    return lax.stop_gradient(_cross_entropy(head, hidden_BTD, weights, targets_BT, ones_BT)[2])


Outputs = tuple[Array, dict[str, Array], tuple[Array, Array]]  # loss_sum, aux, (nll_BT, correct_BT)


@dataclass(frozen=True)
class _Head(LossHead):
    """What is static about the loss."""

    chunk: int
    z_loss: float


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(
    head: _Head, hidden_BTD: Array, weights: HeadWeights, targets_BT: Array, weights_BT: Array
) -> Outputs:
    return _island(head, False, hidden_BTD, weights, targets_BT, weights_BT)[0]


def _forward(head: _Head, *arrays: Any) -> tuple[Outputs, tuple[Any, ...]]:
    return _island(head, True, *arrays)


def _backward(
    head: _Head, gradients: tuple[Array, HeadWeights], cotangents: Any
) -> tuple[Array, HeadWeights, None, None]:
    d_loss = cotangents[0]  # the literal 1.0 under jax.grad: XLA drops the products
    scaled = jax.tree.map(lambda g: (g.astype(jnp.float32) * d_loss).astype(g.dtype), gradients)
    return *scaled, None, None


_cross_entropy.defvjp(_forward, _backward)


def _island(
    head: _Head,
    with_gradient: bool,
    hidden_BTD: Array,
    weights: HeadWeights,
    targets_BT: Array,
    weights_BT: Array,
) -> tuple[Outputs, tuple[Any, ...]]:
    """Runs `_local` on every device, Manual over each mesh axis that is not Manual already."""
    mesh = jax.sharding.get_abstract_mesh()
    tokens, hidden = head.rules.spec("batch seq"), head.rules.spec("batch seq act_embed")
    specs = tuple(jax.typeof(weight).sharding.spec for weight in weights)
    return jax.shard_map(
        partial(_local, head, specs, with_gradient),
        in_specs=(hidden, specs, tokens, tokens),
        out_specs=((P(), P(), tokens), (hidden, specs) if with_gradient else ()),
        axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
        check_vma=False,
    )(hidden_BTD, weights, targets_BT, weights_BT)


def _local(
    head: _Head,
    specs: tuple[P, ...],
    with_gradient: bool,
    x_BTD: Array,
    head_weights: HeadWeights,
    targets_BT: Array,
    w_BT: Array,
) -> tuple[Outputs, tuple[Any, ...]]:
    """One device's tokens against its part of the vocabulary."""
    batch, vocab = head.divided("batch"), head.divided("act_vocab")
    used = head.used(head_weights, specs)
    B, T = targets_BT.shape
    chunks = Chunks(B, T, head.chunk)
    one_chunk = partial(_chunk, head, with_gradient, used)
    d_used = tuple(jnp.zeros(w.shape, jnp.float32) for w in used) if with_gradient else None
    xs = chunks.split(x_BTD), chunks.split(targets_BT), chunks.split(w_BT)
    d_used, (nll, lse, correct, d_x) = lax.scan(one_chunk, d_used, xs)

    weights, nll, lse, correct = map(chunks.merge, (xs[2], nll, lse, correct))
    sums = [jnp.sum(weights * a) for a in (nll, lse * lse, correct)]
    nll_sum, z_sum, correct_sum = psum(jnp.stack(sums), batch)
    aux = {"nll_sum": nll_sum, "z_sum": z_sum, "correct_sum": correct_sum}
    outputs = nll_sum + head.z_loss * z_sum, aux, (nll, correct)
    if d_used is None:
        return outputs, ()
    d_x_BTD = psum(chunks.merge(d_x), vocab)
    return outputs, (d_x_BTD.astype(x_BTD.dtype), head.reduced(d_used, used, specs))


def _chunk(
    head: _Head,
    with_gradient: bool,
    head_weights: HeadWeights,
    d_weights: Any,  # float32, or None without gradient
    inputs: tuple[Array, Array, Array],
) -> tuple[Any, tuple[Any, ...]]:
    """One chunk of C tokens: adds to gradients of the weights; gives losses and hidden gradient."""
    x_CD, targets_C, weights_C = inputs
    capped_CV, logits_CV = head.logits(x_CD, head_weights)
    max_C, target_C, picked_C = head.of_targets(capped_CV, logits_CV, targets_C)
    exp_sum_C = jnp.sum(jnp.exp(logits_CV - max_C[:, None]), axis=1)
    exp_sum_C, picked_C = psum(jnp.stack([exp_sum_C, picked_C]), head.divided("act_vocab"))
    lse_C = max_C + jnp.log(exp_sum_C)
    losses = lse_C - picked_C, lse_C, (picked_C >= max_C).astype(jnp.float32)
    if not with_gradient:
        return d_weights, (*losses, None)

    scale_C = weights_C * (1.0 + 2.0 * head.z_loss * lse_C)
    d_logits_CV = jnp.exp(logits_CV - lse_C[:, None]) * scale_C[:, None]
    column_CV = lax.broadcasted_iota(jnp.int32, logits_CV.shape, 1)
    d_logits_CV -= jnp.where(column_CV == target_C[:, None], weights_C[:, None], 0.0)
    d_x_CD, d_used = head.pull_back(d_logits_CV, capped_CV, x_CD, head_weights)
    return tuple(map(jnp.add, d_weights, d_used)), (*losses, d_x_CD)
