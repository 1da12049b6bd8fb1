"""The forms that a weight may have at rest, by the names that configs and command lines give them.

int8  int4:128  int3:64  nf4:64  fp8     codes and scales; the number is of rows in a group
int8+int8  fp8+fp8                       the same, and inputs are codes, too, where they meet
2:4                                      two of every four rows
rank:64                                  two factors
none                                     the array itself
int8@0,11 int4:128                       by layer: those that are named, then the others
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from parallel.by_layer import ByLayer
from parallel.codes import Code
from parallel.low_rank import LowRank, factor_shapes, largest_rank, low_rank_axes
from parallel.quantised import quantised, quantised_axes
from parallel.rules import STACKS, Rules
from parallel.stored import Matrix
from parallel.two_of_four import two_of_four, two_of_four_axes

KNOWN = "int8, int4:128, int3:128, int2:64, nf4:64, fp8, 2:4, rank:64 or none"
_NUMBERS = {"int2": 2, "int3": 3, "int4": 4, "int8": 8}


@dataclass(frozen=True)
class Form:
    """One form; of `none` there is no node.

    Attributes:
      code: of numbers, or None.
      kind: "codes", "2:4", "rank" or "none".
      rank: of two factors.
      inputs: "" or the form in which inputs are multiplied.
      static: their scale is the same for all tokens.
    """

    kind: str
    code: Code | None = None
    rank: int = 0
    inputs: str = ""
    static: bool = False

    def check(self, matrix: Matrix, name: str) -> None:
        """Refuses a weight that cannot have this form.

        Raises:
          ValueError: saying which would do.
        """
        rows, columns = matrix.rows, matrix.columns
        if self.code is not None:
            group, unit = self.code.group, self.code.per_unit
            if group and rows % group:
                right = [g for g in (256, 128, 64, 32, 16, 8) if rows % g == 0 and g % unit == 0]
                raise ValueError(
                    f"{name}: a group of {group} does not divide its {rows} rows; choose "
                    f"{' or '.join(map(str, right)) or 'int8'}"
                )
            if rows % unit or (group and group % unit):
                raise ValueError(
                    f"{name}: {unit} codes of {self.code.bits} bits share bytes, which its {rows} "
                    f"rows or groups of {group} do not divide by; choose int8"
                )
        if self.inputs and matrix.several:
            raise ValueError(
                f"{name}: inputs in codes ({written(self)}) are not for weights of experts; choose "
                f"{written(replace(self, inputs='', static=False))}"
            )
        if self.kind == "2:4" and rows % 8:
            raise ValueError(
                f"{name}: 2:4 packs eight rows together, its {rows} do not divide by that"
            )
        if self.kind == "rank":
            if matrix.several:
                raise ValueError(f"{name}: rank:{self.rank} is not for weights of experts")
            most = largest_rank(matrix)
            if not 1 <= self.rank <= most:
                raise ValueError(
                    f"{name}: rank:{self.rank} saves nothing of {rows} x {columns}; two factors "
                    f"are smaller up to rank:{most}"
                )

    def store(self, matrix: Matrix, w: jax.Array, dtype: Any = "float32") -> Any:
        """The node of undivided matrices [..., lead, K, M], rounded to nearest or cut off.

        Two factors are those of the largest singular values.
        """
        if self.code is not None:
            limit = jnp.ones((*w.shape[:-2], 1), jnp.float32) if self.static else None
            return quantised(self.code, matrix, w, inputs=self.inputs, limit=limit)
        if self.kind == "2:4":
            return two_of_four(matrix, w, dtype)
        if self.kind == "rank":
            u, s, v = jnp.linalg.svd(w, full_matrices=False)
            root = jnp.sqrt(s[..., : self.rank])
            return self.factors(
                matrix,
                u[..., : self.rank] * root[..., None, :],
                root[..., None] * v[..., : self.rank, :],
            )
        return matrix.unflat(w).astype(dtype)

    def factors(self, matrix: Matrix, into: jax.Array, out_of: jax.Array) -> LowRank:
        """The node of factors [..., K, r] and [..., r, M]."""
        stacked = into.shape[:-2]
        a, b = factor_shapes(matrix, self.rank)
        return LowRank(into.reshape(*stacked, *a), out_of.reshape(*stacked, *b), matrix)

    def axes(self, matrix: Matrix, stack: str, rules: Rules) -> Any:
        """The same node, of logical axes; `stack` is "layers " or nothing."""
        if self.code is not None:
            return quantised_axes(self.code, matrix, stack, rules, self.inputs, static=self.static)
        if self.kind == "2:4":
            return two_of_four_axes(matrix, stack, rules)
        if self.kind == "rank":
            return low_rank_axes(matrix, stack, rules)
        return stack + matrix.names


@dataclass(frozen=True)
class Forms:
    """The form of each layer of a weight, or of all.

    Attributes:
      rest: of the layers that are not named.
      layers: (form, layers) of those that are.
    """

    rest: Form
    layers: tuple[tuple[Form, tuple[int, ...]], ...] = ()

    @property
    def all(self) -> list[Form]:
        """Every form that a layer may have."""
        return [self.rest, *[form for form, _ in self.layers]]

    def of_layers(self, number: int) -> list[Form]:
        """The form of each of so many layers."""
        forms = [self.rest] * number
        for form, layers in self.layers:
            for layer in layers:
                forms[layer] = form
        return forms

    def parts(self, number: int) -> tuple[list[Form], tuple[int, ...]]:
        """The forms that there are, and which each layer has."""
        of_layers = self.of_layers(number)
        distinct = list(dict.fromkeys(of_layers))
        return distinct, tuple(distinct.index(form) for form in of_layers)

    def axes(self, shape: tuple[int, ...], names: str, rules: Rules) -> Any:
        """The node of logical axes of a weight whose array is of this shape."""
        matrix = Matrix.of(shape, names)
        first = names.split()[0]
        if first not in STACKS:
            return self.rest.axes(matrix, "", rules)
        distinct, which = self.parts(shape[0])
        if len(distinct) == 1:
            return distinct[0].axes(matrix, f"{first} ", rules)
        parts = [form.axes(matrix, f"{first} ", rules) for form in distinct]
        return ByLayer(tuple(parts), matrix, which)

    def joined(
        self, layers: list[Any], matrix: Matrix, stacked: Callable[[list[Any]], Any] = jnp.stack
    ) -> Any:
        """A stacked node of each layer's own; `stacked` is that of arrays."""
        distinct, which = self.parts(len(layers))
        stack = lambda nodes: jax.tree.map(lambda *arrays: stacked(list(arrays)), *nodes)
        parts = [
            stack([node for node, own in zip(layers, which, strict=True) if own == i])
            for i in range(len(distinct))
        ]
        return parts[0] if len(parts) == 1 else ByLayer(tuple(parts), matrix, which)


