"""Adapters on a frozen model, by `config.adapter`: what is trained, and what a checkpoint holds.

The model's own parameters, in whatever form they are stored, are those of another run; they have no
gradient and no optimizer state. Adapters begin by changing nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from parallel.adapted import Adapted, base_name, column_norms
from parallel.by_layer import ByLayer
from parallel.ia3 import Rescaled, rescaled_axes
from parallel.lora import Dora, Lora, dora_axes, factor_axes, lora_axes
from parallel.low_rank import factor_shapes, largest_rank
from parallel.precision import PrecisionConfig
from parallel.rules import STACKS
from parallel.several import side_by_side
from parallel.stored import Composed, Matrix, cast, is_stored
from training.idle_keys import idle_keys
from training.naming import named
from training.state import Model, drawn_params, drawn_shapes
from training.stored import dense_params, is_matrix

Tree = Any
METHODS = ("lora", "dora", "ia3", "prefix")
OF_IA3 = ("key", "value", "down")  # the last one by its input
PREFIX = ("prefix_key", "prefix_value")  # parameters of self-attention, where it has them


@dataclass(frozen=True)
class AdapterConfig:
    """What is trained on a frozen model (`config.adapter`).

    Attributes:
      method: lora, dora, ia3 or prefix; "" is none of them, the model itself.
      base: the workdir of the run whose parameters are frozen.
      rank: r of lora and dora.
      alpha: they add alpha / r times their product.
      names: patterns of canonical names of matrices that are adapted; (): all of the layers, of ia3
        keys, values and the feed-forward's last.
      prefix_length: virtual positions of prefix.
    """

    method: str = ""
    base: str = ""
    rank: int = 8
    alpha: float = 16.0
    names: tuple[str, ...] = ()
    prefix_length: int = 16

    def __post_init__(self) -> None:
        def check(key: str, right: bool, hint: str) -> None:
            if not right:
                raise ValueError(f"config.adapter.{key} = {getattr(self, key)!r}: {hint}")

        if not self.method:
            hint = f"has no effect without config.adapter.method; choose {', '.join(METHODS)}"
            check("base", not self.base, hint)
            return
        check("method", self.method in METHODS, f"choose {', '.join(METHODS)}, or '' for none")
        check("base", bool(self.base), "missing; give the workdir of the run to adapt")
        check("rank", self.rank >= 1, "at least 1")
        check("alpha", self.alpha > 0, "above 0")
        check("prefix_length", self.prefix_length >= 1, "at least 1")
        none = "prefix is of every layer's self-attention; leave it out"
        check("names", not (self.method == "prefix" and self.names), none)

    def without_effect(self) -> list[str]:
        """Keys that were set and are not read, a sentence each."""
        read = {"lora": {"rank", "alpha", "names"}, "ia3": {"names"}, "prefix": {"prefix_length"}}
        read["dora"] = read["lora"]
        idle = sorted({"rank", "alpha", "names", "prefix_length"} - read.get(self.method, set()))
        return idle_keys(self, "adapter", idle, f"config.adapter.method is {self.method!r}")


class Place(NamedTuple):
    """A weight that gets an adapter.

    Attributes:
      matrix: of one layer.
      stack: "layers " or the like, or nothing.
      layers: of the stack; 0 outside of one.
    """

    matrix: Matrix
    stack: str
    layers: int


def adapted(model: Model, config: AdapterConfig) -> Model:
    """The model with adapters, all else frozen.

    `init` draws the base, too, of which it makes what adapters begin from; `begun` is for a base
    that is there.

    Raises:
      ValueError: names that match no matrix, or a matrix that cannot have the adapter.
    """
    if not config.method:
        return model
    if config.method == "prefix":  # the model's own parameters
        frozen = [n for n in named(model.axes) if n.rpartition("/")[2] not in PREFIX]
        assert len(frozen) < len(named(model.axes)), "no layer has a prefix"
        return replace(model, frozen=frozenset(frozen))
    places = chosen_places(config, model)
    scale = config.alpha / config.rank

    def of_axes(name: str, axes: Any) -> Any:
        matrix, stack, _ = places[name]
        if config.method == "ia3":
            return rescaled_axes(axes, matrix, stack, on_input=_by_input(name))
        return (lora_axes if config.method == "lora" else dora_axes)(axes, matrix, stack, scale)

    axes = _each(places, of_axes, model.axes)

    def init(key: jax.Array) -> Tree:
        params = model.init(key)
        begin = lambda name, base: _begin(config, places[name], name, base, key)
        made = _each(places, begin, params)
        rules = model.rules
        return jax.tree.map(lambda a, n: jax.reshard(a, rules.at_rest(n, a.shape)), made, axes)

    own: set[str] = set()
    for name, node in _nodes(axes).items():
        if isinstance(node, Adapted):
            own.update(f"{name}/{field}" for field in node.own)
    frozen_names = frozenset(n for n in named(axes) if n not in own)
    return replace(model, init=init, axes=axes, frozen=frozen_names)


def begun(
    model: Model, base: Tree, config: AdapterConfig, precision: PrecisionConfig, seed: int
) -> Tree:
    """The parameters of an adapted model on a base: its arrays themselves, and new adapters.

    Args:
      model: of `adapted`.
      base: master parameters of the model that is adapted, at rest; call it under the mesh.
      seed: of what is drawn; the same on every mesh.
    """
    if config.method == "prefix":
        chosen = lambda params: {n: a for n, a in named(params).items() if n not in model.frozen}
        return on_base(model, drawn_params(model, precision, seed, chosen), named(base))
    key, rules = jax.random.key(seed), model.rules
    bases, own = _nodes(base), dict[str, Any]()
    for name, axes in _nodes(model.axes).items():
        if not isinstance(axes, Adapted):
            continue
        stack = _stack_of(axes.base)
        place = Place(axes.matrix, stack, _layers(bases[name]) if stack else 0)

        def new(base: Any, name: str = name, place: Place = place, axes: Any = axes) -> Any:
            node = cast(_begin(config, place, name, base, key), precision.params)
            found = {field: getattr(node, field) for field in node.own}
            return {
                f: jax.reshard(a, rules.at_rest(getattr(axes, f), a.shape))
                for f, a in found.items()
            }

        own |= {f"{name}/{field}": a for field, a in jax.jit(new)(bases[name]).items()}
    return on_base(model, own, named(base))


def merged(model: Model, params: Tree, config: AdapterConfig) -> Tree:
    """Every weight as the one array that it and its adapter stand for, in float32; not divided.

    Args:
      model: of `adapted`.
      params: its parameters at rest; call it under the mesh.

    Raises:
      ValueError: a method that no weight stands for.
    """
    if config.method == "prefix":
        raise ValueError(
            "config.adapter.method = 'prefix': positions are part of no weight; use the run as it "
            "is, or lora, dora or ia3"
        )
    return dense_params(params, model.axes)


def on_base(model: Model, own: Mapping[str, Any], base: Mapping[str, Any]) -> Tree:
    """An adapted model's parameters, of adapters and a base by canonical names."""
    leaves = [own[n] if n in own else base[base_name(n)] for n in named(model.axes)]
    return jax.tree.unflatten(jax.tree.structure(model.axes), leaves)


