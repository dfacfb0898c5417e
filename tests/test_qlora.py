"""QLoRA from end to end: a real model in nf4, adapters trained on real dialogues over a 4x2 mesh, merged, served."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from faulty_runs import finish, launch
from safetensors.numpy import load_file

from convert import load_model, save_model
from convert.checkpoint import WriteOptions
from convert.merge import merge_adapters
from model.llama import forward
from model.quantize import quantize
from model.sharding import make_mesh
from model.tokenizer import load_tokenizer
from train import distributed, loop
from train.config import load_config, read_config
from train.data.encode import encode
from train.metrics import read_metrics

pytestmark = pytest.mark.slow

TEMPLATE = "### Instruct: Summarize the below conversation.\n\n{dialogue}\n\n### Output:\n{summary}\n\n### End"
RESPONSE = "### Output:\n"
STEPS, LENGTH = 12, 352
SMALL = """
[model]
path = "{base}"
[quantize]
method = "nf4"
double_quant = true
[lora]
dora = true
dropout = 0.1
modules_to_save = ["embed_tokens"]
[data]
path = "{folder}/data.jsonl"
cache_dir = "{folder}/cache"
template = "plain"
max_length = 64
[mesh]
fsdp = 2
[run]
batch_size = 4
max_steps = 3
save_steps = 2
"""


def test_stories260k_learns_to_summarize_dialogues(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "reached_preemption", lambda step: False)
    base = data_dir / "stories260k-derived" / "hf_sharded"
    lines = (data_dir / "dialogsum" / "dialogsum.dev.jsonl").read_text().splitlines()
    short = [line for line in lines if len(json.loads(line)["dialogue"]) < 350]
    held_out, train = short[:24], short[24:]
    (tmp_path / "held_out.jsonl").write_text("\n".join(held_out) + "\n")
    (tmp_path / "train.jsonl").write_text("\n".join(train) + "\n")
    config = read_config(
        {
            "model": {"path": str(base)},
            "quantize": {"method": "nf4", "double_quant": True},
            "lora": {"rank": 8, "alpha": 32, "dropout": 0.05},
            "data": {
                "path": str(tmp_path / "train.jsonl"),
                "eval_path": str(tmp_path / "held_out.jsonl"),
                "template": TEMPLATE,
                "response_template": RESPONSE,
                "max_length": LENGTH,
                "cache_dir": str(tmp_path / "cache"),
            },
            "optim": {"learning_rate": 5e-3, "warmup_steps": 2},
            "mesh": {"fsdp": 4, "tensor": 2},
            "run": {
                "output_dir": str(tmp_path / "run"),
                "batch_size": 8,
                "max_steps": STEPS,
                "eval_steps": STEPS,
                "save_steps": 0,
            },
        }
    )
    loop.train(config)
    after = read_metrics(tmp_path / "run")[-1]["eval_loss"]

    config, params = load_model(base, quantize=partial(quantize, format="nf4", double=True))
    save_model(tmp_path / "nf4", config, params, tokenizer=load_tokenizer(base))
    wide = WriteOptions(dtype="float32")
    merge_adapters(tmp_path / "nf4", [tmp_path / "run" / "final"], tmp_path / "merged", options=wide)
    before, merged = (held_out_loss(folder, held_out) for folder in (base, tmp_path / "merged"))
    assert after < before - 0.3, (after, before)
    assert merged == pytest.approx(after, rel=1e-4)

    ids = np.random.default_rng(0).integers(3, 512, (2, 100))
    config, params = load_model(tmp_path / "merged")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged")(torch.tensor(ids)).logits
    np.testing.assert_allclose(forward(params, jnp.array(ids), config)[0], theirs.detach().numpy(), atol=1e-4)


def test_two_processes_write_the_adapter_of_one(data_dir, tmp_path, monkeypatch):
    """Quantized, DoRA and a saved table, each split over both. Sums of two terms do not depend on their order."""
    monkeypatch.setattr(distributed, "reached_preemption", lambda step: False)
    monkeypatch.setattr(loop, "mesh_of", lambda config: make_mesh(fsdp=2, devices=jax.devices()[:2]))
    lines = (json.dumps({"prompt": f"One day {name}", "completion": " went home."}) for name in "ABCDEFGHIJKLMNOP")
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    config = tmp_path / "run.toml"
    config.write_text(SMALL.format(base=data_dir / "stories260k-derived" / "hf_sharded", folder=tmp_path))
    loop.train(load_config(config, [f"run.output_dir={tmp_path / 'one'}"]))
    finish(launch(config, tmp_path / "two", processes=2, devices=1))
    one, two = tmp_path / "one" / "final", tmp_path / "two" / "final"
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    for path in one.iterdir():
        if path.suffix != ".safetensors":
            assert path.read_bytes() == (two / path.name).read_bytes(), path.name
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    assert ours.keys() == theirs.keys() and any("magnitude" in name for name in ours)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], name)


def held_out_loss(folder: Path, lines: list[str]) -> float:
    """The mean loss of a model's answer tokens, by transformers."""
    tokenizer = load_tokenizer(folder)
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    total = count = 0
    for line in lines:
        ids, labels = encode(json.loads(line), tokenizer, TEMPLATE, LENGTH, response_template=RESPONSE)
        wanted = torch.tensor([labels])[:, 1:]
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[:, :-1]
        total += torch.nn.functional.cross_entropy(logits[0], wanted[0], reduction="sum").item()
        count += (wanted != -100).sum().item()
    return total / count
