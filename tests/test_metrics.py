"""What leaves a run for other tools, read back with those tools' own readers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from model.errors import PunaError
from train.metrics import MetricsFile
from train.metrics_logger import MetricsLogger
from train.plot import names_of, plot, smooth
from train.reporters import TensorBoard

ROOT = Path(__file__).parent.parent
LINES = [{"step": 1, "loss": 2.5, "mfu": None}, {"step": 2, "loss": 1.25, "mfu": 0.5}]


def events(path: Path) -> list[Event]:
    """The records of an event file (TFRecord: length, its checksum, data, its checksum)."""
    data, found = path.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        found.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return found


def test_tensorboard_gets_every_number_that_is_there(tmp_path):
    board = TensorBoard(tmp_path, {})
    for line in LINES:
        board.log(line)
    board.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    values = [(event.step, v.tag, v.simple_value) for event in events(path) for v in event.summary.value]
    assert values == [(1, "loss", 2.5), (2, "loss", 1.25), (2, "mfu", 0.5)]


def test_a_picture_of_no_kind_is_refused_by_name(tmp_path):
    MetricsFile(tmp_path / "run", 0).close()
    with pytest.raises(PunaError, match=r"loss.v2: .v2 is no kind of picture; choose .*png"):
        plot([tmp_path / "run"], tmp_path / "loss.v2")
    assert not (tmp_path / "loss.v2").exists()


def test_runs_of_one_name_are_told_apart_and_noise_is_smoothed(tmp_path):
    assert names_of([tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "other"]) == ["a/run", "b/run", "other"]
    assert names_of([tmp_path / "run"]) == ["run"]
    line, noise = np.linspace(3.0, 1.0, 400), np.tile([0.1, -0.1], 200)
    np.testing.assert_allclose(smooth(line.tolist()), line)  # a straight line is its own average
    assert np.abs(smooth((line + noise).tolist()) - line)[8:-8].max() < 0.01
    assert smooth([3.0, 1.0, 2.0]) == [3.0, 1.0, 2.0]
    expected = np.convolve(line + noise, np.ones(17) / 17, "valid")
    np.testing.assert_allclose(smooth((line + noise).tolist())[8:-8], expected)


def leveldb_records(path: Path) -> list[bytes]:
    """The records of a LevelDB log, which is what an offline run of W&B is after seven bytes of its own: blocks of
    32 KiB holding pieces (checksum, length, whether first, middle, last or all of a record)."""
    data, at, found = path.read_bytes(), 7, [b""]
    while at + 7 <= len(data):
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        found[-1] += data[at + 7 : at + 7 + size]
        if kind in (1, 4):
            found.append(b"")
        at += 7 + size
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
    return found[:-1]


WANDB = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from train.reporters import WandB
run = WandB(Path(sys.argv[1]), {"optim": {"learning_rate": 0.5}})
for line in json.loads(sys.argv[2]):
    run.log(line)
run.close()
"""


@pytest.mark.slow
def test_wandb_gets_the_lines_the_settings_and_a_name_of_its_own(tmp_path):
    from wandb.proto.wandb_internal_pb2 import Record

    (tmp_path / "run").mkdir()
    env = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", WANDB, str(tmp_path / "run"), json.dumps(LINES)]
    subprocess.run(command, cwd=ROOT, env=env, check=True, timeout=120)
    (path,) = (tmp_path / "run").rglob("*.wandb")
    records = [Record.FromString(data) for data in leveldb_records(path)]
    history = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    assert [(line["_step"], line["loss"], line["mfu"]) for line in history] == [(1, 2.5, None), (2, 1.25, 0.5)]
    (run,) = [record.run for record in records if record.HasField("run")]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["optim"] == {"learning_rate": 0.5}
    assert run.display_name == "run" and run.run_id.startswith("run-")


def test_tokens_a_second_are_of_the_steps_alone(monkeypatch):
    """A step takes 2 seconds on a clock of our own; an evaluation 100, a save 50, and waiting for the next batch 1."""
    now, lines = [0.0], []
    monkeypatch.setattr("train.metrics_logger.time.monotonic", lambda: now[0])
    monkeypatch.setattr("train.metrics_logger.jax.device_count", lambda: 1)
    display = SimpleNamespace(show=lambda line: None, say=lambda line: None)
    record = MetricsLogger(lines.append, display, 2, 1, 3.0, 300.0, float, str)

    def get(metrics):  # the step ends while it is waited for
        now[0] += 2
        return metrics

    monkeypatch.setattr("train.metrics_logger.jax.device_get", get)
    for step in range(1, 7):
        record.push(step, {"num_tokens": np.int32(60), "skipped": np.int32(0), "loss": np.float32(step)})
        now[0] += 1
        if step == 3:
            with record.paused():
                now[0] += 100
            record.add(eval_loss=1.5)
        if step == 4:
            record.flush()
            with record.paused():
                now[0] += 50
    record.flush()
    assert [(line["step"], line["loss"], line.get("eval_loss")) for line in lines] == [
        (2, 2.0, None), (3, 3.0, 1.5), (4, 4.0, None), (6, 6.0, None),
    ]  # fmt: skip
    assert [line["tokens_per_second_per_device"] for line in lines] == [20.0] * 4
    assert [line["mfu"] for line in lines] == [0.2] * 4
