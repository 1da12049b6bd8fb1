"""What each way to make a model smaller costs, on one model trained on real text.

    python train.py --config=benchmarks/dense.py --workdir=runs/dense
    python -m benchmarks.compressed --workdir=runs/dense [--part=quantize,...] [--seeds=5]

Seeds choose the calibration text, and the channels that outliers are put into. Beside held-out bits
per byte there is the change of every matrix's outputs on held-out text, |X (W' - W)|^2 / |X W|^2
over all of them: what most of the methods minimise on their calibration text.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compress.calibration import Calibration
from compress.factorize import Factorize, factorize
from compress.fold import apply_fold, folds_of, shared_scale
from compress.gptq import output_error
from compress.prune_layers import Prune, prune
from compress.quantize import Quantize, quantize
from compress.result import Result
from compress.walk import STACK, Layer, matrices_of, walk
from compressing import Run, forms_of, opened
from config_border import read_config
from data.loader import device_batches
from parallel.compilation import keep_compiled
from parallel.stored import Matrix, is_stored
from training.evaluation import evaluate, make_eval_step
from training.naming import named
from training.stored import dense_layer

RESULTS = Path(__file__).parent / "results" / "compressed.json"
Arrays = dict[str, np.ndarray]
ROWS = 32  # of calibration text


@dataclass
class Bench:
    """A dense run, its held-out text, and what goes into its matrices there."""

    run: Run
    batches: list[Any]
    eval_step: Any
    moments: list[dict[str, np.ndarray]]

    def bits_per_byte(self, arrays: Arrays) -> float:
        """Of the dense model with other weights."""
        return evaluate(self.eval_step, self.placed(arrays), self.batches)["bits_per_byte"]

    def placed(self, arrays: Arrays) -> Any:
        """NumPy arrays as parameters."""
        structure: Any = jax.tree.structure(self.run.params)
        names = list(named(self.run.params))
        leaves = zip(names, jax.tree.leaves(self.run.params), strict=True)
        return structure.unflatten([jax.device_put(arrays[n], a.sharding) for n, a in leaves])

    def output_change(self, dense: Arrays, arrays: Arrays, moments: Any = None) -> float:
        """The part of the matrices' outputs that changes, on held-out text."""
        changed = whole = 0.0
        axes = named(self.run.model.axes)
        for layer, of_layer in enumerate(moments or self.moments):
            for name, moment in of_layer.items():
                matrix = Matrix.of(dense[name].shape, axes[name])
                flat = lambda a, m=matrix, i=layer, n=name: a[n][i].reshape(m.rows, m.columns)
                changed += output_error(moment, flat(arrays) - flat(dense))
                whole += output_error(moment, flat(dense))
        return changed / whole


def moments_of(run: Run, params: Any, batches: list[Any]) -> list[dict[str, np.ndarray]]:
    """What goes into each matrix of each layer of a model."""
    found: list[dict[str, np.ndarray]] = []

    def visit(layer: Layer) -> dict[str, jax.Array]:
        found.append({name: np.asarray(inputs.moment) for name, inputs in layer.inputs.items()})
        return {}

    walk(Calibration(run.model, run.mesh, batches), params, visit)
    return found


def dense_of(result: Result, dense: Arrays) -> Arrays:
    """The arrays that a result stands for."""
    arrays = dict(dense)
    for name, layers in result.nodes().items():
        own = [np.asarray(dense_layer(n) if is_stored(n) else n) for n in layers]
        arrays[name] = np.stack([o.reshape(dense[name].shape[1:]) for o in own])
    return arrays