def served(base: Model, params: Tree, adapters: Sequence[Mapping[str, Lora]]) -> tuple[Tree, Tree]:
    """(logical axes, parameters) of a base with several LoRA adapters (`parallel.several`).

    Args:
      base: the model without adapters.
      params: its master parameters at rest; call it under the mesh.
      adapters: of each, nodes by the canonical name of their weights, of which the base is not
        read.
    """

    def beside(name: str, weight: Any) -> Any:
        having = [(i, own[name]) for i, own in enumerate(adapters) if name in own]
        return side_by_side(weight, having)

    def axes_of(name: str, axes: Any) -> Any:
        node, first = nodes[name], next(own[name] for own in adapters if name in own)
        into, out_of = factor_axes(first.matrix, _stack_of(axes))
        return replace(node, base=axes, into=into, out_of=out_of)

    names = dict.fromkeys(name for own in adapters for name in own)
    with_factors = _each(names, beside, params)
    nodes = _nodes(with_factors)
    axes = _each(names, axes_of, base.axes)
    rules = base.rules
    laid = lambda a, n: jax.reshard(a, rules.at_rest(n, a.shape))
    return axes, jax.tree.map(laid, with_factors, axes)


def loras(model: Model, params: Tree) -> dict[str, Lora]:
    """The adapters in a model's parameters, without their bases, by the names of weights."""
    own = _nodes(model.trained(params)).items()
    return {name: node for name, node in own if isinstance(node, Lora)}