def read_forms(text: str, key: str) -> Forms:
    """`int4:128`, or by layer `int8@0,3-5 int4:128`.

    Raises:
      ValueError: naming the key.
    """
    rest, named = None, []
    for word in text.split():
        name, at, layers = word.partition("@")
        form = read_form(name, key, text)
        if at:
            named.append((form, _layers(layers, key, text)))
        elif rest is not None:
            raise ValueError(f"{key} = {text!r}: two forms of all layers; name those of one by @")
        else:
            rest = form
    if rest is None:
        raise ValueError(
            f"{key} = {text!r}: no form of the layers that are not named; end with one, or 'none'"
        )
    return Forms(rest, tuple(named))


def read_form(name: str, key: str, shown: str = "") -> Form:
    """One form by its name.

    Raises:
      ValueError: naming the key.
    """
    wrong = ValueError(f"{key} = {shown or name!r}: choose {KNOWN}")
    kind, _, number = name.partition(":")
    kind, plus, inputs = kind.partition("+")
    static, inputs = inputs.endswith("="), inputs.removesuffix("=")
    if plus and (inputs, kind, number) not in (("int8", "int8", ""), ("fp8", "fp8", "")):
        raise wrong
    if number and not number.isdecimal():
        raise wrong
    if name == "none":
        return Form("none")
    if name == "2:4":
        return Form("2:4")
    if kind == "rank" and number:
        return Form("rank", rank=int(number))
    group = int(number or 0)
    if kind in _NUMBERS:
        return Form("codes", Code("int", _NUMBERS[kind], group), inputs=inputs, static=static)
    if kind == "nf4":
        return Form("codes", Code("nf4", 4, group or 64))
    if kind == "fp8":
        return Form("codes", Code("fp8", 8, group), inputs=inputs, static=static)
    raise wrong


def written(form: Form) -> str:
    """The name of a form, as `read_form` reads it."""
    if form.code is not None:
        code = form.code
        name = f"int{code.bits}" if code.kind == "int" else code.kind
        static = "=" * form.static
        tail = f"+{form.inputs}{static}" if form.inputs else f":{code.group}" if code.group else ""
        return name + tail
    return f"rank:{form.rank}" if form.kind == "rank" else form.kind


def _layers(text: str, key: str, shown: str) -> tuple[int, ...]:
    """`0,3-5` as (0, 3, 4, 5)."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise ValueError(f"{key} = {shown!r}: layers are such as @0,3-5, not @{text}")
        found.extend(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(found)
