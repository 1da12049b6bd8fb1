"""Every test runs on 8 simulated CPU devices; warnings and silent rank promotions are errors."""

import os
from importlib.metadata import version

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Programs here run for milliseconds and compile for seconds. Without optimisation in LLVM, and by
# the older emitters of fusions where they still exist, that takes a third of the time.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false" * version("jaxlib").startswith("0.10.")
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import pytest

from parallel.mesh import MeshConfig, make_mesh

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def strict_dtypes(request):
    """Our own maths promotes no dtype silently; optax, on the floor above, does."""
    ours = {"models", "parallel"} & set(request.path.parts)
    with jax.numpy_dtype_promotion("strict" if ours else "standard"):
        yield


@pytest.fixture
def use_mesh():
    """`with use_mesh(data=2, tensor=4) as mesh:`; a mesh over the first devices, made current."""

    def build(**sizes):
        config = MeshConfig(**({"data": 1} | sizes))
        count = 1
        for size in config.sizes().values():
            count *= size
        return jax.set_mesh(make_mesh(config, jax.devices()[:count]))

    return build
