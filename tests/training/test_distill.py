"""A step with a teacher: the loss of whole logits, on every layout; bytes; what it leaves alone."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from models.config import ModelConfig
from parallel.precision import PrecisionConfig
from parallel.remat import RematConfig
from tests.families import FAMILIES
from tests.small import CAUSAL_LM, layout
from training.distill import Distillation, DistillConfig, with_projection
from training.losses import LossConfig
from training.micro_batches import loss_weights
from training.naming import named
from training.objectives import make_model
from training.state import abstract_state, placed_params
from training.step import loss_and_grads, make_step

FLOAT32, ONE = PrecisionConfig(), jnp.float32(1)
STUDENT = ModelConfig(
    vocab_size=250, layers=2, embed_dim=32, mlp_dim=32, heads=4, kv_heads=2, head_dim=8,
    attention="xla", init_std=0.1, logit_softcap=6.0,
)  # fmt: skip
TEACHER = replace(STUDENT, layers=3, embed_dim=48, tied=False, logit_softcap=0.0, kv_heads=4)
KL = DistillConfig(teacher="x", temperature=2.0, weight=0.7)
MATCHED = replace(KL, hidden_weight=0.3, layers=("0:0", "1:2", "2:3"))


def told(laid, config=MATCHED, student=STUDENT, teacher=TEACHER, objective=CAUSAL_LM):
    """The student's model with its projection, and what its step is told."""
    loss, rules = LossConfig(chunk=16), laid.model.rules
    made = make_model(teacher, objective, loss, rules, RematConfig())
    model = with_projection(laid.model, config, student.embed_dim, teacher.embed_dim)
    pairs = config.pairs(student.layers, teacher.layers)
    given = Distillation(config, model, made, "float32", pairs, student.vocab_size, loss)
    return model, given


def drawn(laid, model, seed):
    """Parameters by NumPy, gains and biases too, at rest: the same on every layout."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf, names):
        gain = path[-1].key == "gain"
        value = (gain + 0.2 * rng.normal(size=leaf.shape)).astype(np.float32)
        spec = model.rules.at_rest(names, leaf.shape)
        return jax.device_put(value, NamedSharding(laid.mesh, spec))

    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map_with_path(draw, shapes, model.axes)


def log_p(predictor, vocab, temperature):
    """Of whole logits."""
    first = predictor.table_axes.startswith("vocab")
    equation = "btd,vd->btv" if first else "btd,dv->btv"
    z = jnp.einsum(equation, predictor.x_BTD, predictor.table)[..., :vocab]
    if predictor.bias is not None:
        z += predictor.bias[None, None, :vocab]
    if predictor.softcap:
        z = predictor.softcap * jnp.tanh(z / predictor.softcap)
    return jax.nn.log_softmax(z / temperature)


def plain_loss(model, given, params, teacher, batch):
    """The same loss by whole logits, on one device, and the divergence in it."""
    config, vocab = given.config, given.vocab_size
    weights, _ = loss_weights(batch, ONE)
    after = [tuple(pair[side] for pair in given.pairs) for side in (0, 1)]
    student = model.features(params, batch, None, None, after[0])
    taught = given.teacher.features(teacher, batch, None, None, after[1])
    log_q, log_t = (log_p(f.predictor, vocab, config.temperature) for f in (student, taught))
    kl = jnp.sum(jnp.exp(log_t) * (log_t - log_q), -1)
    log_one, targets = log_p(student.predictor, vocab, 1.0), batch["targets"][..., None]
    nll = -jnp.take_along_axis(log_one, targets, -1)[..., 0]
    each = (1 - config.weight) * nll + config.weight * config.temperature**2 * kl
    for ours, theirs in zip(student.states, taught.states, strict=True):
        if "distill" in params:
            ours = jnp.einsum("btd,de->bte", ours, params["distill"]["projection"])
        apart = jnp.mean((ours - theirs) ** 2, -1)
        each += config.hidden_weight / len(student.states) * apart
    return jnp.sum(weights.tokens_BT * each), jnp.sum(weights.tokens_BT * kl)


@pytest.fixture(scope="module")
def oracle():
    with layout(config=STUDENT) as laid:
        model, given = told(laid)
        params, teacher, batch = drawn(laid, model, 0), drawn(laid, given.teacher, 1), laid.batch()
        loss = lambda params: plain_loss(model, given, params, teacher, batch)
        (value, kl), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return float(value), float(kl), jax.tree.map(np.asarray, grads)


LAYOUTS = {
    "micro-steps": (2, {}),
    "fsdp": (1, dict(fsdp=8, zero=3)),
    "tensor, zero 2": (1, dict(fsdp=2, tensor=4, zero=2, sequence=True)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_and_gradients_are_those_of_whole_logits_on_every_layout(name, oracle):
    micro, kind = LAYOUTS[name]
    value, kl, want = oracle
    with layout(config=STUDENT, **kind) as laid:
        model, given = told(laid)
        params, teacher = drawn(laid, model, 0), drawn(laid, given.teacher, 1)
        of_batch = jax.jit(loss_and_grads(model, FLOAT32, micro, given))
        sums, grads = of_batch(params, laid.batch(), None, ONE, teacher)
    # float32, the same terms in another order; through three layers and two softmaxes.
    assert float(sums["loss"]) == pytest.approx(value, rel=1e-5)
    assert float(sums["kl"]) == pytest.approx(kl, rel=1e-5)
    assert float(sums["hidden"]) > 0
    assert named(grads).keys() == named(want).keys()
    assert "distill/projection" in named(grads)
    for leaf, g in named(grads).items():
        apart = np.linalg.norm(np.asarray(g) - named(want)[leaf])
        assert apart <= 2e-5 * np.linalg.norm(named(want)[leaf]) + 1e-8, leaf


@pytest.mark.parametrize("name", ["encoder, tokens and classes", "2017", "captioning"])
def test_every_family_that_predicts_tokens_teaches_its_own(name):
    """A deeper teacher, matched after the last layers; an image before the text is left out."""
    family = FAMILIES[name]
    student = replace(family.config, layers=1, encoder_layers=min(1, family.config.encoder_layers))
    teacher = replace(student, layers=2)
    config = replace(MATCHED, layers=())
    with layout(config=student, objective=family.objective) as laid:
        model, given = told(laid, config, student, teacher, family.objective)
        params, taught = drawn(laid, model, 0), drawn(laid, given.teacher, 1)
        batch = laid.placed(family.batch(0))
        weights, _ = loss_weights(batch, ONE)

        def both(params, taught):
            batch_, lesson = given.lessons(taught)(batch)
            total, sums = given.of_student(params, batch_, weights, None, lesson)
            tasks = [v for n, v in sums.items() if n.endswith("_nll_sum")]
            rest = family.objective.task_weight * sum(tasks)
            return total - rest, sums["kl_sum"], plain_loss(model, given, params, taught, batch)

        value, kl, want = jax.jit(both)(params, taught)
    assert float(value) == pytest.approx(float(want[0]), rel=1e-5)
    assert float(kl) == pytest.approx(float(want[1]), rel=1e-5)


def bytes_of(laid, model, given=None, micro=1):
    """What the compiled step says of its memory, and the teacher's bytes on a device."""
    optimizer = optax.sgd(0.1)
    state = abstract_state(model, optimizer, FLOAT32, laid.mesh)
    step = make_step(
        model, optimizer, lambda _: ONE, FLOAT32, seed=0, micro_steps=micro, distillation=given
    )
    teacher = () if given is None else (placed_params(given.teacher, FLOAT32, laid.mesh),)
    batch = laid.batch(length=64)
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch, *teacher).compile()
    held = sum(4 * np.prod(a.sharding.shard_shape(a.shape)) for a in jax.tree.leaves(teacher))
    return compiled.memory_analysis(), int(held)


