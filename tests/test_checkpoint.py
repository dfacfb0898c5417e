"""Checkpoints: what is read is what was saved, on any mesh; damage is named and the step before it is used."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from convert import manifest
from train import checkpoint
from train.checkpoint import Checkpoints
from train.integrity import CheckpointError

pytestmark = pytest.mark.slow

MESHES = {"8": (8, 1), "2x4": (2, 4), "1x8": (1, 8), "2x1": (2, 1), "1": (1, 1)}


class State(NamedTuple):
    params: dict
    opt_state: tuple
    step: jax.Array


def mesh(name: str) -> Mesh:
    rows, columns = MESHES[name]
    devices = np.array(jax.devices()[: rows * columns]).reshape(rows, columns)
    return Mesh(devices, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def place(host: State, on: Mesh) -> State:
    def put(x):
        spec = PartitionSpec("fsdp", "tensor") if np.ndim(x) == 2 else PartitionSpec()
        return jax.device_put(x, NamedSharding(on, spec))

    return jax.tree.map(put, host)


def host_state(seed: int) -> State:
    """Every dtype a state may hold, as host arrays; `seed` changes every value."""
    random = np.random.default_rng(seed)
    weights = random.standard_normal((16, 256)).astype(np.float32)
    params = {
        "wq": weights,
        "half": weights.astype(jnp.bfloat16),
        "codes": random.integers(0, 255, (16, 16)).astype(np.uint8),
        "nibbles": random.integers(-8, 8, (16, 16)).astype(jnp.int4),
        "norm": random.standard_normal(32).astype(np.float32),
    }
    return State(params, ({"mu": weights * 2}, (), [weights * 3]), np.int32(seed))


def abstract(host: State, on: Mesh) -> State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), place(host, on))


def assert_same(restored: State, host: State) -> None:
    assert jax.tree.structure(restored) == jax.tree.structure(host)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(host), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save_steps(directory: Path, steps, **options) -> Checkpoints:
    checkpoints = Checkpoints(directory, **options)
    for step in steps:
        checkpoints.save(step, place(host_state(step), mesh("8")), {"next": step}, {"seed": 7})
    checkpoints.wait()
    return checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Two steps, 10 and 20, saved once; tests copy the folder before they harm it."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    save_steps(directory, [10, 20])
    return directory


@pytest.fixture
def harmed(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run" / "checkpoints"))


@pytest.mark.parametrize("name", MESHES)
def test_restores_bit_for_bit_on_any_mesh(saved, name):
    on = mesh(name)
    checkpoints = Checkpoints(saved)
    assert checkpoints.latest() == 20
    state, data, step = checkpoints.restore(abstract(host_state(20), on))
    assert (step, data) == (20, {"next": 20})
    assert_same(state, host_state(20))
    assert state.params["wq"].sharding.mesh == on


@pytest.mark.parametrize("name", [name for name in MESHES if name != "8"])
def test_fingerprint_is_the_same_on_every_mesh(name):
    def prints(on):
        return jax.device_get(checkpoint.integrity.fingerprints(place(host_state(3), on)))

    assert prints(mesh(name)) == prints(mesh("8"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "uint8", "int32", "bool"])
def test_fingerprint_shows_every_flipped_bit(dtype):
    random = np.random.default_rng(0)
    array = random.integers(0, 2, (9, 11)).astype(bool) if dtype == "bool" else random.standard_normal((9, 11))
    array = array.astype(jnp.dtype(dtype))
    fingerprint = jax.jit(manifest.fingerprint)
    before = fingerprint(array)
    for _ in range(100):
        flipped = array.copy()
        if dtype == "bool":
            flipped.reshape(-1)[random.integers(array.size)] ^= True
        else:
            flipped.view(np.uint8).reshape(-1)[random.integers(array.nbytes)] ^= 1 << random.integers(8)
        assert fingerprint(flipped) != before


def test_fingerprint_shows_moved_rows_and_adds_up_over_slices():
    array = np.random.default_rng(0).standard_normal((9, 11)).astype(np.float32)
    whole = int(manifest.fingerprint(array))
    assert int(manifest.fingerprint(array[::-1])) != whole
    assert (int(manifest.fingerprint(array[:4])) + int(manifest.fingerprint(array[4:], 4))) % 2**32 == whole


def kinds(step: Path) -> dict[str, Path]:
    """One file of every kind that a checkpoint holds, by a short name."""
    files = sorted(path for path in step.rglob("*") if path.is_file())
    return {str(path.relative_to(step)).rsplit("/d/")[0]: path for path in files}


COMMIT_FILES = ("_CHECKPOINT_METADATA", "commit_success.txt")


def test_every_flipped_bit_in_every_file_is_named(harmed):
    """At least 200 flips, spread over all files; only the commit's own stamps are not covered."""
    chance = random.Random(0)
    step = harmed / "20"
    files = [path for path in step.rglob("*") if path.is_file() and path.name not in COMMIT_FILES]
    flips = 0
    for path in files:
        original = path.read_bytes()
        for _ in range(max(1, 220 // len(files) + 1) if original else 0):
            changed = bytearray(original)
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
            path.write_bytes(changed)
            (line,) = manifest.damaged_files(step)
            assert str(path) in line
            flips += 1
        path.write_bytes(original)
    assert flips >= 200
    assert manifest.damaged_files(step) == []


def test_damage_to_the_commits_own_stamps_is_harmless(harmed):
    for name in COMMIT_FILES:
        (harmed / "20" / name).write_bytes(b"\x00garbage")
    state, _, step = Checkpoints(harmed).restore(abstract(host_state(20), mesh("8")))
    assert step == 20
    assert_same(state, host_state(20))
    for name in COMMIT_FILES:
        (harmed / "20" / name).unlink()
    assert_same(Checkpoints(harmed).restore(abstract(host_state(20), mesh("8")))[0], host_state(20))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [flip, zero, truncate, Path.unlink], ids=lambda f: f.__name__)
def test_the_step_before_is_used_and_the_damage_named(harmed, harm, capfd):
    for path in kinds(harmed / "20").values():
        if path.name in COMMIT_FILES or not path.stat().st_size:
            continue
        original = path.read_bytes()
        harm(path)
        assert Checkpoints(harmed).latest() == 10
        assert str(path) in capfd.readouterr().err
        path.write_bytes(original)
    harm(max((harmed / "20").rglob("*"), key=lambda path: path.stat().st_size))
    state, data, step = Checkpoints(harmed).restore(abstract(host_state(10), mesh("8")))
    assert (step, data) == (10, {"next": 10})
    assert_same(state, host_state(10))
    assert manifest.steps(harmed) == [10]


def test_a_damaged_array_is_named(harmed, capfd):
    """The largest data file holds the largest arrays; a byte of theirs is found by its value and changed."""
    needle = host_state(20).params["wq"][3, :8].tobytes()
    (path,) = [p for p in (harmed / "20").rglob("*") if p.is_file() and needle in p.read_bytes()]
    path.write_bytes(path.read_bytes().replace(needle, needle[:5] + b"\x00" + needle[6:]))
    damage = manifest.verify(harmed.parent)
    assert damage[10] == []
    assert damage[20] == [f"{path} has changed since it was written", "arrays that changed: params.wq"]
    assert Checkpoints(harmed).latest() == 10
    assert "arrays that changed: params.wq" in capfd.readouterr().err


def test_arrays_are_checked_even_where_files_are_as_written(harmed, capfd):
    """Bits lost between the device and the disk: the files are what was written, the values are not what was saved."""
    body = json.loads((harmed / "20" / manifest.MANIFEST).read_text())
    body["arrays"]["opt_state.0.mu"]["fingerprint"] ^= 1
    manifest.write(harmed / "20", body["arrays"])
    (harmed / "20" / "again").mkdir()
    state, _, step = Checkpoints(harmed).restore(abstract(host_state(10), mesh("8")))
    assert step == 10
    assert_same(state, host_state(10))
    assert "opt_state.0.mu" in capfd.readouterr().err


def test_a_run_without_a_good_step_is_refused_and_an_empty_one_is_new(harmed, tmp_path):
    for step in (10, 20):
        (harmed / str(step) / manifest.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="can be trusted"):
        Checkpoints(harmed).latest()
    assert Checkpoints(tmp_path / "new").latest() is None


def test_a_rollback_removes_what_lies_ahead_and_goes_on(harmed):
    checkpoints = Checkpoints(harmed)
    with pytest.raises(CheckpointError, match="20 exists"):
        checkpoints.save(20, place(host_state(5), mesh("8")), {}, {})
    state, _, step = checkpoints.restore(abstract(host_state(10), mesh("8")), step=10)
    assert step == 10 and manifest.steps(harmed) == [10]
    checkpoints.save(20, state, {"next": 20}, {})
    checkpoints.wait()
    assert Checkpoints(harmed).latest() == 20


def test_leftovers_of_killed_saves_are_removed(harmed):
    for name in ("30.orbax-checkpoint-tmp", "5.removed"):
        (harmed / name / "state").mkdir(parents=True)
    (harmed / "10.bak").mkdir()
    (harmed / ".DS_Store").touch()
    Checkpoints(harmed)
    assert sorted(path.name for path in harmed.iterdir()) == [".DS_Store", "10", "10.bak", "20"]


def test_keeps_the_last_and_every_kth(tmp_path):
    save_steps(tmp_path / "a", range(1, 8), keep_last=2, keep_every=3)
    assert manifest.steps(tmp_path / "a") == [3, 6, 7]
    save_steps(tmp_path / "b", range(1, 4), keep_last=None)
    assert manifest.steps(tmp_path / "b") == [1, 2, 3]


def test_other_shapes_are_refused_by_name(saved):
    host = host_state(20)
    host.params["wq"] = np.zeros((8, 256), np.float32)
    with pytest.raises(CheckpointError, match=r"params\.wq is float32\[16, 256\] there, float32\[8, 256\] here"):
        Checkpoints(saved).restore(abstract(host, mesh("8")))
    del host.params["wq"]
    with pytest.raises(CheckpointError, match=r"params\.wq is float32\[16, 256\] there, absent here"):
        Checkpoints(saved).restore(abstract(host, mesh("8")))
    assert manifest.steps(saved) == [10, 20]


def test_due_by_steps_and_by_minutes(tmp_path, monkeypatch):
    steps = Checkpoints(tmp_path / "a", every_steps=5)
    assert [step for step in range(1, 12) if steps.due(step)] == [5, 10]
    clock = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock[0])
    minutes = Checkpoints(tmp_path / "b", every_minutes=2)
    state = place(host_state(1), mesh("8"))
    taken = []
    for step in range(1, 50):
        clock[0] += 10.0
        if minutes.due(step):
            taken.append(step)
            minutes.save(step, state, {}, {})
    minutes.wait()
    assert taken == [12, 24, 36, 48]


