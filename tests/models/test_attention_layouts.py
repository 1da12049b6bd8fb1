"""Every form of attention on every mesh, under rematerialisation and in a pipeline."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from models.attention import attention
from models.masks import NO_ARRAYS, Mask, MaskArrays
from parallel.mesh import AXES
from tests.attention import FORMS, SEGMENTS, assert_near, inputs, rules_for, with_gradients
from tests.jaxpr import primitives

MESHES = [{"data": 2, "tensor": 4}, {"fsdp": 8}, {"tensor": 8}]


@pytest.mark.parametrize(
    ("form", "rate"),
    [
        ("xla", 0.2),
        ("blocked", 0.0),
        pytest.param("blocked", 0.2, marks=pytest.mark.slow),  # 8 compilations of threefry
    ],
)
def test_meshes_compute_the_same(use_mesh, form, rate):
    """8 query heads, 2 K/V heads: replicated where tensor is 4 or 8. With dropout: one mask."""
    shape = {"batch": 8, "heads": 8, "kv_heads": 2}
    data = inputs(**shape)
    segments = np.tile(SEGMENTS, (4, 1))

    def run(sizes):
        rules = rules_for(**shape, **sizes)
        q_spec, k_spec, segment_spec = (
            rules.spec(f"batch seq {names}".strip())
            for names in ("act_heads head_dim", "act_kv_heads head_dim", "")
        )
        with use_mesh(**sizes):
            q, k, v, do = (
                jax.device_put(x, spec)
                for x, spec in zip(data, (q_spec, k_spec, k_spec, q_spec), strict=True)
            )
            s = jax.device_put(segments, segment_spec)
            out = with_gradients(
                Mask(segments=True),
                rules,
                implementation=form,
                block=8,
                dropout_rate=rate,
                dropout_key=jax.random.key(3),
            )(q, k, v, do, MaskArrays(s, s))
            for x, like in zip(out, (q, q, k, v), strict=True):
                assert jax.typeof(x) == jax.typeof(like)
            return [np.asarray(x) for x in out]

    want = run({})
    for sizes in MESHES:
        # One other bit of the dropout mask would be seen at 1e-2; sums over devices are reordered.
        assert_near(run(sizes), want, 1e-6)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tensor"), [(8, 2, 2), (8, 2, 4), (8, 2, 8), (8, 1, 4)]
)
def test_each_device_hands_cudnn_the_keys_of_its_heads(
    use_mesh, monkeypatch, heads, kv_heads, tensor
):
    """But for the first case, key and value heads are whole on every device."""
    kernel = jax.nn.dot_product_attention

    def of_xla(*args, implementation, **kwargs):
        assert implementation == "cudnn"
        return kernel(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", of_xla)
    monkeypatch.setattr("models.attention._not_for_cudnn", lambda *_: None)
    shape = {"batch": 2, "heads": heads, "kv_heads": kv_heads}
    q, k, v, do = inputs(**shape)
    rules = rules_for(**shape, tensor=tensor)

    def run(implementation):
        return with_gradients(Mask(segments=True), rules, implementation=implementation)(
            *(jax.device_put(x, spec) for x, spec in zip((q, k, v, do), specs, strict=True)),
            MaskArrays(SEGMENTS, SEGMENTS),
        )

    q_spec = rules.spec("batch seq act_heads head_dim")
    k_spec = rules.spec("batch seq act_kv_heads head_dim")
    specs = (q_spec, k_spec, k_spec, q_spec)
    with use_mesh(tensor=tensor):
        assert_near(run("cudnn"), run("xla"), 1e-5)  # sums of other lengths


SAVED = {
    "xla": ("query", "key", "value", "attention_probs"),
    "rows": ("query", "key", "value", "attention_out", "attention_lse"),
    "blocked": ("query", "key", "value", "attention_out", "attention_lse"),
}


@pytest.mark.parametrize("form", FORMS)
def test_named_residuals_spare_everything_quadratic(use_mesh, form):
    """Under `scan` and `checkpoint`: saving by name leaves no product with keys to redo."""
    q, k, v, do = inputs()
    rules = rules_for()

    def loss(q, k, v, policy):
        def layer(x, _):
            names = [checkpoint_name(y, n) for y, n in ((x, "query"), (k, "key"), (v, "value"))]
            return attention(*names, Mask(), rules=rules, implementation=form, block=8), None

        body = layer if policy is None else jax.checkpoint(layer, policy=policy)
        return jnp.sum(jax.lax.scan(body, q, None, length=2)[0] * do)

    policies = {
        "none": None,
        "saved": jax.checkpoint_policies.save_only_these_names(*SAVED[form]),
        "full": jax.checkpoint_policies.nothing_saveable,
    }
    with use_mesh():
        products, gradients = {}, {}
        for name, policy in policies.items():
            grad = jax.grad(lambda q, k, v, policy=policy: loss(q, k, v, policy), (0, 1, 2))
            jaxpr = jax.make_jaxpr(grad)(q, k, v).jaxpr
            products[name] = len(list(primitives(jaxpr, "dot_general")))
            gradients[name] = jax.jit(grad)(q, k, v)
    # xla: 2 forward, 4 backward. blocked: 2 forward, 5 backward. full: the forward again, less what
    # only the output needs. rows: as blocked, three times.
    want = {"xla": (6, 6, 7), "rows": (21, 21, 27), "blocked": (7, 7, 9)}[form]
    assert (products["none"], products["saved"], products["full"]) == want
    for name in ("saved", "full"):
        for x, y in zip(gradients[name], gradients["none"], strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)  # other fusions


def test_blocked_memory_is_linear_in_the_length(use_mesh):
    rules = rules_for(batch=1, heads=2)

    def temporaries(length, form):
        shapes = [jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)] * 4
        run = with_gradients(Mask(), rules, implementation=form)
        return run.lower(*shapes, NO_ARRAYS).compile().memory_analysis().temp_size_in_bytes

    with use_mesh():
        blocked = {length: temporaries(length, "blocked") for length in (1024, 2048, 4096)}
        xla = temporaries(2048, "xla")
    assert blocked[2048] < 2.05 * blocked[1024]
    assert blocked[4096] < 2.05 * blocked[2048]
    probabilities = 4 * 2 * 2048**2
    assert xla > probabilities  # the measure sees what is quadratic
    assert blocked[2048] < probabilities / 8


@pytest.mark.parametrize("form", FORMS)
def test_inside_a_pipeline_stage(use_mesh, form):
    """Under `shard_map` with only `pipe` Manual: every stage attends to its own microbatch."""
    sizes = {"data": 2, "pipe": 2, "tensor": 2}
    mesh = jax.make_mesh(
        tuple(sizes.get(axis, 1) for axis in AXES), AXES, axis_types=(AxisType.Explicit,) * 6
    )
    rules = rules_for(batch=4, data=2, tensor=2)
    data = [np.stack([x, x[::-1]]) for x in inputs(batch=4)]  # one microbatch a stage
    spec = rules.spec("batch seq act_heads head_dim")
    options = {"implementation": form, "block": 8, "dropout_rate": 0.1}
    options["dropout_key"] = jax.random.key(0)

    def stage(q, k, v, do):
        run = with_gradients(Mask(), rules, **options)
        return tuple(x[None] for x in run(q[0], k[0], v[0], do[0], NO_ARRAYS))

    with jax.set_mesh(mesh):
        sharded = [jax.device_put(x, P("pipe", *spec)) for x in data]
        staged = jax.shard_map(stage, in_specs=P("pipe"), out_specs=P("pipe"), axis_names={"pipe"})
        got = jax.jit(staged)(*sharded)
    with use_mesh():
        run = with_gradients(Mask(), rules_for(batch=4), **options)
        for microbatch in range(2):
            want = run(*(x[microbatch] for x in data), NO_ARRAYS)
            # as between meshes
            assert_near([np.asarray(x)[microbatch] for x in got], want, 1e-6)
