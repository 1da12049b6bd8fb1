"""A checkpoint survives what happens to disks and processes, and fits any layout."""

import gc
import json
import logging
import resource
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from parallel.mesh import MeshConfig, make_mesh
from tests.processes import launch, outputs
from training import manifest
from training.checkpoint import CheckpointConfig, Checkpoints


class State(NamedTuple):
    step: jax.Array
    params: dict
    optimizer: optax.OptState
    key: jax.Array


def make_state(mesh, spec, seed=0, embed=16):
    """A state with everything that has its own way of being stored."""

    def put(x, spec):
        return jax.device_put(x, NamedSharding(mesh, spec))

    random = np.random.default_rng(seed)
    params = {
        "blocks": {"up": put(random.standard_normal((2, embed, 32), np.float32), spec)},
        "norm": put(random.standard_normal(embed, np.float32), P()),
    }
    optimizer = jax.jit(optax.adamw(1e-3).init)(params)
    key = put(jax.random.key(seed), P())
    return State(put(np.int32(seed), P()), params, optimizer, key)


def abstract(state, mesh, spec, dtype=None):
    """How `state` is wanted on another mesh; its matrices in `dtype`."""

    def leaf(x):
        matrix = x.ndim == 3
        sharding = NamedSharding(mesh, spec if matrix else P())
        return jax.ShapeDtypeStruct(
            x.shape, dtype if dtype and matrix else x.dtype, sharding=sharding
        )

    return jax.tree.map(leaf, state)


def values(tree):
    """Host copies of all leaves, random keys as bits."""
    keys = jax.dtypes.prng_key
    return [
        np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, keys) else x)
        for x in jax.tree.leaves(tree)
    ]


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(values(found), values(expected), strict=True):
        np.testing.assert_array_equal(x, y)


CONFIG = CheckpointConfig(every=10, keep=3)
FSDP, TENSOR = P(None, "fsdp", "tensor"), P(None, None, ("data", "tensor"))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A directory with the steps 10, 20 and 30, and the state of each."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    path = tmp_path_factory.mktemp("written")
    with jax.set_mesh(mesh):
        states = {step: make_state(mesh, FSDP, seed=step) for step in (10, 20, 30)}
        checkpoints = Checkpoints(path, CONFIG)
        for step, state in states.items():
            checkpoints.save(step, state, {"position": step})
        checkpoints.close()
    return path, states, mesh


@pytest.fixture
def three_steps(tmp_path, written):
    """A copy of what was written, the states, and how to ask for one."""
    path, states, mesh = written
    shutil.copytree(path, tmp_path, dirs_exist_ok=True)
    with jax.set_mesh(mesh):
        yield tmp_path, states, abstract(states[10], mesh, FSDP)


def test_restores_on_another_mesh_and_in_another_dtype(three_steps, use_mesh):
    path, states, _ = three_steps
    with use_mesh(data=2, tensor=2):
        mesh = jax.sharding.get_mesh()
        want = abstract(states[20], mesh, TENSOR, jnp.bfloat16)
        step, found = Checkpoints(path).restore(20, want)
    assert step == 20
    up = found.params["blocks"]["up"]
    assert up.dtype == jnp.bfloat16
    assert up.sharding == want.params["blocks"]["up"].sharding
    expected = states[20].params["blocks"]["up"]
    np.testing.assert_array_equal(np.asarray(up), np.asarray(expected).astype(jnp.bfloat16))
    assert_equal(found.params["norm"], states[20].params["norm"])
    assert found.key.dtype == states[20].key.dtype
    assert_equal(found.key, states[20].key)


def test_latest_steps_and_metadata(three_steps):
    path, states, want = three_steps
    checkpoints = Checkpoints(path)
    assert (checkpoints.steps(), checkpoints.latest()) == ([10, 20, 30], 30)
    assert checkpoints.metadata(20) == {"position": 20}
    step, found = checkpoints.restore(None, want)
    assert step == 30
    assert_equal(found, states[30])