def test_no_room_is_said_before_writing_and_raised_at_the_end(harmed, monkeypatch, capfd):
    full = shutil.disk_usage(harmed)._replace(free=100)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: full)
    checkpoints = Checkpoints(harmed)
    checkpoints.save(30, place(host_state(30), mesh("8")), {}, {})
    assert f"{harmed / '30'} was not written" in capfd.readouterr().err
    with pytest.raises(CheckpointError, match=r"needs [\d,]+ bytes and the disk has 100 free"):
        checkpoints.wait()
    assert manifest.steps(harmed) == [10, 20]
    assert Checkpoints(harmed).latest() == 20


FULL_DISK = """
import resource, signal, sys
import jax
jax.config.update("jax_platforms", "cpu")
import numpy as np
from train.checkpoint import Checkpoints
from train.integrity import CheckpointError
small, large = ({"w": jax.numpy.asarray(np.random.default_rng(0).standard_normal(n))} for n in (1_000, 2_000_000))
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, small, {}, {})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    with checkpoints:
        checkpoints.save(2, large, {}, {})
except CheckpointError as error:
    sys.exit(f"FAILED {error}")
"""


def test_a_save_that_fails_half_way_leaves_the_last_one(tmp_path):
    """A limit on file size makes the write itself fail, as a full disk would, on every system."""
    script = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert done.returncode == 1
    assert f"FAILED checkpoint {tmp_path / '2'} was not written" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1"]
    assert manifest.damaged_files(tmp_path / "1") == []
