"""The compiled decode step writes its state in place and copies neither it nor a weight."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from generation.sampling import Sampling
from generation.steps import Steps
from models.decode import make_decoding, weights_of
from models.kv_cache import CacheShape
from tests.models.test_decode import ALL, LAYOUTS
from tests.small import initial_params, layout

ROWS, SLOTS, BLOCK, SOURCE = 8, 512, 16, 40
WINDOW = 48
HEAD = 32  # a cache is larger than all weights and activations of a layer
ONE_HEAD = replace(
    ALL["decoder"], config=replace(ALL["decoder"].config, kv_heads=1, qkv_bias=False)
)
OWN_HEADS = replace(ALL["decoder"], config=replace(ALL["decoder"].config, kv_heads=8))
WINDOWS = replace(ALL["windows"], config=replace(ALL["windows"].config, window=WINDOW))
FAMILIES = ALL | {"one K/V head": ONE_HEAD, "own K/V heads": OWN_HEADS, "windows": WINDOWS}
CASES = [
    ("decoder", "contiguous", "one"),
    ("decoder", "contiguous", "tensor 4 x data 2"),  # one K/V head a device
    ("decoder", "paged", "one"),
    ("one K/V head", "contiguous", "one"),
    ("own K/V heads", "contiguous", "one"),
    ("windows", "contiguous", "one"),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("decoder", "contiguous", "fsdp 8"),
            ("decoder", "int8", "one"),
            ("decoder", "paged", "tensor 4 x data 2"),
            ("windows", "paged", "one"),
            ("experts", "contiguous", "one"),
            ("t5", "contiguous", "one"),
            ("t5", "contiguous", "tensor 4 x data 2"),
            ("captioning", "contiguous", "one"),
        )
    ),
]
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = \w+\[([\d,]*)\]\S* ([\w\-]+)\(")


def compiled_step(name: str, kind: str, mesh: str) -> tuple[Any, Any, Any]:
    """The step of a small model, the arrays that a device keeps, and its weights."""
    family = FAMILIES[name]
    config = replace(family.config, head_dim=HEAD, max_length=SLOTS)
    with layout(config=config, objective=family.objective, **LAYOUTS[mesh]) as laid:
        rules = laid.model.rules
        shape = CacheShape(
            ROWS,
            SLOTS,
            int8=kind == "int8",
            block=BLOCK if kind == "paged" else 0,
            blocks=ROWS // rules.parts("batch") * SLOTS // BLOCK if kind == "paged" else 0,
            source=SOURCE if config.cross != "none" else 0,
        )
        decoding = make_decoding(config, rules, shape, "float32")
        params = laid.params(initial_params(config, family.objective))
        weights = weights_of(params, laid.model.axes, rules, "float32")
        steps = Steps(decoding, Sampling())
        state = jax.jit(steps.empty)()
        ones = np.ones(ROWS, np.int32)
        given = dict.fromkeys(("start", "count", "number", "position"), ones)
        if kind == "paged":
            given["table"] = np.zeros((ROWS, shape.row_blocks), np.int32)
        step = jax.jit(steps.step, donate_argnums=1)
        program = step.lower(weights, state, jax.random.key(0), laid.placed(given)).compile()
        own = lambda x: x.addressable_shards[0].data
        kept, blocks = jax.tree.map(own, (state, weights.blocks))
    return program, jax.tree.leaves(kept), jax.tree.leaves(blocks)


def copies_of(text: str, kept: list[Any]) -> list[str]:
    """Copies and transposes, fused ones too, of arrays that have the dims of a kept one."""
    dims = lambda sizes: tuple(sorted(size for size in sizes if size != 1))
    large = {dims(x.shape) for x in kept if x.ndim > 2}
    found = []
    for line in text.splitlines():
        match = INSTRUCTION.match(line)
        if match is None:
            continue
        name, sizes, operation = match.groups()
        moved = operation in ("copy", "transpose") or (
            operation == "fusion" and re.search("copy|transpose", name)
        )
        if moved and dims(int(size) for size in sizes.split(",") if size) in large:
            found.append(line.strip())
    return found


@pytest.mark.parametrize(("name", "kind", "mesh"), CASES)
def test_the_state_is_written_in_place(name, kind, mesh):
    program, kept, blocks = compiled_step(name, kind, mesh)
    memory = program.memory_analysis()
    # Of an encoder-decoder the source's arrays come out as they came in.
    assert memory.alias_size_in_bytes == sum(x.nbytes for x in kept)
    pointers = 8 * (len(kept) + 1)
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes <= 4 * ROWS + pointers  # tokens
    whole = blocks if mesh == "one" else []  # parts of them are as small as activations
    if mesh == "fsdp 8":  # one row a device: XLA:CPU copies its cache before it writes a token
        return
    assert not copies_of(program.as_text(), kept + whole)
    if kind == "contiguous":  # int8 is read as float32, and a pool by rows
        assert memory.temp_size_in_bytes < max(x.nbytes for x in kept)


def test_the_check_sees_a_copy():
    """What it was given is kept, and read turned."""
    cache = jax.numpy.zeros((4, 2, 64, 8))

    @jax.jit
    def turned(cache):
        return cache.at[0, 0, 0].set(1.0), jax.numpy.swapaxes(cache, 2, 3) @ cache

    text = turned.lower(cache).compile().as_text()
    assert copies_of(text, [cache])
