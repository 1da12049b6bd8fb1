"""Optimizers, and the one function that applies an update or skips it.

State is sharded like its parameter because it is made of it: on an Explicit mesh, zeros like a
parameter have the parameter's sharding, and elementwise arithmetic keeps it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import NamedSharding

from parallel.mesh import platform
from parallel.rules import Rules
from training.by_layer import ByLayer, Place, by_layer, unstacked
from training.idle_keys import idle_keys
from training.low_rank import scale_by_low_rank
from training.matrices import decays, scale_by_factored_rms, scale_by_muon
from training.naming import completed, restricted
from training.quantised_adam import scale_by_quantised_adam
from training.rounding import rounded, widened
from training.schedules import make_schedule
from training.zeros import keeping_zeros

BITS = {"adamw8bit": 8, "adamw4bit": 4}  # of a moment
# The scale of what is projected where the config has 0: GaLore section 5, APOLLO section 5.1; that
# of rank 1 is APOLLO-Mini's.
SCALES = {"galore": 0.25, "apollo": 1.0}
MINI_SCALE = math.sqrt(128)
NAMES = ("adamw", "adafactor", "lion", "muon", "sgd", *BITS, *SCALES)
SCHEDULES = ("cosine", "wsd", "constant")

Optimizer: TypeAlias = optax.GradientTransformation | ByLayer


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates (`config.optimizer`).

    Attributes:
      name: adamw, adafactor, lion, muon, sgd, adamw8bit, adamw4bit, galore or apollo.
      learning_rate: the highest one.
      warmup_steps: updates of linear warm-up; more than the run has is allowed.
      schedule: cosine, wsd or constant, see `training/schedules.py`.
      final_fraction: the last learning rate of cosine and wsd, as a fraction of the highest.
      decay_fraction: the part of the run in which wsd decays.
      weight_decay: decoupled, times the learning rate; of matrices alone.
      clip_norm: the largest global norm of the gradient; 0 turns clipping off.
      b1, b2: decay of first and second moments (adamw, lion, and muon's tables and vectors).
      eps: added to the denominator.
      momentum: of sgd and muon; 0 gives sgd without state.
      offload: moments of the stacked layers live in host memory (training/by_layer.py).
      frozen: patterns of canonical names, such as "stack/*", of parameters that are not trained
        (training/frozen.py).
      rank: of the moments of matrices with galore and apollo; 1 with apollo is APOLLO-Mini.
      refresh: updates after which their projection changes.
      projection_scale: factor of what is projected; 0: the method's own.
      stochastic_rounding: parameters and moments in bfloat16 are rounded up or down by chance, by
        how near they are (training/rounding.py).
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    schedule: str = "cosine"
    final_fraction: float = 0.1
    decay_fraction: float = 0.2
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.9
    offload: bool = False
    frozen: tuple[str, ...] = ()
    rank: int = 128
    refresh: int = 200
    projection_scale: float = 0.0
    stochastic_rounding: bool = False

    def __post_init__(self) -> None:
        def check(key: str, right: bool, hint: str) -> None:
            if not right:
                value = getattr(self, key)
                raise ValueError(f"config.optimizer.{key} = {value!r}: {hint}")

        check("name", self.name in NAMES, f"choose one of {', '.join(NAMES)}")
        check("schedule", self.schedule in SCHEDULES, f"choose one of {', '.join(SCHEDULES)}")
        check("learning_rate", self.learning_rate > 0, "a learning rate is above 0")
        check("warmup_steps", self.warmup_steps >= 0, "0 (no warm-up) or more steps")
        for key in ("final_fraction", "decay_fraction"):
            check(key, 0 <= getattr(self, key) <= 1, "a fraction is between 0 and 1")
        check("weight_decay", self.weight_decay >= 0, "0 (off) or more")
        check("clip_norm", self.clip_norm >= 0, "0 (off) or more")
        for key in ("b1", "b2", "momentum"):
            check(key, 0 <= getattr(self, key) < 1, "a decay is at least 0 and below 1")
        check("eps", self.eps > 0, "above 0")
        for key in ("rank", "refresh"):
            check(key, getattr(self, key) >= 1, "at least 1")
        check("projection_scale", self.projection_scale >= 0, "0 (the method's own) or more")
        stateless = self.name == "sgd" and self.momentum == 0
        check("offload", not (self.offload and stateless), "sgd without momentum has no state")

    @property
    def scale(self) -> float:
        """`projection_scale`, or what the method's paper has."""
        own = MINI_SCALE if self.name == "apollo" and self.rank == 1 else SCALES.get(self.name, 1.0)
        return self.projection_scale or own

    def without_effect(self) -> list[str]:
        """Keys that were set and are not read, a sentence each."""
        idle = [] if self.name in SCALES else ["rank", "refresh", "projection_scale"]
        idle += [] if self.name in ("sgd", "muon") else ["momentum"]
        return idle_keys(self, "optimizer", idle, f"config.optimizer.name is {self.name!r}")


