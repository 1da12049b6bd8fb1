"""Memory of generation: predicted bytes against those of the compiled programs, and every knob."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from compile_for import compile_for, content_key
from config_border import load_config, override
from config_types import plain
from data.objective import ObjectiveConfig
from memory.compiled import Compiled
from memory.compiled_inference import compile_inference
from memory.inference import predict_inference
from memory.inference_fit import changes, largest
from memory.inference_job import InferenceJob
from memory.inference_terms import CROSS, FULL, POOL, RING, InferenceTerms
from models.decode import kind_of
from models.kv_cache import CacheShape
from parallel.mesh import MeshConfig
from parallel.precision import PrecisionConfig
from parallel.rules import ParallelConfig, make_rules
from parallel.targets import cpu_target, parse_target
from tests.families import FAMILIES, S
from tests.small import DECODER

ROOT = Path(__file__).parent.parent.parent
HAS_GPU_COMPILER = importlib.util.find_spec("jax_cuda12_plugin") is not None
TARGET = cpu_target(8)
PART = 0.5
ROWS, PROMPT, SLOTS, BLOCK = 16, 12, 32, 4
LOCAL = replace(DECODER, window=8, pattern=("local", "global"), layers=4)
MODELS = {
    "decoder": (DECODER, ObjectiveConfig()),
    "windows": (LOCAL, ObjectiveConfig()),
} | {
    name: (family.config, family.objective)
    for name, family in FAMILIES.items()
    if family.config.family in ("encoder_decoder", "vision_language")
}
LAYOUTS = {
    "data 8": {"data": 8},
    "tensor 4 x data 2": {"tensor": 4, "data": 2},  # more parts than K/V heads
    "fsdp 4 x tensor 2": {"fsdp": 4, "tensor": 2, "zero": 3},
}
KINDS = {
    "contiguous": {},
    "paged": {"paged": True},
    "int8": {"int8": True},
    "paged int8": {"paged": True, "int8": True},
}


def job_of(
    name: str = "decoder",
    *,
    paged: bool = False,
    int8: bool = False,
    rows: int = ROWS,
    slots: int = SLOTS,
    compute: str = "float32",
    zero: int = 0,
    **mesh: int,
) -> InferenceJob:
    config, objective = MODELS[name]
    kind_of(config)
    sizes = MeshConfig(**({"data": 1} | mesh)).resolve(8)
    dims = config.dims() | {"batch": (rows, "config.generate.batch_size")}
    rules = make_rules(ParallelConfig(zero=zero), sizes.sizes(), dims)
    slots += config.image_tokens
    source = S if config.family == "encoder_decoder" else config.vision.patches
    shape = CacheShape(
        rows=rows,
        slots=slots,
        int8=int8,
        block=BLOCK if paged else 0,
        blocks=rows // rules.parts("batch") * -(-slots // BLOCK) if paged else 0,
        source=source if config.cross != "none" else 0,
    )
    prompt = 1 if config.family == "encoder_decoder" else PROMPT
    precision = PrecisionConfig(compute=compute)
    return InferenceJob(config, sizes, precision, objective, rules, shape, prompt)


def compiled(job: InferenceJob) -> dict[str, Compiled]:
    return compile_inference(job, TARGET)


# --- What is held, to the byte --------------------------------------------------------------------

CELLS = [
    *[("decoder", layout, kind) for layout in LAYOUTS for kind in ("contiguous", "paged int8")],
    *[("windows", "fsdp 4 x tensor 2", kind) for kind in ("contiguous", "paged", "int8")],
    *[(name, "tensor 4 x data 2", "int8") for name in MODELS if name not in ("decoder", "windows")],
]


@pytest.mark.parametrize(("name", "layout", "kind"), CELLS)
def test_weights_cache_and_inputs_are_predicted_to_the_byte(name, layout, kind):
    job = job_of(name, **LAYOUTS[layout], **KINDS[kind])
    prediction, terms = predict_inference(job, TARGET.chip), InferenceTerms(job, TARGET.chip)
    for phase, program in compiled(job).items():
        assert prediction.programs[phase].arguments == program.arguments, phase
        assert sum(terms.cache.values()) == program.aliases, "the cache is written in place"
        # Beside the cache the logits, and a pointer for each array.
        outputs = program.outputs - program.aliases - terms.logits
        assert 0 <= outputs <= 8 * (1 + len(jax.tree.leaves(job.cache))), phase
        if job.rules.zero < 3:  # XLA:CPU gathers all layers at once whatever the program says
            # CPU's constants are guesses; of programs this small most is weights and cache.
            total = prediction.programs[phase].total_bytes
            assert total == pytest.approx(program.total_bytes, rel=PART), phase


def test_the_cache_is_named_by_kind():
    def kinds(name: str, **how: bool) -> set[str]:
        return set(InferenceTerms(job_of(name, data=8, **how), TARGET.chip).cache)

    assert kinds("decoder") == {FULL}
    assert kinds("windows") == {FULL, RING}
    assert kinds("windows", paged=True) == {POOL, RING}
    assert kinds("decoder", int8=True) == {FULL, f"{FULL}, scales"}
    crossing = [name for name, (config, _) in MODELS.items() if config.cross != "none"]
    assert crossing
    for name in crossing:
        assert kinds(name) == {FULL, CROSS}


# --- Every knob moves compiled bytes --------------------------------------------------------------


def cache_bytes(**how: int | bool | str) -> int:
    """What decoding writes in place, compiled."""
    return compiled(job_of(**{"data": 8} | how))["decode"].aliases


def test_int8_is_a_quarter_of_float32_and_its_scales():
    H = DECODER.head_dim
    assert cache_bytes(int8=True) * 4 * H == cache_bytes() * (H + 4)


def test_rows_and_tokens_are_what_the_cache_is_for():
    one = cache_bytes(rows=8)
    assert cache_bytes(rows=16) == 2 * one
    assert cache_bytes(rows=8, slots=2 * SLOTS) == 2 * one


def test_a_window_does_not_grow_with_the_text():
    short, long = (
        InferenceTerms(job_of("windows", data=8, slots=slots), TARGET.chip).cache
        for slots in (32, 128)
    )
    assert short[RING] == long[RING]
    assert 4 * short[FULL] == long[FULL]
    grows = cache_bytes(name="windows", slots=128) - cache_bytes(name="windows", slots=32)
    assert grows == long[FULL] - short[FULL]


def test_weights_divide_over_fsdp_and_tensor():
    whole, divided, tensor = (
        compiled(job_of(**layout))["decode"].arguments
        for layout in ({"fsdp": 8}, {"fsdp": 8, "zero": 3}, {"tensor": 8})
    )
    assert divided < 0.6 * whole
    assert tensor < whole


@pytest.mark.skipif(not HAS_GPU_COMPILER, reason="wants the extra gpu-target")
def test_layers_gather_their_weights_one_after_the_other():
    """Three times the layers need no more gathered weights and no more activations."""
    found = []
    for layers in (2, 6):
        values = {"model.layers": layers, "mesh.data": 1, "mesh.fsdp": 8}
        values |= {"generate.prompt_length": 32, "generate.max_new_tokens": 32}
        flags = [f"--config.{key}={value}" for key, value in values.items()]
        config = override(load_config(str(ROOT / "configs/tiny.py")), flags)
        answer = compile_for(plain(config), parse_target("gpu:h100:1x8"), mode="generate")
        assert answer["status"] == "ok", answer
        found.append(answer["programs"])
    for phase, few in found[0].items():
        assert found[1][phase]["temporaries"] < 1.2 * few["temporaries"], phase


def test_answers_of_a_compiler_are_kept_by_mode():
    keys = {content_key({}, TARGET, mode) for mode in ("train", "evaluate", "generate")}
    assert len(keys) == 3
    assert content_key({}, TARGET) in keys


# --- What fits ------------------------------------------------------------------------------------


def test_the_largest_batch_and_length_are_the_last_that_fit():
    job = job_of(data=8)
    limit = int(1.5 * predict_inference(job, TARGET.chip).total_bytes)
    found = largest(job, TARGET.chip, limit)

    def total(**size: int) -> int:
        return predict_inference(job.resized(**size), TARGET.chip).total_bytes

    assert found.rows % 8 == 0
    assert total(rows=found.rows) <= limit < total(rows=found.rows + 8)
    assert total(slots=found.slots) <= limit < total(slots=found.slots + 1)
    assert largest(job, TARGET.chip, 1) == type(found)(0, 0)


def test_what_does_not_fit_is_told_what_would():
    job = job_of(data=8, slots=512)
    limit = int(0.6 * predict_inference(job, TARGET.chip).total_bytes)

    def change(overrides: dict[str, object]) -> InferenceJob:
        if overrides == {"config.generate.cache_dtype": "int8"}:
            return replace(job, shape=replace(job.shape, int8=True))
        if "config.generate.batch_size" in overrides:
            return job.resized(rows=int(str(overrides["config.generate.batch_size"])))
        raise ValueError(overrides)

    found = changes(job, TARGET.chip, limit, change)
    assert [c.fits for c in found] == sorted((c.fits for c in found), reverse=True)
    assert any("cache_dtype=int8" in str(c) for c in found)


# --- As published ---------------------------------------------------------------------------------


def published():
    """benchmarks/inference_accuracy.py as a module, and the programs of its table."""
    path = ROOT / "benchmarks" / "inference_accuracy.py"
    spec = importlib.util.spec_from_file_location("inference_accuracy", path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, module.errors(module.read_cells(module.RESULTS))


@pytest.mark.skipif(
    jax.__version_info__ >= (0, 11, 2), reason="the cells are programs of JAX 0.10.2"
)
def test_the_published_accuracy_is_what_the_code_reaches():
    module, found = published()
    now = module.summary(found)
    said = json.loads((ROOT / "docs/memory-accuracy/inference.json").read_text())
    assert now["programs"] == said["programs"] >= 30
    assert now["median"] <= 3.0
    assert now["arguments_worst"] <= 0.1  # a TPU's scalars and odd tiles
    for key in ("median", "p95", "worst"):
        assert now[key] == pytest.approx(said[key], abs=0.05), f"{key}: write the table again"
