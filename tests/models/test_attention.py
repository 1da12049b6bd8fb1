"""Every form of attention against a float64 reference, on every kind of mask and mesh."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from models.attention import MOST_ROWS, attention
from models.blocked_attention import BLOCK
from models.masks import NO_ARRAYS, Mask, MaskArrays, visible
from parallel.mesh import AXES, MeshConfig
from parallel.rules import ParallelConfig, Rules, make_rules

B, T, N, H = 2, 20, 4, 8
SEGMENTS = np.array([[1] * 9 + [2] * 8 + [0] * 3, [1] * 3 + [2] * 17], np.int32)
PREFIX = np.array([7, 0], np.int32)
FORMS = ["xla", "rows", "blocked"]


def rules_for(batch: int = B, heads: int = N, kv_heads: int = N, **sizes: int) -> Rules:
    dims = {
        "batch": (batch, "batch"),
        "heads": (heads, "heads"),
        "kv_heads": (kv_heads, "kv_heads"),
    }
    return make_rules(ParallelConfig(), MeshConfig(**({"data": 1} | sizes)).sizes(), dims)


def inputs(batch=B, q_length=T, k_length=T, heads=N, kv_heads=N, head_dim=H, dtype=np.float32):
    """q, k, v and the gradient of the output."""
    random = np.random.default_rng(0)
    q_shape, k_shape = (
        (batch, q_length, heads, head_dim),
        (batch, k_length, kv_heads, head_dim),
    )
    return [random.normal(size=s).astype(dtype) for s in (q_shape, k_shape, k_shape, q_shape)]


def reference(q, k, v, do, seen, softcap=None, scale=None):
    """o, dq, dk, dv in float64, from the definition; `seen` is [B, T, S]."""
    q, k, v, do = (np.asarray(x, np.float64) for x in (q, k, v, do))
    group = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, group, 2), np.repeat(v, group, 2)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s = np.einsum("btnh,bsnh->bnts", q, k) * scale
    slope = np.ones_like(s)
    if softcap is not None:
        s, slope = softcap * np.tanh(s / softcap), 1 / np.cosh(s / softcap) ** 2
    e = np.exp(s) * seen[:, None]
    total = e.sum(-1, keepdims=True)
    p = e / np.where(total == 0, 1, total)
    o = np.einsum("bnts,bsnh->btnh", p, v)
    dp = np.einsum("btnh,bsnh->bnts", do, v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * slope * scale
    dq = np.einsum("bnts,bsnh->btnh", ds, k)
    dk = np.einsum("bnts,btnh->bsnh", ds, q)
    dv = np.einsum("bnts,btnh->bsnh", p, do)
    shape = (*k.shape[:2], -1, group, k.shape[-1])
    return o, dq, dk.reshape(shape).sum(3), dv.reshape(shape).sum(3)


def with_gradients(mask: Mask, rules: Rules, **options):
    """A jitted (q, k, v, do, arrays) -> (o, dq, dk, dv)."""

    def run(q, k, v, do, arrays):
        core = lambda q, k, v: attention(q, k, v, mask, arrays, rules=rules, **options)
        o, pull = jax.vjp(core, q, k, v)
        return (o, *pull(do))

    return jax.jit(run)


def assert_near(got, want, tolerance):
    """Each of o, dq, dk, dv to `tolerance` of its norm."""
    for name, x, y in zip(("o", "dq", "dk", "dv"), got, want, strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y), name


def primitives(jaxpr, name: str) -> Iterator:
    """All equations of a primitive, also inside other equations."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == name:
            yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from primitives(inner, name)


CASES = [  # mask, kv heads, softcap, block
    (Mask(), 4, None, 8),
    (Mask(causal=False), 4, None, 8),
    (Mask(causal=False), 1, 2.0, 20),
    (Mask(window=3), 2, None, 5),
    (Mask(window=11), 1, None, 8),
    (Mask(causal=False, window=4), 2, None, 8),
    (Mask(prefix=True), 4, 1.5, 8),
    (Mask(segments=True), 2, None, 8),
    (Mask(window=6, segments=True), 2, 3.0, 7),
    (Mask(causal=False, segments=True), 4, None, 8),
    (Mask(window=9, prefix=True, segments=True), 1, 2.0, 8),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("mask", "kv_heads", "softcap", "block"), CASES, ids=str)
