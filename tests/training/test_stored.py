"""Weights in other forms compute what the arrays that they stand for compute, on every layout."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallel.forms import read_form
from parallel.precision import PrecisionConfig
from parallel.stored import Matrix
from tests.small import DECODER, MIXTURE, initial_params, layout
from training.naming import named
from training.step import loss_and_grads
from training.stored import WeightsConfig, chosen_forms, dense_params, store_array, stored

PRECISION = PrecisionConfig()
FORMS = [
    *("int8", "int4:8", "int3:16", "int2:8", "nf4:16", "fp8", "2:4", "rank:4"),
    *("int8@0 int4:8", "rank:2@1 rank:4@2 none"),
]
LAYOUTS = [
    dict(fsdp=8),
    dict(data=2, tensor=4),
    dict(data=2, fsdp=2, tensor=2, zero=2, sequence=True),
]


@contextmanager
def stored_layout(forms: dict[str, str], **sizes: object):
    with layout(**sizes) as laid:
        yield replace(laid, model=stored(laid.model, WeightsConfig(forms)))


def compressed(forms: dict[str, str], config=DECODER):
    """NumPy parameters of a stored model, of those that one device draws."""
    with stored_layout(forms, config=config) as laid:
        init = initial_params(config)
        axes = jax.tree.leaves(laid.model.axes, is_leaf=lambda n: not isinstance(n, dict))

        with layout(config=config) as plain:
            names = named(plain.model.axes)
        chosen = chosen_forms(
            WeightsConfig(forms), {n: a.shape for n, a in named(init).items()}, names
        )
        nodes = [
            store_array(chosen[n], jnp.asarray(a), names[n]) if n in chosen else a
            for n, a in named(init).items()
        ]
        assert len(axes) == len(nodes)
        tree = jax.tree.unflatten(jax.tree.structure(init), nodes)
        return jax.tree.map(np.asarray, tree)


def loss_of(laid, params):
    """The loss without dropout, and the gradients by name."""
    metrics, grads = jax.jit(loss_and_grads(laid.model, PRECISION))(
        params, laid.batch(), None, jnp.float32(1)
    )
    return float(metrics["loss"]), {n: np.asarray(g) for n, g in named(grads).items()}


@pytest.mark.parametrize("form", FORMS)
def test_a_stored_weight_multiplies_as_the_array_it_stands_for(form):
    forms = {"stack/*": form}
    params = compressed(forms)
    with stored_layout(forms) as laid:
        placed = laid.params(params)
        loss, grads = loss_of(laid, placed)
        dense = dense_params(placed, laid.model.axes)
    with layout() as plain:
        wanted, plain_grads = loss_of(plain, plain.params(jax.tree.map(np.asarray, dense)))
    # Two factors sum in another order; all else is the same product of the same numbers.
    assert loss == pytest.approx(wanted, rel=1e-5)
    for name in set(grads) & set(plain_grads):  # what stayed an array
        norm = np.linalg.norm(plain_grads[name])
        assert np.linalg.norm(grads[name] - plain_grads[name]) <= 1e-4 * max(norm, 1e-3), name
    assert all("codes" not in name and "values" not in name for name in grads)


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
@pytest.mark.parametrize("form", ["int4:8", "nf4:16", "2:4", "rank:2@1 int8"])
def test_every_layout_computes_the_same_of_it(form, sizes):
    forms = {"stack/*": form}
    params = compressed(forms)
    with stored_layout(forms) as laid:
        loss, grads = loss_of(laid, laid.params(params))
    with stored_layout(forms, **sizes) as laid:
        sharded, sharded_grads = loss_of(laid, laid.params(params))
    assert sharded == pytest.approx(loss, rel=1e-6)  # float32 sums in another order
    assert grads.keys() == sharded_grads.keys()
    for name, grad in grads.items():
        norm = max(np.linalg.norm(grad), 1e-3)
        assert np.linalg.norm(grad - sharded_grads[name]) <= 1e-4 * norm, name


@pytest.mark.parametrize("form", ["int8+int8", "fp8+fp8"])
def test_inputs_as_codes_are_near_inputs_as_they_are(form):
    plain, codes = {"stack/*": form.partition("+")[0]}, {"stack/*": form}
    with stored_layout(plain) as laid:
        wanted, _ = loss_of(laid, laid.params(compressed(plain)))
    losses = []
    for sizes in (dict(), dict(data=2, tensor=4), dict(fsdp=8)):
        with stored_layout(codes, **sizes) as laid:
            losses.append(loss_of(laid, laid.params(compressed(codes)))[0])
    # 7 bits (fp8: 3 of the mantissa) of every input; the loss is a mean over 128 tokens.
    assert losses[0] == pytest.approx(wanted, rel=1e-2 if form == "fp8+fp8" else 2e-3)
    assert losses[0] != wanted
    # An input on the border of two codes falls to either side with float32's last bit.
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-3)


@pytest.mark.parametrize("form", ["int8", "int4:8", "nf4:16"])
def test_experts_are_stored_too(form):
    forms = {"stack/*": form}
    params = compressed(forms, MIXTURE)
    losses = []
    for sizes in (dict(), dict(expert=2, fsdp=2, tensor=2)):
        with stored_layout(forms, config=MIXTURE, **sizes) as laid:
            placed = laid.params(params)
            losses.append(loss_of(laid, placed)[0])
    with stored_layout(forms, config=MIXTURE) as laid:
        dense = dense_params(laid.params(params), laid.model.axes)
    with layout(config=MIXTURE) as plain:
        wanted, _ = loss_of(plain, plain.params(jax.tree.map(np.asarray, dense)))
    assert losses == pytest.approx([wanted, wanted], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("int8", 8 + 32 / 512),
        ("int4:128", 4.125),
        ("int3:128", 3.125),
        ("int2:64", 2.25),
        ("nf4:64", 4 + 8 / 64 + 32 / (64 * 256)),
        ("fp8", 8 + 32 / 512),
        ("2:4", 0.5625 * 16),
    ],
)
def test_bits_of_each_weight(name, bits):
    matrix = Matrix((512, 8, 64), "embed -> heads head_dim")
    shape = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    node = jax.eval_shape(lambda w: read_form(name, "form").store(matrix, w, "bfloat16"), shape)
    found = sum(a.size * a.dtype.itemsize * 8 for a in jax.tree.leaves(node)) / 512**2
    assert found == pytest.approx(bits, rel=1e-3)


@pytest.mark.parametrize(
    ("forms", "message"),
    [
        ({"stack/*": "int5"}, "config.weights.forms['stack/*'] = 'int5': choose int8, int4:128"),
        ({"stack/*": "int4:24"}, "a group of 24 does not divide its 32 rows; choose 32 or 16 or 8"),
        ({"stack/*/query": "rank:99"}, "two factors are smaller up to rank:21"),
        ({"nothing": "int8"}, "names no matrix of the layers"),
        ({"stack/*": "int8@9 int4:8"}, "has layers 0 to 2"),
        ({"stack/*": "int8@0"}, "no form of the layers that are not named"),
    ],
)
def test_what_cannot_be_is_refused(forms, message):
    with pytest.raises(ValueError) as error, stored_layout(forms):
        pass
    assert message in str(error.value), error.value
