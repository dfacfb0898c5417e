"""What a run wrote is an input, and what it read must be what it was: runs, steps, adapters, fingerprints."""

import filecmp
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from small_tokenizer import small_tokenizer

from convert import load_model, save_model
from convert.merge import merge_adapters
from convert.peft import read_adapter
from convert.source import find_source
from convert.verify import compare
from infer.commands.generate import _asking
from infer.load import find_model
from infer.sample import Sampling
from model import LlamaConfig, forward, init_params
from model.errors import PunaError
from train import distributed, loop
from train.config import read_config
from train.data import encode
from train.export import export_step
from train.metrics import read_metrics
from train.resume import schedule_change

SMALL = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128,
}  # fmt: skip
RECORDS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {i}+{i}?"},
            {"role": "assistant", "content": f"It is {2 * i}."},
        ]
    }
    for i in range(16)
]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(distributed, "reached_preemption", lambda step: False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base model whose tokenizer knows ChatML's tokens, and conversations."""
    folder = tmp_path_factory.mktemp("inputs")
    config = LlamaConfig(**SMALL, bos_token_id=None, eos_token_id=(2,))
    save_model(folder / "base", config, init_params(config, jax.random.key(1)))
    small_tokenizer(folder / "base")
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return folder


def settings(folder: Path, name: str, **changes):
    """A run of 4 steps that saves every second."""
    sections = {
        "model": {"path": str(folder / "base")},
        "data": {
            "path": str(folder / "data.jsonl"),
            "template": "chatml",
            "max_length": 64,
            "cache_dir": str(folder / "cache"),
        },
        "optim": {"learning_rate": 1e-2},
        "run": {"output_dir": str(folder / name), "batch_size": 8, "max_steps": 4, "save_steps": 2},
    }
    for key, value in changes.items():
        section, _, setting = key.partition("__")
        if setting:
            sections.setdefault(section, {})[setting] = value
        else:
            sections[section] = value
    return read_config(sections)


@pytest.fixture(scope="module")
def whole(folder) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "reached_preemption", lambda step: False)
        loop.train(settings(folder, "whole"))
    return folder / "whole"


LORA = {"rank": 2, "targets": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"], "dora": True,
        "rank_pattern": {"layers.1.self_attn.q_proj": 3}}  # fmt: skip


@pytest.fixture(scope="module")
def adapted(folder) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "reached_preemption", lambda step: False)
        loop.train(settings(folder, "adapted", lora=LORA, quantize={"method": "nf4"}))
    return folder / "adapted"


def assert_same_files(one: Path, other: Path):
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    assert filecmp.cmpfiles(one, other, names, shallow=False) == (names, [], [])


def assert_equal(one, other):
    assert one[0] == other[0]
    jax.tree.map(np.testing.assert_array_equal, one[1], other[1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "adapted"])
def test_every_step_of_a_run_is_a_model(kind, request, tmp_path):
    run = request.getfixturevalue(kind)
    assert export_step(run, tmp_path / "last") == 4
    assert_same_files(tmp_path / "last", run / "final")
    assert export_step(run, tmp_path / "two", step=2) == 2
    assert_equal(load_model(run), load_model(run / "final"))
    assert_equal(load_model(run / "checkpoints" / "2"), load_model(tmp_path / "two"))
    assert_equal(load_model(run / "checkpoints" / "4"), load_model(run))
    assert not np.array_equal(load_model(tmp_path / "two")[1]["lm_head"], load_model(run)[1]["lm_head"])
    with pytest.raises(PunaError, match=r"--step 3: .* has saved 2, 4: give one of them"):
        export_step(run, tmp_path / "three", step=3)
    with pytest.raises(
        PunaError, match=r"holds the steps of a training run: give one of its steps, as .*checkpoints/4"
    ):
        load_model(run / "checkpoints")


@pytest.mark.slow
def test_an_unfinished_run_says_what_can_be_read_of_it(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run, ignore=shutil.ignore_patterns("final"))
    with pytest.raises(PunaError, match=r"is a training run without final/: give one of its steps, as .*/4"):
        load_model(run)
    (run / "checkpoints" / "4" / "state" / "_sharding").write_bytes(b"{}")
    with pytest.raises(PunaError, match="_sharding has .* where .* were written"):
        export_step(run, tmp_path / "damaged")
    shutil.rmtree(run / "model")
    with pytest.raises(PunaError, match=r"is a step of a training run, and .*model/config.json is missing: resume"):
        load_model(run / "checkpoints" / "2")


