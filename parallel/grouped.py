"""Products of rows with the weights of their experts, where rows are sorted by expert.

The door of `parallel/einsum.py` for a ragged dim, with the same promises: weights divided over fsdp
are gathered where they are used, gradients leave divided as the weights, and partial gradients of
one input are summed before one reduction over `tensor`.

Rows are worked on in blocks, each of one expert (as in MegaBlocks, Gale et al. 2022,
https://arxiv.org/abs/2211.15841), with a mask where the next expert's rows begin: operations and
memory are those of the rows. `jax.lax.ragged_dot` is a product with a copy of the rows for every
expert where XLA has no kernel for it (on CPU: 8 times both for 8 experts).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from parallel.contract import axes_of, by_device, gathered, without
from parallel.gather import gather
from parallel.mesh import PIPE
from parallel.rules import FSDP
from parallel.stored import Packed, computed, differentiable

LARGEST_BLOCK, SMALLEST_BLOCK = 512, 8


class _Static(NamedTuple):
    outs: tuple[P, ...]
    inside: P
    input_gradient: P
    weight_gradients: tuple[P | None, ...]

    def usable(self, weights: list[Any], dtype: Any) -> list[jax.Array]:
        """Those that are packed made dense, divided as what they meet."""

        def dense(w: Any, out: P) -> jax.Array:
            if not isinstance(w, Packed):
                return w
            column = without(out[2], axes_of([self.inside[2]]))
            array = w.dense(dtype)
            expert = jax.typeof(array).sharding.spec[0]
            return jax.reshard(array, P(expert, self.inside[2], column))

        return [dense(w, out) for w, out in zip(weights, self.outs, strict=True)]


def grouped(
    sizes_GE: jax.Array,
    x_GRX: jax.Array,
    weights: Sequence[Any],
    outs: Sequence[P],
    inside: P | None = None,
) -> list[jax.Array]:
    """Several products [G, R, Y] of one input, each row with its expert's matrix.

    Args:
      sizes_GE: int32, rows of each expert that a group's device has.
      x_GRX: rows sorted by expert, G groups of them; those after the last expert's give zero.
      weights: [E, X, Y] each, in the dtype of x or packed (`parallel.stored`), divided over the
        experts of a device's group.
      outs: layout of each result; a contracted dim that is divided is summed over.
      inside: the layout that x is brought to first; its gradient comes back in that of x.
    """
    used = [computed(w) for w in weights]
    differentiated = [differentiable(w) for w in weights]
    own = jax.typeof(x_GRX).sharding.spec
    static = _Static(
        tuple(outs),
        own if inside is None else inside,
        own,
        tuple(None if d is None else jax.typeof(d).sharding.spec for d in differentiated),
    )
    return _products(static, x_GRX, sizes_GE, used, differentiated)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _products(
    static: _Static,
    x: jax.Array,
    sizes: jax.Array,
    weights: list[Any],
    differentiated: list[jax.Array | None],
) -> list[jax.Array]:
    return _forward(static, x, sizes, weights, differentiated)[0]


def _forward(
    static: _Static,
    x: jax.Array,
    sizes: jax.Array,
    weights: list[Any],
    differentiated: list[jax.Array | None],
) -> tuple[list[jax.Array], tuple[jax.Array, jax.Array, list[Any]]]:
    x = gather(x, static.inside)
    products = [
        _rows([x], [w], sizes, out, transposed=False)
        for w, out in zip(static.usable(weights, x.dtype), static.outs, strict=True)
    ]
    return products, (x, sizes, weights)


def _backward(
    static: _Static,
    residuals: tuple[jax.Array, jax.Array, list[Any]],
    cotangents: list[jax.Array],
) -> tuple[jax.Array, None, None, list[jax.Array | None]]:
    x, sizes, weights = residuals
    weights = static.usable(weights, x.dtype)
    columns = [without(jax.typeof(w).sharding.spec[2], (FSDP, PIPE)) for w in weights]
    cotangents = [
        jax.reshard(dy, P(*out[:2], column))
        for dy, out, column in zip(cotangents, static.outs, columns, strict=True)
    ]
    dx = _rows(cotangents, weights, sizes, static.input_gradient, transposed=True)
    gradients = [
        None if spec is None else _weight_gradient(x, dy, sizes, w, spec)
        for dy, w, spec in zip(cotangents, weights, static.weight_gradients, strict=True)
    ]
    return dx, None, None, gradients


_products.defvjp(_forward, _backward)


def _rows(
    inputs: list[jax.Array], weights: list[jax.Array], sizes: jax.Array, out: P, *, transposed: bool
) -> jax.Array:
    """The sum of products of several inputs with a weight each, laid out as `out`."""
    weights = [gathered(w, FSDP, PIPE) for w in weights]
    summed = axes_of([jax.typeof(inputs[0]).sharding.spec[2]])
    scattered = summed & axes_of([out[2]])

    def local(inputs: list[jax.Array], weights: list[jax.Array], sizes: jax.Array) -> jax.Array:
        pairs = zip(inputs, weights, strict=True)
        y = sum(product(x[0], w, sizes[0], transposed=transposed) for x, w in pairs)[None]
        for axis in scattered:
            y = lax.psum_scatter(y, axis, scatter_dimension=2, tiled=True)
        return lax.psum(y, tuple(summed - scattered)) if summed - scattered else y

    specs = [_specs(inputs), _specs(weights), jax.typeof(sizes).sharding.spec]
    return by_device(local, tuple(specs), out, check_vma=False)(inputs, weights, sizes)


def _weight_gradient(
    x: jax.Array, dy: jax.Array, sizes: jax.Array, w: jax.Array, spec: P
) -> jax.Array:
    """The gradient of one weight, summed over the devices that have the same experts."""
    over = axes_of([jax.typeof(x).sharding.spec[0]]) - axes_of(spec[:1])
    scattered = [(axis, dim) for dim, entry in enumerate(spec) for axis in over & axes_of([entry])]

    def local(x: jax.Array, dy: jax.Array, sizes: jax.Array) -> jax.Array:
        dw = outer_product(x[0], dy[0], sizes[0])
        for axis, dim in scattered:
            dw = lax.psum_scatter(dw, axis, scatter_dimension=dim, tiled=True)
        rest = tuple(sorted(over - {axis for axis, _ in scattered}))
        return lax.psum(dw, rest) if rest else dw

    return by_device(local, tuple(_specs([x, dy, sizes])), spec, check_vma=False)(x, dy, sizes)


def _specs(arrays: list[jax.Array]) -> list[P]:
    return [jax.typeof(a).sharding.spec for a in arrays]


# --- On one device ------------------------------------------------------------------------------


def product(x_RX: jax.Array, w_EXY: jax.Array, sizes_E: jax.Array, *, transposed: bool) -> Any:
    """[R, Y], each row of x with its expert's matrix, or with that transposed."""
    dims = (((1,), (1,)), ((), ())) if transposed else (((1,), (0,)), ((), ()))
    Y = w_EXY.shape[1 if transposed else 2]

    def block(begin: jax.Array, expert: jax.Array, mask: jax.Array, y_RY: jax.Array) -> jax.Array:
        b = len(mask)
        w_XY = lax.dynamic_index_in_dim(w_EXY, expert, 0, keepdims=False)
        new = lax.dot_general(lax.dynamic_slice_in_dim(x_RX, begin, b), w_XY, dims)
        old = lax.dynamic_slice_in_dim(y_RY, begin, b)
        return lax.dynamic_update_slice_in_dim(y_RY, jnp.where(mask, new, old), begin, 0)

    # Made when they are wanted: of a program of many layers XLA would make all of theirs at once.
    x_RX, y_RY = lax.optimization_barrier((x_RX, jnp.zeros((len(x_RX), Y), x_RX.dtype)))
    return _over_blocks(len(x_RX), sizes_E, block, y_RY)


