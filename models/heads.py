"""Classification heads: one affine map for each task over the features of a whole row."""

from __future__ import annotations

import jax
from flax import nnx

from models.config import ModelConfig
from models.layers import broadcast_to_rank, constant, gathered, normal, weight
from parallel.einsum import einsum
from parallel.footprint import Weight
from parallel.rules import Rules


class Heads(nnx.Module):
    """features [B, D] -> {task: logits [B, C]}, a `ClassHead` an attribute for each task."""

    def __init__(self, config: ModelConfig, rules: Rules, rngs: nnx.Rngs) -> None:
        self._tasks = tuple(name for name, _ in config.tasks)
        for name, classes in config.tasks:
            setattr(self, name, ClassHead(config, classes, rules, rngs))

    def __call__(self, features_BD: jax.Array) -> dict[str, jax.Array]:
        return {name: getattr(self, name)(features_BD) for name in self._tasks}


class ClassHead(nnx.Module):
    """features [B, D] -> logits [B, C]."""

    def __init__(self, config: ModelConfig, classes: int, rules: Rules, rngs: nnx.Rngs) -> None:
        shape, init = (config.embed_dim, classes), normal(config.init_std)
        self.rules = rules
        self.weight = weight(rngs, shape, "embed -> classes", rules, init)
        self.bias = weight(rngs, (classes,), "classes", rules, constant(0.0))

    def __call__(self, features_BD: jax.Array) -> jax.Array:
        out = self.rules.spec("batch classes")
        logits_BC = einsum("bd,dc->bc", features_BD, self.weight.get_value(), out)
        return logits_BC + broadcast_to_rank(gathered(self.bias, self.rules), 2)


def heads_weights(config: ModelConfig) -> list[Weight]:
    """The weights of `Heads`."""
    D = config.embed_dim
    return [
        weight
        for _, classes in config.tasks
        for weight in (Weight((D, classes), "embed -> classes"), Weight((classes,), "classes"))
    ]
