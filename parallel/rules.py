"""One table from logical dimension names to mesh axes: the only place where a layout is decided.

Models declare every parameter and activation with logical names; this table says which mesh axes
divide each. Parameter names and activation names differ, so that FSDP may divide a weight's `embed`
without dividing the activations' `act_embed`.

A parameter is declared as `"embed -> heads head_dim"`: the dims before the arrow are contracted,
the rest are produced. Vectors (gains, biases) have no arrow. Stacked layers put `layers` first;
that axis is scanned, and `pipe` alone divides it: each stage of a pipeline scans its own layers.

Between steps, `pipe` divides stacked arrays so too where each stage's layers are one block of the
model's and as many as any other's. Where they are not (several chunks a stage, uneven ones) it
divides another dim, and `parallel/exchange.py` brings each stage its layers once a step. Of the
parameters outside the stack, `pipe` divides the tables between steps (`TABLES`): their master copy
and moments. While they are used every stage has them whole.

ZeRO (`config.parallel.zero`, over the fsdp axis; Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054):

| level | master copy and moments | copy in compute dtype | gradients |
| --- | --- | --- | --- |
| 0 | replicated | replicated | replicated |
| 1 | divided | replicated | replicated |
| 2 | divided | replicated | divided |
| 3 | divided | divided, gathered where used | divided |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from jax.sharding import PartitionSpec as P

from parallel.mesh import AXES, PIPE

FSDP = "fsdp"
EXPERT = "expert"

# Megatron's split (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053): columns, then rows.
MEGATRON: dict[str, tuple[str, ...]] = {
    # parameters
    "vocab": ("tensor",),
    "embed": (FSDP,),
    "rank": (FSDP,),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "head_dim": (),
    "norm": (),
    "position": (),
    "token_type": (),
    "feature": (),
    "classes": (),
    "bucket": (),
    "virtual": (),
    "group": (),  # of weights in other forms: dims that stay whole
    "layers": (),
    "encoder_layers": (),
    "shared_layers": (),
    "router": (),
    "experts": (EXPERT,),
    # activations
    "batch": ("data", FSDP, EXPERT),  # the last one's devices are neighbours in an exchange
    "seq": (),
    "residual_seq": (),  # ("tensor",) with config.parallel.sequence
    "act_embed": (),
    "act_heads": ("tensor",),
    "act_kv_heads": ("tensor",),
    "act_mlp": ("tensor",),
    "act_vocab": ("tensor",),
    # tokens at their experts (`parallel/dispatch.py`); `make_rules` divides the first two as the
    # batch is, the second one without the expert axis
    "groups": (),
    "group_batch": (),
    "act_experts": (EXPERT,),
    "act_router": (),
    "choice": (),
    "rows": (),
    "slots": (),
    "slot_embed": ("tensor",),
}

PRESETS: dict[str, dict[str, tuple[str, ...]]] = {
    "megatron": MEGATRON,
    # Tensor parallelism in the feed-forward and the vocabulary alone: for heads that do not divide.
    "mlp": MEGATRON | dict.fromkeys(("heads", "kv_heads", "act_heads", "act_kv_heads"), ()),
    # Attention and feed-forward divided, embedding and loss head replicated over `tensor`.
    "whole_vocab": MEGATRON | dict.fromkeys(("vocab", "act_vocab"), ()),
}

# Leading dims of stacked arrays: of the stack that stages divide, of an encoder beside it, and of
# blocks that several layers share. The last two are outside the stages' part.
STAGED, SHARED = "layers", "shared_layers"
STACKS = (STAGED, "encoder_layers", SHARED)

# First dims of parameters outside the stack that every layer reads, so that every stage has a part
# in their gradients.
READ_BY_LAYERS = (SHARED, "bucket")

TABLES = ("vocab", "position")  # dims of rows that are looked up, of large arrays outside the stack

BATCH = {"data", FSDP, EXPERT}
# What the exchange of tokens between experts relies on.
FIXED = (
    *("experts", "act_experts", "groups", "group_batch", "router", "act_router"),
    *("choice", "rows", "slots"),
)

PAIRS = {"heads": "act_heads", "kv_heads": "act_kv_heads", "mlp": "act_mlp", "vocab": "act_vocab"}


@dataclass(frozen=True)
class ParallelConfig:
    """How arrays are divided over the mesh (`config.parallel`).

    Attributes:
      zero: ZeRO level 0 to 3 over the fsdp axis (table above); 3 is FSDP.
      sequence: shard the residual stream's sequence dim over `tensor` (Korthikanti et al. 2022,
        https://arxiv.org/abs/2205.05198).
      preset: a table of `PRESETS`.
      rules: overrides of single rows, logical name -> mesh axes, e.g. `{"embed": ["fsdp"]}`.
    """

    zero: int = 3
    sequence: bool = False
    preset: str = "megatron"
    rules: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.zero not in (0, 1, 2, 3):
            raise ValueError(f"config.parallel.zero = {self.zero!r}: a ZeRO level is 0, 1, 2 or 3")
        if self.preset not in PRESETS:
            raise ValueError(
                f"config.parallel.preset = {self.preset!r}: choose one of {', '.join(PRESETS)}"
            )
        for name, axes in self.rules.items():
            key = f"config.parallel.rules.{name}"
            if name not in MEGATRON:
                raise ValueError(f"{key}: no such logical name; there are {', '.join(MEGATRON)}")
            if name in STACKS and axes:
                raise ValueError(f"{key} = {axes}: only {PIPE} divides the scanned layers")
            if isinstance(axes, str) or not set(axes) <= set(AXES):
                raise ValueError(f"{key} = {axes!r}: a list of mesh axes of {', '.join(AXES)}")
            if PIPE in axes:
                raise ValueError(
                    f"{key} = {axes!r}: config.mesh.pipe divides layers and tables alone"
                )
            if len(set(axes)) != len(tuple(axes)):
                raise ValueError(f"{key} = {axes!r}: a mesh axis may be named once")
            if name == "batch" and (tuple(axes)[-1:] != (EXPERT,) or not set(axes) >= BATCH):
                raise ValueError(
                    f"{key} = {axes!r}: the batch is divided over data, {FSDP} and {EXPERT} at "
                    f"least; name all three, {EXPERT} last"
                )
            if name in FIXED:
                raise ValueError(
                    f"{key} = {axes!r}: the exchange of tokens between experts fixes it; leave it "
                    f"out"
                )


@dataclass(frozen=True)
class Rules:
    """The resolved table: hashable, a static field of models, never a context variable.

    (jit's cache does not see context variables: a sweep would get a stale layout.)

    Attributes:
      table: logical name -> mesh axes.
      sizes: mesh axis -> its size.
      zero: ZeRO level.
      rows: `pipe` divides stacked arrays by layers between steps; if not, by another dim.
    """

    table: tuple[tuple[str, tuple[str, ...]], ...]
    sizes: tuple[tuple[str, int], ...]
    zero: int = 0
    rows: bool = True

    def axes(self, name: str) -> tuple[str, ...]:
        """The mesh axes that divide one logical dim; () if none does."""
        return dict(self.table)[name]

    def size(self, axes: tuple[str, ...]) -> int:
        """The number of parts that `axes` divide a dim into."""
        sizes = dict(self.sizes)
        return math.prod(sizes[axis] for axis in axes)

    def parts(self, name: str) -> int:
        """The number of parts a logical dim is divided into."""
        return self.size(self.axes(name))

    def spec(self, names: str) -> P:
        """The partition of an activation, e.g. `"batch seq act_heads head_dim"`.

        Raises:
          ValueError: two dims of the tensor would use one mesh axis.
        """
        return self._spec([self.axes(name) for name in names.split()], names)

    @property
    def staged(self) -> bool:
        """Whether the layers are divided over the stages of a pipeline."""
        return self.size((PIPE,)) > 1

    def at_rest(self, names: str, shape: tuple[int, ...]) -> P:
        """The partition between steps of a parameter's master copy and moments."""
        if not self.rows and is_staged(names):
            return self.spread(names, shape)
        return self._parameter(names, shape, divided=self.zero >= 1, tables=True)

    def in_model(self, names: str, shape: tuple[int, ...]) -> P:
        """The partition of the copy in compute dtype that the step computes with."""
        return self._parameter(names, shape, divided=self.zero >= 3)

    def of_gradient(self, names: str, shape: tuple[int, ...]) -> P:
        """The partition of a parameter's gradient."""
        if not self.rows and is_staged(names):
            return self.spread(names, shape)  # on its way back from the stages anyway
        return self._parameter(names, shape, divided=self.zero >= 2, tables=True)

    def in_stage(self, names: str, shape: tuple[int, ...]) -> P:
        """The partition of the gradient that one stage of a pipeline sums."""
        return self._parameter(names, shape, divided=self.zero >= 2)

    def spread(self, names: str, shape: tuple[int, ...]) -> P:
        """The partition of a stacked array that has all layers on every stage, a part of each."""
        return self._parameter(names, shape, divided=self.zero >= 1, spread=True)

    def gathered(self, names: str, shape: tuple[int, ...]) -> P:
        """The partition of a weight while it is used: divided over `tensor` at most."""
        return self._parameter(names, shape, divided=False)

    def _parameter(
        self,
        names: str,
        shape: tuple[int, ...],
        divided: bool,
        tables: bool = False,
        spread: bool = False,
    ) -> P:
        dims = names.replace("->", " ").split()
        assert len(dims) == len(shape), (names, shape)
        parts = [tuple(a for a in self.axes(name) if a != FSDP) for name in dims]
        if tables:
            for i, name in enumerate(dims):
                if name in TABLES and shape[i] % self.size((PIPE, *parts[i])) == 0:
                    parts[i] = (PIPE, *parts[i])
        # The dim that the table names for fsdp, or where that does not divide the first one that
        # does: every tensor is divided that can be, biases and gains too.
        wanted = [i for i, name in enumerate(dims) if FSDP in self.axes(name)]
        order = wanted + [i for i, name in enumerate(dims) if name not in STACKS]

        def divide(axis: str) -> None:
            for i in order:
                if shape[i] % self.size((*parts[i], axis)) == 0:
                    parts[i] = (*parts[i], axis)
                    return

        if divided:
            divide(FSDP)
        if spread:
            # After fsdp, so that what one device has over all stages is one block of the dim.
            parts[dims.index(STAGED)] = ()
            divide(PIPE)
        return self._spec(parts, names)

    def _spec(self, parts: list[tuple[str, ...]], names: str) -> P:
        used = [axis for axes in parts for axis in axes]
        twice = sorted({axis for axis in used if used.count(axis) > 1})
        if twice:
            raise ValueError(
                f"config.parallel.rules: '{names}' would be divided twice over mesh axis "
                f"{twice[0]}; give its dims different axes"
            )
        # Axes of one device divide nothing; left out, no collective over them is ever written.
        real = [tuple(axis for axis in axes if self.size((axis,)) > 1) for axes in parts]
        return P(*[axes[0] if len(axes) == 1 else (axes or None) for axes in real])


def is_stacked(names: str) -> bool:
    """Whether an array holds several layers, one after the other, by its axis string."""
    return names.split()[0] in STACKS


def of_one_layer(names: str) -> str:
    """The axis string without the leading dim of layers, if it has one."""
    first, _, rest = names.partition(" ")
    return rest if first in STACKS else names


def is_staged(names: str) -> bool:
    """Whether these are the layers that the stages of a pipeline divide."""
    return names.split()[0] == STAGED


def is_shared(names: str) -> bool:
    """Whether layers read this array that is none of the stack's."""
    return names.split()[0] in READ_BY_LAYERS


def make_rules(
    config: ParallelConfig,
    sizes: Mapping[str, int],
    dims: Mapping[str, tuple[int, str]],
    *,
    rows: bool = True,
) -> Rules:
    """Resolves the table for a mesh and checks that every divided dim divides.

    Args:
      config: level, preset and overrides.
      sizes: mesh axis -> its size.
      dims: logical name -> (size, the config key it comes from) of the model and the batch.
      rows: see `Rules`; as the pipeline's division says (`parallel.division.Division.in_rows`).

    Raises:
      ValueError: a dim does not divide, naming its key. Fewer K/V heads than parts are replicated.
    """
    table = dict(PRESETS[config.preset])
    if config.sequence:
        table["residual_seq"] = ("tensor",)
    if sizes[PIPE] > 1:
        table["layers"] = (PIPE,)
    overrides = {name: tuple(axes) for name, axes in config.rules.items()}
    table |= overrides
    for name, act in PAIRS.items():  # a parameter's override carries its activation along
        if name in overrides and act not in overrides:
            table[act] = tuple(axis for axis in overrides[name] if axis != FSDP)
    table["groups"] = table["batch"]
    table["group_batch"] = tuple(axis for axis in table["batch"] if axis != EXPERT)
    for name, (size, key) in dims.items():
        axes = tuple(a for a in table[name] if a != FSDP or name == "batch")
        parts = math.prod(sizes[axis] for axis in axes)
        if size % parts == 0:
            continue
        if name == "kv_heads" and parts % size == 0:
            table["kv_heads"] = table["act_kv_heads"] = ()
            continue
        shown = " x ".join(
            f"config.mesh.{axis} = {sizes[axis]}" for axis in axes if sizes[axis] > 1
        )
        raise ValueError(f"{key} = {size} does not divide by {shown}; choose a multiple of {parts}")
    rules = Rules(tuple(table.items()), tuple(sizes.items()), config.zero, rows)
    rules.spec("batch seq act_heads head_dim"), rules.spec("batch residual_seq act_embed")
    rules.spec("batch seq act_mlp"), rules.spec("batch seq act_vocab")
    return rules
