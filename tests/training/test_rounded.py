"""Rounding in training: the numbers of stored codes, gradients straight through, any layout."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallel.codes import decode, unpack
from parallel.pipeline import PipelineConfig
from parallel.precision import PrecisionConfig
from parallel.stored import is_stored
from parallel.zero import for_model
from tests.small import DECODER, MIXTURE, all_count, initial_params, layout
from tests.training.test_stored import compressed, stored_layout
from training.naming import named
from training.rounded import QuantizeConfig, rounded
from training.step import loss_and_grads
from training.stored import WeightsConfig, stored

PRECISION = PrecisionConfig()
SLOW = pytest.mark.slow


@contextmanager
def rounded_layout(forms: dict[str, str], **sizes: object):
    with layout(**sizes) as laid:
        yield replace(laid, model=rounded(laid.model, QuantizeConfig(forms)))


def loss_of(laid, params, micro_steps=1):
    """The loss without dropout, and the gradients by name."""
    metrics, grads = jax.jit(loss_and_grads(laid.model, PRECISION, micro_steps))(
        params, laid.batch(), None, jnp.float32(1)
    )
    return float(metrics["loss"]), {n: np.asarray(g) for n, g in named(grads).items()}


def as_rounded(form: str, config=DECODER, **sizes: object):
    """Loss and gradients of the plain initial weights, rounded where they are used."""
    with rounded_layout({"stack/*": form}, config=config, **sizes) as laid:
        micro_steps = 4 if "pipeline" in sizes else 1
        return loss_of(laid, laid.params(initial_params(config)), micro_steps)


@cache
def on_one_device(form: str, config=DECODER):
    return as_rounded(form, config)


def assert_alike(found, wanted, *, loss, grads):
    assert found[0] == pytest.approx(wanted[0], rel=loss)
    assert found[1].keys() == wanted[1].keys()
    for name, grad in wanted[1].items():
        apart = np.linalg.norm(found[1][name] - grad)
        assert apart <= grads * max(np.linalg.norm(grad), 1e-3), name


def dense(node):
    """The array that stacked codes at rest stand for."""
    if not is_stored(node):
        return node
    scales = node.scales if node.steps is None else node.first_level()
    return np.asarray(
        node.matrix.unflat(decode(node.code, unpack(node.code, jnp.asarray(node.codes)), scales))
    )


@cache
def plain_loss():
    """Compiled once: loss and gradients of arrays as they are."""
    with layout() as laid:
        return jax.jit(loss_and_grads(laid.model, PRECISION))


@pytest.mark.parametrize("form", ["int8", "int4:8", pytest.param("nf4:16", marks=SLOW)])
def test_gradients_are_those_at_the_rounded_weights(form):
    """Loss and gradients of arrays that hold what the codes at rest stand for."""
    at_rest = compressed({"stack/*": form})
    with layout() as laid:
        arrays = jax.tree.map(dense, at_rest, is_leaf=is_stored)
        metrics, grads = plain_loss()(laid.params(arrays), laid.batch(), None, jnp.float32(1))
        wanted = float(metrics["loss"]), {n: np.asarray(g) for n, g in named(grads).items()}
    # The same products of the same numbers; XLA fuses them otherwise.
    assert_alike(on_one_device(form), wanted, loss=1e-6, grads=1e-5)


LAYOUTS = [
    dict(fsdp=8),
    dict(data=2, tensor=4),
    dict(data=2, fsdp=2, tensor=2, zero=2, sequence=True),
    dict(data=2, pipe=3, pipeline=PipelineConfig(microbatches=4)),
]


@pytest.mark.parametrize(
    ("form", "sizes"),
    [
        *(("int4:8", LAYOUTS[i]) for i in (0, 2, 3)),
        ("int8", LAYOUTS[1]),
        pytest.param("int4:32", LAYOUTS[1], marks=SLOW),  # no device has a whole group
        pytest.param("nf4:16", LAYOUTS[2], marks=SLOW),
        pytest.param("int8+int8", LAYOUTS[2], marks=SLOW),
    ],
    ids=str,
)
def test_every_layout_computes_the_same(form, sizes):
    # An input on the border of two codes falls to either side with float32's last bit.
    loss, grads = (1e-3, 0.03) if "+" in form else (1e-6, 1e-4)
    assert_alike(as_rounded(form, **sizes), on_one_device(form), loss=loss, grads=grads)


@SLOW
def test_experts_are_rounded_too():
    forms = {"stack/*": "int4:8"}
    with stored_layout(forms, config=MIXTURE) as laid:
        wanted, _ = loss_of(laid, laid.params(compressed(forms, MIXTURE)))
    sizes = dict(expert=2, fsdp=2, tensor=2)
    found, grads = as_rounded("int4:8", MIXTURE, **sizes)
    assert found == pytest.approx(wanted, rel=1e-6)
    assert all(np.linalg.norm(grad) > 0 for name, grad in grads.items() if "bias" not in name)


@pytest.mark.parametrize("form", [pytest.param("fp8+fp8", marks=SLOW), "int8+int8"])
def test_products_of_codes_are_those_of_codes_at_rest(form):
    forms = {"stack/*": form}
    with stored_layout(forms) as laid:
        wanted, of_arrays = loss_of(laid, laid.params(compressed(forms)))
    found, grads = on_one_device(form)
    assert found == pytest.approx(wanted, rel=1e-6)
    for name, grad in of_arrays.items():  # what stayed an array: the gradient of inputs is the same
        apart = np.linalg.norm(grads[name] - grad)
        assert apart <= 1e-4 * max(np.linalg.norm(grad), 1e-3), name
    assert all(np.isfinite(grad).all() for grad in grads.values())


def test_no_rounded_weight_is_kept_for_the_backward_pass():
    def kept(laid) -> list[tuple[tuple[int, ...], str]]:
        """Shapes and dtypes of what autodiff keeps between the passes."""
        model, params = laid.model, laid.params(initial_params())

        def between(params, batch):
            leaves, build = for_model(params, model.axes, model.rules, "float32")
            weights = all_count((8, 16))
            return jax.vjp(lambda p: model.loss(build(p), batch, weights, None)[0], leaves)[1]

        found = jax.eval_shape(between, params, laid.batch())
        return sorted((a.shape, str(a.dtype)) for a in jax.tree.leaves(found))

    with layout() as plain:
        wanted = kept(plain)
    for form in ("int4:8", "int8+int8"):
        with rounded_layout({"stack/*": form}) as laid:
            assert kept(laid) == wanted


@pytest.mark.parametrize(
    ("forms", "message"),
    [
        ({"stack/*": "rank:4"}, "'rank:4' is no form of codes; choose int8, int4:32"),
        ({"stack/*": "int8@0 int4:8"}, "forms by layer (@) are of weights at rest"),
        ({"stack/*": "int8+int8="}, "choose int8+int8"),
        ({"stack/*": "int5"}, "config.quantize.forms['stack/*'] = 'int5': choose int8"),
        ({"stack/*": "int4:24"}, "a group of 24 does not divide its 32 rows"),
        ({"nothing": "int8"}, "config.quantize.forms['nothing']: 'nothing' names no matrix"),
    ],
)
def test_what_cannot_be_is_refused(forms, message):
    with pytest.raises(ValueError) as error, rounded_layout(forms):
        pass
    assert message in str(error.value), error.value


def test_codes_of_experts_inputs_and_weights_in_other_forms_are_refused():
    with (
        pytest.raises(ValueError, match="are not for weights of experts; choose int8"),
        rounded_layout({"stack/*": "int8+int8"}, config=MIXTURE),
    ):
        pass
    with layout() as laid:
        model = stored(laid.model, WeightsConfig({"stack/*/mlp/*": "int8"}))
        with pytest.raises(ValueError, match=r"stack/.*mlp.* is no array that is trained"):
            rounded(model, QuantizeConfig({"stack/*": "int4:8"}))
        assert rounded(model, QuantizeConfig({"stack/*/attention/*": "int4:8"})) is not model


def test_float8_is_said_to_save_no_time_on_cpu():
    config = QuantizeConfig({"stack/*": "fp8+fp8"})
    assert "'fp8+fp8' saves no time" in config.without_effect("cpu")[0]
    assert not config.without_effect("gpu")
    assert not QuantizeConfig({"stack/*": "int8+int8"}).without_effect("cpu")