def with_outliers(bench: Bench, dense: Arrays, seed: int, factor: float = 30.0) -> Arrays:
    """The same function with a few channels of every input made large, and their weights small."""
    rng, arrays = np.random.default_rng(seed), dict(dense)
    config, axes = bench.run.experiment.model, named(bench.run.model.axes)
    for fold in folds_of(config, list(dense), STACK):
        for layer in range(config.layers):
            mine = {n: a[layer] for n, a in arrays.items() if n.startswith(STACK)}
            matrices = {n: Matrix.of(dense[n].shape, axes[n]) for n in matrices_of(bench.run.model)}
            rows = matrices[fold.targets[0]].rows
            scale = np.ones(rows, np.float32)
            scale[rng.choice(rows, max(1, rows // 100), replace=False)] = 1 / factor
            scale = shared_scale(fold, scale, config.head_dim)
            for name, array in apply_fold(fold, mine, matrices, scale, config.head_dim).items():
                arrays[name] = arrays[name].copy()
                arrays[name][layer] = array
    return arrays


def main() -> None:
    """Each part, over all seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--part", default="quantize,outliers,factorize,prune")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=16, help="held-out, of the run's size")
    options = parser.parse_args()
    keep_compiled()
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    parts: dict[str, Callable[..., Any]] = {
        "quantize": quantized,
        "outliers": outliers,
        "factorize": factored,
        "prune": pruned,
    }
    config = read_config(options.workdir)
    with opened(config, options.workdir, None, Path("nowhere")) as run:
        experiment = run.experiment
        data = experiment.open_data(options.workdir)
        spec = run.model.rules.spec("batch seq")
        with data.held_out(options.batches) as loader:
            batches = list(device_batches(loader, run.mesh, spec))
        sizes = data.tokenizer.token_bytes()
        eval_step = jax.jit(make_eval_step(run.model, experiment.precision, sizes))
        bench = Bench(run, batches, eval_step, moments_of(run, run.params, batches[:4]))
        dense = {name: np.asarray(a) for name, a in named(run.params).items()}
        whole = bench.bits_per_byte(dense)
        found["dense"] = {
            "bits_per_byte": whole,
            "step": run.step,
            "parameters": sum(a.size for a in dense.values()),
            "jax": jax.__version__,
            "rows": ROWS,
        }
        print(f"dense: {whole:.4f} bits per byte", flush=True)
        for part in options.part.split(","):
            began = time.perf_counter()
            rows = parts[part](bench, dense, range(options.seeds))
            for row in rows:
                row["loss"] = row["bits_per_byte"] / whole - 1
            found[part] = rows
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
            print(f"{part}: {time.perf_counter() - began:.0f} s", flush=True)


def row_of(bench: Bench, dense: Arrays, arrays: Arrays, moments: Any = None, **what: Any) -> Any:
    """One measurement, said at once."""
    row = what | {
        "output_change": bench.output_change(dense, arrays, moments),
        "bits_per_byte": bench.bits_per_byte(arrays),
    }
    print(json.dumps(row), flush=True)
    return row


def quantized(bench: Bench, dense: Arrays, seeds: range) -> list[Any]:
    """Rounding to nearest and GPTQ, by bits."""
    rows, run = [], bench.run

    def made(how: Quantize, form: str, text: Calibration | None) -> Arrays:
        forms = forms_of(run, "stack/*", form, "form")
        config = run.experiment.model
        return dense_of(quantize(how, forms, config, run.model, run.params, text), dense)

    for form in ("int8", "int4:128", "int3:128", "nf4:64", "fp8"):
        rows.append(row_of(bench, dense, made(Quantize(), form, None), method="rtn", form=form))
    for seed in seeds:
        text = run.calibration(ROWS, 100 + seed, "gptq")
        for form in ("int4:128", "int3:128"):
            arrays = made(Quantize("gptq"), form, text)
            rows.append(row_of(bench, dense, arrays, method="gptq", form=form, seed=seed))
    return rows


def outliers(bench: Bench, dense: Arrays, seeds: range) -> list[Any]:
    """AWQ and SmoothQuant against plain rounding where a few channels are large."""
    rows = []
    for seed in seeds:
        hard = with_outliers(bench, dense, seed)
        params = bench.placed(hard)
        run = replace(bench.run, params=params)
        moments = moments_of(run, params, bench.batches[:4])
        text = run.calibration(ROWS, 100 + seed, "awq")

        def made(method: str, form: str, run: Run = run, text: Any = text) -> Result:
            forms = forms_of(run, "stack/*", form, "form")
            how, config = Quantize(method), run.experiment.model
            read = text if method != "rtn" else None
            return quantize(how, forms, config, run.model, run.params, read)

        rows.append(row_of(bench, hard, hard, moments, method="dense", seed=seed))
        for method in ("rtn", "awq"):
            arrays = dense_of(made(method, "int4:128"), hard)
            rows.append(
                function_row(bench, hard, arrays, params, method=method, form="int4:128", seed=seed)
            )
        for method in ("rtn", "smoothquant"):
            result = made(method, "int8+int8")
            rows.append(stored_row(bench, run, result, method=method, form="int8+int8", seed=seed))
    return rows


def function_row(bench: Bench, hard: Arrays, arrays: Arrays, params: Any, **what: Any) -> Any:
    """As `row_of`, where scales moved between matrices: the layers' outputs are compared."""
    change = layer_change(bench, params, bench.placed(arrays), bench.run.model, bench.run.model)
    row = what | {"output_change": change, "bits_per_byte": bench.bits_per_byte(arrays)}
    print(json.dumps(row), flush=True)
    return row


def stored_row(bench: Bench, run: Run, result: Result, **what: Any) -> Any:
    """The same of a model whose inputs are codes, too: it is run as it is stored."""
    from compressing import compressed_model

    _, model = compressed_model(run, {"config.weights.forms": result.forms()})
    copy = replace_params(result, run)
    params = copy.finished(model, run.mesh)
    sizes = run.experiment.open_data(run.workdir).tokenizer.token_bytes()
    step = jax.jit(make_eval_step(model, run.experiment.precision, sizes))
    row = what | {
        "output_change": layer_change(bench, run.params, params, run.model, model),
        "bits_per_byte": evaluate(step, params, bench.batches)["bits_per_byte"],
    }
    print(json.dumps(row), flush=True)
    return row


def replace_params(result: Result, run: Run) -> Result:
    """The result on a copy of the parameters, which `finished` uses up."""
    result.params = jax.tree.map(jnp.copy, run.params)
    return result


def layer_change(bench: Bench, params: Any, others: Any, model: Any, other: Any) -> float:
    """The change of the residual stream after the last layer, as a part of what layers add."""
    last = []
    for tree, one in ((params, model), (others, other)):
        cut = one.cut

        @jax.jit
        def run(tree: Any, batch: Any, cut: Any = cut, one: Any = one) -> tuple[Any, Any]:
            from parallel.zero import for_model
            from training.micro_batches import counted

            leaves, build = for_model(tree, one.axes, one.rules, "float32")
            built = build(leaves)
            x = cut.embed(built, batch, None)
            return x, cut.blocks(built, x, batch, None, None, counted(batch))

        last.append([jax.device_get(run(tree, batch)) for batch in bench.batches[:4]])
    changed = whole = 0.0
    for (start, a), (_, b) in zip(*last, strict=True):
        changed += float(np.sum((a - b).astype(np.float64) ** 2))
        whole += float(np.sum((a - start).astype(np.float64) ** 2))
    return changed / whole


def factored(bench: Bench, dense: Arrays, seeds: range) -> list[Any]:
    """Plain, whitened and scaled factors of one rank."""
    rows, run = [], bench.run
    forms = forms_of(run, "stack/*", "rank:96", "form")
    plain = dense_of(factorize(Factorize("svd"), forms, run.model, run.params, None), dense)
    rows.append(row_of(bench, dense, plain, method="svd", form="rank:96"))
    for seed in seeds:
        text = run.calibration(ROWS, 100 + seed, "whitened")
        for method in ("whitened", "asvd"):
            made = factorize(Factorize(method), forms, run.model, run.params, text)
            arrays = dense_of(made, dense)
            rows.append(row_of(bench, dense, arrays, method=method, form="rank:96", seed=seed))
    return rows


def pruned(bench: Bench, dense: Arrays, seeds: range) -> list[Any]:
    """Half of the weights zero, by magnitude and by what text says."""
    rows, run = [], bench.run
    names = list(forms_of(run, "stack/*", "int8", "form"))

    def made(method: str, pattern: str, text: Calibration | None) -> Arrays:
        how = Prune(method, pattern=pattern)
        return dense_of(prune(how, names, run.model, run.params, text), dense)

    for pattern in ("unstructured", "2:4"):
        arrays = made("magnitude", pattern, None)
        rows.append(row_of(bench, dense, arrays, method="magnitude", form=pattern))
    for seed in seeds:
        text = run.calibration(ROWS, 100 + seed, "wanda")
        for method in ("wanda", "sparsegpt"):
            for pattern in ("unstructured", "2:4") if seed == 0 else ("unstructured",):
                arrays = made(method, pattern, text)
                rows.append(row_of(bench, dense, arrays, method=method, form=pattern, seed=seed))
    return rows


if __name__ == "__main__":
    main()