def chosen_places(config: AdapterConfig, model: Model) -> dict[str, Place]:
    """The weights that get an adapter, by canonical name.

    Raises:
      ValueError: as `adapted`.
    """
    shapes = _nodes(drawn_shapes(model))
    found: dict[str, Place] = {}
    matrices: list[str] = []
    for name, axes in _nodes(model.axes).items():
        node, stack = shapes[name], _stack_of(axes)
        if is_stored(axes):
            matrix = axes.matrix
        elif is_matrix(name, axes):
            matrix = Matrix.of(node.shape, axes)
        else:
            continue
        if matrix.several:
            if any(fnmatchcase(name, pattern) for pattern in config.names):
                raise ValueError(
                    f"config.adapter.names = {list(config.names)}: {name} is of experts, which "
                    f"have no adapters; leave it out"
                )
            continue
        matrices.append(name)
        if not _is_chosen(config, name, stack):
            continue
        _check(config, name, matrix, axes)
        found[name] = Place(matrix, stack, _layers(node) if stack else 0)
    for pattern in config.names:
        if not any(fnmatchcase(name, pattern) for name in matrices):
            raise ValueError(
                f"config.adapter.names: {pattern!r} names no matrix; there are "
                f"{', '.join(matrices)}, and a pattern is such as 'stack/*/query'"
            )
    if not found:
        raise ValueError(
            f"config.adapter.names = (): no matrix of the layers is one of "
            f"{config.method}; name those that are to be adapted"
        )
    return found


def _is_chosen(config: AdapterConfig, name: str, stack: str) -> bool:
    if config.names:
        return any(fnmatchcase(name, pattern) for pattern in config.names)
    return bool(stack) and (config.method != "ia3" or name.rpartition("/")[2] in OF_IA3)


def _check(config: AdapterConfig, name: str, matrix: Matrix, axes: Any) -> None:
    """Refuses a weight that cannot have the adapter."""
    if config.method == "ia3":
        return
    most = largest_rank(matrix)
    if config.rank > most:
        right = f"up to rank {most}, or leave it out by config.adapter.names" if most else "never"
        raise ValueError(
            f"config.adapter.rank = {config.rank}: saves nothing of {name}, {matrix.rows} x "
            f"{matrix.columns}; two factors are smaller {right}"
        )
    if config.method == "dora" and isinstance(axes, ByLayer | Composed):
        what = "two factors" if isinstance(axes, Composed) else "of several forms by layer"
        raise ValueError(
            f"config.adapter.method = 'dora': {name} of config.adapter.base is {what}, which has "
            f"no norm at hand; choose lora"
        )


def _begin(config: AdapterConfig, place: Place, name: str, base: Any, key: jax.Array) -> Any:
    """A weight and its adapter, which changes nothing yet."""
    matrix, stacked = place.matrix, (place.layers,) if place.layers else ()
    if config.method == "ia3":
        by_input = _by_input(name)
        cut = slice(matrix.contracted) if by_input else slice(matrix.contracted, None)
        return Rescaled(base, jnp.ones((*stacked, *matrix.shape[cut])), matrix, by_input)
    a, b = factor_shapes(matrix, config.rank)
    own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    into = jax.random.normal(own_key, (*stacked, *a), jnp.float32) * matrix.rows**-0.5
    out_of = jnp.zeros((*stacked, *b), jnp.float32)
    scale = config.alpha / config.rank
    if config.method == "lora":
        return Lora(base, into, out_of, matrix, scale)
    norms: Callable[[Any], jax.Array] = lambda layer: column_norms(matrix, layer)
    magnitude = jax.lax.map(norms, base) if stacked else norms(base)
    return Dora(base, into, out_of, magnitude, matrix, scale)


def _by_input(name: str) -> bool:
    return name.rpartition("/")[2] == OF_IA3[-1]


def _nodes(tree: Tree) -> dict[str, Any]:
    """Weights by canonical name, whatever they are stored as."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_stored)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): node for p, node in leaves}


def _each(places: Mapping[str, Any], function: Callable[[str, Any], Any], tree: Tree) -> Tree:
    """The tree with `function(name, node)` in those places."""
    structure: Any = jax.tree.structure(tree, is_leaf=is_stored)
    nodes = _nodes(tree).items()
    return structure.unflatten([function(n, a) if n in places else a for n, a in nodes])


def _stack_of(axes: Any) -> str:
    first = jax.tree.leaves(axes)[0].split()[0]
    return f"{first} " if first in STACKS else ""


def _layers(node: Any) -> int:
    """Of a stacked weight."""
    return len(node.form) if isinstance(node, ByLayer) else jax.tree.leaves(node)[0].shape[0]
