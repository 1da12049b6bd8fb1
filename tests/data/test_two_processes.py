"""Two processes put one global batch together, each from the rows that its devices hold."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys
import jax
import numpy as np
from jax.sharding import PartitionSpec as P

port, process, workdir = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", 2, process)

from data.config import DataConfig
from data.dataset import open_data
from data.loader import device_batches, local_rows
from data.objective import ObjectiveConfig
from parallel.mesh import MeshConfig, make_mesh

config, spec = DataConfig(sequence_length=16, batch_size=8), P(("data", "fsdp"))
for objective in (ObjectiveConfig("causal_lm"), ObjectiveConfig("masked_lm")):
    data = open_data(config, 258, workdir, objective=objective)
    with data.train() as loader:
        expected = [next(loader), next(loader)]
    for sizes, rows in (
        ({"data": 8}, range(4 * process, 4 * process + 4)),
        ({"data": 2, "tensor": 4}, range(4 * process, 4 * process + 4)),
        ({"data": 1, "tensor": 8}, range(8)),  # every process needs every row
    ):
        mesh = make_mesh(MeshConfig(**sizes))
        here = local_rows(mesh, spec, 8)
        assert here.tolist() == list(rows), (sizes, here)
        with data.train(rows=here) as loader:
            for batch, whole in zip(device_batches(loader, mesh, spec), expected):
                assert batch.keys() == whole.keys()
                for name, array in batch.items():
                    assert array.shape == (8, 16)
                    assert len(array.addressable_shards) == 4
                    for shard in array.addressable_shards:
                        np.testing.assert_array_equal(shard.data, whole[name][shard.index])
print("done")
"""


@pytest.mark.slow
def test_global_batches_of_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(port), str(process), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
        assert output.endswith("done\n")
