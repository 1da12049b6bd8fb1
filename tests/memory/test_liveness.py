"""The live buffers found in a program's text, against what XLA allocates and what was saved."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest

from memory.components import COMPONENTS
from memory.hlo import parse
from memory.hlo_costs import count
from memory.liveness import POINTS, live_at_peak
from parallel.precision import PrecisionConfig
from tests.memory.test_hlo import program, shape
from tests.small import layout
from training.state import abstract_state
from training.step import make_step

L, B, D = 7, 512, 64
STACK = 4 * L * B * D


def layers(w_LDD, x_BD):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_BD, w_LDD)[0].sum()


def remat_layers(w_LDD, x_BD):
    @jax.checkpoint
    def layer(x, w):
        return jnp.sin(jnp.tanh(x @ w) @ w), None

    return jax.lax.scan(layer, x_BD, w_LDD)[0].sum()


def update(w_LDD, x_BD):
    return w_LDD - 0.1 * jax.grad(layers)(w_LDD, x_BD)


@pytest.mark.parametrize(
    ("function", "donate"),
    [(jax.grad(layers), ()), (jax.grad(remat_layers), ()), (update, (0,))],
    ids=["grad", "remat", "update"],
)
def test_peak_is_what_xla_allocates(function, donate):
    lowered = jax.jit(function, donate_argnums=donate).lower(shape(L, D, D), shape(B, D))
    program = lowered.compile()
    live = live_at_peak(parse(program.as_text()))
    temporaries = program.memory_analysis().temp_size_in_bytes
    # Holes in the heap and reuse across kinds of instructions are not followed.
    assert live.peak_bytes == pytest.approx(temporaries, rel=0.1)
    assert live.peak_bytes == sum(b.bytes for b in live.buffers) == sum(live.by_component.values())


def test_saved_stack_is_named():
    program = jax.jit(jax.grad(remat_layers)).lower(shape(L, D, D), shape(B, D)).compile()
    live = live_at_peak(parse(program.as_text()))
    largest = live.buffers[0]
    assert (largest.bytes, largest.component) == (STACK, "activations")
    assert "test_liveness.py:" in largest.source
    assert live.named_fraction > 0.95


@pytest.mark.slow
def test_a_training_step_is_named():
    precision = PrecisionConfig(compute="float32")
    with layout(fsdp=4, tensor=2, zero=3, dropout=0.0) as laid:
        optimizer = optax.adamw(1e-3)
        state = abstract_state(laid.model, optimizer, precision, laid.mesh)
        step = make_step(laid.model, optimizer, lambda _: jnp.float32(0), precision, seed=0)
        program = jax.jit(step, donate_argnums=0).lower(state, laid.batch()).compile()
    live = live_at_peak(parse(program.as_text()))
    assert live.peak_bytes == pytest.approx(program.memory_analysis().temp_size_in_bytes, rel=0.1)
    assert live.named_fraction > 0.95
    assert set(live.by_component) <= set(COMPONENTS)
    assert len(live.timeline) <= POINTS
    assert max(sum(at.values()) for _, at in live.timeline) == live.peak_bytes
    assert [part for part, _ in live.timeline] == sorted(part for part, _ in live.timeline)


LOOP = """%body (p: (s32[], f32[64], f32[64])) -> (s32[], f32[64], f32[64]) {
  %p = (s32[], f32[64]{0}, f32[64]{0}) parameter(0)
  %n = s32[] get-tuple-element(%p), index=0
  %a = f32[64]{0} get-tuple-element(%p), index=1
  %b = f32[64]{0} get-tuple-element(%p), index=2
  %wide = f32[4,64]{1,0} custom-call(%a), custom_call_target="f"
  %small = f32[64]{0} custom-call(%wide), custom_call_target="g"
  ROOT %t = (s32[], f32[64]{0}, f32[64]{0}) tuple(%n, %small, %b)
}

