"""The chunked loss with a teacher against plain log-softmaxes in float64 on one device."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallel.mesh import MeshConfig
from parallel.rules import ParallelConfig, make_rules
from tests.jaxpr import inside
from training.distill_loss import distillation_loss
from training.features import Predictor
from training.losses import cross_entropy

B, T, D, E, V, REAL = 8, 12, 32, 48, 256, 200  # E: the teacher's width
VD, DV = "vocab -> embed", "embed -> vocab"
FULL = dict(softcaps=(5.0, 8.0), z_loss=1e-2, biased=True)


def sample():
    """Student's features, table and bias; the teacher's; targets; weights, zero for some tokens."""
    rng = np.random.default_rng(0)
    normal = lambda *shape, std=1.0: (rng.normal(size=shape) * std).astype(np.float32)
    student = normal(B, T, D), normal(V, D, std=0.3), normal(V)
    teacher = normal(B, T, E), normal(V, E, std=0.3), normal(V)
    targets = rng.integers(0, REAL, size=(B, T)).astype(np.int32)
    weights = ((rng.random((B, T)) < 0.8) / (B * T)).astype(np.float32)
    return student, teacher, targets, weights


@functools.cache
def oracle(
    kind="forward", temperature=1.0, weight=0.5, softcaps=(None, None), z_loss=0.0, biased=False
):
    """Value, KL and gradients, with all logits, in float64."""
    with jax.enable_x64(True):
        student, teacher, targets, weights = sample()
        student, teacher, weights = jax.tree.map(
            lambda a: jnp.asarray(a, jnp.float64), (student, teacher, weights)
        )

        def logits(x, table, bias, cap):
            z = jnp.einsum("btd,vd->btv", x, table)[..., :REAL]
            z = z + bias[None, None, :REAL] if biased else z
            return z if cap is None else cap * jnp.tanh(z / cap)

        def loss(student):
            z, t = logits(*student, softcaps[0]), logits(*teacher, softcaps[1])
            nll = -jnp.take_along_axis(jax.nn.log_softmax(z), targets[..., None], -1)[..., 0]
            log_q, log_p = (jax.nn.log_softmax(a / temperature) for a in (z, t))
            forward = kind == "forward"
            kl = (
                jnp.sum((log_p - log_q) * jnp.exp(log_p), -1)
                if forward
                else jnp.sum((log_q - log_p) * jnp.exp(log_q), -1)
            )
            lse = jax.nn.logsumexp(z, -1)
            each = (1 - weight) * nll + weight * temperature**2 * kl + z_loss * lse**2
            return jnp.sum(weights * each), jnp.sum(weights * kl)

        (value, kl), grads = jax.value_and_grad(loss, has_aux=True)(student)
        return float(value), float(kl), [np.asarray(g) for g in grads]


def ours(
    rules, axes=(VD, DV), chunk=5, kind="forward", temperature=1.0, weight=0.5,
    softcaps=(None, None), z_loss=0.0, biased=False, same=False,
):  # fmt: skip
    """Value, aux and gradients on the current mesh; with `same` the student is its own teacher."""
    student, teacher, targets, weights = sample()
    teacher = student if same else teacher
    targets, weights = (jax.device_put(a, rules.spec("batch seq")) for a in (targets, weights))

    def placed(x, table, bias, orientation):
        table = table if orientation == VD else table.T
        x = jax.device_put(x, rules.spec("batch seq act_embed"))
        table = jax.device_put(table, rules.in_model(orientation, table.shape))
        return [x, table] + [jax.device_put(bias, rules.in_model("vocab", (V,)))] * biased

    def predictor(arrays, orientation, cap):
        return Predictor(*arrays[:2], orientation, arrays[2] if biased else None, cap)

    def loss(student, teacher):
        return distillation_loss(
            predictor(student, axes[0], softcaps[0]),
            predictor(teacher, axes[1], softcaps[1]),
            targets,
            weights,
            rules=rules,
            vocab_size=REAL,
            kind=kind,
            temperature=temperature,
            weight=weight,
            chunk=chunk,
            z_loss=z_loss,
        )

    args = placed(*student, axes[0]), placed(*teacher, axes[1])
    (value, aux), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*args)
    assert jax.tree.map(jax.typeof, grads) == jax.tree.map(jax.typeof, args)
    assert not any(np.any(g) for g in jax.tree.leaves(grads[1])), "the teacher has no gradient"
    return value, aux, grads[0]


def relative(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


def check(result, want):
    """float32 sums of a few hundred terms: values to 2e-6; gradients, two exponentials and a
    division each, to 1e-5 of their norm.
    """
    value, aux, (d_x, d_table, *d_bias) = jax.tree.map(np.asarray, result)
    want_value, want_kl, (want_x, want_table, want_bias) = want
    assert float(value) == pytest.approx(want_value, rel=2e-6)
    assert float(aux["kl_sum"]) == pytest.approx(want_kl, rel=2e-6)
    assert relative(d_x, want_x) < 1e-5
    assert relative(d_table if d_table.shape == (V, D) else d_table.T, want_table) < 1e-5
    assert not np.any((d_table if d_table.shape == (V, D) else d_table.T)[REAL:])
    for got in d_bias:
        assert relative(got, want_bias) < 1e-5


def rules_for(zero=3, **sizes):
    return make_rules(ParallelConfig(zero=zero), MeshConfig(**({"data": 1} | sizes)).sizes(), {})


@pytest.mark.parametrize("kind", ["forward", "reverse"])
@pytest.mark.parametrize(
    ("sizes", "zero"), [({}, 0), ({"fsdp": 8}, 3), ({"data": 2, "tensor": 4}, 0)]
)
def test_value_and_gradients_are_those_of_whole_logits_on_every_layout(use_mesh, sizes, zero, kind):
    options = dict(kind=kind, temperature=2.5, weight=0.7, **FULL)
    with use_mesh(**sizes):
        check(ours(rules_for(zero, **sizes), **options), oracle(**options))


@pytest.mark.parametrize("kind", ["forward", "reverse"])
@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 1.0), (0.5, 0.2), (8.0, 1.0)])
def test_temperatures_and_weights(use_mesh, kind, temperature, weight):
    options = dict(kind=kind, temperature=temperature, weight=weight)
    with use_mesh():
        check(ours(rules_for(), (DV, VD), chunk=1000, **options), oracle(**options))


def test_a_weight_of_zero_is_the_cross_entropy_alone(use_mesh):
    with use_mesh():
        value, aux, (d_x, d_table) = ours(rules_for(), weight=0.0, z_loss=1e-2)
        (x, table, _), _, targets, weights = sample()
        want = lambda x, table: cross_entropy(
            x, table, targets, weights, rules=rules_for(), vocab_size=REAL, chunk=5, z_loss=1e-2
        )
        (plain, plain_aux), grads = jax.value_and_grad(want, (0, 1), has_aux=True)(x, table)
    # The same float32 terms, in another order of multiplication.
    assert float(value) == pytest.approx(float(plain), rel=1e-6)
    for name, number in plain_aux.items():
        assert float(aux[name]) == pytest.approx(float(number), rel=1e-6)
    for got, wanted in zip((d_x, d_table), grads, strict=True):
        assert relative(got, np.asarray(wanted)) < 1e-6


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_a_student_that_is_its_teacher_has_no_divergence_and_no_gradient(use_mesh, kind):
    sizes = {"data": 2, "tensor": 4}
    options = dict(kind=kind, temperature=2.0, weight=1.0, softcaps=(5.0, 5.0))
    with use_mesh(**sizes):
        rules = rules_for(0, **sizes)
        _, aux, grads = ours(rules, (VD, VD), same=True, **options)
        _, _, others = ours(rules, (VD, VD), **options)
    # The same bits on both sides, but that a compiler may round one division into a difference.
    assert abs(float(aux["kl_sum"])) < 1e-7
    for g, other in zip(grads, others, strict=True):
        assert np.linalg.norm(g) < 1e-6 * np.linalg.norm(other)


def shapes(jaxpr):
    """The shapes of everything that a traced program computes, inner programs included."""
    for equation in jaxpr.eqns:
        yield from (var.aval.shape for var in equation.outvars)
        for inner in inside(equation):
            yield from shapes(inner)


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_logits_of_all_tokens_exist_neither_traced_nor_compiled(use_mesh, kind):
    """Of either model, in either direction: at most a chunk's of each."""
    tokens, vocab, chunk = 2048, 4096, 16
    with use_mesh():
        rules = rules_for()
        place = lambda shape, dtype=np.float32: jax.ShapeDtypeStruct(shape, dtype)
        args = (
            place((8, tokens // 8, D)), place((vocab, D)), place((8, tokens // 8, E)),
            place((E, vocab)), place((8, tokens // 8), np.int32), place((8, tokens // 8)),
        )  # fmt: skip

        def loss(x, table, taught, other, targets, weights):
            return distillation_loss(
                Predictor(x, table), Predictor(taught, other, DV), targets, weights,
                rules=rules, vocab_size=vocab, kind=kind, temperature=2.0, weight=0.5, chunk=chunk,
            )[0]  # fmt: skip

        program = jax.value_and_grad(loss, (0, 1))
        largest = max(
            np.prod(shape)
            for shape in shapes(jax.make_jaxpr(program)(*args).jaxpr)
            if vocab in shape
        )
        compiled = jax.jit(program).lower(*args).compile()
    assert largest == max(chunk, E) * vocab  # a chunk's logits, or a table
    # All that grows with tokens x vocabulary would be 32 MiB of one model alone.
    assert compiled.memory_analysis().temp_size_in_bytes < tokens * vocab * 4 / 8
