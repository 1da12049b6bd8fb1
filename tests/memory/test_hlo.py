"""Costs read from a compiled program's text, against programs whose costs are known."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from memory.collectives import Collective, device_groups, mesh_axes
from memory.hlo import Instruction, parse, trip_count
from memory.hlo_costs import count
from memory.hlo_shapes import parse_shape

ONE = {"data": 1}
GPT2 = {"data": 1, "fsdp": 4, "pipe": 1, "context": 1, "expert": 1, "tensor": 2}


def shape(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text()


def program(*lines: str, before: str = "", aliases: str = "") -> str:
    """The text of a small module whose entry has these lines."""
    body = "\n".join(f"  {line}" for line in lines)
    head = f"HloModule m, is_scheduled=true{aliases}\n\n{before}\n"
    return f"{head}ENTRY %main (x: f32[]) -> f32[] {{\n{body}\n}}\n"


@pytest.mark.parametrize(
    ("text", "size", "payload", "device"),
    [
        ("f32[8,3]{1,0}", 96, 96, 96),
        ("bf16[12,100]{1,0:T(8,128)(2,1)}", 16 * 128 * 2, 2400, 16 * 128 * 2),
        ("bf16[12,100]{0,1:T(8,128)(2,1)S(1)}", 104 * 128 * 2, 2400, 0),  # in fast memory
        ("f32[]{:T(128)}", 512, 4, 512),
        ("pred[16,100]{1,0:T(8,128)(4,1)}", 16 * 128, 1600, 16 * 128),
        ("f32[4]{0:S(5)}", 16, 16, 0),  # on the host
        ("s4[3,3]{1,0}", 5, 5, 5),
        ("(f32[2]{0}, (bf16[4]{0}, /*index=2*/u8[]))", 17, 17, 17),
        ("token[]", 0, 0, 0),
    ],
)
def test_bytes_of_shapes(text, size, payload, device):
    parsed = parse_shape(text)
    assert (parsed.bytes, parsed.payload, parsed.device_bytes) == (size, payload, device)


def test_flops_and_bytes_of_a_loop():
    def run(w_LDD, x_BD):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_BD, w_LDD)[0]

    counts = count(parse(compiled(run, shape(7, 64, 64), shape(16, 64))), ONE)
    assert counts.flops == 7 * 2 * 16 * 64 * 64
    # At least weights, inputs and outputs of each layer; at most the copies of a CPU besides.
    least = 4 * 7 * (64 * 64 + 2 * 16 * 64)
    assert least <= counts.bytes_moved <= 4 * least
    assert counts.collectives == []


def test_the_costliest_branch_counts():
    def run(which, x):
        return jax.lax.switch(which, [lambda x: x, lambda x: x @ x, lambda x: x @ x @ x], x)

    text = compiled(run, jax.ShapeDtypeStruct((), jnp.int32), shape(32, 32))
    assert count(parse(text), ONE).flops == 2 * 2 * 32**3


def test_collectives_of_a_mesh():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    @partial(jax.shard_map, mesh=mesh, in_specs=P("a", "b"), out_specs=P("a", "b"))
    def run(x):  # [16, 16] on a device, 1024 bytes
        x = x + jax.lax.psum(x, "a")
        gathered = jax.lax.all_gather(x, "b", axis=0, tiled=True)
        x = x + jax.lax.psum_scatter(jnp.sin(gathered), "b", tiled=True)
        x = x + jax.lax.ppermute(x, "b", [(i, (i + 1) % 4) for i in range(4)])
        x = x + jax.lax.all_to_all(x, "a", 0, 0, tiled=True)
        return jax.lax.scan(lambda x, _: (x / jax.lax.pmax(x, ("a", "b")), None), x, length=5)[0]

    found = count(parse(compiled(run, shape(32, 64))), {"a": 2, "b": 4}).collectives
    assert [(c.kind, c.axis, c.bytes, c.group, c.count, c.loop is None) for c in found] == [
        ("all-reduce", "a", 1024, 2, 1, True),
        ("all-gather", "b", 4096, 4, 1, True),
        ("reduce-scatter", "b", 4096, 4, 1, True),
        ("collective-permute", "b", 1024, 2, 1, True),
        ("all-to-all", "a", 1024, 2, 1, True),
        ("all-reduce", "a+b", 1024, 8, 5, False),
    ]


@pytest.mark.parametrize(
    ("groups", "axis", "first"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", "tensor", [0, 1]),
        ("replica_groups=[4,2]<=[8]", "tensor", [0, 1]),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", "fsdp", [0, 2, 4, 6]),
        ("replica_groups={}", "fsdp+tensor", list(range(8))),
        ("source_target_pairs={{0,2},{2,4},{4,6},{6,0}}", "fsdp", [0, 2]),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2] {'axis_0'}", "fsdp", [0, 2, 4, 6]),
        ("replica_groups=mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'x'}", "tensor", [0, 1]),
        ("replica_groups=mesh['x'=8] {'x':(1)4}", "fsdp", [0, 2, 4, 6]),
    ],
)
def test_axis_of_a_collective(groups, axis, first):
    line = f", channel_id=1, {groups}, dimensions={{0}}"
    instruction = Instruction("c", "all-gather", parse_shape("f32[8]"), (), line)
    found = device_groups(instruction, 8)
    assert found[0].tolist() == first
    assert mesh_axes(found, GPT2) == axis


def test_a_smaller_mesh_than_the_programs():
    with pytest.raises(ValueError, match="larger mesh"):
        mesh_axes(np.arange(8)[None], {"data": 4})


def test_asynchronous_collectives_of_a_gpu():
    text = program(
        "%x = bf16[4,8]{1,0} parameter(0)",
        "%s = (bf16[4,8]{1,0}, bf16[8,8]{1,0}) all-gather-start(%x), replica_groups=[4,2]<=[8], "
        'dimensions={0}, metadata={op_name="reshard"}',
        "ROOT %d = bf16[8,8]{1,0} all-gather-done(%s)",
    )
    assert count(parse(text), GPT2).collectives == [
        Collective("all-gather", "tensor", 128, 2, 1, None)
    ]


def test_a_collective_spread_over_fusions_of_a_tpu():
    """One fusion starts it, others repeat it while they compute: it runs once."""
    gather = (
        "%g = bf16[8,8]{1,0:S(1)} all-gather(%p), channel_id=3, replica_groups=[4,2]<=[8], "
        'dimensions={0}, frontend_attributes={chain_id="1"}'
    )
    fused = "\n".join(
        f"%fused.{n} (p: bf16[4,8]) -> bf16[8,8] {{\n"
        f"  %p = bf16[4,8]{{1,0}} parameter(0)\n  {gather}\n"
        f"  ROOT %c = bf16[8,8]{{1,0:S(1)}} custom-call(%g), "
        f'custom_call_target="AsyncCollective{end}"\n}}\n'
        for n, end in enumerate(["Start", "Done"])
    )
    text = program(
        "%x = bf16[4,8]{1,0} parameter(0)",
        "%a = bf16[8,8]{1,0:S(1)} fusion(%x), kind=kCustom, calls=%fused.0",
        "ROOT %b = bf16[8,8]{1,0:S(1)} fusion(%x), kind=kCustom, calls=%fused.1",
        before=fused,
    )
    assert count(parse(text), GPT2).collectives == [
        Collective("all-gather", "tensor", 128, 2, 1, None)
    ]


@pytest.mark.parametrize(
    ("operands", "out", "attributes", "expected"),
    [
        # [16, 768] x [768, 1536] as a TPU writes a dot
        (("16,768", "768,1536"), "16,1536", "dim_labels=bf_io->bf", 2 * 16 * 768 * 1536),
        # x_BTD w_DF with T as a window of one element that meets each place once
        (
            ("8,4,32", "1,32,16"),
            "8,4,16",
            "window={size=1}, dim_labels=0bf_0io->0bf",
            2 * 8 * 4 * 32 * 16,
        ),
        # a batched dot: batch 8 as a spread window, of whose places one counts
        (
            ("8,4,32", "8,32,16"),
            "8,4,16",
            "window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf",
            2 * 8 * 4 * 32 * 16,
        ),
        # a sum over 8 places as a window over all of them
        (
            ("8,4,32", "8,32,16"),
            "1,4,16",
            "window={size=8}, dim_labels=0bf_0io->0bf",
            2 * 8 * 4 * 32 * 16,
        ),
    ],
)
def test_flops_of_convolutions(operands, out, attributes, expected):
    left, right = operands
    text = program(
        f"%x = bf16[{left}] parameter(0)",
        f"%w = bf16[{right}] parameter(1)",
        f"ROOT %c = f32[{out}] convolution(%x, %w), {attributes}",
    )
    assert count(parse(text), ONE).flops == expected


@pytest.mark.parametrize(
    ("target", "mask", "expected"),
    [
        ("__cudnn$fmhaScaleBiasSoftmax", "NO_MASK", 4 * 2 * 3 * 16 * 16 * 64),
        ("__cudnn$fmhaScaleBiasSoftmax", "CAUSAL", 4 * 2 * 3 * 16 * 8.5 * 64),
        ("__cudnn$fmhaScaleBiasSoftmaxBackward", "NO_MASK", 10 * 2 * 3 * 16 * 16 * 64),
    ],
)
def test_flops_of_attention_kernels(target, mask, expected):
    """q [2, 16, 3, 64]; a causal query sees (16 + 1) / 2 keys in the mean."""
    text = program(
        "%q = bf16[2,16,3,64] parameter(0)",
        f'ROOT %o = bf16[2,16,3,64] custom-call(%q, %q, %q), custom_call_target="{target}", '
        'backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type"'
        f': "BF16", "dimensions": ["2", "3", "16", "16"]}}, "mask_type": "{mask}"}}}}',
    )
    assert count(parse(text), ONE).flops == expected


def test_trips_of_a_loop_that_a_tpu_leaves_to_be_read():
    loop = """%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]{0}) parameter(0)
  %n = s32[] get-tuple-element(%p), index=0
  %v = f32[4]{0} get-tuple-element(%p), index=1
  %two = s32[] constant(2)
  %next = s32[] add(%n, %two)
  ROOT %t = (s32[], f32[4]{0}) tuple(%next, %v)
}

