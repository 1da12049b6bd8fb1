"""The training state: plain pytrees, created divided, described without being created."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from parallel.compilation import quick_compilation
from parallel.cut import Cut
from parallel.pipeline import PipelineConfig
from parallel.precision import LossScale, PrecisionConfig
from parallel.rules import Rules
from parallel.stored import cast
from training.by_layer import ByLayer
from training.features import Features
from training.naming import named
from training.optim import Optimizer, state_specs

Tree = Any


class TrainState(NamedTuple):
    """Everything that a step reads and writes; a checkpoint holds just this.

    Attributes:
      step: int32, steps done.
      params: master parameters, a nested dict by canonical name.
      opt_state: state of the optax transformation.
      loss_scale: float16's factor and counter (unused, and 1, in other precisions).
      skipped: int32, updates skipped because their gradient was not finite.
    """

    step: Any  # an array; in trees that describe the state its PartitionSpec or shape
    params: Tree
    opt_state: Tree
    loss_scale: LossScale
    skipped: Any


@dataclass(frozen=True)
class Model:
    """A model as the step sees it: pure functions on a tree of parameters, and that tree's names.

    Attributes:
      init: PRNG key -> float32 parameters, laid out at rest.
      axes: tree of logical axis strings, one for each parameter.
      loss: (params for the model, batch, `Weights`, key or None) -> (float32 sum, float32 sums).
      rules: the layout.
      cut: the same model in parts, for stages.
      pipeline: how the stages work together.
      frozen: canonical names of the parameters that are not trained (`training.frozen`).
      scores: (params for the model, batch) -> (-log p of every target, 1 where it is the most
        likely token), float32 [B, T]; None where no next token is predicted.
      features: (params for the model, batch, `Weights` or None, key or None, layers) -> the forward
        pass up to the head of tokens, with the residual streams after those layers; without weights
        there is no loss beside that of tokens. None where no token is predicted.
    """

    init: Callable[[jax.Array], Tree]
    axes: Tree
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
    rules: Rules
    cut: Cut | None = None
    pipeline: PipelineConfig | None = None
    frozen: frozenset[str] = frozenset()
    scores: Callable[..., tuple[jax.Array, jax.Array]] | None = None
    features: Callable[..., Features] | None = None

    def trained(self, tree: Tree) -> Tree:
        """A tree like the parameters, with None, which is nothing to JAX, for the frozen ones.

        Gradients are such a tree, and optimizers are made of and for such trees.
        """
        if not self.frozen:
            return tree
        structure: Any = jax.tree.structure(self.axes)
        leaves = zip(named(self.axes), structure.flatten_up_to(tree), strict=True)
        return structure.unflatten([None if name in self.frozen else leaf for name, leaf in leaves])


def drawn_shapes(model: Model) -> Tree:
    """What `model.init` gives, abstract. No key is made: devices to compile for run nothing."""
    return jax.eval_shape(lambda: model.init(jax.random.key(0)))


def abstract_params(model: Model, precision: PrecisionConfig) -> Tree:
    """Shapes, dtypes and partitions of the master parameters; nothing is computed."""
    return jax.eval_shape(lambda: _cast(model.init(jax.random.key(0)), precision))


def count_of(params: Tree) -> int:
    """How many numbers a tree of parameters holds."""
    return sum(p.size for p in jax.tree.leaves(params))


def placed_params(
    model: Model,
    precision: PrecisionConfig,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
) -> Tree:
    """The master parameters at rest as `ShapeDtypeStruct`s with shardings."""
    abstract = abstract_params(model, precision)
    specs = jax.tree.map(lambda p, names: model.rules.at_rest(names, p.shape), abstract, model.axes)
    return jax.tree.map(
        lambda p, sharding: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=sharding),
        abstract,
        shardings_of(specs, mesh),
    )


def _cast(params: Tree, precision: PrecisionConfig) -> Tree:
    return cast(params, precision.params)


def drawn_params(
    model: Model,
    precision: PrecisionConfig,
    seed: int,
    chosen: Callable[[Tree], Tree] = lambda params: params,
) -> Tree:
    """Master parameters of a seed, or what is `chosen` of them: nothing else is drawn then."""
    draw = lambda: chosen(_cast(model.init(jax.random.key(seed)), precision))
    return jax.jit(draw, compiler_options=quick_compilation())()


def state_partition(model: Model, optimizer: Optimizer, precision: PrecisionConfig) -> TrainState:
    """The PartitionSpec of every array of the state."""
    params = abstract_params(model, precision)
    specs = jax.tree.map(lambda p, names: model.rules.at_rest(names, p.shape), params, model.axes)
    scalar = PartitionSpec()
    return TrainState(
        step=scalar,
        params=specs,
        opt_state=state_specs(
            optimizer, model.trained(model.axes), model.trained(params), model.rules
        ),
        loss_scale=LossScale(scalar, scalar),
        skipped=scalar,
    )


def state_shardings(
    model: Model,
    optimizer: Optimizer,
    precision: PrecisionConfig,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
) -> TrainState:
    """The NamedSharding of every array of the state, which says in what memory it is."""
    shardings = shardings_of(state_partition(model, optimizer, precision), mesh)
    if not isinstance(optimizer, ByLayer):
        return shardings
    params = model.trained(abstract_params(model, precision))
    return shardings._replace(opt_state=optimizer.placed(shardings.opt_state, params))


def create_state(
    model: Model,
    optimizer: Optimizer,
    precision: PrecisionConfig,
    seed: int,
    mesh: jax.sharding.Mesh,
    params: Tree | None = None,
) -> TrainState:
    """The state of step 0; every device draws only its own part of the parameters.

    The same seed gives the same parameters on every mesh: threefry is partitionable, and keys go by
    the parameter's place in the model. Where `params` are given, as `placed_params` says, none are
    drawn.
    """
    shardings = state_shardings(model, optimizer, precision, mesh)
    if params is None:
        params = drawn_params(model, precision, seed)
    init = jax.jit(optimizer.init, out_shardings=shardings.opt_state)
    opt_state = init(model.trained(params))
    zero, scale = jnp.int32(0), LossScale.init(precision)
    rest = jax.device_put(
        (zero, scale, zero + 0), (shardings.step, shardings.loss_scale, shardings.skipped)
    )
    return TrainState(rest[0], params, opt_state, rest[1], rest[2])


def abstract_state(
    model: Model,
    optimizer: Optimizer,
    precision: PrecisionConfig,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
) -> TrainState:
    """The state as `ShapeDtypeStruct`s with shardings: what a checkpoint is restored to."""
    params = abstract_params(model, precision)
    shapes = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        params=params,
        opt_state=jax.eval_shape(optimizer.init, model.trained(params)),
        loss_scale=LossScale(
            jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
        ),
        skipped=jax.ShapeDtypeStruct((), jnp.int32),
    )
    shardings = state_shardings(model, optimizer, precision, mesh)
    return jax.tree.map(
        lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def shardings_of(specs: Tree, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> Tree:
    """PartitionSpecs to NamedShardings."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
