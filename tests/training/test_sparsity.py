"""Pruning while a model is trained: its schedule, zeros that stay, no memory beside it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import get_mesh

from parallel.mesh import MeshConfig
from parallel.precision import PrecisionConfig
from parallel.rules import ParallelConfig, make_rules
from tests.small import DECODER, initial_params, layout
from tests.training.line import tokens
from training.naming import named
from training.optim import NAMES, OptimizerConfig, make_optimizer
from training.schedules import make_schedule
from training.sparsity import NO_SPARSITY, SparsityConfig, make_sparsity
from training.state import Model, create_state
from training.step import make_step

FLOAT32 = PrecisionConfig()
L, K, M = 2, 16, 12
NAME = "stack/blocks/mlp/up"
WANTED = np.random.default_rng(1).normal(size=(L, K, M)).astype(np.float32)


def quadratic() -> Model:
    """loss = (w - target)^2 of a stack of matrices and a bias: every gradient is dense."""
    rules = make_rules(ParallelConfig(), MeshConfig(data=1).sizes(), {})
    tree = lambda w, b: {"stack": {"blocks": {"mlp": {"up": w, "up_bias": b}}}}

    def init(key):
        spec = rules.at_rest("layers embed mlp", (L, K, M))
        return tree(jax.random.normal(key, (L, K, M), out_sharding=spec), jnp.zeros((L, M)))

    def loss(params, batch, weights, key):
        mlp = params["stack"]["blocks"]["mlp"]
        total = jnp.sum((mlp["up"] - WANTED) ** 2) + jnp.sum((mlp["up_bias"] - 1) ** 2)
        total = total * jnp.sum(weights.tokens_BT)
        return total, {"nll_sum": jax.lax.stop_gradient(total)}

    return Model(init, tree("layers embed -> mlp", "layers mlp"), loss, rules)


def made(model, config, optimizer, steps):
    """Optimizer, step."""
    sparsity = make_sparsity(config, model)
    rule = make_optimizer(optimizer, steps, model.trained(model.axes), sparsity.names)
    schedule = make_schedule(optimizer, steps)
    return rule, make_step(model, rule, schedule, FLOAT32, seed=0, sparsity=sparsity)


def moments_at(state, name, dead):
    """What moments there are of a parameter where it is zero."""
    found = named(state.opt_state)
    own = {n: np.asarray(a) for n, a in found.items() if n.endswith(f"/{name}")}
    return {n: np.abs(a[dead]).max() for n, a in own.items() if a.shape == dead.shape}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_zeros_stay_for_a_thousand_steps_and_rise_as_the_schedule_has_it(use_mesh, name):
    config = SparsityConfig(target=0.75, begin=100, end=700, every=100)
    with use_mesh():
        model = quadratic()
        optimizer = OptimizerConfig(name=name, learning_rate=0.05, warmup_steps=0)
        rule, step = made(model, config, optimizer, 1000)
        state = create_state(model, rule, FLOAT32, 0, get_mesh())
        batch = tokens([[0, 1]])

        def turn(state, _):
            before = state.params
            state, metrics = step(state, batch)
            grown = jax.tree.map(lambda a, b: jnp.sum((a == 0) & (b != 0)), before, state.params)
            return state, (metrics["sparsity"], grown)

        state, (shares, grown) = jax.jit(lambda s: jax.lax.scan(turn, s, length=1000))(state)
    of_matrix = np.asarray(grown["stack"]["blocks"]["mlp"]["up"])
    assert not of_matrix.any()
    assert np.asarray(grown["stack"]["blocks"]["mlp"]["up_bias"]).sum() == L * M  # none of a bias
    shares = np.asarray(shares)
    assert not shares[:200].any()  # the share at `begin` is 0
    for i in range(2, 7):
        at = 100 * i
        want = round(0.75 * (1 - (1 - (i - 1) / 6) ** 3) * K * M) / (K * M)
        np.testing.assert_allclose(shares[at : at + 100], want, rtol=1e-6)
    np.testing.assert_allclose(shares[700:], 0.75, rtol=1e-6)
    dead = np.asarray(state.params["stack"]["blocks"]["mlp"]["up"]) == 0
    assert dead.sum(axis=(1, 2)).tolist() == [round(0.75 * K * M)] * L
    found = moments_at(state, NAME, dead)
    assert len(found) == {"adamw": 2, "muon": 1}[name]
    assert not any(found.values()), found


@pytest.mark.parametrize("name", NAMES)
def test_no_optimizer_moves_a_zero_that_is_held(use_mesh, name):
    config = SparsityConfig(hold=True)
    with use_mesh():
        model = quadratic()
        optimizer = OptimizerConfig(name=name, warmup_steps=0, offload=name == "lion")
        rule, step = made(model, config, optimizer, 5)
        state = create_state(model, rule, FLOAT32, 0, get_mesh())
        w = state.params["stack"]["blocks"]["mlp"]["up"]
        dead = np.random.default_rng(0).random(w.shape) < 0.5
        state.params["stack"]["blocks"]["mlp"]["up"] = jnp.where(dead, 0.0, w)
        before = np.asarray(state.params["stack"]["blocks"]["mlp"]["up"])
        run = jax.jit(step, donate_argnums=0)
        norms = []
        for _ in range(3):
            state, metrics = run(state, tokens([[0, 1]]))
            norms.append(float(metrics["grad_norm"]))
        after = np.asarray(state.params["stack"]["blocks"]["mlp"]["up"])
    assert run._cache_size() == 1
    of_live = 4 * np.sum((before - WANTED)[~dead] ** 2) + 4 * L * M  # biases go from 0 to 1
    assert norms[0] == pytest.approx(of_live**0.5, rel=1e-5)
    np.testing.assert_array_equal(after == 0, dead)
    assert (after != before)[~dead].mean() > 0.99
    assert float(metrics["sparsity"]) == pytest.approx(dead.mean())


PLAIN = replace(
    DECODER, dropout=0.0, qkv_bias=False, mlp_bias=False, attention_out_bias=False, qk_norm=False
)
KINDS = [{}, dict(fsdp=8, zero=3), dict(data=2, tensor=4)]
NAMES_OF_SOME = ("stack/*/mlp/*", "*/out")


@pytest.mark.slow
def test_every_layout_prunes_the_same_weights_by_the_same_schedule():
    schedule = dict(target=0.8, begin=2, end=7, every=3)
    config = SparsityConfig(**schedule, names=NAMES_OF_SOME, scope="global")
    assert config.steps() == [2, 5, 7]
    found = []
    for sizes in KINDS:
        with layout(**sizes) as laid:
            sparsity = make_sparsity(config, laid.model)

            @jax.jit
            def prune(params, step, sparsity=sparsity):
                params = sparsity.pruned(params, step)
                return params, sparsity.zeros(params)

            params, seen = laid.params(initial_params()), []
            for step in range(9):
                params, share = prune(params, jnp.int32(step))
                seen.append(float(share))
            found.append((seen, jax.tree.map(np.asarray, params)))
    shares, params = found.pop(0)
    near = [0, 0, 0, 0, 0, *[0.8 * (1 - 0.4**3)] * 2, 0.8, 0.8]
    assert shares == pytest.approx(near, abs=2e-3)  # whole numbers of weights
    for other, arrays in found:
        assert other == shares
        jax.tree.map(np.testing.assert_array_equal, arrays, params)
    untouched = {n: (a == 0).mean() for n, a in named(params).items() if n not in sparsity.names}
    assert untouched["embedding"] == 0


@pytest.mark.slow
def test_a_real_step_is_one_program_and_needs_no_more_memory():
    """Here, where activations are tiny, what is beside the step's own arrays shows: a masked
    gradient, which XLA:CPU does not make in place, and a byte for each weight of what 2:4 leaves
    out.
    """
    config = SparsityConfig(target=0.5, begin=1, end=5, every=2, pattern="2:4")
    optimizer = OptimizerConfig(learning_rate=0.01, warmup_steps=0)
    sizes, masks = {}, []
    with layout(config=PLAIN, fsdp=8, zero=3) as laid:
        for chosen in (SparsityConfig(), config):
            rule, step = made(laid.model, chosen, optimizer, 12)
            params = laid.params(initial_params(PLAIN))
            state = create_state(laid.model, rule, FLOAT32, 0, laid.mesh, params)
            run = jax.jit(step, donate_argnums=0)
            compiled = run.lower(state, laid.batch()).compile()
            sizes[chosen.on] = compiled.memory_analysis()
        types = jax.tree.map(jax.typeof, state)
        for i in range(12):
            state, metrics = compiled(state, laid.batch(i % 3))
            assert jax.tree.map(jax.typeof, state) == types
            masks.append({n: np.asarray(a) == 0 for n, a in named(state.params).items()})
        names = make_sparsity(config, laid.model).names
    assert sizes[True].alias_size_in_bytes == sizes[False].alias_size_in_bytes  # all is donated
    more = sizes[True].temp_size_in_bytes - sizes[False].temp_size_in_bytes
    of_names = sum(a.nbytes for n, a in named(params).items() if n in names)
    assert more <= 1.25 * of_names / 8, (more, of_names / 8)
    assert float(metrics["sparsity"]) == pytest.approx(0.5)
    for name in names:
        for before, after in itertools.pairwise(masks):
            assert not (before[name] & ~after[name]).any(), name
        assert masks[-1][name].mean() == pytest.approx(0.5), name


def test_without_the_section_a_step_is_what_it_was():
    with layout() as laid:
        assert make_sparsity(SparsityConfig(), laid.model) is NO_SPARSITY
        params = laid.params(initial_params())
        assert NO_SPARSITY.pruned(params, jnp.int32(0)) is params


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(target=1.0), "config.sparsity.target = 1.0: a share in (0, 1), or 0"),
        (dict(target=-0.1), "config.sparsity.target = -0.1: a share in (0, 1), or 0"),
        (dict(target=0.6, pattern="2:4"), "config.sparsity.target = 0.6: config.sparsity.pattern"),
        (dict(begin=5, end=4), "config.sparsity.end = 4: not before config.sparsity.begin = 5"),
        (dict(scope="all"), "config.sparsity.scope = 'all': choose one of layer, global"),
        (dict(target=0.5, names=("no/*",)), "'no/*' names no matrix that is trained"),
    ],
)
def test_what_cannot_be_is_refused(values, message):
    with pytest.raises(ValueError) as error, layout() as laid:
        make_sparsity(SparsityConfig(**values), laid.model)
    assert message in str(error.value)


def test_a_schedule_beyond_the_run_is_refused():
    with pytest.raises(ValueError, match=r"config\.sparsity\.end = 10: the run has"):
        SparsityConfig(target=0.5, end=10).check_run(10)