def test_the_parameters_alone(three_steps):
    path, states, want = three_steps
    _, found = Checkpoints(path).restore(10, {"params": want.params}, partial=True)
    assert_equal(found["params"], states[10].params)


def test_on_disk_are_canonical_names_and_no_mesh(three_steps):
    path, _states, _ = three_steps
    names = set(manifest.tensors(path / "10"))
    assert {"step", "key", "params/blocks/up", "optimizer/0/mu/blocks/up"} <= names
    files = [file for file in (path / "10").rglob("*") if file.is_file()]
    assert not any(b"fsdp" in file.read_bytes() for file in files)
    # Plain Orbax reads it too.
    with ocp.PyTreeCheckpointer() as orbax:
        metadata = orbax.metadata(path / "10" / "state").item_metadata.tree
    assert metadata["params"]["blocks"]["up"].shape == (2, 16, 32)


def test_a_donated_state_is_saved_as_it_was(tmp_path, use_mesh):
    with use_mesh(fsdp=8):
        mesh = jax.sharding.get_mesh()
        x = jax.device_put(jnp.arange(2.0**20), NamedSharding(mesh, P("fsdp")))
        want = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)}
        overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
        checkpoints = Checkpoints(tmp_path, CONFIG)
        checkpoints.save(1, {"x": x}, {})
        # (On CPU, Orbax writes from the buffer itself, and JAX copies instead of donating it.)
        assert float(overwrite(x).max()) == -1
        checkpoints.wait()
        _, found = checkpoints.restore(1, want)
        np.testing.assert_array_equal(np.asarray(found["x"]), np.arange(2.0**20))
        checkpoints.close()


def test_keeps_the_newest_and_the_best(tmp_path, use_mesh):
    with use_mesh():
        checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep=2, best="eval_loss"))
        for step, loss in enumerate((3.0, 1.0, np.nan, 2.0, 4.0)):
            checkpoints.save(step, {"x": jnp.float32(step)}, {"metrics": {"eval_loss": loss}})
        checkpoints.close()
        assert checkpoints.steps() == [1, 3, 4]


def damage(kind, file):
    content = file.read_bytes()
    if kind == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif kind == "zeros":
        file.write_bytes(bytes(len(content)))
    elif kind == "flipped":
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        file.unlink()


@pytest.mark.parametrize("kind", ["truncated", "zeros", "flipped", "missing"])
def test_damage_to_any_file_is_found(three_steps, kind):
    path, _, _ = three_steps
    files = [file for file in (path / "30").rglob("*") if file.is_file()]
    assert len(files) > 5
    for file in files:
        if (file.name, kind) == (manifest.NAME, "flipped"):
            continue  # A flipped bit in a checksum is found as well, under another file's name.
        content = file.read_bytes()
        damage(kind, file)
        assert file.name in manifest.damage(path / "30")
        file.write_bytes(content)
        assert manifest.damage(path / "30") is None


def largest_file(step):
    return max(step.rglob("d/*"), key=lambda file: file.stat().st_size)


def test_damaged_steps_are_passed_over_and_kept(three_steps, caplog):
    path, states, want = three_steps
    file = largest_file(path / "30")
    damage("truncated", file)
    (path / "20" / manifest.NAME).unlink()
    with caplog.at_level(logging.WARNING):
        checkpoints = Checkpoints(path, CONFIG)
        step, found = checkpoints.restore(None, want)
    assert step == 10
    assert_equal(found, states[10])
    assert "step 30" in caplog.text
    assert file.name in caplog.text
    assert "step 20" in caplog.text
    assert manifest.NAME in caplog.text
    assert (path / "30.damaged" / "metadata.json").exists()
    # The same number can be saved again, and damage again.
    checkpoints.save(30, states[30], {})
    checkpoints.wait()
    assert_equal(checkpoints.restore(None, want)[1], states[30])
    assert checkpoints.steps() == [10, 30]
    damage("missing", largest_file(path / "30"))
    assert checkpoints.restore(None, want)[0] == 10
    assert (path / "30.damaged_").exists()
    checkpoints.close()


