"""Residual streams after single layers, kept on the way through a stack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.stack import Stack


class _Kept(NamedTuple):
    """What goes from layer to layer.

    Attributes:
      carry: the stack's own.
      done: int32, layers so far.
      states: streams, each the last one until its layer is done.
    """

    carry: Any
    done: jax.Array
    states: tuple[jax.Array, ...]


def run_and_keep(
    stack: Stack,
    apply: Callable[[Any, Any, jax.Array | None, Any], Any],
    carry: Any,
    key: jax.Array | None,
    first: int | jax.Array | None,
    after: tuple[int, ...],
    stream: Callable[[Any], jax.Array],
) -> tuple[Any, tuple[jax.Array, ...]]:
    """`stack.run`, and the residual stream after some layers of it.

    A state costs a buffer of one stream, and a select a layer; the backward pass keeps none of it.

    Args:
      after: numbers of layers done, 0 for what goes into the first; () adds nothing to the program.
      stream: carry -> x_BTD.
    """
    if not after:
        return stack.run(apply, carry, key, first), ()

    def apply_and_keep(block: Any, kept: _Kept, key: jax.Array | None, kind: Any) -> _Kept:
        carry, done = apply(block, kept.carry, key, kind), kept.done + 1
        states = tuple(
            jnp.where(done == number, stream(carry), state)
            for number, state in zip(after, kept.states, strict=True)
        )
        return _Kept(carry, done, states)

    start = _Kept(carry, jnp.int32(0), tuple(stream(carry) for _ in after))
    end: _Kept = stack.run(apply_and_keep, start, key, first)
    return end.carry, end.states
