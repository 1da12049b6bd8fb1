"""The table of a layout: presets, overrides, what is divided at which ZeRO level, every error."""

from __future__ import annotations

import pytest
from jax.sharding import PartitionSpec as P

from parallel.mesh import MeshConfig
from parallel.rules import MEGATRON, PAIRS, PRESETS, ParallelConfig, make_rules

SIZES = MeshConfig(data=2, fsdp=2, tensor=2).sizes()
DIMS = {
    "vocab": (256, "config.model.vocab_size"),
    "heads": (8, "config.model.heads"),
    "kv_heads": (4, "config.model.kv_heads"),
    "mlp": (64, "config.model.mlp_dim"),
    "batch": (8, "config.data.batch_size"),
    "residual_seq": (16, "config.data.sequence_length"),
}
BATCH = ("data", "fsdp")


def rules(dims=DIMS, sizes=SIZES, **options):
    return make_rules(ParallelConfig(**options), sizes, dims)


def test_activations_of_the_default():
    r = rules()
    assert r.spec("batch seq act_heads head_dim") == P(BATCH, None, "tensor", None)
    assert r.spec("batch residual_seq act_embed") == P(BATCH, None, None)
    assert r.spec("batch seq act_vocab") == P(BATCH, None, "tensor")
    assert r.axes("act_mlp") == ("tensor",)
    assert r.axes("seq") == ()
    assert (r.parts("batch"), r.parts("heads"), r.parts("embed")) == (4, 2, 2)
    assert hash(r) == hash(rules())
    assert r != rules(sequence=True)


def test_sequence_parallelism_divides_the_residual_stream_alone():
    changed = dict(rules(sequence=True).table).items() - dict(rules().table).items()
    assert changed == {("residual_seq", ("tensor",))}
    assert rules(sequence=True).spec("batch residual_seq act_embed") == P(BATCH, "tensor", None)


MATRIX, BIAS, GAIN = "layers embed -> heads head_dim", "layers mlp", "layers norm"
WHOLE = [P(None, None, "tensor", None), P(None, "tensor"), P(None, None)]
DIVIDED = [P(None, "fsdp", "tensor", None), P(None, ("tensor", "fsdp")), P(None, "fsdp")]


@pytest.mark.parametrize(
    ("zero", "at_rest", "of_gradient", "in_model"),
    [
        (0, WHOLE, WHOLE, WHOLE),
        (1, DIVIDED, WHOLE, WHOLE),
        (2, DIVIDED, DIVIDED, WHOLE),
        (3, DIVIDED, DIVIDED, DIVIDED),
    ],
)
def test_what_each_zero_level_divides(zero, at_rest, of_gradient, in_model):
    r = rules(zero=zero)
    arrays = [(MATRIX, (3, 32, 8, 4)), (BIAS, (3, 64)), (GAIN, (3, 32))]
    assert [r.at_rest(*a) for a in arrays] == at_rest
    assert [r.of_gradient(*a) for a in arrays] == of_gradient
    assert [r.in_model(*a) for a in arrays] == in_model
    assert [r.gathered(*a) for a in arrays] == WHOLE


def test_the_first_dim_that_divides_is_taken_where_the_named_one_does_not():
    r = rules()
    assert r.at_rest("embed -> heads head_dim", (33, 8, 4)) == P(None, ("tensor", "fsdp"), None)
    assert r.at_rest("embed -> heads head_dim", (33, 2, 4)) == P(None, "tensor", "fsdp")
    assert r.at_rest("norm", (33,)) == P(None)  # nothing divides: whole, and no error
    assert r.at_rest("layers norm", (4, 33)) == P(None, None)  # never the scanned axis


@pytest.mark.parametrize(
    ("preset", "divided"),
    [
        ("megatron", {"vocab", "heads", "kv_heads", "mlp"}),
        ("mlp", {"vocab", "mlp"}),
        ("whole_vocab", {"heads", "kv_heads", "mlp"}),
    ],
)
def test_presets(preset, divided):
    r = rules(preset=preset)
    assert {name for name in PAIRS if r.axes(name)} == divided
    assert {name for name in PAIRS if r.axes(PAIRS[name])} == divided
    assert set(PRESETS[preset]) == set(MEGATRON)


def test_an_override_of_a_parameter_carries_its_activation_along():
    r = rules(rules={"mlp": [], "embed": []})
    assert r.axes("mlp") == r.axes("act_mlp") == r.axes("embed") == ()
    r = rules(rules={"mlp": ["tensor", "fsdp"]})  # fsdp divides weights at rest, not activations
    assert r.axes("act_mlp") == ("tensor",)
    assert r.at_rest("embed -> mlp", (31, 64)) == P(None, ("tensor", "fsdp"))
    r = rules(rules={"vocab": [], "act_vocab": ["tensor"]})  # each as it was said
    assert (r.axes("vocab"), r.axes("act_vocab")) == ((), ("tensor",))


