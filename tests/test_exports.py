"""A run with replaced pieces leaves a model that says what it is, gives the run's own loss, and misleads nobody."""

import json
from pathlib import Path

import jax
import numpy as np
import peft
import pytest
import transformers
from converting import command  # noqa: F401

from convert import load_model
from model import forward
from model.errors import PunaError
from train import distributed, loop
from train.config import load_config
from train.data import in_order, load_dataset
from train.start import tokenizer_of

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
ABLATIONS = sorted((ROOT / "configs" / "ablations").glob("*.toml"))
FEW = ["run.max_steps=6", "run.save_steps=6", "run.batch_size=8", "optim.warmup_steps=1"]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(distributed, "reached_preemption", lambda step: False)
    monkeypatch.chdir(ROOT)


def trained(path, folder, *overrides):
    config = load_config(path, [*FEW, f"run.output_dir={folder}", *overrides])
    loop.train(config)
    return config


def held_out_loss(config, model, params):
    """The mean loss of the trained tokens of the held-out rows, from the logits."""
    total = count = 0
    score = jax.jit(lambda tokens, segments: jax.nn.log_softmax(forward(params, tokens, model, segments=segments)[0]))
    for batch in in_order(load_dataset(config.data, tokenizer_of(config)).evaluation, 8):
        chosen = np.asarray(score(batch["tokens"], batch["segments"]))
        trained = batch["labels"] >= 0
        total -= np.take_along_axis(chosen, batch["labels"].clip(0)[..., None], -1)[trained].sum()
        count += trained.sum()
    return total / count


def said_loss(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["eval_loss"] for line in lines if "eval_loss" in line][-1]


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_the_export_of_an_ablation_gives_its_held_out_loss_and_plain_readers_refuse_it(path, tmp_path, command):  # noqa: F811
    config = trained(path, tmp_path / "run")
    final = tmp_path / "run" / "final"
    model, params = load_model(final)
    pieces = {part: getattr(config.model, part) for part in ("block", "norm") if getattr(config.model, part)}
    assert model.pieces.names() == pieces
    expected = said_loss(tmp_path / "run")
    assert abs(held_out_loss(config, model, params) - expected) < 1e-6 * expected

    with pytest.raises(ValueError, match="model type `puna`"):
        transformers.AutoModelForCausalLM.from_pretrained(final)
    with pytest.raises(OSError, match="no file named model.safetensors"):
        transformers.LlamaForCausalLM.from_pretrained(final)
    for to in ("gguf", "meta"):
        code, _, errors = command("model", final, tmp_path / to, "--to", to)
        assert code == 2 and ("what replaces a part" in errors[-1] or "llama.cpp does not have" in errors[-1])

    assert command("model", final, tmp_path / "orbax", "--to", "orbax")[0] == 0
    assert command("model", tmp_path / "orbax", tmp_path / "hf", "--to", "hf")[0] == 0
    for name in ("config.json", "puna.safetensors"):
        assert (tmp_path / "hf" / name).read_bytes() == (final / name).read_bytes()


def test_a_run_goes_on_from_an_export_with_its_pieces_and_so_do_adapters(tmp_path, command):  # noqa: F811
    path = ROOT / "configs" / "ablations" / "layer_norm.toml"
    config = trained(path, tmp_path / "base")
    base = tmp_path / "base" / "final"
    shape = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    text = "".join(
        line
        for line in path.read_text().splitlines(keepends=True)
        if not line.startswith((*shape, "norm", "max_position"))
    )
    tuned = tmp_path / "tuned.toml"
    tuned.write_text(text.replace("[model]", f'[model]\npath = "{base}"') + "\n[lora]\nrank = 4\n")
    trained(tuned, tmp_path / "tuned")

    adapter = tmp_path / "tuned" / "final"
    said = json.loads((adapter / "adapter_config.json").read_text())
    assert said["peft_type"] == "PUNA_LORA" and said["puna"]["norm"] == config.model.norm
    with pytest.raises(KeyError):
        peft.PeftConfig.from_pretrained(adapter)
    model, params = load_model(base, adapters=[adapter])
    expected = said_loss(tmp_path / "tuned")
    assert abs(held_out_loss(config, model, params) - expected) < 1e-6 * expected
    assert command("merge", base, adapter, tmp_path / "merged")[0] == 0
    model, params = load_model(tmp_path / "merged")
    assert model.pieces.norm == config.model.norm
    assert abs(held_out_loss(config, model, params) - expected) < 1e-5 * expected


def test_a_plain_export_says_nothing_of_pieces(tmp_path):
    trained(ROOT / "configs" / "tiny.toml", tmp_path / "run")
    said = json.loads((tmp_path / "run" / "final" / "config.json").read_text())
    assert said["architectures"] == ["LlamaForCausalLM"] and "puna" not in said
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


def test_a_piece_that_is_not_there_is_named_before_training(tmp_path):
    with pytest.raises(PunaError, match="model.norm is \"no_such:norm\": No module named 'no_such'"):
        trained(ROOT / "configs" / "tiny.toml", tmp_path / "run", "model.norm=no_such:norm")