def test_a_run_whose_steps_are_all_damaged_does_not_start_anew(three_steps):
    path, _, want = three_steps
    for step in ("10", "20", "30"):
        damage("truncated", largest_file(path / step))
    for _ in range(2):
        checkpoints = Checkpoints(path, CONFIG)
        assert checkpoints.latest() == 30
        with pytest.raises(ValueError, match="no undamaged checkpoint"):
            checkpoints.restore(None, want)


def test_a_reader_moves_nothing_and_never_swaps_the_step_asked_for(three_steps, caplog):
    path, _, want = three_steps
    damage("truncated", largest_file(path / "30"))
    assert Checkpoints(path).restore(None, want)[0] == 20
    assert (path / "30").exists()
    with pytest.raises(ValueError, match=r"--workdir: .* no undamaged step 30; .*: 10, 20"):
        Checkpoints(path).restore(30, want)
    with pytest.raises(ValueError, match="no undamaged step 7"):
        Checkpoints(path).restore(7, want)
    with pytest.raises(ValueError, match="no undamaged checkpoint"):
        Checkpoints(path / "nothing").restore(None, want)


def test_an_interrupted_write_is_ignored_and_removed(three_steps, caplog):
    path, _states, want = three_steps
    shutil.copytree(path / "30", path / "40.tmp")
    assert Checkpoints(path).latest() == 30
    assert (path / "40.tmp").exists()
    with caplog.at_level(logging.WARNING):
        checkpoints = Checkpoints(path, CONFIG)
    assert "40.tmp was interrupted" in caplog.text
    assert not (path / "40.tmp").exists()
    assert checkpoints.restore(None, want)[0] == 30


# What Orbax leaves behind of a failed write complains of a closed event loop when it is collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_costs_only_the_step_that_did_not_fit(three_steps, caplog):
    path, states, want = three_steps
    checkpoints = Checkpoints(path, CONFIG)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        checkpoints.save(40, states[10], {})
        with pytest.raises(ValueError, match=r"--workdir: step 40 .* GiB are free"):
            checkpoints.wait()
        checkpoints.save(50, states[10], {})  # As training does: nobody waits, only a warning.
        checkpoints._settle()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        gc.collect()
    assert "step 50 could not be saved" in caplog.text
    assert not any(record.exc_info for record in caplog.records)
    assert checkpoints.steps() == [10, 20, 30]
    checkpoints.save(60, states[20], {})
    checkpoints.close()
    assert sorted(file.name for file in path.iterdir()) == ["20", "30", "60"]
    assert_equal(checkpoints.restore(60, want)[1], states[20])


def test_another_model_is_refused(three_steps, use_mesh):
    path, _states, want = three_steps
    narrow = want._replace(
        params=want.params
        | {"norm": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=want.step.sharding)}
    )
    message = r"config\.model: .*params/norm is \(16,\) on disk and \(8,\) in this run"
    with pytest.raises(ValueError, match=message):
        Checkpoints(path).restore(None, narrow)
    with pytest.raises(ValueError, match="params/extra is absent on disk"):
        Checkpoints(path).restore(
            None, {"params": want.params | {"extra": want.step}}, partial=True
        )
    with pytest.raises(ValueError, match=r"params/norm is .* on disk and absent in this run"):
        Checkpoints(path).restore(None, {"params": {"blocks": want.params["blocks"]}}, partial=True)
    sgd = want._replace(optimizer=())
    with pytest.raises(ValueError, match=r"config\.optimizer: .* absent in this run"):
        Checkpoints(path).restore(None, sgd)
    assert Checkpoints(path).steps() == [10, 20, 30]


