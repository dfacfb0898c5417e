"""A sweep runs its grid, goes on after a failure and a signal, and its runs are those of `train run`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from model.errors import PunaError
from train.metrics import read_metrics
from train.sweep import device_shares, sweep, values_of

ROOT = Path(__file__).parent.parent
TINY = ROOT / "configs/tiny.toml"


@pytest.mark.parametrize(
    "axis, values",
    [
        ("optim.learning_rate=1e-4,3e-4", ["1e-4", "3e-4"]),
        ("optim.lr_scheduler_type=cosine, wsd", ["cosine", "wsd"]),
        ('data.path="a,b.jsonl",c.jsonl', ['"a,b.jsonl"', "c.jsonl"]),
        ('lora.targets=["q_proj","v_proj"],["q_proj"]', ['["q_proj","v_proj"]', '["q_proj"]']),
    ],
)
def test_values_end_at_commas_outside_of_quotes_and_lists(axis, values):
    assert values_of(axis) == [f"{axis.partition('=')[0]}={value}" for value in values]


@pytest.mark.parametrize(
    "axes, message",
    [
        (["optim.learning_rat=1e-4,3e-4"], "optim.learning_rate"),
        (["optim.learning_rate"], "names no values"),
        (["optim.learning_rate=1e-4,,3e-4"], "names no values"),
        (["optim.learning_rate=1e-4,"], "names no values"),
        (["optim.learning_rate=1e-4,-1"], "must be above 0"),
        (["run.seed=1,1"], "comes twice"),
        (["run.output_dir=a,b"], "sweep another setting"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_runs(axes, message, tmp_path):
    with pytest.raises(PunaError, match=message):
        sweep(TINY, [f"run.output_dir={tmp_path}/out"], axes)
    assert not list(tmp_path.iterdir())


def train(folder: Path, out: str, *more: str) -> subprocess.Popen:
    """`train run` on a model of one narrow layer, for six steps."""
    small = "model.hidden_size=32 model.intermediate_size=64 model.num_hidden_layers=1 model.num_attention_heads=4"
    own = [f"run.output_dir={out}", "run.max_steps=6", "run.save_steps=1", "run.eval_steps=0"]
    command = [sys.executable, "-m", "train", "run", str(TINY), *small.split(), *own, *more]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "COLUMNS": "120"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=env, stdout=pipe, stderr=pipe, text=True)


def losses(run: Path) -> list[tuple]:
    return [(line["step"], line.get("loss"), line.get("eval_loss")) for line in read_metrics(run)]


@pytest.mark.slow
def test_stopped_and_failing_a_sweep_is_the_runs_themselves(tmp_path):
    axes = ("--sweep", "optim.optimizer=adamw,absent_module:lion")
    good, bad = (tmp_path / "out" / f"optim.optimizer={name}" for name in ("adamw", "absent_module_lion"))

    first = train(tmp_path, "out", *axes)
    while not (good / "checkpoints").exists() and first.poll() is None:
        time.sleep(0.02)
    first.send_signal(signal.SIGINT)
    first_out, first_err = first.communicate(timeout=120)
    assert (first.returncode, first_out) == (85, ""), first_err
    assert not (good / "final").exists() and not bad.exists()

    again = train(tmp_path, "out", *axes)
    out, err = again.communicate(timeout=120)
    assert again.returncode == 1, err
    assert "absent_module_lion: failed with exit code 2" in err and "absent_module" in out
    whole = train(tmp_path, "whole")
    _, err = whole.communicate(timeout=120)
    assert whole.returncode == 0, err
    assert losses(good) == losses(tmp_path / "whole")
    *_, (step, loss, held_out) = losses(good)
    row = next(line.split() for line in out.splitlines() if "adamw" in line)
    assert row == ["adamw", str(step), f"{loss:.4f}", f"{held_out:.4f}", "done"]
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")

    before = (good / "config.toml").stat().st_mtime_ns
    last = train(tmp_path, "out", "--sweep", "optim.optimizer=adamw")
    out, err = last.communicate(timeout=120)
    assert last.returncode == 0 and "done before" in err, err
    assert (good / "config.toml").stat().st_mtime_ns == before


@pytest.mark.slow
def test_runs_side_by_side_are_those_one_after_the_other(tmp_path):
    rates = ["1e-3", "3e-3", "1e-2"]
    several = train(tmp_path, "out", "--sweep", f"optim.learning_rate={','.join(rates)}", "--at-once", "2")
    out, err = several.communicate(timeout=240)
    assert several.returncode == 0, err
    assert [line.split()[0] for line in out.splitlines() if line.split()[-1:] == ["done"]] == rates
    alone = train(tmp_path, "alone", f"optim.learning_rate={rates[1]}")
    _, said = alone.communicate(timeout=120)
    assert alone.returncode == 0, said
    assert losses(tmp_path / f"out/optim.learning_rate={rates[1]}") == losses(tmp_path / "alone")
    assert "step 6/6" in (tmp_path / f"out/optim.learning_rate={rates[1]}.log").read_text()


@pytest.mark.parametrize(
    "at_once, gpus, words", [(0, "0,1", "give 1 or more"), (3, "0,1,2,3", "does not divide the 4")]
)
def test_gpus_that_cannot_be_shared_out_are_refused(monkeypatch, at_once, gpus, words):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    with pytest.raises(PunaError, match=f"--at-once {at_once}.*{words}"):
        device_shares(at_once)


def test_gpus_are_shared_out_by_the_names_that_are_visible(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,GPU-ab,1")
    assert [share["CUDA_VISIBLE_DEVICES"] for share in device_shares(2)] == ["3,5", "GPU-ab,1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device_shares(2) == [{}, {}]
