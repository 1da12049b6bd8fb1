"""The loss head on every layout against a plain log-softmax in float64 on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from parallel.mesh import AXES, MeshConfig
from parallel.rules import ParallelConfig, make_rules
from training.losses import LossConfig, cross_entropy, token_scores

B, T, D, V, REAL = 8, 12, 32, 256, 200
FULL = {"softcap": 5.0, "z_loss": 1e-2}
VD, DV = "vocab -> embed", "embed -> vocab"


def sample():
    rng = np.random.default_rng(0)
    x_BTD = rng.normal(size=(B, T, D)).astype(np.float32)
    table_VD = rng.normal(size=(V, D)).astype(np.float32)
    targets_BT = rng.integers(0, REAL, size=(B, T)).astype(np.int32)
    weights_BT = ((rng.random((B, T)) < 0.8) / (B * T)).astype(np.float32)
    return x_BTD, table_VD, targets_BT, weights_BT


def sample_bias():
    return np.random.default_rng(1).normal(size=V).astype(np.float32)


@functools.cache
def oracle(softcap=None, z_loss=0.0, biased=False):
    """Loss, nll of each token, and gradients, with all logits, in float64."""
    with jax.enable_x64(True):
        x, table, targets, weights = sample()
        x, table, weights = (jnp.asarray(a, jnp.float64) for a in (x, table, weights))
        bias = (jnp.asarray(sample_bias(), jnp.float64),) if biased else ()

        def loss(x, table, *bias):
            logits = jnp.einsum("btd,vd->btv", x, table)[..., :REAL]
            for b in bias:
                logits += b[None, None, :REAL]
            if softcap is not None:
                logits = softcap * jnp.tanh(logits / softcap)
            nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
            lse = jax.nn.logsumexp(logits, -1)
            hits = jnp.sum(weights * (jnp.argmax(logits, -1) == targets))
            return jnp.sum(weights * (nll + z_loss * lse**2)), (nll, hits)

        of = (0, 1, 2) if biased else (0, 1)
        (value, (nll, hits)), grads = jax.value_and_grad(loss, of, has_aux=True)(x, table, *bias)
        return float(value), np.asarray(nll), float(hits), [np.asarray(g) for g in grads]


def ours(rules, axes=VD, dtype=jnp.float32, chunk=5, biased=False, **options):
    """Loss, aux and gradients of the sharded head on the current mesh."""
    x, table, targets, weights = sample()
    table = table if axes == VD else table.T
    x = jax.device_put(x.astype(dtype), rules.spec("batch seq act_embed"))
    table = jax.device_put(table.astype(dtype), rules.in_model(axes, table.shape))
    targets, weights = (jax.device_put(a, rules.spec("batch seq")) for a in (targets, weights))
    args = [x, table]
    if biased:
        args.append(jax.device_put(sample_bias().astype(dtype), rules.in_model("vocab", (V,))))

    def loss(x, table, bias=None):
        return cross_entropy(
            x,
            table,
            targets,
            weights,
            rules=rules,
            vocab_size=REAL,
            table_axes=axes,
            bias=bias,
            chunk=chunk,
            **options,
        )

    of = tuple(range(len(args)))
    (value, aux), grads = jax.jit(jax.value_and_grad(loss, of, has_aux=True))(*args)
    assert jax.tree.map(jax.typeof, grads) == tuple(map(jax.typeof, args))
    return value, aux, grads


def relative(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


def check(result, want, loss_tolerance=1e-6, gradient_tolerance=1e-5):
    """float32 sums of at most a few hundred terms: 1e-6; gradients to 1e-5 of their norm."""
    value, aux, (d_x, d_table, *d_bias) = jax.tree.map(np.asarray, result)
    want_value, want_nll, want_hits, (want_d_x, want_d_table, *want_d_bias) = want
    assert float(value) == pytest.approx(want_value, rel=loss_tolerance)
    assert float(aux["nll_sum"]) == pytest.approx(
        np.sum(sample()[3] * want_nll), rel=loss_tolerance
    )
    assert relative(d_x, want_d_x) < gradient_tolerance
    if d_table.shape != want_d_table.shape:
        d_table = d_table.T
    assert relative(d_table, want_d_table) < gradient_tolerance
    assert not np.any(d_table[REAL:]), "padded rows get no gradient"
    for got, wanted in zip(d_bias, want_d_bias, strict=True):
        assert relative(got, wanted) < gradient_tolerance
        assert not np.any(got[REAL:])
    return aux, want_hits


def rules_for(zero=3, **sizes):
    return make_rules(ParallelConfig(zero=zero), MeshConfig(**({"data": 1} | sizes)).sizes(), {})


LAYOUTS = [
    ({}, 0),
    ({"data": 8}, 0),
    ({"fsdp": 8}, 0),
    ({"fsdp": 8}, 2),
    ({"fsdp": 8}, 3),
    ({"data": 2, "tensor": 4}, 0),
    ({"data": 2, "fsdp": 2, "tensor": 2}, 3),
]


@pytest.mark.parametrize(("sizes", "zero"), LAYOUTS)
def test_loss_and_gradients_equal_log_softmax_on_every_layout(use_mesh, sizes, zero):
    with use_mesh(**sizes):
        result = ours(rules_for(zero, **sizes), **FULL)
    aux, want_hits = check(result, oracle(**FULL))
    assert float(aux["correct_sum"]) == pytest.approx(want_hits, rel=1e-6)


@pytest.mark.parametrize(("sizes", "zero"), LAYOUTS)
def test_a_bias_of_the_vocabulary_on_every_layout(use_mesh, sizes, zero):
    with use_mesh(**sizes):
        rules = rules_for(zero, **sizes)
        if sizes.get("tensor", 1) > 1:
            assert rules.in_model("vocab", (V,)) != P(), "else this test divides nothing"
        result = ours(rules, biased=True, **FULL)
    aux, want_hits = check(result, oracle(biased=True, **FULL))
    assert float(aux["correct_sum"]) == pytest.approx(want_hits, rel=1e-6)
    assert abs(oracle(biased=True, **FULL)[0] - oracle(**FULL)[0]) > 0.01, "else it says little"


@pytest.mark.parametrize("axes", [VD, DV])
@pytest.mark.parametrize("chunk", [1, 12, 1000])
def test_chunk_size_and_orientation_change_nothing(use_mesh, axes, chunk):
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    with use_mesh(**sizes):
        check(ours(rules_for(**sizes), axes, chunk=chunk), oracle())


def test_table_whose_embed_dim_does_not_divide_is_gathered_over_vocab(use_mesh):
    sizes = {"fsdp": 4, "tensor": 2}
    rules = rules_for(**sizes)
    assert rules.in_model(VD, (V, 30))[0] == ("tensor", "fsdp")
    with use_mesh(**sizes):
        tokens = rules.spec("batch seq")
        x = jax.device_put(np.ones((4, 3, 30), np.float32), rules.spec("batch seq act_embed"))
        table = np.random.default_rng(0).normal(size=(V, 30)).astype(np.float32)
        targets = jax.device_put(np.full((4, 3), 7, np.int32), tokens)
        placed = jax.device_put(table, rules.in_model(VD, table.shape))
        weights = jax.device_put(np.ones((4, 3), np.float32), tokens)
        loss = lambda t: cross_entropy(x, t, targets, weights, rules=rules, vocab_size=V)[0]
        value, grad = jax.jit(jax.value_and_grad(loss))(placed)
    logits = table.sum(1)
    softmax = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert float(value) == pytest.approx(-12 * np.log(softmax[7]), rel=1e-6)
    want = 12 * (softmax - (np.arange(V) == 7))[:, None] * np.ones((1, 30))
    assert relative(grad, want) < 1e-5


def test_bfloat16_gradients_are_scaled_before_the_cast(use_mesh):
    with use_mesh(data=2, tensor=4):
        result = ours(rules_for(0, data=2, tensor=4), dtype=jnp.bfloat16)
    # bfloat16 has 8 bits: inputs and dlogits are each rounded by 2^-9 at most; errors average out.
    check(result, oracle(), loss_tolerance=5e-3, gradient_tolerance=2e-2)


def test_float16_with_a_large_loss_scale_stays_finite_and_exact(use_mesh):
    """1 / tokens alone would underflow float16; with the scale in the weights nothing is lost."""
    scale = 2.0**15
    with use_mesh(data=8):
        rules = rules_for(0, data=8)
        x, table, targets, weights = sample()
        tokens = rules.spec("batch seq")
        x = jax.device_put(x.astype(np.float16), rules.spec("batch seq act_embed"))
        table = jax.device_put(table.astype(np.float16), rules.in_model(VD, table.shape))
        targets, weights = (
            jax.device_put(a, tokens) for a in (targets, weights * np.float32(1e-4))
        )
        loss = lambda x, w: cross_entropy(x, table, targets, w, rules=rules, vocab_size=REAL)[0]
        grad = jax.jit(jax.grad(loss))
        scaled, unscaled = grad(x, weights * scale), grad(x, weights)
    want = oracle()[3][0] * 1e-4
    # float16 has 11 bits, so products of two rounded factors are good to about 1e-3.
    assert relative(np.asarray(scaled, np.float64) / scale, want) < 3e-3
    assert relative(unscaled, want) > 1e-2, "else this test does not see underflow"


def test_a_scaled_loss_scales_its_gradient(use_mesh):
    with use_mesh(data=8):
        rules = rules_for(0, data=8)
        x, table, targets, weights = sample()
        x = jax.device_put(x, rules.spec("batch seq act_embed"))
        targets, weights = (jax.device_put(a, rules.spec("batch seq")) for a in (targets, weights))
        table = jax.device_put(table, P(None, None))
        loss = lambda x: (
            3.0 * cross_entropy(x, table, targets, weights, rules=rules, vocab_size=REAL)[0]
        )
        assert relative(jax.jit(jax.grad(loss))(x), 3 * oracle()[3][0]) < 1e-5


def test_evaluation_scores_each_token(use_mesh):
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    with use_mesh(**sizes):
        rules = rules_for(**sizes)
        x, table, targets, weights = sample()
        x = jax.device_put(x, rules.spec("batch seq act_embed"))
        table = jax.device_put(table, rules.in_model(VD, table.shape))
        targets = jax.device_put(targets, rules.spec("batch seq"))
        bias = jax.device_put(sample_bias(), rules.in_model("vocab", (V,)))
        how = {"rules": rules, "vocab_size": REAL, "chunk": 5, "softcap": 5.0}
        head = jax.jit(lambda x, t, y, b: token_scores(x, t, y, bias=b, **how))
        nll_BT, most_likely_BT = head(x, table, targets, bias)
        program = head.lower(x, table, targets, bias).compile().as_text()
    want = oracle(softcap=5.0, biased=True)
    np.testing.assert_allclose(nll_BT, want[1], rtol=2e-6, atol=2e-6)
    assert np.sum(weights * most_likely_BT) == pytest.approx(want[2], rel=1e-5)
    # Without differentiation there is one product, the logits: no gradient is formed and dropped.
    assert program.count(" dot(") == 1


def compiled_temporaries(rules, tokens, vocab, with_gradient):
    def place(shape, dtype, spec):
        return jax.ShapeDtypeStruct(
            shape, dtype, sharding=jax.NamedSharding(jax.sharding.get_mesh(), spec)
        )

    x = place((8, tokens // 8, D), np.float32, rules.spec("batch seq act_embed"))
    table = place((vocab, D), np.float32, rules.in_model(VD, (vocab, D)))
    targets = place((8, tokens // 8), np.int32, rules.spec("batch seq"))
    weights = place((8, tokens // 8), np.float32, rules.spec("batch seq"))
    loss = lambda x, t, y, w: cross_entropy(x, t, y, w, rules=rules, vocab_size=vocab, chunk=16)[0]
    program = jax.value_and_grad(loss, (0, 1)) if with_gradient else loss
    compiled = jax.jit(program).lower(x, table, targets, weights).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("with_gradient", [True, False])
def test_logits_of_the_whole_batch_never_exist(use_mesh, with_gradient):
    vocab, devices = 4096, 8
    with use_mesh(data=4, tensor=2):
        rules = rules_for(0, data=4, tensor=2)
        few, many = (compiled_temporaries(rules, n, vocab, with_gradient) for n in (1024, 4096))
    assert many < 4096 * vocab * 4 / devices / 2, "half of the logits' bytes on one device"
    # Four times the tokens: more hidden states and their gradients (a few times D floats a token),
    # not more logits (vocab / 2 = 64 D floats a token).
    assert many - few < (4096 - 1024) / 4 * 4 * D * 4


def test_nests_inside_a_program_that_is_manual_over_another_axis():
    """As the last stage of a pipeline calls it: `pipe` is Manual already."""
    sizes = {"pipe": 2, "data": 2, "fsdp": 1, "context": 1, "expert": 1, "tensor": 2}
    mesh = Mesh(
        np.array(jax.devices()).reshape(*sizes.values()), AXES, axis_types=(AxisType.Explicit,) * 6
    )
    rules = make_rules(ParallelConfig(zero=0), sizes, {})
    with jax.set_mesh(mesh):
        x, table, targets, weights = sample()
        x = jax.device_put(x, rules.spec("batch seq act_embed"))
        table = jax.device_put(table, rules.in_model(VD, table.shape))
        targets, weights = (jax.device_put(a, rules.spec("batch seq")) for a in (targets, weights))

        def stage(x, table, targets, weights):
            loss = lambda x, t: cross_entropy(
                x, t, targets, weights, rules=rules, vocab_size=REAL, chunk=5, **FULL
            )
            return jax.value_and_grad(loss, (0, 1), has_aux=True)(x, table)

        staged = jax.shard_map(
            stage, in_specs=(P(),) * 4, out_specs=P(), axis_names={"pipe"}, check_vma=False
        )
        (value, aux), grads = jax.jit(staged)(x, table, targets, weights)
    check((value, aux, grads), oracle(**FULL))


@pytest.mark.parametrize("values", [{"chunk": 0}, {"z_loss": -1.0}])
def test_config_names_the_key(values):
    with pytest.raises(ValueError, match=f"config.loss.{next(iter(values))} = "):
        LossConfig(**values)
