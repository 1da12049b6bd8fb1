"""Whether every method makes the same of one model on every layout: codes, zeros and loss.

    python train.py --config=benchmarks/dense.py --workdir=runs/dense
    python -m benchmarks.compressed_layouts --workdir=runs/dense

One process for each layout makes the model smaller by each method and keeps what it made; then the
files are compared. What differs are sums of float32 in another order, of which a code or a zero
that is as near to one side as to the other may tip over.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np

from compress.factorize import Factorize, factorize
from compress.prune_layers import Prune, prune
from compress.quantize import Quantize, quantize
from compress.result import Result
from compressing import Run, compressed_model, forms_of, opened
from config_border import read_config, with_values
from data.loader import device_batches
from parallel.compilation import keep_compiled
from training.evaluation import evaluate, make_eval_step
from training.naming import named

RESULTS = Path(__file__).parent / "results" / "compressed_layouts.json"
LAYOUTS = {
    "one device": dict(data=1),
    "fsdp 8": dict(data=1, fsdp=8),
    "tensor 4 x data 2": dict(data=2, tensor=4),
}
ROWS, BATCHES = 32, 4
Make = Callable[[Run, Path], Result]


def rounded(method: str, form: str) -> Make:
    """A quantisation."""

    def make(run: Run, folder: Path) -> Result:
        read = method != "rtn" or "=" in form
        text = run.calibration(ROWS, 0, method) if read else None
        of_model = (run.experiment.model, run.model, run.params)
        forms = forms_of(run, "stack/*", form, "form")
        return quantize(Quantize(method), forms, *of_model, text, scratch=folder)

    return make


def zeros(method: str, **how: Any) -> Make:
    """A pruning."""

    def make(run: Run, folder: Path) -> Result:
        chosen = Prune(method, **how)
        text = run.calibration(ROWS, 0, method) if chosen.calibrated else None
        names = list(forms_of(run, "stack/*", "int8", "form"))
        return prune(chosen, names, run.model, run.params, text, scratch=folder)

    return make


def factors(run: Run, folder: Path) -> Result:
    """Whitened factors."""
    forms = forms_of(run, "stack/*", "rank:96", "form")
    text = run.calibration(ROWS, 0, "whitened")
    how = Factorize("whitened")
    return factorize(how, forms, run.model, run.params, text, scratch=folder)


METHODS: dict[str, Make] = {
    "int8": rounded("rtn", "int8"),
    "int4:128": rounded("rtn", "int4:128"),
    "nf4:64": rounded("rtn", "nf4:64"),
    "fp8": rounded("rtn", "fp8"),
    "magnitude": zeros("magnitude"),
    "magnitude, global": zeros("magnitude", scope="global"),
    "magnitude 2:4": zeros("magnitude", pattern="2:4", packed=True),
    "gptq int4:128": rounded("gptq", "int4:128"),
    "awq int4:128": rounded("awq", "int4:128"),
    "smoothquant int8+int8=": rounded("smoothquant", "int8+int8="),
    "wanda": zeros("wanda"),
    "sparsegpt": zeros("sparsegpt"),
    "whitened rank:96": factors,
}


def make_all(workdir: Path, layout: str, out: Path) -> None:
    """Every method on one layout, in this process."""
    keep_compiled()
    mesh = {f"config.mesh.{axis}": n for axis, n in LAYOUTS[layout].items()}
    config = with_values(read_config(workdir), mesh)
    with opened(config, workdir, None, out / "nowhere") as run:
        data = run.experiment.open_data(workdir)
        with data.held_out(BATCHES) as loader:
            batches = list(device_batches(loader, run.mesh, run.model.rules.spec("batch seq")))
        for name, make in METHODS.items():
            folder = out / name
            folder.mkdir()
            made = make(run, folder)
            made.params = jax.tree.map(lambda a: a + 0, run.params)  # `finished` uses it up
            _, model = compressed_model(run, {"config.weights.forms": made.forms()})
            params = made.finished(model, run.mesh)
            sizes = data.tokenizer.token_bytes()
            step = jax.jit(make_eval_step(model, run.experiment.precision, sizes))
            loss = evaluate(step, params, batches)["loss"]
            (folder / "loss").write_text(repr(float(loss)))
            print(f"{layout}: {name}: {loss:.6f}", flush=True)


def difference(one: Path, other: Path) -> dict[str, float]:
    """Of codes, or of zeros, the share that differs; of the loss a part."""
    tipped = total = 0
    for file in sorted(one.iterdir()):
        if file.name == "loss":
            continue
        arrays = [
            named({"": pickle.loads((folder / file.name).read_bytes())}) for folder in (one, other)
        ]
        for part, array in arrays[0].items():
            a, b = array, arrays[1][part]
            if array.dtype.kind == "f":
                if part:  # scales, factors, kept values: the loss compares them
                    continue
                a, b = a == 0, b == 0
            tipped, total = tipped + int(np.sum(a != b)), total + a.size
    losses = [float((folder / "loss").read_text()) for folder in (one, other)]
    return {
        "entries": total,
        "differ": tipped / max(total, 1),
        "loss": abs(losses[1] / losses[0] - 1),
    }


def main() -> None:
    """All layouts in turn, then the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--layout", choices=list(LAYOUTS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.layout:
        make_all(options.workdir, options.layout, options.out)
        return
    with TemporaryDirectory() as scratch:
        for layout, sizes in LAYOUTS.items():
            out = Path(scratch) / layout
            out.mkdir()
            count = int(np.prod(list(sizes.values())))
            flags = [f"--workdir={options.workdir}", f"--layout={layout}", f"--out={out}"]
            subprocess.run(
                [sys.executable, "-m", "benchmarks.compressed_layouts", *flags],
                check=True,
                env=os.environ | {"JAX_NUM_CPU_DEVICES": str(count), "JAX_PLATFORMS": "cpu"},
            )
        first, *others = LAYOUTS
        rows = [
            {"method": name, "layout": layout}
            | difference(Path(scratch) / first / name, Path(scratch) / layout / name)
            for name in METHODS
            for layout in others
        ]
    for row in rows:
        print(json.dumps(row))
    found = {"jax": jax.__version__, "calibration_rows": ROWS, "against": first, "rows": rows}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
