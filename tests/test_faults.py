"""Whatever befalls the processes of a run, it ends as if nothing had happened: the same losses, the same state."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jaxlib
import pytest
from faulty_runs import (
    ROOT,
    finish,
    hit,
    last_step,
    launch,
    outcome,
    processor,
    run,
    storm,
    wait_for_line,
    wait_for_save,
    wait_for_step,
    workers,
    write_config,
)

from convert import manifest
from train import distributed, loop
from train.config import load_config

pytestmark = pytest.mark.slow

EXPECTED = Path(__file__).parent / "expected_losses.json"


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def calm_dir(config, tmp_path_factory) -> Path:
    """The uninterrupted run of two processes with one device each, every checkpoint kept."""
    run_dir = tmp_path_factory.mktemp("calm") / "run"
    finish(launch(config, run_dir))
    return run_dir


@pytest.fixture(scope="module")
def calm(calm_dir) -> dict:
    found = outcome(calm_dir)
    assert found["steps"] == list(range(1, 41))
    return found


def test_whatever_befalls_two_processes(config, calm, tmp_path):
    """One run: one of two is stopped, one is killed in a save, one is frozen."""
    run_dir = tmp_path / "run"
    process = launch(config, run_dir)
    wait_for_step(run_dir, 4, process)
    assert hit(run_dir, 1, signal.SIGTERM, process)
    finish(process, code=85)
    saved = max(manifest.steps(run_dir / "checkpoints"))
    assert saved == last_step(run_dir) < 40
    assert manifest.damaged_files(run_dir / "checkpoints" / str(saved)) == []

    process = launch(config, run_dir)
    wait_for_step(run_dir, saved + 4, process)
    wait_for_save(run_dir, process)
    assert hit(run_dir, 0, signal.SIGKILL, process)
    wait_for_line("restarting from", process)
    wait_for_step(run_dir, last_step(run_dir) + 2, process)
    assert hit(run_dir, 1, signal.SIGSTOP, process)
    wait_for_line("restarting from", process)
    finish(process)
    assert outcome(run_dir) == calm


@pytest.mark.soak
def test_a_process_frozen_before_the_others_met_it(config, calm, tmp_path, monkeypatch):
    monkeypatch.setenv("CONNECT_SECONDS", "15")
    run_dir = tmp_path / "run"
    process = launch(config, run_dir)
    assert hit(run_dir, 0, signal.SIGSTOP, process)
    said = finish(process)
    assert "error: process 0 was not reached" in said and "restarting from the beginning" in said
    assert outcome(run_dir) == calm


def test_sigterm_before_jax_has_started_and_ctrl_c_save_a_step(config, tmp_path):
    """Compiled as users' programs are. One process does a step in 5 ms: so many of them that a signal never comes too
    late. The losses are those of the record: exactly, on the kind of processor and the version of XLA that recorded
    them; elsewhere instructions round differently. To record them anew, delete the entry and run this test."""
    calm_dir, run_dir, long = tmp_path / "calm", tmp_path / "run", ("run.max_steps=400", "run.save_steps=50")
    finish(run(config, calm_dir, *long, optimize=True))
    process = launch(config, run_dir, *long, processes=1, optimize=True)
    while not workers(run_dir):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    finish(process, code=85)
    assert 0 < last_step(run_dir) < 161
    process = run(config, run_dir, *long, optimize=True)
    wait_for_step(run_dir, 161, process)
    process.send_signal(signal.SIGINT)
    assert "SIGINT: a step is saved, then the run stops" in finish(process, code=85)
    saved = max(manifest.steps(run_dir / "checkpoints"))
    assert saved == last_step(run_dir) < 400
    finish(run(config, run_dir, *long, optimize=True))
    calm = outcome(calm_dir)
    assert outcome(run_dir) == calm
    assert calm["steps"] == list(range(1, 401))
    key, recorded = f"jaxlib {jaxlib.__version__}, {processor()}", json.loads(EXPECTED.read_text())
    if key not in recorded and not recorded:
        pytest.fail(f"no losses are recorded; put these into {EXPECTED.name}: {json.dumps({key: calm['loss'][:40]})}")
    if key in recorded:
        assert calm["loss"][:40] == recorded[key]
    else:
        assert calm["loss"][:40] == pytest.approx(next(iter(recorded.values())), rel=1e-5)


def assert_close(losses, others, first=1e-6, rest=1e-5):
    assert losses[0] == pytest.approx(others[0], rel=first)
    assert losses[:20] == pytest.approx(others[:20], rel=rest)


def here(config: Path, run_dir: Path) -> None:
    """The run in this process, on its eight devices."""
    loop.train(load_config(config, [f"run.output_dir={run_dir}"]))


def test_two_processes_train_as_one(config, calm, tmp_path, monkeypatch):
    """2 x 1 devices and 1 x 8: the same batches, the same curve."""
    monkeypatch.setattr(distributed, "reached_preemption", lambda step: False)
    here(config, tmp_path / "run")
    assert_close(calm["loss"], outcome(tmp_path / "run")["loss"])


@pytest.mark.parametrize(
    "processes, devices", [(1, 8), (1, 1), pytest.param(4, 1, marks=pytest.mark.soak)], ids=["1x8", "1x1", "4x1"]
)
def test_resumes_on_another_number_of_processes_and_devices(
    config, calm_dir, calm, tmp_path, monkeypatch, processes, devices
):
    """Saved at step 24 on 2 x 1. What a step logs of its batch (its tokens) is equal, its loss to 1e-6."""
    run_dir = tmp_path / "run"
    shutil.copytree(calm_dir, run_dir)
    for step in manifest.steps(run_dir / "checkpoints"):
        if step > 24:
            shutil.rmtree(run_dir / "checkpoints" / str(step))
    if (processes, devices) == (1, 8):
        monkeypatch.setattr(distributed, "reached_preemption", lambda step: False)
        here(config, run_dir)
    elif processes == 1:
        finish(run(config, run_dir))
    else:
        finish(launch(config, run_dir, processes=processes))
    lines, ours = ([json.loads(x) for x in (d / "metrics.jsonl").read_text().splitlines()] for d in (calm_dir, run_dir))
    assert [line["step"] for line in ours] == list(range(1, 41))
    for name in ("num_tokens", "trained_tokens", "learning_rate", "epoch"):
        assert [line[name] for line in ours] == [line[name] for line in lines]
    assert outcome(run_dir)["loss"][:24] == calm["loss"][:24]
    assert outcome(run_dir)["loss"][24:] == pytest.approx(calm["loss"][24:], rel=1e-6)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
def test_a_storm(config, calm, tmp_path, seed):
    """At least 20 faults at random moments: kills of either process, in saves too, freezes, and SIGTERMs."""
    chance, run_dir, done = random.Random(seed), tmp_path / "run", []
    while not (run_dir / "final").exists():
        process = launch(config, run_dir)
        done += storm(run_dir, process, 24 - len(done), 2, chance)
        _, said = process.communicate()
        assert process.returncode in (0, 85), said[-4000:]
        if len(done) < 20 and (run_dir / "final").exists():  # it came through too fast: back to step 10, and on
            shutil.rmtree(run_dir / "final")
            for step in manifest.steps(run_dir / "checkpoints"):
                if step > 10:
                    shutil.rmtree(run_dir / "checkpoints" / str(step))
    print(f"storm {seed}: {len(done)} faults: {', '.join(done)}")
    assert len(done) >= 20
    assert outcome(run_dir) == calm


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(2))
def test_a_storm_on_one_process_without_a_supervisor(config, tmp_path, seed):
    chance, run_dir, long = random.Random(seed), tmp_path / "run", ("run.max_steps=600",)
    finish(run(config, tmp_path / "calm", *long))
    for _ in range(20):
        process = run(config, run_dir, *long)
        wait_for_step(run_dir, last_step(run_dir) + chance.randrange(1, 16), process)
        if chance.random() < 0.3:
            wait_for_save(run_dir, process)
        process.kill()
        finish(process, code=-signal.SIGKILL)
    print(f"storm {seed} on one process: 20 kills, the last after step {last_step(run_dir)}")
    finish(run(config, run_dir, *long))
    assert outcome(run_dir) == outcome(tmp_path / "calm")


@pytest.mark.soak
def test_a_full_disk_leaves_the_last_checkpoint(config, tmp_path):
    """A tmpfs of 2 MB in a mount namespace of its own (`unshare`, which needs user namespaces or root)."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = (
        f"mount -t tmpfs -o size=2m tmpfs {disk} && "
        f"{sys.executable} -m train run {config} run.output_dir={disk}/run; code=$?; "
        f"cp -r {disk}/run {tmp_path}/kept; exit $code"
    )
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script],
        cwd=ROOT, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin:/usr/sbin", "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode not in (0, 85), done.stderr[-2000:]
    assert "was not written, the earlier ones stay" in done.stderr
    kept = tmp_path / "kept" / "checkpoints"
    assert manifest.damaged_files(kept / str(max(manifest.steps(kept)))) == []
