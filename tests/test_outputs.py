"""What fails beside a run costs itself alone: full disks, tools that get its lines, names that cannot be printed."""

import errno
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import SessionLog
from test_metrics import events

from model.errors import JobFailed, PunaError
from train import distributed, loop, metrics
from train.config import read_config
from train.data.toy import make_examples, write_tokenizer
from train.metrics import MetricsFile, read_metrics
from train.outputs import Outputs
from train.reporters import TensorBoard, WandB

ROOT = Path(__file__).parent.parent


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def line(step: int) -> dict:
    return {"step": step, "loss": 1.0 / step}


def test_a_line_that_a_full_disk_does_not_take_is_left_out_whole(tmp_path, monkeypatch):
    said: list[str] = []
    outputs, write = Outputs(said.append), os.write
    file = MetricsFile(tmp_path, 0, outputs=outputs)
    file.write(line(1))
    left = [5]  # bytes that the disk still takes

    def short(descriptor: int, data: bytes) -> int:
        if not left[0]:
            full()
        taken, left[0] = data[: left[0]], 0
        return write(descriptor, taken)

    with monkeypatch.context() as patch:
        patch.setattr(metrics.os, "write", short)
        file.write(line(2))
        file.write(line(3))
    file.write(line(4))
    file.close()
    assert [found["step"] for found in read_metrics(tmp_path)] == [1, 4]
    size = len(json.dumps(line(2))) + 1
    path = tmp_path / "metrics.jsonl"
    assert said == [f"{path} ({size} bytes) was not written: No space left on device; training goes on"]
    with pytest.raises(JobFailed, match=rf"not all of its outputs were written: {path} \(No space left on device\)"):
        outputs.check()


def test_tensorboard_purges_what_follows_the_step_that_a_run_resumes_at(tmp_path):
    for done, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        board = TensorBoard(tmp_path, {}, done)
        for step in steps:
            board.log(line(step))
        board.close()
    kept: dict[int, int] = {}
    for path in sorted((tmp_path / "tensorboard").iterdir()):
        for event in events(path):  # as TensorBoard reads them
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                kept = {step: count for step, count in kept.items() if step < event.step}
            for _ in event.summary.value:
                kept[event.step] = kept.get(event.step, 0) + 1
    assert kept == {1: 1, 2: 1, 3: 1, 4: 1}


class Service:
    """What W&B does of a run: it knows the last step that it has."""

    def __init__(self):
        self.runs: dict[str, list[int]] = {}
        self.error: Exception | None = None

    def init(self, id, **_):
        if self.error is not None:
            raise self.error
        steps = self.runs.setdefault(id, [])
        return types.SimpleNamespace(
            step=steps[-1] + 1 if steps else 0,
            log=lambda line, step: steps.append(step),
            finish=lambda: None,
        )


def test_wandb_gets_every_step_once_and_a_new_run_for_a_new_start(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", service := Service())
    for done, steps in ((0, (1, 2, 3)), (2, (3, 4)), (0, (1,))):
        run = WandB(tmp_path, {}, done)
        for step in steps:
            run.log(line(step))
        run.close()
    assert list(service.runs.values()) == [[1, 2, 3, 4], [1]]
    service.error = RuntimeError("api_key not configured\n(no-tty)")
    with pytest.raises(
        PunaError, match=r"did not start: api_key not configured \(no-tty\): run `wandb login`.*offline"
    ):
        WandB(tmp_path, {}, 0)


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "1",
    "SLURM_STEP_NODELIST": "a[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"SLURM_STEP_TASKS_PER_NODE": None}, "is set and SLURM_STEP_TASKS_PER_NODE is not"),
        ({"SLURM_STEP_NODELIST": None}, "is set and SLURM_STEP_NODELIST is not"),
        ({"SLURM_STEP_NODELIST": None, "SLURM_STEP_TASKS_PER_NODE": None}, "SLURM_PROCID is set and"),
        ({"SLURM_STEP_TASKS_PER_NODE": "1"}, "names 2 hosts and .* the tasks of 1"),
        ({"SLURM_JOB_ID": None}, "SLURM_PROCID is set and SLURM_JOB_ID is not"),
        ({"SLURM_JOB_ID": "x"}, "SLURM_JOB_ID='x' is not a whole number"),
        ({"SLURM_PROCID": "2"}, "SLURM_PROCID is 2, and the step has 2 processes"),
        ({"SLURM_NODEID": "5"}, "SLURM_NODEID is 5, and the step has 2 nodes"),
    ],
)
def test_a_part_of_what_slurm_sets_is_refused_with_the_remedy(change, words):
    env = {name: value for name, value in (SLURM | change).items() if value is not None}
    with pytest.raises(PunaError, match=words):
        distributed._from_environment(env)
        distributed._local_device_ids(env)
    assert distributed._from_environment({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"})[1:] == (1, 0)


def test_a_run_that_does_no_step_leaves_nothing(tmp_path):
    with pytest.raises(PunaError), distributed.lock(tmp_path / "runs" / "new"):
        raise PunaError("wrong")
    assert list(tmp_path.iterdir()) == []
    with distributed.lock(tmp_path / "kept"):
        (tmp_path / "kept" / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "old").mkdir()
    with pytest.raises(PunaError), distributed.lock(tmp_path / "old"):
        raise PunaError("wrong")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "old"]


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A run of 4 steps on toy examples."""
    monkeypatch.setattr(distributed, "reached_preemption", lambda step: False)
    write_tokenizer(tmp_path)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(example) + "\n" for example in make_examples(40)))
    dims = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return read_config(
        {
            "model": dims | {"num_attention_heads": 4, "tokenizer": str(tmp_path)},
            "data": {
                "path": str(tmp_path / "train.jsonl"),
                "template": "plain",
                "max_length": 64,
                "cache_dir": str(tmp_path / "cache"),
            },
            "run": {"output_dir": str(tmp_path / "run"), "batch_size": 8, "max_steps": 4, "save_steps": 2},
        }
    )


@pytest.mark.slow
def test_a_checkpoint_that_has_no_room_does_not_cost_the_weights(config, tmp_path, monkeypatch, capfd):
    """Nor does the picture; the exit code is that of a failed job."""
    monkeypatch.setattr("train.plot.plot", full)
    usage = shutil.disk_usage
    with monkeypatch.context() as patch:
        free = {"checkpoints": 10}
        space = lambda path: usage(path)._replace(free=free.get(Path(path).name, 2**40))  # noqa: E731
        patch.setattr("train.checkpoint.shutil.disk_usage", space)
        with pytest.raises(
            JobFailed, match=r"checkpoints/4 was not written.* it needs [\d,]+ bytes and the disk has 10"
        ):
            loop.train(config)
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
    assert "training_loss.png was not written: No space left on device; training goes on" in capfd.readouterr().err
    with pytest.raises(JobFailed, match="not all of its outputs were written: .*training_loss.png"):
        loop.train(config)
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_text_that_a_pipe_cannot_spell_is_replaced():
    script = "from cli.command import main; import typer; app = typer.Typer(); app.command()(lambda: print('a\\u00e9\\U0001f438')); main(app)"  # noqa: E501
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, check=True)
    assert done.stdout == b"a??\n"
