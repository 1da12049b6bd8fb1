"""A layer's computation, traced once and cut into forward, input gradient and weight gradient.

A pipeline runs the three in different ticks, in branches of one loop: what one leaves for another
travels through buffers, so what that is must be known. `jax.vjp` of a layer is traced to a list of
equations, each of which has a level, that of what it depends on:

| level | depends on | where it is computed |
| --- | --- | --- |
| 0 | the micro-batch's own arrays: masks, rotations, keys | in each action, before its loop over layers |
| 1 | the weights, the layer's number: gathered weights, dropout masks | in each action that reads it |
| 2 | the input x | forward; what the backward pass reads of it is `kept` |
| 3 | the cotangent dy | input gradient; what the weight gradient reads of it is `pending` |

Under a rematerialisation policy the equations that compute again are there as the policy wrote
them, and read only what it saves. Where W is an action of its own, `weight_grad` repeats nothing of
`input_grad`: that is the split of Zero Bubble Pipeline Parallelism (Qi et al. 2024,
https://arxiv.org/abs/2401.10241).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core

from parallel.contract import axes_of

Arrays = Sequence[jax.Array]
Atom = Any  # a variable or a literal of a jaxpr
MICROBATCH, WEIGHTS, INPUT, COTANGENT = range(4)

# What a compiler fuses into whatever reads it: of what they give, the operands are kept where they
# are no larger, or are kept anyway.
FORMS = ("broadcast_in_dim", "convert_element_type", "name", "reshape", "squeeze", "transpose")
ELEMENTWISE = (
    *("add", "add_any", "div", "mul", "neg", "sub", "square", "integer_pow", "max", "min"),
    *("exp", "log", "logistic", "tanh", "rsqrt", "sqrt", "erf", "select_n", "gt", "lt", "ge", "le"),
)


class Split:
    """The parts of a function (weights, others, x, number, index) -> y like x.

    Args:
      function: to cut; may close over arrays, which count as the micro-batch's.
      weights: lists its arrays that are differentiated.
      others: those that are not.
      x: its input, or a shape with sharding.

    `number` and `index` are int32 scalars: of the layer, and of the micro-batch.

    Attributes:
      kept: shapes with shardings of what `forward` leaves for the gradients.
      pending: of what `input_grad` leaves for `weight_grad`.
    """

    def __init__(
        self,
        function: Callable[..., jax.Array],
        weights: Arrays,
        others: Arrays,
        x: Any,
    ) -> None:
        def both(
            weights: Arrays, others: Arrays, number: Any, index: Any, x: Any, dy: Any
        ) -> tuple[Any, ...]:
            y, back = jax.vjp(lambda w, x: function(w, others, x, number, index), list(weights), x)
            return y, *back(dy)

        zero = jax.ShapeDtypeStruct((), "int32")
        closed = jax.make_jaxpr(both)(list(weights), list(others), zero, zero, x, x)
        jaxpr, self._consts = closed.jaxpr, list(closed.consts)
        names = list(jaxpr.constvars)
        eqns, results = _inlined(jaxpr, self._consts, names)
        inputs = list(jaxpr.invars)
        count = len(weights) + len(others)
        arrays, (number, index, x_in, dy) = inputs[:count], inputs[count:]
        level = dict.fromkeys([*names, index], MICROBATCH)
        level |= dict.fromkeys([*arrays, number], WEIGHTS)
        level |= {x_in: INPUT, dy: COTANGENT}
        equation = {}
        for eqn in eqns:
            at = max((level[v] for v in _variables(eqn.invars)), default=MICROBATCH)
            level |= dict.fromkeys(eqn.outvars, at)
            equation |= dict.fromkeys(eqn.outvars, eqn)
        y, *d_weights, dx = results

        def needed(targets: Iterable[Atom], given: Callable[[Any], bool]) -> tuple[list, list]:
            """The equations that compute targets from what is given, and what they take of it."""
            taken, found, todo = dict[Any, None](), set[int](), list(_variables(targets))
            while todo:
                v = todo.pop()
                if given(v):
                    taken[v] = None
                elif id(equation[v]) not in found:
                    found.add(id(equation[v]))
                    todo += _variables(equation[v].invars)
            return [eqn for eqn in eqns if id(eqn) in found], list(taken)

        roots = {*names, index, number, *arrays}

        def outer(v: Any) -> bool:  # what every part is given
            return v in roots or level[v] == MICROBATCH

        def is_read(v: Any, at: int) -> bool:
            """Whether gradients take v as it is, and not the operands that it is a form of."""
            eqn = equation.get(v)
            if level[v] != at or eqn is None:
                return level[v] == at
            operands = [u for u in _variables(eqn.invars) if level[u] == at]
            form = eqn.primitive.name in FORMS or _stays(eqn)
            return not form or sum(map(_bytes, operands)) > _bytes(v)

        order = {v: place for place, eqn in enumerate(eqns) for v in eqn.outvars}

        def fewer(found: list[Any], given: Iterable[Any] = ()) -> list[Any]:
            """Without those that the others and what is given make, element by element."""
            left, given = dict.fromkeys(found), set(given)

            def made(v: Any) -> bool:
                if level[v] < INPUT or v in given or v in left:
                    return True
                fused = v in equation and (
                    equation[v].primitive.name in (*FORMS, *ELEMENTWISE) or _stays(equation[v])
                )
                return fused and all(map(made, _variables(equation[v].invars)))

            for v in sorted(found, key=lambda v: order.get(v, -1), reverse=True):
                del left[v]
                if not made(v):
                    left[v] = None
            return [v for v in found if v in left]

        first, _ = needed([y], lambda v: v is x_in or outer(v))
        forward = {v for eqn in first for v in eqn.outvars} | {x_in}
        _, found = needed(
            [dx, *d_weights],
            lambda v: outer(v) or v is dy or (v in forward and is_read(v, INPUT)),
        )
        kept = fewer([v for v in found if level[v] == INPUT])

        def has_kept(v: Any) -> bool:
            return outer(v) or v is dy or v in kept

        second, _ = needed([dx], has_kept)
        made_by_it = {v for eqn in second for v in eqn.outvars if level[v] == COTANGENT} | {dy}
        _, found = needed(
            d_weights,
            lambda v: outer(v) or v in kept or (v in made_by_it and is_read(v, COTANGENT)),
        )
        pending = fewer([v for v in found if level[v] == COTANGENT], kept)
        self.kept, self.pending = [_shape(v) for v in kept], [_shape(v) for v in pending]

        def has_pending(v: Any) -> bool:
            return outer(v) or v in kept or v in pending

        third, _ = needed(d_weights, has_pending)

        # Level 0, computed once in an action; what is used of it differs, XLA drops the rest.
        parts = (first, *(needed(t, has_kept)[0] for t in ([dx], d_weights)), third)
        reads_of = [v for eqns in parts for eqn in eqns for v in _variables(eqn.invars)]
        reads_of += _variables([y, dx, *d_weights])
        shared = [v for v in dict.fromkeys(reads_of) if v not in roots and level[v] == MICROBATCH]
        self._shared = _Part([*names, index], shared, needed(shared, lambda v: v in roots)[0])

        given = [*names, index, *shared, *arrays, number]

        def part(inputs: list[Any], outputs: list[Atom]) -> _Part:
            known = {*given, *inputs}
            return _Part(given + inputs, outputs, needed(outputs, known.__contains__)[0])

        self._forward = part([x_in], [y, *kept])
        self._backward = part([*kept, dy], [dx, *d_weights])
        self._input_grad = part([*kept, dy], [dx, *pending])
        self._weight_grad = part([*kept, *pending], d_weights)

    def at(self, index: jax.Array) -> list[jax.Array]:
        """What all layers share of a micro-batch: the first argument of the parts."""
        known = [*self._consts, index]
        return known + self._shared(known)

    def forward(
        self, shared: Arrays, weights: Arrays, number: jax.Array, x: jax.Array
    ) -> tuple[jax.Array, list[jax.Array]]:
        """(y, what is kept); `weights` are both lists, one after the other."""
        y, *kept = self._forward([*shared, *weights, number, x])
        return y, kept

    def backward(
        self, shared: Arrays, weights: Arrays, number: jax.Array, kept: Arrays, dy: jax.Array
    ) -> tuple[jax.Array, list[jax.Array]]:
        """(dx, gradients of the weights), from what `forward` kept."""
        dx, *gradients = self._backward([*shared, *weights, number, *kept, dy])
        return dx, gradients

    def input_grad(
        self, shared: Arrays, weights: Arrays, number: jax.Array, kept: Arrays, dy: jax.Array
    ) -> tuple[jax.Array, list[jax.Array]]:
        """(dx, what is pending)."""
        dx, *pending = self._input_grad([*shared, *weights, number, *kept, dy])
        return dx, pending

    def weight_grad(
        self, shared: Arrays, weights: Arrays, number: jax.Array, kept: Arrays, pending: Arrays
    ) -> list[jax.Array]:
        """The gradients of the weights."""
        return self._weight_grad([*shared, *weights, number, *kept, *pending])


class _Part:
    """Some equations as a function of lists."""

    def __init__(self, inputs: list[Any], outputs: list[Atom], eqns: list[Any]) -> None:
        names = core.DebugInfo("Split", "layer", (None,) * len(inputs), ("",) * len(outputs))
        self.jaxpr = core.ClosedJaxpr(core.Jaxpr((), inputs, outputs, eqns, debug_info=names), ())

    def __call__(self, inputs: Arrays) -> list[jax.Array]:
        values: list[jax.Array] = core.jaxpr_as_fun(self.jaxpr)(*inputs)
        return values


def _inlined(jaxpr: Any, consts: list[Any], names: list[Any]) -> tuple[list[Any], list[Atom]]:
    """Equations and results, with those of jitted and rematerialised functions in their place.

    Constants of inner functions are added to `consts`, their variables to `names`.
    """
    out: list[Any] = []

    def visit(eqns: Iterable[Any], renamed: dict[Any, Atom], stack: Any) -> None:
        def outer(atom: Atom) -> Atom:
            return atom if isinstance(atom, core.Literal) else renamed.get(atom, atom)

        for eqn in eqns:
            # The names of the functions that it is in, for whoever reads the compiled program.
            name = (
                eqn.source_info.name_stack if stack is None else stack + eqn.source_info.name_stack
            )
            inner = eqn.params.get("jaxpr") if eqn.primitive.name in ("jit", "remat2") else None
            if inner is None:
                fresh = {v: core.Var(v.aval) for v in eqn.outvars} if stack is not None else {}
                renamed |= fresh
                out.append(
                    eqn.replace(
                        invars=[outer(v) for v in eqn.invars],
                        outvars=[fresh.get(v, v) for v in eqn.outvars],
                        source_info=eqn.source_info.replace(name_stack=name),
                    )
                )
                continue
            body = getattr(inner, "jaxpr", inner)
            added = {v: core.Var(v.aval) for v in body.constvars}
            names.extend(added.values())
            consts.extend(getattr(inner, "consts", ()))
            scope: dict[Any, Atom] = dict(added)
            scope.update(zip(body.invars, map(outer, eqn.invars), strict=True))
            visit(body.eqns, scope, name)
            results = [v if isinstance(v, core.Literal) else scope[v] for v in body.outvars]
            renamed.update(zip(eqn.outvars, results, strict=True))

    top: dict[Any, Atom] = {}
    visit(jaxpr.eqns, top, None)
    return out, [v if isinstance(v, core.Literal) else top.get(v, v) for v in jaxpr.outvars]


def _variables(atoms: Iterable[Atom]) -> Iterator[Any]:
    return (a for a in atoms if not isinstance(a, core.Literal))


def _stays(eqn: Any) -> bool:
    """Whether it moves an array to where it is already."""
    (v, *_), (out, *_) = eqn.invars, eqn.outvars
    return eqn.primitive.name == "reshard" and v.aval.sharding.spec == out.aval.sharding.spec


def _bytes(v: Any) -> int:
    """On one device."""
    sharding = v.aval.sharding
    parts = math.prod(sharding.mesh.shape[axis] for axis in axes_of(sharding.spec))
    return v.aval.size * v.aval.dtype.itemsize // parts


def _shape(v: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, sharding=v.aval.sharding)