@pytest.mark.slow
def test_an_adapter_folder_is_a_model(folder, adapted, tmp_path):
    base = folder / "base"
    assert_equal(load_model(adapted), load_model(base, adapters=[adapted / "final"]))
    source = find_model(str(adapted))
    assert source.name == "base" and source.tokenizer.special_id("<|im_end|>") is not None
    merge_adapters(base, [adapted / "final"], tmp_path / "merged")
    found = find_source(adapted / "checkpoints" / "4")
    merge_adapters(found.base, found.adapters, tmp_path / "step")
    assert_equal(load_model(tmp_path / "merged"), load_model(tmp_path / "step"))
    assert compare(adapted, tmp_path / "merged") and compare(tmp_path / "step", adapted / "checkpoints" / "4")
    assert not compare(adapted, base)
    lost = tmp_path / "lost"
    shutil.copytree(adapted / "final", lost)
    said = json.loads((lost / "adapter_config.json").read_text())
    for name, words in (
        ("no/where/at/all", "is not here: correct it there"),
        (None, "is missing: name the base there"),
    ):
        (lost / "adapter_config.json").write_text(json.dumps(said | {"base_model_name_or_path": name}))
        with pytest.raises(PunaError, match=f"base_model_name_or_path .*{words}"):
            load_model(lost)


@pytest.mark.slow
def test_training_goes_on_with_an_adapter(folder, adapted, whole):
    """With no rate to speak of it stays what it was; the base may be a run, and is then named as peft finds it."""
    still = {"optim": {"learning_rate": 1e-30, "weight_decay": 0.0}, "run__max_steps": 1}
    loop.train(settings(folder, "still", model={"path": str(adapted)}, quantize={"method": "nf4"}, **still))
    before, after = (read_adapter(path / "final") for path in (adapted, folder / "still"))
    assert before.settings == after.settings and before.factors.keys() == after.factors.keys()
    for name, factors in before.factors.items():
        for part, other in zip(factors.parts, after.factors[name].parts, strict=True):
            np.testing.assert_array_equal(part.load(), other.load())
    np.testing.assert_array_equal(before.saved["lm_head"].load(), after.saved["lm_head"].load())
    first = read_metrics(folder / "still")[0]["loss"]
    assert first < read_metrics(adapted)[0]["loss"]
    loop.train(settings(folder, "over", model={"path": str(whole)}, lora={"rank": 2}, run__max_steps=1))
    assert read_adapter(folder / "over").settings["base_model_name_or_path"] == str(whole / "final")
    with pytest.raises(PunaError, match=r"lora.rank is 5, and the adapter .* has 2: drop it"):
        loop.train(settings(folder, "no", model={"path": str(adapted)}, lora={"rank": 5}))
    assert not (folder / "no" / "final").exists()


@pytest.mark.slow
def test_a_model_is_prompted_as_it_was_trained(whole):
    """--chat in a folder that was trained, and by name: the ids of the training record up to its answer."""
    source = find_model(str(whole))
    record = RECORDS[3]
    ids, labels = encode(record, source.tokenizer, "chatml", format="messages")
    answer = next(i for i, label in enumerate(labels) if label != -100)
    for template in (None, "chatml"):
        request = _asking(source, record["messages"][0]["content"], template, None, 5, Sampling(), ())
        assert request.prompt == ids[:answer]
        assert source.tokenizer.special_id("<|im_end|>") in request.stop_ids
    said = json.loads((whole / "final" / "generation_config.json").read_text())
    stop, eos = (source.tokenizer.special_id(name) for name in ("<|im_end|>", "<|end_of_text|>"))
    assert said["eos_token_id"] == [2, stop, eos]
    assert (whole / "final" / "chat_template.jinja").read_text().startswith("{# puna: chatml #}")


def changed_base(folder: Path) -> None:
    config = LlamaConfig(**SMALL, bos_token_id=None, eos_token_id=(2,))
    save_model(folder / "new", config, init_params(config, jax.random.key(2)))
    shutil.copy(folder / "new" / "model.safetensors", folder / "base")


def changed_tokenizer(folder: Path) -> None:
    file = folder / "base" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": "{{ messages }}"}))


def changed_code(folder: Path) -> None:
    (folder / "own_prepare.py").write_text("def make(config):\n    return 1\n")


CHANGES = {
    "weights that model.path .* names are not those that it started from": changed_base,
    "holds a run with another tokenizer: what model.path names has changed": changed_tokenizer,
    "what run.prepare names has changed since": changed_code,
}


