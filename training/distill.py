"""A student learns from a teacher's distributions and hidden states beside the data.

    loss = (1 - weight) nll + weight T^2 KL + hidden_weight * hidden

of every token that counts (`training/distill_loss.py`); hidden is the mean over pairs of layers of
the mean squared difference of residual streams, the student's through one learned projection where
the widths differ (TinyBERT, Jiao et al. 2019, https://arxiv.org/abs/1909.10351).

The teacher's forward pass is outside of what is differentiated and comes before the student's, a
micro-batch at a time: it leaves its features, and the states that are matched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.block import RESIDUAL
from models.layers import normal
from parallel.einsum import einsum
from parallel.footprint import Weight
from parallel.rules import Rules
from parallel.zero import for_model
from training.distill_loss import KINDS, distillation_loss
from training.features import Predictor
from training.idle_keys import idle_keys
from training.losses import LossConfig
from training.micro_batches import Batch, Weights
from training.naming import TRAINING_ONLY
from training.state import Model, Tree

AXES = "embed -> feature"  # of the projection
Pair = tuple[int, int]  # layers done, of the student and of the teacher


@dataclass(frozen=True)
class DistillConfig:
    """Learning from a teacher (`config.distill`).

    Attributes:
      teacher: a run's workdir, or a folder of Hugging Face; empty: off.
      teacher_step: of the run; 0: the newest.
      teacher_compute: float32 or bfloat16, of its parameters and its forward pass; empty: as the
        student's, or float32 where that is float16.
      kind: forward or reverse, see `training/distill_loss.py`.
      temperature: T.
      weight: of the divergence, in [0, 1]; the rest is the cross-entropy's.
      hidden_weight: of matched states; 0: none are.
      layers: pairs "student:teacher" of numbers of layers done, 0 for what goes into the first; ():
        after the last ones.
    """

    teacher: str = ""
    teacher_step: int = 0
    teacher_compute: str = ""
    kind: str = "forward"
    temperature: float = 1.0
    weight: float = 0.5
    hidden_weight: float = 0.0
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        def check(key: str, right: bool, hint: str) -> None:
            if not right:
                raise ValueError(f"config.distill.{key} = {getattr(self, key)!r}: {hint}")

        check("teacher_step", self.teacher_step >= 0, "a step of the run, or 0 for the newest")
        computes = ("", "float32", "bfloat16")
        check("teacher_compute", self.teacher_compute in computes, "float32, bfloat16 or empty")
        check("kind", self.kind in KINDS, f"choose one of {', '.join(KINDS)}")
        check("temperature", self.temperature > 0, "above 0")
        check("weight", 0 <= self.weight <= 1, "0 (cross-entropy alone) to 1 (the teacher alone)")
        check("hidden_weight", self.hidden_weight >= 0, "0 (off) or more")
        hint = "a list of student:teacher, such as 2:4,4:8"
        check("layers", all(_is_pair(pair) for pair in self.layers), hint)

    @property
    def matches(self) -> bool:
        """Whether hidden states are matched."""
        return bool(self.teacher) and self.hidden_weight > 0

    def pairs(self, layers: int, teacher_layers: int) -> tuple[Pair, ...]:
        """The layers that are matched, of models of so many.

        Raises:
          ValueError: a layer that there is not.
        """
        if not self.matches:
            return ()
        found = [tuple(map(int, pair.split(":"))) for pair in self.layers]
        for student, teacher in found:
            if student > layers or teacher > teacher_layers:
                raise ValueError(
                    f"config.distill.layers = {list(self.layers)}: {student}:{teacher} is none of "
                    f"the student's 0 to {layers} and the teacher's 0 to {teacher_layers}"
                )
        return tuple((s, t) for s, t in found) or ((layers, teacher_layers),)

    def without_effect(self) -> list[str]:
        """Keys that were set and are not read, a sentence each."""
        if not self.teacher:
            keys, why = [k for k in vars(self) if k != "teacher"], "config.distill.teacher is empty"
        elif not self.matches:
            keys, why = ["layers"], "config.distill.hidden_weight is 0"
        else:
            return []
        return idle_keys(self, "distill", keys, why)


def _is_pair(text: str) -> bool:
    parts = text.split(":")
    return len(parts) == 2 and all(part.isdecimal() for part in parts)


def projection_weights(config: DistillConfig, width: int, teacher_width: int) -> list[Weight]:
    """The projection of states, if there is one."""
    needed = config.matches and width != teacher_width
    return [Weight((width, teacher_width), AXES)] if needed else []


def with_projection(model: Model, config: DistillConfig, width: int, teacher_width: int) -> Model:
    """The student with what its training alone has: parameter `distill/projection`, if needed.

    Every function of the model reads past it; the loss with a teacher does not.
    """
    if not projection_weights(config, width, teacher_width):
        return model
    shape = width, teacher_width

    def init(key: jax.Array) -> Tree:
        spec = model.rules.at_rest(AXES, shape)
        draw = normal(width**-0.5)  # states are then as large on both sides of it
        weight = draw(jax.random.fold_in(key, 1), shape, jnp.float32, out_sharding=spec)
        return model.init(key) | {TRAINING_ONLY: {"projection": weight}}

    def alone(function: Callable[..., Any] | None) -> Any:
        if function is None:
            return None
        return lambda params, *args: function(_split(params)[0], *args)

    return replace(
        model,
        init=init,
        axes=model.axes | {TRAINING_ONLY: {"projection": AXES}},
        loss=alone(model.loss),
        scores=alone(model.scores),
        features=alone(model.features),
        cut=None,
    )


def _split(params: Tree) -> tuple[Tree, Any]:
    """The model's own parameters, and the projection, or None."""
    own = {name: tree for name, tree in params.items() if name != TRAINING_ONLY}
    return own, params.get(TRAINING_ONLY, {}).get("projection")


