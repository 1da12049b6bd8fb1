"""Every method makes the same of a model on every layout."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from compress.factorize import Factorize, factorize
from compress.prune_layers import Prune, prune
from compress.quantize import Quantize, quantize
from tests.compress.walked import LAYOUTS, PLAIN, loss_of, walked
from training.naming import named

TWO = dict(layers=2)


def rounded(how, form, it):
    text = it.text if how.calibrated or "=" in form else None
    return quantize(how, it.forms(form), it.config, it.laid.model, it.params, text)


def factored(how, it):
    text = it.text if how.method != "svd" else None
    return factorize(how, it.forms("rank:4"), it.laid.model, it.params, text)


def pruned(how, it):
    text = it.text if how.calibrated else None
    return prune(how, list(it.forms("int8")), it.laid.model, it.params, text)


METHODS = {
    "rtn": partial(rounded, Quantize(), "int4:8"),
    "nf4": partial(rounded, Quantize(), "nf4:16"),
    "magnitude": partial(pruned, Prune("magnitude")),
    "packed": partial(pruned, Prune("magnitude", pattern="2:4", packed=True)),
    "gptq": partial(rounded, Quantize("gptq"), "int4:8"),
    "awq": partial(rounded, Quantize("awq", clip="mse"), "int4:8"),
    "smoothquant": partial(rounded, Quantize("smoothquant"), "int8+int8="),
    "wanda": partial(pruned, Prune("wanda")),
    "sparsegpt": partial(pruned, Prune("sparsegpt")),
    "whitened": partial(factored, Factorize("whitened")),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_the_same_on_every_layout(name):
    """Bit for bit: text is read on one device, one layer at a time."""
    method = METHODS[name]
    config = PLAIN if name == "rtn" else PLAIN.__class__(**{**vars(PLAIN), **TWO})
    found, losses = [], []
    for sizes in [dict(), *LAYOUTS]:
        with walked(config, **sizes) as it:
            made = method(it)
            found.append(
                {
                    f"{n}/{i}/{part}": np.asarray(array)
                    for n, layers in made.nodes().items()
                    for i, node in enumerate(layers)
                    for part, array in named({"": node}).items()
                }
            )
            if sizes != LAYOUTS[0]:
                laid = it.stored(made.forms())
                losses.append(loss_of(laid, made.finished(laid.model, laid.mesh)))
    # Sums in another order.
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for part, array in found[0].items():
            np.testing.assert_array_equal(array, other[part], part)