def outer_product(x_RX: jax.Array, dy_RY: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """[E, X, Y]: for each expert the product of its rows of x, transposed, with those of dy.

    Summed over blocks in float32.
    """
    E, X, Y = len(sizes_E), x_RX.shape[1], dy_RY.shape[1]
    Carry = tuple[jax.Array, jax.Array, jax.Array]

    def block(begin: jax.Array, expert: jax.Array, mask: jax.Array, carry: Carry) -> Carry:
        dw_EXY, sum_XY, before = carry
        x_bX = jnp.where(mask, lax.dynamic_slice_in_dim(x_RX, begin, len(mask)), 0)
        dy_bY = lax.dynamic_slice_in_dim(dy_RY, begin, len(mask))
        new = lax.dot_general(
            x_bX, dy_bY, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        sum_XY = jnp.where(expert == before, sum_XY, 0.0) + new
        dw_EXY = lax.dynamic_update_index_in_dim(dw_EXY, sum_XY.astype(x_RX.dtype), expert, 0)
        return dw_EXY, sum_XY, expert

    start = jnp.zeros((E, X, Y), x_RX.dtype), jnp.zeros((X, Y), jnp.float32), jnp.int32(0)
    return _over_blocks(len(x_RX), sizes_E, block, start)[0]


def _over_blocks(rows: int, sizes_E: jax.Array, block: Callable[..., Any], carry: Any) -> Any:
    """Runs `block(first row, expert, mask [b, 1] of its rows, carry)` for each block in use.

    The loop has as many turns as there can be blocks, so that whoever counts a compiled program's
    operations knows it; those without rows do nothing.
    """
    E, b = len(sizes_E), block_size(rows, len(sizes_E))
    ends_E, blocks_E = jnp.cumsum(sizes_E), -(-sizes_E // b)
    last_E = jnp.cumsum(blocks_E)

    def one(n: jax.Array, carry: Any) -> Any:
        expert = jnp.searchsorted(last_E, n, side="right").astype(jnp.int32)
        end, first_block = ends_E[expert], last_E[expert] - blocks_E[expert]
        wanted = end - sizes_E[expert] + (n - first_block) * b
        begin = jnp.minimum(wanted, rows - b)  # the last block may begin in the one before it
        row = begin + jnp.arange(b, dtype=jnp.int32)
        mask = (row >= wanted) & (row < end)
        return block(begin, expert, mask[:, None], carry)

    def turn(n: jax.Array, carry: Any) -> Any:
        return lax.cond(n < last_E[-1], lambda: one(n, carry), lambda: carry)

    return lax.fori_loop(0, rows // b + E, turn, carry)


def block_size(rows: int, experts: int) -> int:
    """Rows of a block: a power of two, so that of all blocks about one in eight is not full."""
    size = LARGEST_BLOCK
    while size > SMALLEST_BLOCK and size * experts * 8 > rows:
        size //= 2
    return min(size, rows)