def make_optimizer(
    config: OptimizerConfig, total_steps: int, axes: Any, zeros: frozenset[str] = frozenset()
) -> Optimizer:
    """Clipping, the optimizer's direction, weight decay and learning rate, in this order.

    Args:
      config: `config.optimizer`.
      total_steps: updates of the whole run, for the schedule.
      axes: a tree like the trained parameters, of their logical axes ("layers embed -> mlp").
      zeros: canonical names of parameters whose zeros stay (training/zeros.py).

    Returns:
      A transformation with state {"clip", "direction", "decay", "rate"}. Its update takes
      `grad_norm` where the caller knows it, which saves computing it again. With
      `config.offload` the same, with the moments of the layers in host memory.

    Sources: Loshchilov and Hutter 2019 (AdamW), https://arxiv.org/abs/1711.05101; Chen et al. 2023
    (Lion), https://arxiv.org/abs/2302.06675; Adafactor and Muon in `training/matrices.py`.
    """
    make = keeping_zeros(partial(_chain, config, total_steps), zeros)
    looped = config.offload or config.name in {*BITS, *SCALES} or config.stochastic_rounding
    return by_layer(make, axes, host=config.offload) if looped else make(axes)


def _chain(
    config: OptimizerConfig, total_steps: int, axes: Any
) -> optax.GradientTransformationExtraArgs:
    quantised = partial(scale_by_quantised_adam, axes, b1=config.b1, b2=config.b2, eps=config.eps)
    low_rank = partial(
        scale_by_low_rank,
        axes,
        rank=config.rank,
        refresh=config.refresh,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
    )
    directions: dict[str, Callable[[], optax.GradientTransformation]] = {
        "adamw": lambda: optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        **{name: partial(quantised, bits=bits) for name, bits in BITS.items()},
        **{name: partial(low_rank, method=name, scale=config.scale) for name in SCALES},
        "adafactor": lambda: scale_by_factored_rms(axes),
        "lion": lambda: optax.scale_by_lion(b1=config.b1, b2=config.b2),
        "muon": lambda: scale_by_muon(
            axes, momentum=config.momentum, b1=config.b1, b2=config.b2, eps=config.eps
        ),
        "sgd": lambda: optax.trace(config.momentum) if config.momentum else optax.identity(),
    }
    return optax.named_chain(
        ("clip", _clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()),
        ("direction", directions[config.name]()),
        ("decay", optax.add_decayed_weights(config.weight_decay, jax.tree.map(decays, axes))),
        ("rate", optax.scale_by_learning_rate(make_schedule(config, total_steps))),
    )