@pytest.fixture
def copied(folder, tmp_path, monkeypatch):
    """The base and the data in a folder of their own, and a module that run.prepare names."""
    for name in ("base", "data.jsonl"):
        (shutil.copytree if name == "base" else shutil.copy)(folder / name, tmp_path / name)
    (tmp_path / "own_prepare.py").write_text("def make(config):\n    return 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_run_made_longer_says_what_becomes_of_its_rate(tmp_path):
    for scheduler, warmup, done, said in (
        ("cosine", 0, 4, "The run has 8 steps now, and had 4: step 5 has the learning rate 0.005, where it .* 0"),
        ("linear", 0, 2, "The run has 8 steps now, and had 4: step 3 has the learning rate 0.0075, where it .* 0.005"),
        ("constant", 0, 4, None),
        ("cosine", 2, 1, None),
    ):
        optim = {"learning_rate": 1e-2, "lr_scheduler_type": scheduler, "warmup_steps": warmup}
        change = schedule_change(settings(tmp_path, "run", optim=optim), done, 4, 8)
        assert change is None if said is None else re.fullmatch(said, change)
    assert schedule_change(settings(tmp_path, "run"), 2, 4, 4) is None


@pytest.mark.slow
def test_frozen_inputs_that_changed_are_named(copied, folder, monkeypatch):
    config = settings(copied, "run", lora={"rank": 2}, run__prepare="own_prepare:make", run__max_steps=2)
    config = replace(config, data=replace(config.data, cache_dir=str(folder / "cache")))
    longer = replace(config, run=replace(config.run, max_steps=3))
    loop.train(config)
    kept = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file() and "run" not in path.parts}
    for words, change in CHANGES.items():
        change(copied)
        with pytest.raises(PunaError, match=words):
            loop.train(longer)
        for path, data in kept.items():
            path.write_bytes(data)
    other = copied / "other.jsonl"
    other.write_text("".join((copied / "data.jsonl").read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(PunaError, match=r"on other data: data.path was '.*/data.jsonl' and is '.*/other.jsonl'; take"):
        loop.train(replace(longer, data=replace(longer.data, path=str(other))))
    (copied / "base").rename(copied / "moved")
    (copied / "data.jsonl").rename(copied / "moved.jsonl")
    places = {"model": replace(longer.model, path=str(copied / "moved"))}
    places["data"] = replace(longer.data, path=str(copied / "moved.jsonl"))
    loop.train(replace(longer, **places, run=replace(longer.run, prepare=None)))
    assert [line["step"] for line in read_metrics(copied / "run")] == [1, 2, 3]
    with pytest.raises(PunaError, match="has done 3 steps, and run.max_steps is 2: give more, or .* train export"):
        loop.train(replace(config, **places))


@pytest.mark.slow
def test_another_base_under_another_path_does_not_take_over_a_run(folder, whole, tmp_path):
    run, other = tmp_path / "whole", tmp_path / "other"
    shutil.copytree(whole, run)
    shutil.copytree(folder / "base", other)
    again = settings(folder, "whole", run__output_dir=str(run), run__max_steps=5, model={"path": str(other)})
    loop.train(again)
    changed_base_of = LlamaConfig(**SMALL, bos_token_id=None, eos_token_id=(2,))
    save_model(tmp_path / "new", changed_base_of, init_params(changed_base_of, jax.random.key(2)))
    small_tokenizer(tmp_path / "new")
    shutil.rmtree(other)
    (tmp_path / "new").rename(tmp_path / "third")
    with pytest.raises(PunaError, match="holds a run on another base"):
        loop.train(replace(again, model=replace(again.model, path=str(tmp_path / "third"))))


@pytest.mark.slow
def test_losses_that_are_no_numbers_from_the_first_step_fail(folder, tmp_path):
    config = LlamaConfig(**SMALL, bos_token_id=None, eos_token_id=(2,))
    params = init_params(config, jax.random.key(1))
    save_model(tmp_path / "nan", config, params | {"final_norm": params["final_norm"] * np.nan})
    small_tokenizer(tmp_path / "nan")
    run = settings(folder, "nan", model={"path": str(tmp_path / "nan")}, run__output_dir=str(tmp_path / "run"))
    for _ in range(2):  # the second time from what the first saved
        with pytest.raises(loop.NonFinite, match="4 updates in a row were not finite, up to step 4"):
            loop.train(run)
    assert not (tmp_path / "run" / "final").exists()
    assert [line["loss"] for line in read_metrics(tmp_path / "run")] == [None] * 4
    assert export_step(tmp_path / "run", tmp_path / "kept") == 4
    assert forward(load_model(tmp_path / "kept")[1], np.zeros((1, 2), np.int32), config)[0].shape == (1, 2, 512)