def test_forms_are_the_reference(use_mesh, form, mask, kv_heads, softcap, block):
    arrays = MaskArrays(jnp.asarray(SEGMENTS), jnp.asarray(SEGMENTS), jnp.asarray(PREFIX))
    with use_mesh():
        rules = rules_for(kv_heads=kv_heads)
        run = with_gradients(mask, rules, implementation=form, softcap=softcap, block=block)
        data = inputs(kv_heads=kv_heads)
        seen = visible(mask, jnp.arange(T), jnp.arange(T), arrays)
        seen = np.broadcast_to(np.asarray(seen)[:, 0], (B, T, T))
        # float32 rounds at 6e-8; sums of at most 20 terms of either sign
        assert_near(run(*data, arrays), reference(*data, seen, softcap), 1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_cross_attention_of_other_lengths(use_mesh, form):
    """An encoder-decoder: 20 queries, 13 keys, padding on both sides."""
    segments = [np.array([[1] * (n - 4) + [0] * 4, [1] * n], np.int32) for n in (20, 13)]
    mask, data = Mask(causal=False, segments=True), inputs(k_length=13, kv_heads=2)
    with use_mesh():
        run = with_gradients(mask, rules_for(kv_heads=2), implementation=form, block=8, scale=0.3)
        got = run(*data, MaskArrays(*segments))
    seen = (segments[0][:, :, None] == segments[1][:, None]) & (segments[0][:, :, None] > 0)
    assert_near(got, reference(*data, seen, scale=0.3), 1e-6)  # as above


def test_the_reference_is_that_of_jax(use_mesh):
    data = inputs(kv_heads=2)
    with use_mesh():
        o, pull = jax.vjp(
            lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True), *data[:3]
        )
        want = (o, *pull(jnp.asarray(data[3])))
    seen = np.broadcast_to(np.tril(np.ones((T, T), bool)), (B, T, T))
    assert_near(want, reference(*data, seen), 1e-6)  # as above


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_see_nothing_give_zeros(use_mesh, form):
    """Padding, and a query before its window's first key: no NaN forward or backward."""
    segments = jnp.zeros((B, T), jnp.int32).at[0, :6].set(1)
    data = inputs()
    with use_mesh():
        run = with_gradients(Mask(segments=True), rules_for(), implementation=form, block=8)
        got = [np.asarray(x) for x in run(*data, MaskArrays(segments, segments))]
        for x in got:
            assert np.all(np.isfinite(x))
            assert np.all(x[0, 6:] == 0)
            assert np.all(x[1] == 0)
            assert np.all(np.any(x[0, :6] != 0, -1)) or x is got[1]  # query 0 has a choice of one
        # 20 queries, 4 keys, window 2: the last queries see nothing, statically
        data = inputs(k_length=4)
        got = with_gradients(Mask(window=2), rules_for(), implementation=form, block=4)(
            *data, NO_ARRAYS
        )
        assert all(np.all(np.isfinite(x)) for x in got)
        assert np.all(np.asarray(got[0])[:, 5:] == 0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", [Mask(), Mask(window=5, segments=True)], ids=str)
def test_gradients_prove_what_is_seen(use_mesh, form, mask):
    """o[t] has a gradient in v[s] and k[s] exactly where t sees s."""
    arrays = MaskArrays(jnp.asarray(SEGMENTS), jnp.asarray(SEGMENTS))
    q, k, v, _ = inputs()
    with use_mesh():
        run = with_gradients(mask, rules_for(), implementation=form, block=8)
        seen = np.asarray(visible(mask, jnp.arange(T), jnp.arange(T), arrays))
        seen = np.broadcast_to(seen[:, 0], (B, T, T))
        for t in (0, 3, 7, 8, 13, 19):
            do = np.zeros_like(q)
            do[:, t] = np.random.default_rng(t).normal(size=do[:, t].shape)
            _, dq, dk, dv = (np.asarray(x) for x in run(q, k, v, do, arrays))
            np.testing.assert_array_equal(np.any(dv != 0, (2, 3)), seen[:, t])
            assert not np.any(dk[~seen[:, t]])
            assert not np.any(np.delete(dq, t, 1))


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


@pytest.mark.parametrize("form", FORMS)
def test_dropout_drops_its_share_and_scales_the_rest(use_mesh, form):
    length, rate = 48, 0.25
    q, k, _, _ = inputs(4, length, length, 4, 4, length)
    v = np.broadcast_to(np.eye(length, dtype=np.float32)[None, :, None], k.shape)
    with use_mesh():
        options = {"rules": rules_for(4), "implementation": form, "block": 16}
        run = lambda key, rate: attention(
            q, k, v, Mask(causal=False), dropout_rate=rate, dropout_key=key, **options
        )
        run = jax.jit(run, static_argnums=1)
        p = np.asarray(run(jax.random.key(0), 0.0))  # v reads out the probabilities
        dropped = np.asarray(run(jax.random.key(0), rate))
        other = np.asarray(run(jax.random.key(1), rate))
    zero = dropped == 0
    # 36864 draws: a standard deviation of 0.0023
    assert abs(zero.mean() - rate) < 0.01
    np.testing.assert_allclose(dropped[~zero], p[~zero] / (1 - rate), rtol=1e-5)
    assert abs((zero & (other == 0)).mean() - rate**2) < 0.01  # another key, another mask
    # No block, row of the batch or head repeats the mask of another.
    blocks = [
        zero[b, i : i + 16, n, j : j + 16].tobytes()
        for b in range(4) for n in range(4) for i in (0, 16, 32) for j in (0, 16, 32)
    ]  # fmt: skip
    assert len(set(blocks)) == len(blocks)


def test_gradients_of_dropout_are_of_the_same_mask(use_mesh):
    """Linear in v, whatever was dropped: <do, o> = <dv, v>; q and k by small steps."""
    q, k, v, do = inputs()
    options = {"dropout_rate": 0.3, "dropout_key": jax.random.key(0), "block": 8}
    for form in FORMS:
        with use_mesh():
            run = with_gradients(Mask(), rules_for(), implementation=form, **options)
            o, dq, dk, dv = run(q, k, v, do, NO_ARRAYS)
            np.testing.assert_allclose(np.vdot(do, o), np.vdot(v, dv), rtol=1e-5)
            step = 1e-2 * np.random.default_rng(1).normal(size=q.shape).astype(np.float32)
            for place, gradient in ((0, dq), (1, dk)):
                moved = [[q, k, v, do, NO_ARRAYS] for _ in range(2)]
                moved[0][place], moved[1][place] = moved[0][place] + step, moved[1][place] - step
                up, down = (np.vdot(do, run(*m)[0]) for m in moved)
                # central differences: rounding 1e-6 over a step of 1e-2, plus its square
                np.testing.assert_allclose((up - down) / 2, np.vdot(gradient, step), rtol=5e-3)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_is_near_and_keeps_its_dtype(use_mesh, form):
    data = inputs(kv_heads=2, dtype=jnp.bfloat16)
    with use_mesh():
        run = with_gradients(Mask(), rules_for(kv_heads=2), implementation=form, block=8)
        got = run(*data, NO_ARRAYS)
    assert all(x.dtype == jnp.bfloat16 for x in got)
    seen = np.broadcast_to(np.tril(np.ones((T, T), bool)), (B, T, T))
    # bfloat16 rounds at 4e-3: probabilities, score gradients and results are rounded once each
    assert_near(got, reference(*data, seen), 1e-2)


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


def test_auto_goes_by_the_length(use_mesh):
    """On CPU: whole, then rows of blocks, then a loop over pairs of blocks."""
    with use_mesh():
        for blocks, products, scans in ((1, 2, 0), (2, 4, 0), (MOST_ROWS + 1, 2, 1)):
            length = blocks * BLOCK
            run = lambda q, k, v: attention(q, k, v, Mask(), rules=rules_for())
            jaxpr = jax.make_jaxpr(run)(*inputs(q_length=length, k_length=length)[:3]).jaxpr
            assert len(list(primitives(jaxpr, "dot_general"))) == products
            assert len(list(primitives(jaxpr, "scan"))) == scans


@pytest.mark.parametrize(
    ("implementation", "message"),
    [
        (
            "flash",
            "config.model.attention = 'flash': choose one of auto, xla, rows, blocked, cudnn",
        ),
        (
            "cudnn",
            (
                "config.model.attention = 'cudnn': cuDNN runs on NVIDIA GPUs and this mesh is of "
                "cpu; choose auto, xla, rows or blocked"
            ),
        ),
    ],
)
def test_an_implementation_that_cannot_run_is_refused(use_mesh, implementation, message):
    with use_mesh(), pytest.raises(ValueError) as error:
        attention(*inputs()[:3], Mask(), rules=rules_for(), implementation=implementation)
    assert str(error.value) == message