def _clip_by_global_norm(limit: float) -> optax.GradientTransformationExtraArgs:
    def update(
        grads: Any,
        state: optax.EmptyState,
        params: Any = None,
        *,
        grad_norm: Array | None = None,
        **_: Any,
    ) -> tuple[Any, optax.EmptyState]:
        norm = global_norm(grads) if grad_norm is None else grad_norm
        factor = limit / jnp.maximum(norm, limit)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def global_norm(tree: Any) -> Array:
    """The float32 root of the sum of all squares of a tree's arrays, whatever their sharding."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(a.astype(jnp.float32))) for a in jax.tree.leaves(tree)))


def apply_update(
    optimizer: Optimizer,
    grads: Any,
    opt_state: Any,
    params: Any,
    *,
    scale: Array | float = 1.0,
    rounding: Array | None = None,
) -> tuple[Any, Any, Array, Array]:
    """One update, or, if the gradient is not finite, the old parameters and state bit for bit.

    Args:
      optimizer: of `make_optimizer`.
      grads: in any dtype and sharding; brought to the parameters' own. None where a parameter is
        frozen, which then stays as it is.
      opt_state: of `optimizer.init`.
      params: master parameters.
      scale: how many times too large the gradients are (float16's loss scale).
      rounding: the key of this step, by which bfloat16 is rounded; None: to the nearest.

    Returns:
      (params, opt_state, grad_norm, finite): the global norm before clipping, float32, of all
      `grads`, and whether
      the update was applied, bool.
    """
    every, params = params, restricted(params, grads)
    # Before the cast: fewer bytes travel.
    grads = jax.tree.map(lambda g, p: jax.reshard(g, jax.typeof(p).sharding.spec), grads, params)
    norm = global_norm(grads) / scale
    finite = jnp.isfinite(norm)

    def update(
        optimizer: optax.GradientTransformation,
        grads: Any,
        params: Any,
        opt_state: Any,
        place: Place = unstacked,
    ) -> tuple[Any, Any]:
        def new(params: Any, opt_state: Any) -> tuple[Any, Any]:
            old = params, opt_state
            if rounding is not None:
                params, opt_state = widened(old)
            like_param = lambda g, p: (g.astype(jnp.float32) / scale).astype(p.dtype)
            updates, opt_state = optax.with_extra_args_support(optimizer).update(
                jax.tree.map(like_param, grads, params), opt_state, params, grad_norm=norm
            )
            found = optax.apply_updates(params, updates), opt_state
            return found if rounding is None else rounded(found, old, rounding, place)

        return _update_if(finite, new, params, opt_state)

    with jax.numpy_dtype_promotion("standard"):  # optax raises decay rates to integer powers
        if isinstance(optimizer, ByLayer):
            params, opt_state = optimizer.update(update, grads, params, opt_state)
        else:
            params, opt_state = update(optimizer, grads, params, opt_state)
    return completed(params, every), opt_state, norm, finite


def _update_if(finite: Array, update: Callable[..., Any], *state: Any) -> Any:
    """`update(*state)` where `finite`, else `state`, written over the donated state.

    A select is part of the fusion that computes the update: no copy on GPU and TPU, where a branch
    costs a second and a third state (XLA copies what goes into a conditional and what comes out).
    XLA:CPU has no fusions of several results: there it is the select that copies.
    """
    if platform() == "cpu":
        return jax.lax.cond(finite, update, lambda *unchanged: unchanged, *state)
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), update(*state), state)


def state_specs(optimizer: Optimizer, axes: Any, abstract_params: Any, rules: Rules) -> Any:
    """The PartitionSpec of every array of `optimizer.init(params)`; call it under the mesh.

    Args:
      axes: logical axes of every parameter.
      abstract_params: arrays or `ShapeDtypeStruct`s.
      rules: moments are divided like their parameter at rest, factored ones like the dims that
        they keep.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def at_rest(p: Any, names: str) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, rules.at_rest(names, p.shape))
        return jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=sharding)

    placed = jax.tree.map(at_rest, abstract_params, axes)
    return jax.tree.map(
        lambda a: jax.typeof(a).sharding.spec, jax.eval_shape(optimizer.init, placed)
    )