def test_a_teacher_costs_its_parameters_and_the_features_of_one_forward_pass():
    config = replace(MATCHED, layers=("1:1", "2:3"))
    kept = 1 + 2 * 2  # its features, and the states of two pairs, of both models
    with layout(config=STUDENT, length=64) as laid:
        model, given = told(laid, config)
        alone, _ = bytes_of(laid, model)
        taught, held = bytes_of(laid, model, given)
        assert taught.argument_size_in_bytes - alone.argument_size_in_bytes == held
        features = 8 * 64 * TEACHER.embed_dim * 4
        more = taught.temp_size_in_bytes - alone.temp_size_in_bytes
        assert more <= kept * features + 1024  # and scalars
        assert taught.alias_size_in_bytes == alone.alias_size_in_bytes, "it is not donated"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(kind="sideways"), ("kind = 'sideways'", "forward, reverse")),
        (dict(temperature=0.0), ("temperature = 0.0", "above 0")),
        (dict(weight=1.5), ("weight = 1.5", "to 1")),
        (dict(hidden_weight=-1.0), ("hidden_weight = -1.0", "0 (off)")),
        (dict(teacher_compute="float16"), ("teacher_compute = 'float16'", "bfloat16")),
        (dict(teacher_step=-1), ("teacher_step = -1", "newest")),
        (dict(layers=("2-4",)), ("layers = ('2-4',)", "student:teacher")),
    ],
)
def test_what_is_wrong_in_itself_names_its_key(values, words):
    with pytest.raises(ValueError) as error:
        DistillConfig(**values)
    for word in words:
        assert word in str(error.value)
    assert str(error.value).startswith("config.distill.")


def test_pairs_of_layers():
    assert MATCHED.pairs(2, 3) == ((0, 0), (1, 2), (2, 3))
    assert replace(MATCHED, layers=()).pairs(2, 3) == ((2, 3),)
    assert KL.pairs(2, 3) == ()
    with pytest.raises(ValueError, match=r"config\.distill\.layers = .*2:3 is none of") as error:
        MATCHED.pairs(2, 2)
    assert "0 to 2" in str(error.value)


def test_keys_without_effect_are_said():
    notes = DistillConfig(temperature=2.0).without_effect()
    assert notes == ["config.distill.temperature has no effect: config.distill.teacher is empty"]
    assert "hidden_weight is 0" in replace(KL, layers=("1:1",)).without_effect()[0]
    assert MATCHED.without_effect() == []
