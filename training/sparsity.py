"""Pruning while a model is trained: weights become zero by a schedule, and zeros stay.

The share of zeros rises as Zhu and Gupta 2017 have it (https://arxiv.org/abs/1710.01878):
s(t) = target (1 - (1 - (t - begin) / (end - begin))^3), quickly at first, and slowly when each
weight counts more. At a step of the schedule the smallest magnitudes become zero before the
gradient is taken; after the last one the model is trained on with its zeros.

Zeros in an array save neither memory nor time: a 2:4 model may be packed afterwards, and whole
heads and channels removed (`compress.shrink`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from parallel.rules import is_stacked
from parallel.when import when
from training.idle_keys import idle_keys
from training.magnitude import PATTERNS, SCOPES, check_fours, numbers, with_zeros
from training.naming import named
from training.state import Model, drawn_shapes
from training.stored import is_matrix

Tree = Any


@dataclass(frozen=True)
class SparsityConfig:
    """Which weights become zero while a model is trained (`config.sparsity`).

    Attributes:
      target: the share of zeros in the end, in (0, 1); 0: none are made.
      hold: zeros of the start stay, of a pruned checkpoint that is trained further; with a target
        they always do.
      names: patterns of canonical names; (): all matrices of the layers.
      begin: the step before which the first weights become zero.
      end: that of the last ones; with end = begin all at once.
      every: steps between two changes.
      scope: layer (the same share of every matrix of a layer) or global (of all of them together).
      pattern: unstructured, or 2:4: two of every four rows, and a target of 0.5.
    """

    target: float = 0.0
    hold: bool = False
    names: tuple[str, ...] = ()
    begin: int = 0
    end: int = 0
    every: int = 100
    scope: str = "layer"
    pattern: str = "unstructured"

    def __post_init__(self) -> None:
        def check(key: str, right: bool, hint: str) -> None:
            if not right:
                raise ValueError(f"config.sparsity.{key} = {getattr(self, key)!r}: {hint}")

        check("target", 0 <= self.target < 1, "a share in (0, 1), or 0: nothing is pruned")
        check("begin", self.begin >= 0, "a step, 0 or more")
        check("end", self.end >= self.begin, f"not before config.sparsity.begin = {self.begin}")
        check("every", self.every >= 1, "at least 1 step")
        check("scope", self.scope in SCOPES, f"choose one of {', '.join(SCOPES)}")
        check("pattern", self.pattern in PATTERNS, f"choose one of {', '.join(PATTERNS)}")
        fixed = self.pattern == "2:4" and self.target not in (0, 0.5)
        check("target", not fixed, "config.sparsity.pattern = '2:4' leaves half; set it to 0.5")

    def without_effect(self) -> list[str]:
        """Keys that were set and are not read, a sentence each."""
        if self.target:
            return []
        keys = ["begin", "end", "every", "scope", "pattern"] + ["names"] * (not self.hold)
        return idle_keys(self, "sparsity", keys, "config.sparsity.target is 0")

    @property
    def on(self) -> bool:
        """Whether a step has anything to do."""
        return self.target > 0 or self.hold

    def steps(self) -> list[int]:
        """The steps before which weights become zero."""
        return [*range(self.begin, self.end, self.every), self.end] if self.target else []

    def share(self, step: int) -> float:
        """The share of zeros from one of those steps on."""
        if step >= self.end:
            return self.target
        return self.target * (1 - (1 - (step - self.begin) / (self.end - self.begin)) ** 3)

    def check_run(self, steps: int) -> None:
        """Refuses a schedule that a run of so many steps does not come to the end of.

        Raises:
          ValueError: naming the key.
        """
        if self.target and self.end >= steps:
            raise ValueError(
                f"config.sparsity.end = {self.end}: the run has config.train.steps = {steps}; "
                f"choose an end before {steps}, with steps left to recover in"
            )


@dataclass(frozen=True)
class Sparsity:
    """What a step does of `config.sparsity`.

    Attributes:
      config: the section.
      axes: canonical name -> logical axes of every matrix that it is about; none if nothing is
        pruned or held.
    """

    config: SparsityConfig
    axes: Mapping[str, str]

    @property
    def names(self) -> frozenset[str]:
        """The canonical names of those matrices."""
        return frozenset(self.axes)

    def pruned(self, params: Tree, step: Array) -> Tree:
        """The parameters that a step starts with, in place."""
        config = self.config
        if not config.target:
            return params
        weights = {name: array for name, array in named(params).items() if name in self.axes}
        due = (step >= config.begin) & (step <= config.end)
        due &= ((step - config.begin) % config.every == 0) | (step == config.end)
        event = (step - config.begin + config.every - 1) // config.every
        shares = [config.share(at) for at in config.steps()]

        def prune(weights: dict[str, Array]) -> dict[str, Array]:
            if len(shares) == 1 and config.pattern == "2:4":
                return with_zeros(weights, self.axes, None, pattern="2:4")
            tables = [numbers(weights, self.axes, share, config.scope) for share in shares]
            at = jnp.clip(event, 0, len(shares) - 1)

            def now(name: str, half: int) -> Array:
                return jnp.asarray([table[name][half] for table in tables], jnp.int32)[at]

            number = {name: (now(name, 0), now(name, 1)) for name in tables[0]}
            return with_zeros(
                weights, self.axes, number, scope=config.scope, pattern=config.pattern
            )

        weights = when(due, prune, weights)
        leaves = [weights.get(name, array) for name, array in named(params).items()]
        return jax.tree.unflatten(jax.tree.structure(params), leaves)

    def zeros(self, params: Tree) -> Array:
        """The share of zeros that there is, float32."""
        weights = {name: array for name, array in named(params).items() if name in self.axes}
        counts = [jnp.sum(a == 0, dtype=jnp.int32).astype(jnp.float32) for a in weights.values()]
        return sum(counts, jnp.float32(0)) / sum(a.size for a in weights.values())


NO_SPARSITY = Sparsity(SparsityConfig(), {})


def make_sparsity(config: SparsityConfig, model: Model) -> Sparsity:
    """What the steps of a model do of the section.

    Raises:
      ValueError: a pattern that names no matrix that is trained, or rows that are no fours.
    """
    if not config.on:
        return NO_SPARSITY
    axes = {n: a for n, a in named(model.trained(model.axes)).items() if is_matrix(n, a)}
    if config.names:
        for pattern in config.names:
            if not any(fnmatchcase(name, pattern) for name in axes):
                raise ValueError(
                    f"config.sparsity.names = {list(config.names)}: {pattern!r} names no matrix "
                    f"that is trained and is an array; a pattern is such as 'stack/*/mlp/*'"
                )
        chosen = {n: a for n, a in axes.items() if any(fnmatchcase(n, p) for p in config.names)}
    else:
        chosen = {name: names for name, names in axes.items() if is_stacked(names)}
    if not chosen:
        raise ValueError(
            "config.sparsity: no matrix of the layers is trained and is an array (config.weights, "
            "config.optimizer.frozen); choose others by config.sparsity.names, or set target to 0"
        )
    if config.pattern == "2:4":
        shapes = named(drawn_shapes(model))
        for name, names in chosen.items():
            check_fours(name, shapes[name].shape, names, "config.sparsity.pattern")
    return Sparsity(config, chosen)
