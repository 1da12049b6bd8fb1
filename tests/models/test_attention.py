"""Every form of attention against a float64 reference, on every kind of mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.attention import MOST_ROWS, attention
from models.blocked_attention import BLOCK
from models.masks import NO_ARRAYS, Mask, MaskArrays, visible
from tests.attention import (
    FORMS,
    PREFIX,
    SEGMENTS,
    B,
    N,
    T,
    assert_near,
    inputs,
    reference,
    rules_for,
    with_gradients,
)
from tests.jaxpr import primitives

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


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "tensor": 2}], ids=str)
def test_a_bias_is_added_to_the_scores(use_mesh, sizes):
    """And gets the gradient of its scores, summed over the batch; heads divided with it."""
    q, k, v, do = inputs(kv_heads=2)
    bias = np.random.default_rng(2).normal(size=(N, T, T)).astype(np.float32)
    mask, arrays = Mask(segments=True), MaskArrays(jnp.asarray(SEGMENTS), jnp.asarray(SEGMENTS))
    with use_mesh(**sizes):
        rules = rules_for(kv_heads=2, **sizes)
        (heads,) = rules.spec("act_heads")
        lay = lambda x, names: jax.device_put(x, rules.spec(names))
        q, do = (lay(x, "batch seq act_heads head_dim") for x in (q, do))
        k, v = (lay(x, "batch seq act_kv_heads head_dim") for x in (k, v))
        bias = jax.device_put(bias, jax.P(heads, None, None))
        arrays = MaskArrays(*(lay(x, "batch seq") for x in arrays[:2]))

        @jax.jit
        def run(q, k, v, bias, do):
            core = lambda q, k, v, bias: attention(
                q, k, v, mask, arrays, rules=rules, bias_NTS=bias
            )
            o, pull = jax.vjp(core, q, k, v, bias)
            return o, *pull(do)

        *got, dbias = run(q, k, v, bias, do)
        assert jax.typeof(dbias).sharding.spec == jax.typeof(bias).sharding.spec
        seen = visible(mask, jnp.arange(T), jnp.arange(T), MaskArrays(SEGMENTS, SEGMENTS))
    q, k, v, do, seen, bias = map(np.asarray, (q, k, v, do, seen[:, 0], bias))
    *want, dwant = reference(q, k, v, do, seen, bias=bias)
    assert_near(got, want, 1e-6)  # as above
    assert np.linalg.norm(dbias - dwant) <= 1e-6 * np.linalg.norm(dwant)


@pytest.mark.parametrize("form", ["rows", "blocked", "cudnn"])
def test_forms_that_add_no_bias_are_refused(use_mesh, form):
    with use_mesh(), pytest.raises(ValueError, match=f"config.model.attention = '{form}': adds no"):
        attention(
            *inputs()[:3],
            Mask(),
            rules=rules_for(),
            implementation=form,
            bias_NTS=jnp.zeros((N, T, T)),
        )
