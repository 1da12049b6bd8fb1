"""A traced function as a list of equations: what depends on what, and parts of it.

This is all that is known here of JAX's intermediate form; `parallel.split` cuts layers with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core

from parallel.contract import axes_of

Atom = Any  # a variable or a literal of a jaxpr
Variable = Any

# What a compiler fuses into whatever reads it.
FORMS = ("broadcast_in_dim", "convert_element_type", "name", "reshape", "squeeze", "transpose")
ELEMENTWISE = (
    *("add", "add_any", "div", "mul", "neg", "sub", "square", "integer_pow", "max", "min"),
    *("exp", "log", "logistic", "tanh", "rsqrt", "sqrt", "erf", "select_n", "gt", "lt", "ge", "le"),
)


class Equations:
    """The equations of a function, with jitted and rematerialised ones in their place.

    Args:
      function: of `args`; it may close over arrays.
      args: flat, arrays or shapes with shardings.

    Attributes:
      consts: the arrays that it closes over.
      constants, inputs, results: their variables, those of `args`, and what it gives.
    """

    def __init__(self, function: Callable[..., Sequence[jax.Array]], args: Sequence[Any]) -> None:
        closed = jax.make_jaxpr(function)(*args)
        jaxpr, self.consts = closed.jaxpr, list(closed.consts)
        self.constants: list[Variable] = list(jaxpr.constvars)
        self.inputs: list[Variable] = list(jaxpr.invars)
        self._list, self.results = _inlined(jaxpr, self.consts, self.constants)
        self._of = {v: eqn for eqn in self._list for v in eqn.outvars}
        self._order = {v: place for place, eqn in enumerate(self._list) for v in eqn.outvars}

    def levels(self, known: dict[Variable, int]) -> dict[Variable, int]:
        """For each variable the highest level of all that it depends on."""
        level = dict(known)
        for eqn in self._list:
            at = max((level[v] for v in variables(eqn.invars)), default=0)
            level.update(dict.fromkeys(eqn.outvars, at))
        return level

    def needed(
        self, targets: Iterable[Atom], given: Callable[[Variable], bool]
    ) -> tuple[list[Any], list[Variable]]:
        """The equations that compute targets from what is given, and what they take of it."""
        taken, found, todo = dict[Variable, None](), set[int](), list(variables(targets))
        while todo:
            v = todo.pop()
            if given(v):
                taken[v] = None
            elif id(self._of[v]) not in found:
                found.add(id(self._of[v]))
                todo += variables(self._of[v].invars)
        return [eqn for eqn in self._list if id(eqn) in found], list(taken)

    def is_form(self, v: Variable, level: dict[Variable, int]) -> bool:
        """Whether v is another form of operands that, of its level, are no larger together."""
        eqn = self._of.get(v)
        if eqn is None or not (eqn.primitive.name in FORMS or _stays(eqn)):
            return False
        operands = [u for u in variables(eqn.invars) if level[u] == level[v]]
        return sum(map(_bytes, operands)) <= _bytes(v)

    def fewer(self, found: Iterable[Variable], given: Callable[[Variable], bool]) -> list[Variable]:
        """Without those that the others and what is given make, element by element."""
        left = dict.fromkeys(found)

        def made(v: Variable) -> bool:
            if given(v) or v in left:
                return True
            eqn = self._of.get(v)
            if eqn is None or not (eqn.primitive.name in (*FORMS, *ELEMENTWISE) or _stays(eqn)):
                return False
            return all(map(made, variables(eqn.invars)))

        for v in sorted(left, key=lambda v: self._order.get(v, -1), reverse=True):
            del left[v]
            if not made(v):
                left[v] = None
        return sorted(left, key=lambda v: self._order.get(v, -1))

    def part(self, inputs: Sequence[Variable], outputs: Sequence[Atom]) -> Part:
        """The function of lists that computes outputs from inputs."""
        eqns, _ = self.needed(outputs, set(inputs).__contains__)
        return Part(list(inputs), list(outputs), eqns)


class Part:
    """Some equations as a function of lists."""

    def __init__(self, inputs: list[Variable], outputs: list[Atom], eqns: list[Any]) -> None:
        names = core.DebugInfo("part", "layer", ("",) * len(inputs), ("",) * len(outputs))
        self.eqns = eqns
        self._closed = core.ClosedJaxpr(core.Jaxpr((), inputs, outputs, eqns, debug_info=names), ())

    def __call__(self, inputs: Sequence[jax.Array]) -> list[jax.Array]:
        values: list[jax.Array] = core.jaxpr_as_fun(self._closed)(*inputs)
        return values


def variables(atoms: Iterable[Atom]) -> Iterator[Variable]:
    """Without literals."""
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
