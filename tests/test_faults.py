"""Whatever befalls the processes of a run, it ends as if nothing had happened: the same losses, the same state."""

import math
import os
import random
import signal
from pathlib import Path

import pytest
from faulty_runs import (
    finish,
    hit,
    last_step,
    outcome,
    random_faults,
    start,
    wait_for_save,
    wait_for_step,
    write_config,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_config(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def calm(config, tmp_path_factory) -> dict:
    """The uninterrupted run of two processes with two devices each."""
    run_dir = tmp_path_factory.mktemp("calm") / "run"
    finish(launch(config, run_dir))
    return outcome(run_dir)


def launch(config: Path, run_dir: Path, *overrides: str, processes: int = 2, devices: int = 2):
    return start("launch", "-n", processes, "--cpu-devices", devices, config, f"run.output_dir={run_dir}", *overrides)


def test_a_killed_worker_and_a_killed_coordinator(config, calm, tmp_path):
    run_dir = tmp_path / "run"
    process = launch(config, run_dir)
    for step, index in ((8, 1), (22, 0)):
        wait_for_step(run_dir, step, process)
        assert hit(run_dir, index, signal.SIGKILL, process)
    said = finish(process)
    assert said.count("was ended by") + said.count("ended with exit code") == 2
    assert outcome(run_dir) == calm