%condition (p.1: (s32[], f32[64], f32[64])) -> pred[] {
  %p.1 = (s32[], f32[64]{0}, f32[64]{0}) parameter(0)
  %n.1 = s32[] get-tuple-element(%p.1), index=0
  ROOT %lt = pred[] compare(%n.1, %n.1), direction=LT
}
"""


def test_a_loop_carries_in_place():
    """At the peak: the wide array, a (or the array that takes its buffer), b and the counter."""
    text = program(
        "%x = f32[64]{0} parameter(0)",
        '%zero = s32[] custom-call(), custom_call_target="z"',
        '%a0 = f32[64]{0} custom-call(%x), custom_call_target="f"',
        '%b0 = f32[64]{0} custom-call(%x), custom_call_target="f"',
        "%init = (s32[], f32[64]{0}, f32[64]{0}) tuple(%zero, %a0, %b0)",
        "%w = (s32[], f32[64]{0}, f32[64]{0}) while(%init), condition=%condition, body=%body",
        "%r = f32[64]{0} get-tuple-element(%w), index=1",
        'ROOT %out = f32[64]{0} custom-call(%r), custom_call_target="f"',
        before=LOOP,
    )
    live = live_at_peak(parse(text))
    assert live.peak_bytes == 4 * (4 * 64 + 64 + 64 + 1)


def test_views_slices_and_dying_operands_take_no_memory():
    text = program(
        "%x = f32[64]{0} parameter(0)",
        "%n = s32[] parameter(1)",
        '%a = f32[64]{0} custom-call(%x), custom_call_target="f"',
        "%b = f32[8,8]{1,0} bitcast(%a)",
        "%c = f32[8,8]{1,0} tanh(%b)",  # over a
        '%row = f32[1,8]{1,0} custom-call(%x), custom_call_target="f"',
        "%d = f32[8,8]{1,0} dynamic-update-slice(%c, %row, %n, %n)",  # in c
        'ROOT %out = f32[2]{0} custom-call(%d), custom_call_target="f"',
    )
    assert live_at_peak(parse(text)).peak_bytes == 4 * (64 + 8)


def test_an_operand_that_is_read_again_keeps_its_buffer():
    text = program(
        "%x = f32[64]{0} parameter(0)",
        '%a = f32[64]{0} custom-call(%x), custom_call_target="f"',
        "%c = f32[64]{0} tanh(%a)",
        'ROOT %out = f32[2]{0} custom-call(%a, %c), custom_call_target="f"',
    )
    assert live_at_peak(parse(text)).peak_bytes == 4 * 2 * 64


def test_donated_arguments_and_outputs_are_no_temporaries():
    text = program(
        "%x = f32[64]{0} parameter(0)",
        '%a = f32[32]{0} custom-call(%x), custom_call_target="f"',
        '%new = f32[64]{0} custom-call(%a), custom_call_target="f"',
        '%metric = f32[16]{0} custom-call(%a), custom_call_target="f"',
        "ROOT %t = (f32[64]{0}, f32[16]{0}) tuple(%new, %metric)",
        aliases=", input_output_alias={ {0}: (0, {}, may-alias) }, entry_computation_layout={}",
    )
    assert live_at_peak(parse(text)).peak_bytes == 4 * 32


def test_asynchronous_copies_of_a_tpu():
    """The source lives until the copy is done; the copy in fast memory does not count."""
    text = program(
        "%x = f32[1024]{0:T(1024)} parameter(0)",
        '%a = f32[1024]{0:T(1024)} custom-call(%x), custom_call_target="f"',
        "%s = (f32[1024]{0:T(1024)S(1)}, f32[1024]{0:T(1024)}, u32[]{:S(2)}) copy-start(%a)",
        '%b = f32[2048]{0:T(1024)} custom-call(%x), custom_call_target="f"',
        "%d = f32[1024]{0:T(1024)S(1)} copy-done(%s)",
        'ROOT %out = f32[1024]{0:T(1024)} custom-call(%b, %d), custom_call_target="f"',
    )
    assert live_at_peak(parse(text)).peak_bytes == 4 * (1024 + 2048)


def test_aliases_a_compiler_wrote_down():
    """A TPU's numbers operands and results in one row: here result 0 (number 2) over operand 1."""
    lists = '"aliasing_operands":{"lists":[{"indices":["1","2"]}]}'
    text = program(
        "%x = f32[1024]{0} parameter(0)",
        '%a = f32[1024]{0} custom-call(%x), custom_call_target="f"',
        '%b = f32[1024]{0} custom-call(%x), custom_call_target="f"',
        f"%c = f32[1024]{{0}} add(%a, %b), backend_config={{{lists}}}",
        'ROOT %out = f32[2]{0} custom-call(%c), custom_call_target="f"',
    )
    assert live_at_peak(parse(text)).peak_bytes == 4 * 2 * 1024


@pytest.mark.parametrize("started", ["f32[4096]{0}", "((f32[4096]{0}), f32[4096]{0})"])
def test_an_all_reduce_is_in_place_in_either_form(started):
    """Newer XLA names the operands of a start before its results."""
    text = program(
        "%x = f32[4096]{0} parameter(0)",
        "%a = f32[4096]{0} negate(%x)",
        f"%s = {started} all-reduce-start(%a), replica_groups={{{{0,1}}}}, to_apply=%add",
        "%d = f32[4096]{0} all-reduce-done(%s)",
        "ROOT %r = f32[] reduce(%d, %d), to_apply=%add",
        before="%add (p: f32[], q: f32[]) -> f32[] {\n  %p = f32[] parameter(0)\n"
        "  %q = f32[] parameter(1)\n  ROOT %sum = f32[] add(%p, %q)\n}\n",
    )
    assert live_at_peak(parse(text)).peak_bytes == 4 * 4096
    assert count(parse(text), {"data": 2}).bytes_moved >= 3 * 4 * 4096
