"""Floating-point operations of one instruction, from its shapes."""

from __future__ import annotations

import math
import re
from functools import cache

from memory.hlo import Computation, Instruction

LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
CONTRACTED = re.compile(r'"lhs_contracting_dimensions":\s*\["?(\d+)"?(?:,\s*"?(\d+)"?)*\]')
ESTIMATE = re.compile(r'"cost_estimate":\s*\{[^{}]*"flops":\s*"?(\d+)')
SCORES = re.compile(r'"intermediate_tensor_shape":.*?"dimensions":\s*\[([^\]]*)\]')
SLIDING = re.compile(r'"sliding_window_length":\s*(\d+)')
# Forward: scores and their sum over values. Backward: scores again and four gradients.
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5


def flops(where: Computation, i: Instruction) -> float:
    """Of a dot, a convolution or a known kernel, run once; 0 for all else."""
    if i.opcode == "dot":
        left = where.operands(i)[0].shape
        contracted = [
            int(n) for n in i.attribute("lhs_contracting_dims").strip("{}").split(",") if n
        ]
        return 2.0 * i.shape.elements * math.prod(left.dims[n] for n in contracted)
    if i.opcode == "convolution":
        return _convolution(where, i)
    if i.opcode == "custom-call":
        return _kernel(where, i)
    return 0.0


def _convolution(where: Computation, i: Instruction) -> float:
    """A TPU writes dots as convolutions: batch dims as windows of which one place counts."""
    labels = LABELS.search(i.attributes)
    assert labels is not None
    left, right, out = labels.groups()
    x, kernel = (operand.shape for operand in where.operands(i))
    window = dict(part.split("=") for part in i.attribute("window").strip("{}").split())
    spatial = sorted(letter for letter in left if letter.isdigit())

    def setting(key: str, n: int, default: str) -> str:
        return window[key].split("x")[n] if key in window else default

    places = 1
    for n, letter in enumerate(spatial):
        low = setting("pad", n, "0_0").split("_")[0]
        places *= _places(
            x.dims[left.index(letter)],
            kernel.dims[right.index(letter)],
            i.shape.dims[out.index(letter)],
            int(setting("stride", n, "1")),
            int(low),
            int(setting("lhs_dilate", n, "1")),
            int(setting("rhs_dilate", n, "1")),
        )
    rows, columns = i.shape.dims[out.index("b")], i.shape.dims[out.index("f")]
    return 2.0 * rows * columns * kernel.dims[right.index("i")] * places


@cache
def _places(x: int, kernel: int, out: int, stride: int, low: int, spread: int, wide: int) -> int:
    """Pairs (output, kernel) of one spatial dim that meet an element, not padding or a gap."""
    met = 0
    for k in range(kernel):
        first = k * wide - low
        met += sum(
            place >= 0 and place % spread == 0 and place < x * spread
            for place in range(first, first + out * stride, stride)
        )
    return met


def _kernel(where: Computation, i: Instruction) -> float:
    target = i.attribute("custom_call_target").strip('"')
    operands = where.operands(i)
    if "$fmha" in target:
        return _attention(i, [operand.shape.dims for operand in operands], "Backward" in target)
    if found := ESTIMATE.search(i.attributes):  # Pallas
        return float(found[1])
    if "gemm" in target or "matmul" in target:
        contracted = CONTRACTED.search(i.attributes)
        dims = operands[0].shape.dims
        used = [int(n) for n in contracted.groups() if n] if contracted else [len(dims) - 1]
        return 2.0 * i.shape.leaves[0].elements * math.prod(dims[n] for n in used)
    return 0.0


def _attention(i: Instruction, operands: list[tuple[int, ...]], backward: bool) -> float:
    """cuDNN's fused attention: q is the first operand, [B, T, N, H] or [B, N, T, H]."""
    scores = SCORES.search(i.attributes)
    if not scores:
        return 0.0
    B, N, T, S = (int(n.strip('" ')) for n in scores[1].split(","))
    found = SLIDING.search(i.attributes)
    window = int(found[1]) if found else 0
    keys: float = S
    if "CAUSAL" in i.attributes or window:
        seen = min(window or S, S)
        keys = seen - seen * (seen - 1) / (2 * S)  # the mean over queries
    products = BACKWARD_PRODUCTS if backward else FORWARD_PRODUCTS
    return 2.0 * products * B * N * T * keys * operands[0][-1]
