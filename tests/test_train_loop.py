"""A run that stops and resumes is the run that does not, bit for bit; what it leaves behind is what it promises."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from convert import load_model
from model.errors import PunaError
from model.tokenizer import load_tokenizer
from train import distributed, loop
from train.config import read_config
from train.data import load_dataset
from train.data.toy import make_examples, write_tokenizer
from train.metrics import flops_per_token, read_metrics
from train.metrics_logger import NonFinite
from train.sections import Config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A byte tokenizer, 240 examples and 20 held-out ones."""
    folder = tmp_path_factory.mktemp("files")
    write_tokenizer(folder)
    examples = make_examples(260)
    for name, part in (("train.jsonl", examples[:240]), ("held_out.jsonl", examples[240:])):
        (folder / name).write_text("".join(json.dumps(example) + "\n" for example in part))
    return folder


@pytest.fixture
def settings(files, tmp_path, monkeypatch):
    """`settings(output_dir, **changes)`: a small run with packing, shuffling, saves and a held-out loss."""
    monkeypatch.setattr(distributed, "reached_preemption", lambda step: False)

    def make(name: str, **changes) -> Config:
        sections: dict = {
            "model": {
                "tokenizer": str(files),
                "vocab_size": 264,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "max_position_embeddings": 64,
            },
            "data": {
                "path": str(files / "train.jsonl"),
                "eval_path": str(files / "held_out.jsonl"),
                "template": "plain",
                "max_length": 64,
                "packing": True,
                "cache_dir": str(files / "cache"),
            },
            "optim": {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "warmup_steps": 3},
            "mesh": {"fsdp": 2, "data": 4},
            "run": {"output_dir": str(tmp_path / name), "max_steps": 8, "save_steps": 3, "eval_steps": 4},
        }
        for key, value in changes.items():
            section, _, setting = key.partition("__")
            if setting:
                sections.setdefault(section, {})[setting] = value
            else:
                sections[section] = value
        sections["run"].setdefault("batch_size", 8)
        return read_config(sections)

    return make


def stop_at(monkeypatch, step: int) -> None:
    monkeypatch.setattr(distributed, "reached_preemption", lambda number: number == step)


def losses(run: Path | str) -> list[tuple]:
    lines = [line for line in read_metrics(run) if line["step"]]
    return [(line["step"], line["loss"], line["grad_norm"], line.get("eval_loss")) for line in lines]


def final(run: Path | str):
    return jax.device_get(load_model(Path(run) / "final")[1])


def test_a_resumed_run_is_the_uninterrupted_one(settings, monkeypatch):
    whole, parts = settings("whole"), settings("parts")
    loop.train(whole)
    stop_at(monkeypatch, 4)
    with pytest.raises(SystemExit) as stopped:
        loop.train(parts)
    assert stopped.value.code == distributed.EXIT_PREEMPTED
    with open(Path(parts.run.output_dir) / "metrics.jsonl", "a") as file:  # steps that no checkpoint holds, cut short
        file.write('{"step": 5, "loss": 0.0, "grad_norm": 0.0}\n{"step": 6, "lo')
    monkeypatch.setattr(distributed, "reached_preemption", lambda step: False)
    loop.train(parts)
    assert losses(whole.run.output_dir) == losses(parts.run.output_dir)
    assert [step for step, *_ in losses(parts.run.output_dir)] == list(range(1, 9))
    jax.tree.map(np.testing.assert_array_equal, final(whole.run.output_dir), final(parts.run.output_dir))


def test_resumes_on_another_mesh_and_goes_on(settings, monkeypatch):
    whole, moved = settings("whole", run__max_steps=6), settings("moved", run__max_steps=6)
    loop.train(whole)
    stop_at(monkeypatch, 3)
    with pytest.raises(SystemExit):
        loop.train(moved)
    monkeypatch.setattr(distributed, "reached_preemption", lambda step: False)
    loop.train(settings("moved", mesh={"data": 1, "fsdp": 2, "context": 2, "tensor": 2}, run__max_steps=6))
    curve, other = (np.array([line[1] for line in losses(c.run.output_dir)]) for c in (whole, moved))
    np.testing.assert_array_equal(curve[:3], other[:3])
    np.testing.assert_allclose(other, curve, rtol=1e-6)


