"""The headline truths on models of two layers, from data made here: what `make check` holds every change against.

Each is told again, in all its cases, by the tests of its module. (That tokenizers equal sentencepiece is quick there.)
"""

import json
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from reference import config_of, hf_config, hf_logits, hf_model, params_of
from safetensors.numpy import load_file
from small_tokenizer import small_tokenizer

from convert import load_model, save_model
from infer.generate import generate
from model import forward
from model.quantize import quantize
from model.tokenizer import load_tokenizer
from train.config import load_config
from train.data import encode
from train.loop import train

# peft, transformers and bitsandbytes deprecate each other's names; what they warn of is not ours.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
TOKENS = np.random.default_rng(0).integers(0, 99, (2, 24))


@pytest.fixture(scope="module")
def theirs():
    """Transformers' LLaMA with grouped queries, llama3's RoPE beyond the original context, and a tied head."""
    return hf_model(hf_config(**SMALL, rope_scaling=LLAMA3, tie_word_embeddings=True))


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs") / "model"
    theirs.save_pretrained(folder)
    return folder


def our_logits(config, params):
    with jax.default_matmul_precision("highest"):
        return jax.jit(forward, static_argnums=2)(params, jnp.asarray(TOKENS), config)[0]


def test_logits_equal_transformers(theirs, folder):
    plain = hf_model(hf_config(**SMALL | {"num_key_value_heads": 4}))
    np.testing.assert_allclose(our_logits(config_of(plain), params_of(plain)), hf_logits(plain, TOKENS), atol=1e-4)
    np.testing.assert_allclose(our_logits(*load_model(folder)), hf_logits(theirs, TOKENS), atol=1e-4)


def test_hugging_face_to_orbax_and_back_is_the_same_bytes(folder, tmp_path):
    save_model(tmp_path / "orbax", *load_model(folder), format="orbax")
    save_model(tmp_path / "hf", *load_model(tmp_path / "orbax"))
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "hf"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (tensor.dtype, tensor.shape, tensor.tobytes()) == (
            after[name].dtype,
            after[name].shape,
            after[name].tobytes(),
        ), name


def test_generation_is_the_likeliest_token_of_full_passes(folder):
    config, params = load_model(folder)
    score = jax.jit(lambda tokens, at: forward(params, tokens, config)[0][0, at])
    prompts, expected = [TOKENS[0, :5].tolist(), TOKENS[1, :17].tolist()], []
    for prompt in prompts:
        tokens = np.zeros((1, 48), np.int32)
        tokens[0, : len(prompt)] = prompt
        for at in range(len(prompt), len(prompt) + 12):
            tokens[0, at] = score(tokens, at - 1).argmax()
        expected.append(tokens[0, len(prompt) : len(prompt) + 12].tolist())
    rows = [[], []]
    for new in generate(params, config, prompts, 12):
        for row, more in zip(rows, new, strict=True):
            row += more
    assert rows == expected


def test_three_steps_of_training_equal_torch_and_transformers(tmp_path, monkeypatch):
    """A whole run on eight devices: losses, norms of gradients, and the weights in final/."""
    tokenizer = load_tokenizer(small_tokenizer(tmp_path))
    records = [{"prompt": f"What is {a}+2? ", "completion": f"It is {a + 2}."} for a in range(8)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    reference = hf_model(hf_config(**SMALL, vocab_size=tokenizer.vocab_size)).train()
    reference.save_pretrained(tmp_path / "base")
    settings = {
        "model": {"path": tmp_path / "base", "tokenizer": tmp_path},
        "data": {"path": tmp_path / "data.jsonl", "template": "plain", "max_length": 32, "cache_dir": tmp_path / "c"},
        "optim": {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "weight_decay": 0.1},
        "run": {"output_dir": tmp_path / "run", "batch_size": 8, "max_steps": 3},
    }
    lines = [
        line
        for section, values in settings.items()
        for line in (f"[{section}]", *(f"{k} = {json.dumps(v, default=str)}" for k, v in values.items()))
    ]
    (tmp_path / "config.toml").write_text("\n".join(lines))
    monkeypatch.setattr("train.distributed.reached_preemption", lambda step: False)  # only launched processes know it
    train(load_config(tmp_path / "config.toml"))
    seen = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]

    tokens, labels, attended = torch.zeros(8, 32, dtype=int), torch.full((8, 32), -100), torch.zeros(8, 32, dtype=int)
    for row, record in enumerate(records):
        ids, targets = encode(record, tokenizer, template="plain", max_length=32)
        for tensor, values in ((tokens, ids), (labels, targets), (attended, 1)):
            tensor[row, : len(ids)] = torch.as_tensor(values)
    matrices = [p for name, p in reference.named_parameters() if "norm" not in name]
    norms = [p for name, p in reference.named_parameters() if "norm" in name]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    assert len(seen) == 3
    for metrics in seen:
        optimizer.zero_grad()
        loss = reference(tokens, attention_mask=attended, labels=labels).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-4)
        np.testing.assert_allclose(metrics["grad_norm"], norm.item(), rtol=1e-4)
    for name, tensor in load_file(tmp_path / "run" / "final" / "model.safetensors").items():
        np.testing.assert_allclose(tensor, reference.state_dict()[name].numpy(), atol=2e-5, err_msg=name)


def test_an_adapter_of_peft_gives_its_logits(folder, tmp_path):
    model = hf_model(hf_config(**SMALL, rope_scaling=LLAMA3, tie_word_embeddings=True))
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(model, settings).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path)
    golden = hf_logits(model, TOKENS)
    np.testing.assert_allclose(our_logits(*load_model(folder, adapters=[tmp_path])), golden, atol=1e-4)
    assert np.abs(golden - our_logits(*load_model(folder))).max() > 0.1


def test_nf4_is_the_codes_and_scales_of_bitsandbytes():
    w = torch.randn(30, 172, generator=torch.Generator().manual_seed(0)) * 0.02  # blocks of 64 run over rows' ends
    packed, state = import_module("bitsandbytes.functional").quantize_4bit(w, blocksize=64, quant_type="nf4")
    q = quantize(jnp.asarray(w.numpy()).T, "nf4")
    np.testing.assert_array_equal(np.asarray(q.codes).reshape(-1)[: w.numel() // 2], packed.numpy().reshape(-1))
    np.testing.assert_array_equal(np.asarray(q.absmax).reshape(-1)[: -(-w.numel() // 64)], state.absmax.numpy())
