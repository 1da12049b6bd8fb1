"""What each ZeRO level divides, counted in the compiled program against the closed form."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import optax
import pytest

from parallel.precision import PrecisionConfig
from tests.hlo import collectives, per_layer
from tests.small import DECODER, B, T, initial_params, layout
from training.state import abstract_state
from training.step import loss_and_grads, make_step

ONE = jax.ShapeDtypeStruct((), jnp.float32)
COMPUTE = {"float32": 4, "bfloat16": 2}
PLAIN = dict(dropout=0.0)  # drawing masks takes half of the compile time and no memory at rest
COUNT = sum(math.prod(p.shape) for p in jax.tree.leaves(initial_params()))


def compiled_grads(laid, compute="float32", micro_steps=1, accumulate="float32", **shape):
    precision = PrecisionConfig(compute=compute, accumulate=accumulate)
    state = abstract_state(laid.model, optax.adamw(1e-3), precision, laid.mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    function = loss_and_grads(laid.model, precision, micro_steps)
    return jax.jit(function).lower(state.params, laid.batch(**shape), key, ONE).compile()


def compiled_step(laid, compute="float32"):
    precision = PrecisionConfig(compute=compute)
    optimizer = optax.adamw(1e-3)
    state = abstract_state(laid.model, optimizer, precision, laid.mesh)
    step = make_step(laid.model, optimizer, lambda _: jnp.float32(0), precision, seed=0)
    return jax.jit(step, donate_argnums=0).lower(state, laid.batch()).compile()


def batch_bytes(laid, **shape) -> int:
    return sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(laid.batch(**shape)))


def gradient_arrays(sums: int = 5) -> int:
    """Bytes XLA adds to an output: the scalars (loss and sums), and a pointer for each array."""
    return 4 * sums + 8 * (len(jax.tree.leaves(initial_params())) + sums)


@pytest.mark.parametrize("compute", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_bytes_at_rest_and_of_gradients(zero, compute):
    """Every tensor of DECODER divides by 8, so the closed form holds to the byte."""
    with layout(fsdp=8, zero=zero, **PLAIN) as laid:
        at_rest = 12 * COUNT // (8 if zero >= 1 else 1)  # master copy and two moments, float32
        counters = 5 * 4  # step, skipped, loss scale and its counter, AdamW's count
        step = compiled_step(laid, compute).memory_analysis()
        assert step.argument_size_in_bytes == at_rest + counters + batch_bytes(laid)
        assert step.alias_size_in_bytes == at_rest + counters  # donated: updated in place
        gradients = COMPUTE[compute] * COUNT // (8 if zero >= 2 else 1)
        grads = compiled_grads(laid, compute).memory_analysis()
        assert grads.output_size_in_bytes == gradients + gradient_arrays()


@pytest.mark.slow
def test_only_the_copy_in_compute_dtype_is_replicated_at_levels_1_and_2():
    temporaries = {}
    for zero in (0, 1, 2, 3):
        with layout(fsdp=8, zero=zero, rows=8, length=8, **WIDE) as laid:
            temporaries[zero] = compiled_grads(laid, rows=8, length=8).memory_analysis()
    size = 4 * wide_count()
    whole = lambda zero: (
        temporaries[zero].temp_size_in_bytes + temporaries[zero].output_size_in_bytes
    )
    # Level 1 gathers a whole copy, which at level 0 is the argument itself; level 2 gives back a
    # whole gradient less its part; level 3 the whole copy. A tenth is left for the layer at work
    # and for buffers that share memory in another way.
    assert whole(1) - whole(0) == pytest.approx(size, rel=0.1)
    assert whole(1) - whole(2) == pytest.approx(7 / 8 * size, rel=0.1)
    assert whole(2) - whole(3) == pytest.approx(size, rel=0.1)


# Wide, with few tokens: weights outweigh activations.
WIDE = dict(embed_dim=64, mlp_dim=256, heads=8, kv_heads=8, head_dim=8, layers=8, dropout=0.0)


def wide_count() -> int:
    return sum(p.size for p in jax.tree.leaves(initial_params(replace(DECODER, **WIDE))))


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_gathered_weights_are_not_kept_as_residuals(remat):
    """A layer more costs its divided gradient and its few activations, not its whole weights."""
    kind = dict(fsdp=8, zero=3, rows=8, length=8, remat=remat)
    temporaries = []
    for layers in (4, 8):
        with layout(**kind, **(WIDE | {"layers": layers})) as laid:
            compiled = compiled_grads(laid, rows=8, length=8)
            temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
    layer = 4 * (4 * 64 * 64 + 3 * 64 * 256)
    assert (temporaries[1] - temporaries[0]) / 4 < layer / 2


def test_tensor_parallel_weights_are_divided():
    with layout(tensor=8, kv_heads=8, **PLAIN) as laid:
        divided = {"vocab", "heads", "kv_heads", "mlp"}
        state = abstract_state(laid.model, optax.sgd(0.1), PrecisionConfig(), laid.mesh)
        want = sum(
            p.size // (8 if divided & set(names.split()) else 1)
            for p, names in zip(
                jax.tree.leaves(state.params), jax.tree.leaves(laid.model.axes), strict=True
            )
        )
        got = sum(math.prod(p.sharding.shard_shape(p.shape)) for p in jax.tree.leaves(state.params))
        assert got == want < COUNT / 6
        step = compiled_step(laid).memory_analysis()
        assert step.argument_size_in_bytes == 12 * want + 20 + batch_bytes(laid)


@pytest.mark.parametrize(("remat", "backward"), [("none", 2), ("full", 3)])
def test_all_reduces_of_a_layer(remat, backward):
    """Megatron's count: after each row-divided product in the forward pass, and before each
    column-divided one in the backward pass. Recomputation repeats one, since the last product of a
    block is not needed again.
    """
    with layout(tensor=8, kv_heads=8, remat=remat, **PLAIN) as laid:
        loops = per_layer(compiled_grads(laid).as_text(), (B, T, DECODER.embed_dim))
    assert sorted(sum(loop.values()) for loop in loops) == [2, backward]
    assert {kind for loop in loops for kind in loop} == {"all-reduce"}


def test_sequence_parallel_pairs():
    """Each all-reduce becomes a reduce-scatter and an all-gather, in both directions."""
    with layout(tensor=8, kv_heads=8, sequence=True, **PLAIN) as laid:
        text = compiled_grads(laid).as_text()
    whole, part = (B, T, DECODER.embed_dim), (B, T // 8, DECODER.embed_dim)
    assert per_layer(text, whole) == [Counter({"all-gather": 2})] * 2
    assert per_layer(text, part) == [Counter({"reduce-scatter": 2})] * 2


@pytest.mark.parametrize("zero", [2, 3])
def test_divided_gradients_are_reduce_scattered(zero):
    """No gradient of a matrix is reduced whole on every device."""
    with layout(fsdp=8, zero=zero, kv_heads=8, **PLAIN) as laid:
        found = collectives(compiled_grads(laid).as_text())
    D, F, N, H = DECODER.embed_dim, DECODER.mlp_dim, DECODER.heads, DECODER.head_dim
    in_layers = [c for c in found if not c.where.startswith("main")]
    scattered = Counter(s for c in in_layers if c.kind == "reduce-scatter" for s in c.shapes)
    assert scattered == {(D // 8, F): 2, (F, D // 8): 1, (D // 8, N, H): 3, (N, H, D // 8): 1}
    reduced = {s for c in in_layers if c.kind == "all-reduce" for s in c.shapes}
    assert not reduced & {(D, F), (F, D), (D, N, H), (N, H, D)}


def test_collectives_of_data_parallelism_are_all_reduces_alone():
    with layout(data=8, **PLAIN) as laid:
        kinds = {c.kind for c in collectives(compiled_grads(laid).as_text())}
    assert kinds == {"all-reduce"}


@pytest.mark.slow
def test_temporaries_do_not_grow_with_micro_steps():
    temporaries = {}
    for micro_steps in (2, 4, 8):
        with layout(rows=micro_steps * 2, **PLAIN) as laid:
            compiled = compiled_grads(laid, micro_steps=micro_steps, rows=micro_steps * 2)
            inputs = 2 * batch_bytes(laid, rows=micro_steps * 2)  # the batch, split
            temporaries[micro_steps] = compiled.memory_analysis().temp_size_in_bytes - inputs
    assert temporaries[8] <= 1.01 * temporaries[4] <= 1.02 * temporaries[2]


@pytest.mark.slow
def test_the_buffer_of_gradients_is_in_the_dtype_of_accumulate():
    outputs = {}
    for accumulate in ("float32", "bfloat16"):
        with layout(**PLAIN) as laid:
            compiled = compiled_grads(laid, "bfloat16", micro_steps=2, accumulate=accumulate)
            outputs[accumulate] = compiled.memory_analysis().output_size_in_bytes
    assert outputs["float32"] - outputs["bfloat16"] == 2 * COUNT
