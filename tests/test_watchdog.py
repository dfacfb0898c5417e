"""A step that is stuck ends its processes, which say who holds them up; launch goes on from the last checkpoint."""

import json
import signal
import time

import pytest
from faulty_runs import hit, last_step, launch, wait_for_line, wait_for_step, write_config

from train.watchdog import Watchdog, lagging


def test_the_limit_is_ten_times_the_median_step_and_five_minutes_at_least(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watch = Watchdog(tmp_path, None, done=7, rank=0, ranks=1)
    for step, seconds in ((8, 900.0), (9, 40.0), (10, 70.0), (11, 50.0)):
        watch.begins(step)
        now[0] += seconds
        watch.finished(step - 1)  # as of steps whose end is known one step late: this tells nothing of the first
        watch.finished(step)
        assert (watch.limit() is None) == (step == 8)  # which compiles
    assert watch.limit() == 500.0
    now[0] += 60.0
    with watch.paused(12):
        now[0] += 10_000.0
    for step in (13, 14):
        now[0] += 20.0
        watch.finished(step)
    assert watch.limit() == 10 * 45.0  # of 40, 70, 50, 60, 20 and 20
    for step in range(15, 40):
        now[0] += 1.0
        watch.finished(step)
    assert watch.limit() == 300.0
    assert Watchdog(tmp_path, 2.5, done=0, rank=0, ranks=1).limit() == 2.5


def test_who_lags_is_named():
    def state(started: int, finished: int, where: str = "") -> dict:
        return {"started": started, "finished": finished, "where": where, "host": "gpu1", "process": 7}

    seen = {0: state(12, 10), 1: state(12, 10), 2: state(9, 9)}
    known = "(process 7 on gpu1, which has finished step 9)"
    assert lagging({0: seen[0], 1: seen[1]}, seen, 3) == (
        f"rank 2 {known} does not answer: it is stopped, or its host is gone"
    )
    assert lagging({0: seen[0]}, {0: seen[0]}, 2).startswith("rank 1 does not answer")
    called = seen | {2: state(12, 9, "at mine.py:3 (nap)")}
    assert lagging(called, called, 3) == f"rank 2 {known} is in a host callback, at mine.py:3 (nap)"
    assert lagging(seen, seen, 3) == f"rank 2 {known} waits for the rows of step 10"
    same = {0: state(12, 10), 1: state(12, 11)}
    assert lagging(same, same, 2) == "no process lags: all wait for step 11"


def test_stuck_processes_write_their_stacks_once_and_leave(tmp_path, capfd):
    """Two of them, in one here: the second waits for rows. What goes on, is paused or has no limit, stays."""
    codes: dict[int, int] = {}

    def leaving(name: int):
        return lambda code: codes.update({name: code})

    watches = [Watchdog(tmp_path, 1.5, 0, rank, 2, leaving(rank)) for rank in (0, 1)]
    alone = Watchdog(tmp_path / "alone", 1.5, 0, 0, 1, leaving(9))
    off = Watchdog(tmp_path / "off", 0.0, 0, 0, 1)
    with watches[0], watches[1], alone, off:
        for step in range(1, 31):
            for watch in (*watches, alone):
                watch.begins(step)
                watch.finished(step - 1)
            time.sleep(0.06)  # longer together than the limit
        assert codes == {}
        watches[0].begins(31)
        with alone.paused(30):
            deadline = time.monotonic() + 20
            while codes.keys() != {0, 1} and time.monotonic() < deadline:
                time.sleep(0.02)
    assert codes == {0: 86, 1: 86}
    said = capfd.readouterr().err
    assert "error: no step was finished for 1.5 s (run.step_timeout, and the median step takes 0." in said
    assert (
        "rank 1 (process " in said and "which has finished step 29) waits for the rows of step 31. Stacks of " in said
    )
    for rank in (0, 1):
        assert "test_watchdog.py" in (tmp_path / "ranks" / f"rank-{rank}-stacks.txt").read_text()
    assert json.loads((tmp_path / "alone/ranks/rank-0.json").read_text())["finished"] in (29, 30)
    assert not (tmp_path / "alone/ranks/stuck").exists() and not (tmp_path / "off").exists()


NAP = """
import os, time
from pathlib import Path
import jax
from model.llama import block as plain

FILE = Path(__file__).with_name("napped")
calls = iter(range(10_000))

def nap():
    if next(calls) == 24 and not FILE.exists():
        FILE.touch()
        time.sleep(600)

def block(x, layer, config, context, cache, **keywords):
    jax.debug.callback(nap)
    return plain(x, layer, config, context, cache, **keywords)
"""


@pytest.mark.slow
def test_a_process_in_a_callback_and_a_stopped_one_are_named_and_the_run_goes_on(tmp_path, monkeypatch):
    """Of two: first the one sleeps within a step, then the other is stopped. JAX's heartbeats say nothing of either."""
    config, run_dir = write_config(tmp_path / "config"), tmp_path / "run"
    (tmp_path / "nap_block.py").write_text(NAP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("HEARTBEAT_SECONDS", "300")
    settings = ("model.block=nap_block:block", "run.step_timeout=5", "run.max_steps=100", "run.save_steps=20")
    process = launch(config, run_dir, *settings)
    said = wait_for_line("restarting from step 20", process)
    assert "error: no step was finished for 5 s (run.step_timeout" in said
    assert "rank 0 (process " in said and "is in a host callback, at " in said and "nap_block.py:13 (nap)" in said
    assert "ended with exit code 86; restarting" in said
    stacks = [(run_dir / "ranks" / f"rank-{rank}-stacks.txt").read_text() for rank in (0, 1)]
    assert "in nap" in stacks[0] and "nap_block" not in stacks[1].split("Thread")[-1] and "train/loop.py" in stacks[1]
    wait_for_step(run_dir, 41, process)
    assert last_step(run_dir) < 100 and hit(run_dir, 1, signal.SIGSTOP, process)
    said = wait_for_line("restarting from step", process)
    assert "rank 1 (process " in said and "does not answer: it is stopped, or its host is gone" in said
    assert "Stacks of rank 0 are in" in said and "exit code 86" in said
    assert last_step(run_dir) >= 41
    process.kill()  # its children go with it
    process.communicate()
