"""Something that is done or not, on large buffers that stay where they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from parallel.mesh import platform

Carry = TypeVar("Carry")


def when(condition: jax.Array, function: Callable[[Carry], Carry], carry: Carry) -> Carry:
    """`function(carry)` where the condition holds, else `carry` as it is.

    XLA:GPU copies what goes through a conditional, in either branch: for Llama 3 8B in four stages
    that would be all ring buffers, tens of GiB in each tick. A loop of one turn or none copies
    nothing.
    """
    if platform() in ("gpu", "cuda"):
        turns = condition.astype(jnp.int32)
        return lax.fori_loop(0, turns, lambda _, carry: function(carry), carry)
    return lax.cond(condition, function, lambda carry: carry, carry)