%condition (p.1: (s32[], f32[4])) -> pred[] {
  %p.1 = (s32[], f32[4]{0}) parameter(0)
  %n.1 = s32[] get-tuple-element(%p.1), index=0
  %stop = s32[] constant(11)
  ROOT %lt = pred[] compare(%n.1, %stop), direction=LT
}
"""
    module = parse(
        program(
            "%x = f32[4]{0} parameter(0)",
            "%one = s32[] constant(1)",
            "%copied = s32[] copy(%one)",
            "%init = (s32[], f32[4]{0}) tuple(%copied, %x)",
            "ROOT %w = (s32[], f32[4]{0}) while(%init), condition=%condition, body=%body",
            before=loop,
        )
    )
    assert trip_count(module, module.entry, module.entry.root) == 5  # 1, 3, 5, 7, 9


def test_slices_move_only_themselves():
    text = program(
        "%x = f32[100,8]{1,0} parameter(0)",
        "%n = s32[] constant(3)",
        "%cut = f32[1,8]{1,0} dynamic-slice(%x, %n, %n), dynamic_slice_sizes={1,8}",
        "ROOT %put = f32[100,8]{1,0} dynamic-update-slice(%x, %cut, %n, %n)",
    )
    assert count(parse(text), ONE).bytes_moved == 4 * 32


def test_frames_of_both_forms():
    tables = """
FileNames
1 "models/stack.py"
2 "models/block.py"

FunctionNames
1 "run"
2 "Block.__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=92 end_line=92 column=1 end_column=2}
2 {file_name_id=2 function_name_id=2 line=60 end_line=60 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
"""
    module = parse(
        program(
            'ROOT %x = f32[] parameter(0), metadata={op_name="x" stack_frame_id=2}', before=tables
        )
    )
    frames = module.stack(module.entry.root)
    assert [(f.file, f.line, f.function) for f in frames] == [
        ("models/block.py", 60, "Block.__call__"),
        ("models/stack.py", 92, "run"),
    ]
    old = parse(
        program(
            'ROOT %x = f32[] parameter(0), metadata={op_name="x" source_file="a.py" source_line=7}'
        )
    )
    assert [(f.file, f.line) for f in old.stack(old.entry.root)] == [("a.py", 7)]


def test_a_text_that_is_no_program():
    with pytest.raises(ValueError, match="ENTRY"):
        parse("HloModule m\n")