@pytest.mark.parametrize(("kv_heads", "parts"), [(1, 1), (2, 2), (4, 4), (8, 8)])
def test_fewer_kv_heads_than_parts_are_replicated(kv_heads, parts):
    sizes = MeshConfig(data=1, tensor=8).sizes()
    r = rules(DIMS | {"kv_heads": (kv_heads, "config.model.kv_heads")}, sizes)
    whole = kv_heads < 8
    assert r.parts("kv_heads") == r.parts("act_kv_heads") == (1 if whole else parts)
    assert r.parts("heads") == r.parts("act_heads") == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero": 4}, "config.parallel.zero = 4: a ZeRO level is 0, 1, 2 or 3"),
        (
            {"preset": "fast"},
            "config.parallel.preset = 'fast': choose one of megatron, mlp, whole_vocab",
        ),
        (
            {"rules": {"width": ["tensor"]}},
            f"config.parallel.rules.width: no such logical name; there are {', '.join(MEGATRON)}",
        ),
        (
            {"rules": {"layers": ["fsdp"]}},
            "config.parallel.rules.layers = ['fsdp']: only pipe divides the scanned layers",
        ),
        (
            {"rules": {"batch": ["data"]}},
            (
                "config.parallel.rules.batch = ['data']: the batch is divided over data, fsdp and "
                "expert at least; name all three, expert last"
            ),
        ),
        (
            {"rules": {"act_experts": []}},
            (
                "config.parallel.rules.act_experts = []: the exchange of tokens between experts "
                "fixes it; leave it out"
            ),
        ),
        (
            {"rules": {"mlp": ["model"]}},
            (
                "config.parallel.rules.mlp = ['model']: a list of mesh axes of pipe, data, fsdp, "
                "context, expert, tensor"
            ),
        ),
        (
            {"rules": {"mlp": "tensor"}},
            (
                "config.parallel.rules.mlp = 'tensor': a list of mesh axes of pipe, data, fsdp, "
                "context, expert, tensor"
            ),
        ),
        (
            {"rules": {"mlp": ["tensor", "tensor"]}},
            "config.parallel.rules.mlp = ['tensor', 'tensor']: a mesh axis may be named once",
        ),
    ],
)
def test_configs_that_cannot_be(options, message):
    with pytest.raises(ValueError) as error:
        ParallelConfig(**options)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ({"act_heads": ["data"]}, "batch seq act_heads head_dim"),
        ({"seq": ["tensor"]}, "batch seq act_heads head_dim"),
        ({"residual_seq": ["data"]}, "batch residual_seq act_embed"),
        ({"act_mlp": ["fsdp"]}, "batch seq act_mlp"),
        ({"act_vocab": ["data"]}, "batch seq act_vocab"),
    ],
)
def test_collisions_of_activations_are_refused_at_once(overrides, names):
    (axes,) = overrides.values()
    with pytest.raises(ValueError) as error:
        rules(rules=overrides)
    assert str(error.value) == (
        f"config.parallel.rules: '{names}' would be divided twice over mesh axis {axes[0]}; give "
        f"its dims different axes"
    )


def test_a_collision_of_a_parameter_is_refused():
    r = rules(rules={"embed": ["tensor"]})
    with pytest.raises(ValueError) as error:
        r.at_rest("embed -> mlp", (32, 64))
    assert str(error.value) == (
        "config.parallel.rules: 'embed -> mlp' would be divided twice over mesh axis tensor; give "
        "its dims different axes"
    )


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        (
            "batch",
            6,
            (
                "config.data.batch_size = 6 does not divide by config.mesh.data = 2 x "
                "config.mesh.fsdp = 2; choose a multiple of 4"
            ),
        ),
        (
            "heads",
            3,
            (
                "config.model.heads = 3 does not divide by config.mesh.tensor = 2; choose a "
                "multiple of 2"
            ),
        ),
        (
            "kv_heads",
            3,
            (
                "config.model.kv_heads = 3 does not divide by config.mesh.tensor = 2; choose a "
                "multiple of 2"
            ),
        ),
        (
            "mlp",
            65,
            (
                "config.model.mlp_dim = 65 does not divide by config.mesh.tensor = 2; choose a "
                "multiple of 2"
            ),
        ),
        (
            "residual_seq",
            15,
            (
                "config.data.sequence_length = 15 does not divide by config.mesh.tensor = 2; "
                "choose a multiple of 2"
            ),
        ),
    ],
)
def test_dims_that_do_not_divide_name_their_keys(name, size, message):
    with pytest.raises(ValueError) as error:
        rules(DIMS | {name: (size, DIMS[name][1])}, sequence=True)
    assert str(error.value) == message


def test_what_is_not_divided_need_not_divide():
    rules(DIMS | {"heads": (3, "h"), "kv_heads": (3, "k")}, preset="mlp")
    rules(DIMS | {"residual_seq": (15, "t")})