def test_bad_config_and_directory(tmp_path):
    with pytest.raises(ValueError, match=r"config\.checkpoint\.keep = 0"):
        CheckpointConfig(keep=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--workdir: .*file/checkpoints cannot be made"):
        Checkpoints(tmp_path / "file" / "checkpoints", CONFIG)


def test_saving_a_step_again_leaves_it_alone(three_steps):
    path, states, _ = three_steps
    before = json.loads((path / "30" / manifest.NAME).read_text())
    checkpoints = Checkpoints(path, CONFIG)
    checkpoints.save(30, states[10], {})
    checkpoints.close()
    assert json.loads((path / "30" / manifest.NAME).read_text()) == before


BOTH_WAYS = """
import jax, numpy as np
from parallel.mesh import MeshConfig, make_mesh
from training.checkpoint import CheckpointConfig, Checkpoints
path, save, restore = arguments
mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
sharding = jax.NamedSharding(mesh, jax.P("fsdp", ("data", "tensor")))
checkpoints = Checkpoints(path, CheckpointConfig(keep=1))
with jax.set_mesh(mesh):
    if restore:
        want = {"x": jax.ShapeDtypeStruct((16, 32), np.float32, sharding=sharding)}
        step, state = checkpoints.restore(None, want)
        weights = np.arange(32, dtype=np.float32)
        print(step, float(jax.jit(lambda x: (x * weights).sum())(state["x"])))
    if save:
        x = np.arange(512, dtype=np.float32).reshape(16, 32)
        x = jax.make_array_from_callback((16, 32), sharding, lambda i: x[i])
        checkpoints.save(6, {"x": x}, {"position": 6})
        checkpoints.save(7, {"x": x}, {"position": 7})
        checkpoints.save(7, {"x": x}, {"position": 7})
        checkpoints.close()
"""


@pytest.mark.slow
def test_two_processes_write_what_one_reads_and_the_other_way_round(tmp_path):
    x = np.arange(512, dtype=np.float32).reshape(16, 32)
    total = float((x * np.arange(32, dtype=np.float32)).sum(dtype=np.float64))
    outputs(launch(BOTH_WAYS, tmp_path / "two", "save", ""))
    mesh = make_mesh(MeshConfig(data=8))
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P(None, "data"))
        want = {"x": jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=sharding)}
        checkpoints = Checkpoints(tmp_path / "two")
        assert checkpoints.steps() == [7]
        assert checkpoints.metadata(7) == {"position": 7}
        np.testing.assert_array_equal(np.asarray(checkpoints.restore(None, want)[1]["x"]), x)

        checkpoints = Checkpoints(tmp_path / "one", CONFIG)
        for step in (3, 5):
            checkpoints.save(step, {"x": jax.device_put(x, sharding)}, {})
        checkpoints.close()
    damage("truncated", largest_file(tmp_path / "one" / "5"))
    # Sums of integers below 2**24 are exact in float32.
    assert outputs(launch(BOTH_WAYS, tmp_path / "one", "", "restore")) == [f"3 {total}\n"] * 2


ONE_FAILS = """
import resource
import jax, numpy as np
from training import orbax_io
from training.checkpoint import CheckpointConfig, Checkpoints
orbax_io.TIMEOUT = 8
sharding = jax.NamedSharding(jax.make_mesh((8,), ("data",)), jax.P("data"))
x = np.random.default_rng(0).standard_normal((64, 1024), np.float32)
state = {"x": jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])}
checkpoints = Checkpoints(arguments[0], CheckpointConfig())
checkpoints.save(1, state, {})
checkpoints.wait()
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
if index == 1:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
checkpoints.save(2, state, {})
try:
    checkpoints.wait()
except ValueError as error:
    print("step 2 could not be saved" in str(error))
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
checkpoints.save(3, state, {})
checkpoints.close()
"""


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_process_costs_one_step(tmp_path):
    assert outputs(launch(ONE_FAILS, tmp_path)) == ["True\n"] * 2
    assert Checkpoints(tmp_path).steps() == [1, 3]
    assert manifest.damage(tmp_path / "3") is None
