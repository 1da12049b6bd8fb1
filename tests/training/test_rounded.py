"""Rounding in training: the numbers of stored codes, gradients straight through, any layout."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import jax
import numpy as np
import pytest

from tests.small import DECODER, initial_params, layout
from tests.training.test_stored import compressed, loss_of, stored_layout
from training.rounded import QuantizeConfig, rounded
from training.stored import dense_params


@contextmanager
def rounded_layout(forms: dict[str, str], **sizes: object):
    with layout(**sizes) as laid:
        yield replace(laid, model=rounded(laid.model, QuantizeConfig(forms)))


def as_rounded(form: str, config=DECODER, **sizes: object):
    """Loss and gradients of the plain initial weights, rounded where they are used."""
    with rounded_layout({"stack/*": form}, config=config, **sizes) as laid:
        return loss_of(laid, laid.params(initial_params(config)))


def as_plain(form: str, config=DECODER):
    """The same of arrays that hold the numbers that stored codes stand for."""
    forms = {"stack/*": form}
    with stored_layout(forms, config=config) as laid:
        dense = dense_params(laid.params(compressed(forms, config)), laid.model.axes)
        dense = jax.tree.map(np.asarray, dense)
    with layout(config=config) as plain:
        return loss_of(plain, plain.params(dense))


def assert_alike(found, wanted, tolerance):
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    assert found[1].keys() == wanted[1].keys()
    for name, grad in wanted[1].items():
        apart = np.linalg.norm(found[1][name] - grad)
        assert apart <= tolerance * max(np.linalg.norm(grad), 1e-3), name


@pytest.mark.parametrize("form", ["int8", "int4:8", "nf4:16", "fp8"])
def test_gradients_are_those_at_the_rounded_weights(form):
    # The same products of the same numbers; XLA fuses them otherwise.
    assert_alike(as_rounded(form), as_plain(form), 1e-4)