def test_epochs_go_through_every_row_once_though_the_run_stops_and_the_devices_change(settings, monkeypatch):
    epochs = {"run__batch_size": 32, "run__max_steps": 0, "run__num_train_epochs": 2.0}
    config = settings("run", **epochs)
    counts = load_dataset(config.data, load_tokenizer(config.model.tokenizer)).train[0].counts
    steps = -(-counts.rows // 32)
    assert counts.rows % 32 and steps > 1
    stop_at(monkeypatch, steps - 1)
    with pytest.raises(SystemExit):
        loop.train(config)
    stop_at(monkeypatch, -1)
    loop.train(settings("run", **epochs, mesh={"data": 8, "fsdp": 1}, run__gradient_accumulation_steps=4))
    lines = [line for line in read_metrics(config.run.output_dir) if line["step"]]  # 0 is the evaluation before it
    assert [line["epoch"] for line in lines][steps - 1 :: steps] == [1.0, 2.0] and len(lines) == 2 * steps
    for of_epoch in (lines[:steps], lines[steps:]):
        assert sum(line["num_tokens"] for line in of_epoch) == counts.tokens
        seen = sum(line["trained_tokens"] for line in of_epoch)
        assert seen == counts.trained_tokens  # of prompts and answers: no first token of an example is trained


def test_what_a_run_leaves(settings):
    config = settings("run")
    loop.train(config)
    folder = Path(config.run.output_dir)
    start, *lines = read_metrics(folder)
    named = "step loss learning_rate grad_norm num_tokens trained_tokens tokens_per_second_per_device mfu"
    assert {*named.split(), "peak_memory_gib", "epoch"} <= lines[0].keys()
    assert start.keys() == {"step", "eval_loss"} and start["step"] == 0
    assert [line["step"] for line in lines if "eval_loss" in line] == [4, 8]
    assert start["eval_loss"] > lines[3]["eval_loss"] > lines[7]["eval_loss"]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert sorted(int(p.name) for p in (folder / "checkpoints").iterdir()) == [3, 6, 8]
    assert (folder / "training_loss.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "config.toml").read_text()
    assert "# jax " in text and "# git " in text and "hidden_size = 32" in text
    import transformers

    transformers.AutoModelForCausalLM.from_pretrained(folder / "final")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "final")
    assert tokenizer.decode(tokenizer("sort cab = ").input_ids) == "<s>sort cab = "


def test_the_best_checkpoint_is_kept_and_exported(settings, monkeypatch):
    """It gets worse on: the rate is far too high after the second step. Also where the run is cut in two."""
    worse = {"optim": {"learning_rate": 0.3, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}}
    changes = worse | {"run__keep_best": True, "run__keep_last": 1, "run__eval_steps": 1, "run__max_steps": 6}
    whole, parts = settings("whole", **changes), settings("parts", **changes)
    loop.train(whole)
    held_out = {line["step"]: line["eval_loss"] for line in read_metrics(whole.run.output_dir) if line["step"]}
    best = min(held_out, key=held_out.__getitem__)
    assert best < 6
    folder = Path(whole.run.output_dir)
    assert sorted(int(path.name) for path in (folder / "checkpoints").iterdir()) == [best, 6]
    jax.tree.map(np.testing.assert_array_equal, final(folder), load_model(folder / "checkpoints" / str(best))[1])
    stop_at(monkeypatch, best + 1)
    with pytest.raises(SystemExit):
        loop.train(parts)
    monkeypatch.setattr(distributed, "reached_preemption", lambda step: False)
    loop.train(parts)
    jax.tree.map(np.testing.assert_array_equal, final(folder), final(parts.run.output_dir))
    with pytest.raises(PunaError, match="run.keep_best is True, which nothing reads with data.eval_path"):
        settings("none", data__eval_path=None, run__eval_steps=0, run__keep_best=True)


def test_an_incompatible_change_is_refused_by_name(settings, files):
    config = settings("run", run__max_steps=2)
    loop.train(config)
    with pytest.raises(PunaError, match=r"optim.learning_rate was 0.01 and is 0.5; run.batch_size was 8 and is 16"):
        loop.train(settings("run", optim__learning_rate=0.5, run__batch_size=16))
    other = files / "other.jsonl"
    other.write_text("".join(json.dumps(example) + "\n" for example in make_examples(99, seed=1)))
    kept = (files / "train.jsonl").read_text()
    (files / "train.jsonl").write_text(other.read_text())
    try:
        with pytest.raises(PunaError, match="on other data"):
            loop.train(settings("run"))
    finally:
        (files / "train.jsonl").write_text(kept)
    loop.train(settings("run", run__max_steps=3, run__save_steps=1, run__eval_steps=0))
    assert [step for step, *_ in losses(config.run.output_dir)] == [1, 2, 3]


def test_other_data_is_refused_wherever_it_differs(settings, files, tmp_path):
    """In a record of many, which is not among the first."""
    lines = (files / "train.jsonl").read_text().splitlines()
    (tmp_path / "mine.jsonl").write_text("\n".join(lines) + "\n")
    mine = {"data__path": str(tmp_path / "mine.jsonl"), "data__packing": False, "run__max_steps": 1}
    loop.train(settings("run", **mine))
    record = {name: text.swapcase() for name, text in json.loads(lines[-1]).items()}
    (tmp_path / "mine.jsonl").write_text("\n".join([*lines[:-1], json.dumps(record)]) + "\n")
    with pytest.raises(PunaError, match="holds a run on other data"):
        loop.train(settings("run", **mine, run__num_train_epochs=2.0))


def test_updates_that_stay_non_finite_end_the_run(settings):
    config = settings("run", optim__learning_rate=1e38, optim__warmup_steps=0, run__max_skipped_steps=3)
    with pytest.raises(NonFinite, match=r"3 updates in a row were not finite.* came from .*train.jsonl:\d+"):
        loop.train(config)
    assert [line["skipped"] for line in read_metrics(config.run.output_dir)[-3:]] == [1, 2, 3]


@pytest.mark.parametrize("quantized", [False, True])
def test_adapters_train_and_resume(settings, monkeypatch, quantized):
    loop.train(settings("base", run__max_steps=2, run__eval_steps=0))
    base = settings("base").run.output_dir + "/final"
    more = {"quantize": {"method": "nf4", "double_quant": True}} if quantized else {}
    lora = {"rank": 4, "dropout": 0.1, "targets": ["q_proj", "v_proj"], "modules_to_save": ["embed_tokens"]}
    changes = {"lora": lora, "model": {"path": base}, "run__max_steps": 6, **more}
    loop.train(settings("whole", **changes))
    stop_at(monkeypatch, 4)
    with pytest.raises(SystemExit):
        loop.train(settings("parts", **changes))
    monkeypatch.setattr(distributed, "reached_preemption", lambda step: False)
    loop.train(settings("parts", **changes))
    whole, parts = (settings(name).run.output_dir for name in ("whole", "parts"))
    assert losses(whole) == losses(parts)
    adapter = Path(whole) / "final" / "adapter_model.safetensors"
    assert adapter.read_bytes() == (Path(parts) / "final" / "adapter_model.safetensors").read_bytes()
    load_model(base, adapters=[Path(whole) / "final"])
    assert losses(whole)[-1][1] < losses(whole)[0][1]


def test_flops_are_those_of_the_formula(settings):
    from model.config import PRESETS

    model = PRESETS["llama2-7b"]
    weights = 6_738_415_616 - 32_000 * 4096
    assert flops_per_token(model, 4096) == 6 * weights + 6 * 32 * 4096 * 4096
    assert flops_per_token(model, 4096, trained=0) == 4 * weights + 6 * 32 * 4096 * 4096


@pytest.mark.slow
def test_the_command(files, tmp_path):
    """`train run` from a file with overrides; a second run in the directory, and wrong settings, end with code 2."""
    toml = f"""
[model]
tokenizer = "{files}"
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 1
num_attention_heads = 2
vocab_size = 264
[data]
path = "{files}/train.jsonl"
template = "plain"
max_length = 32
cache_dir = "{files}/cache"
[run]
output_dir = "{tmp_path}/run"
"""
    (tmp_path / "c.toml").write_text(toml)

    def command(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "train", *arguments],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )

    config = str(tmp_path / "c.toml")
    done = command("run", config, "run.max_steps=2", "run.logging_steps=2")
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [2]
    wrong = command("run", config, "run.max_step=2", "optim.learning_rate=fast")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
    assert "run.max_step is not a setting; did you mean run.max_steps?" in wrong.stderr
    assert 'optim.learning_rate is "fast"; it must be a number' in wrong.stderr
    shown = command("preview", config, "--examples", "1")
    assert shown.returncode == 0 and "</s>" in shown.stdout and "240 records read" in shown.stdout
    drawn = command("plot", str(tmp_path / "run"), "-o", str(tmp_path / "curve.png"))
    assert drawn.returncode == 0 and (tmp_path / "curve.png").exists()
    with distributed.lock(tmp_path / "run"):
        second = command("run", config)
    assert second.returncode == 2 and "is in use by process" in second.stderr
