"""What the backward pass of a layer keeps where weights are frozen, adapted or two factors.

The gradient of a matrix reads its product's input, that of a gain a norm's result before it: of
frozen ones nobody does. An adapter has residuals of its own: what is between two factors, and the
product that a vector scales. `tests/memory/test_kept.py` holds compiled bytes against this.
"""

from __future__ import annotations

from memory.arrays import Array
from models.block import RESIDUAL
from parallel.footprint import Activation

# Input of products -> the matrices that it meets.
READERS = {
    "attention_norm": ("attention/query", "attention/key", "attention/value"),
    "attention_out": ("attention/out",),
    "cross_norm": ("cross/query",),
    "cross_out": ("cross/out",),
    "mlp_norm": ("mlp/gate", "mlp/up"),
    "expert_input": ("mlp/gate", "mlp/up"),
    "mlp_act": ("mlp/down",),
}
CORE = {"attention_out": "attention", "cross_out": "cross"}  # what the cores read, too
BY_INPUT = "mlp/down"  # of IA3 the one whose vector scales the input
PRODUCED = {
    "heads": "act_heads",
    "kv_heads": "act_kv_heads",
    "mlp": "act_mlp",
    "head_dim": "head_dim",
}


def read_again(
    tensors: list[Activation], arrays: tuple[Array, ...], forms: dict[str, str], *, named: bool
) -> list[Activation]:
    """Those tensors of one layer that the backward pass reads.

    Args:
      arrays: of all layers.
      forms: sublayer -> form of its attention; all but "xla" read what they gave.
      named: they are what a policy saves by name, and all else is computed again from them.
    """
    trained = [_in_layer(array) for array in arrays if array.trained]
    if len(trained) == len(arrays):
        return tensors

    def reads(matrix: str) -> bool:
        own = [name for name in trained if f"{name}/".startswith(f"{matrix}/")]
        if not named and matrix != BY_INPUT:  # the product that a vector scales is kept itself
            own = [name for name in own if not name.endswith("/gain")]
        return bool(own)

    def is_read(tensor: Activation) -> bool:
        if any(map(reads, READERS.get(tensor.name, ()))) or tensor.name not in READERS:
            return True
        # Unnamed, the core's own copy is an entry beside the product's.
        core = tensor.name in CORE and forms[CORE[tensor.name]] != "xla"
        return core and (named or tensor.dtype != "product")

    found = [tensor for tensor in tensors if is_read(tensor)]
    if any(map(is_of_norm, trained)):
        return found
    wide = [i for i, tensor in enumerate(found) if tensor.name == "norm"]
    before_gain = set(wide[::2])
    return [tensor for i, tensor in enumerate(found) if i not in before_gain]


def scaled_products(arrays: tuple[Array, ...]) -> list[Activation]:
    """The products of one layer that a trained vector scales, kept where nothing is repeated."""
    found = []
    for array in arrays:
        name = _in_layer(array)
        vector = name.endswith(("/magnitude", "/gain")) and not is_of_norm(name)
        by_input = name == f"{BY_INPUT}/gain"
        if array.trained and vector and not by_input:
            dims = array.weight.axes.split()[1:]
            wide = " ".join(PRODUCED[dim] for dim in dims) if dims != ["norm"] else ""
            found.append(Activation("scaled products", f"batch seq {wide}" if wide else RESIDUAL))
    return found


def ranks(arrays: tuple[Array, ...]) -> int:
    """The numbers of a token between two factors, summed over all factors of all layers."""
    into = [a.weight for a in arrays if a.trained and a.weight.axes.endswith("-> rank")]
    return sum(weight.shape[0] * weight.shape[-1] for weight in into)


def is_of_norm(name: str) -> bool:
    """Whether an array of a layer is a norm's."""
    return "norm/" in name


def _in_layer(array: Array) -> str:
    """The name of an array of stacked blocks in one of them."""
    return array.name.rpartition("blocks/")[2]