class Lesson(NamedTuple):
    """What a teacher says of one micro-batch: arrays, none of them of [tokens, vocabulary]."""

    predictor: Predictor
    states: tuple[jax.Array, ...]


@dataclass(frozen=True)
class Distillation:
    """Teacher and student of one training step.

    Attributes:
      config: `config.distill`.
      student: with its projection.
      teacher: of the same columns of logits.
      compute: dtype of the teacher's forward pass.
      pairs: layers that are matched.
      vocab_size: of both.
      loss: `config.loss`.
    """

    config: DistillConfig
    student: Model
    teacher: Model
    compute: str
    pairs: tuple[Pair, ...]
    vocab_size: int
    loss: LossConfig

    def lessons(self, params: Tree) -> Callable[[Batch], tuple[Batch, Lesson]]:
        """The teacher's forward pass, of its parameters at rest.

        Returns:
          batch -> (the same batch, which now waits for the teacher, the lesson).
        """
        teacher = self.teacher
        assert teacher.features is not None
        forward = teacher.features
        leaves, build = for_model(params, teacher.axes, teacher.rules, self.compute)
        after = tuple(layer for _, layer in self.pairs)

        def teach(batch: Batch) -> tuple[Batch, Lesson]:
            found = forward(build(leaves), batch, None, None, after)
            head = found.predictor
            # The teacher is done before the student begins: its layers need room while nothing of
            # the student's is kept yet.
            batch, x_BTD, states = jax.lax.optimization_barrier((batch, head.x_BTD, found.states))
            lesson = Lesson(replace(head, x_BTD=x_BTD), states)
            return batch, jax.tree.map(jax.lax.stop_gradient, lesson)

        return teach

    def of_student(
        self,
        params: Tree,
        batch: Batch,
        weights: Weights,
        key: jax.Array | None,
        lesson: Lesson,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss, as `Model.loss`: sums have `kl_sum` too, and `hidden_sum` where it matches."""
        assert self.student.features is not None
        after = tuple(layer for layer, _ in self.pairs)
        forward = self.student.features(params, batch, weights, key, after)
        of_tokens = distillation_loss(
            forward.predictor,
            lesson.predictor,
            batch["targets"],
            weights.tokens_BT,
            rules=self.student.rules,
            vocab_size=self.vocab_size,
            kind=self.config.kind,
            temperature=self.config.temperature,
            weight=self.config.weight,
            chunk=self.loss.chunk,
            z_loss=self.loss.z_loss,
        )
        total, sums = forward.completed(*of_tokens)
        if not self.pairs:
            return total, sums
        projection = _split(params)[1]
        apart = [
            _apart(state, taught, projection, weights, self.student.rules)
            for state, taught in zip(forward.states, lesson.states, strict=True)
        ]
        hidden = sum(apart[1:], apart[0]) / len(apart)
        total += self.config.hidden_weight * hidden
        return total, sums | {"hidden_sum": jax.lax.stop_gradient(hidden)}


def _apart(
    state_BTD: jax.Array, taught_BTE: jax.Array, projection: Any, weights: Weights, rules: Rules
) -> jax.Array:
    """The weighted sum over tokens of the mean squared difference of two streams, float32."""
    if projection is not None:
        state_BTD = einsum("btd,de->bte", state_BTD, projection, rules.spec(RESIDUAL))
    apart_BTE = state_BTD.astype(jnp.float32) - taught_BTE.astype(jnp.float32)
    apart_BT = jnp.mean(jnp.square(apart_BTE), axis=-1)
    weights_BT = jax.reshard(weights.tokens_BT, jax.typeof(apart_BT).sharding.spec)
    return jnp.sum(weights_BT * apart_BT)
