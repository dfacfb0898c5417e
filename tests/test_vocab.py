"""Vocabularies: the published merged tokenizers byte for byte, and models resized by the rules of Alpaca and Vicuna."""

import hashlib
import json
import re
import shutil
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from converting import command  # noqa: F401

from convert.checkpoint import Checkpoint, WriteOptions
from convert.formats import open_model
from convert.lazy import from_array
from convert.names import parameters
from convert.save import write_model
from convert.vocab import Merged, merge_vocabularies, resize, resized
from model import LlamaConfig
from model.errors import PunaError
from model.tokenizer import load_tokenizer

CONFIG = LlamaConfig(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
)


def train(path: Path, text: str, vocab_size: int) -> Path:
    stream = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text] * 5),
        model_writer=stream,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    path.write_bytes(stream.getvalue())
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Two SentencePiece models and their merge with a [PAD]; a model folder for the first one."""
    root = tmp_path_factory.mktemp("vocab")
    base = train(root / "base.model", "the llama walks on the high grassland and the wind walks with it", 300)
    extra = train(root / "extra.model", "羊驼在高原上走，风在草地上吹。the wind 风", 290)
    merge_vocabularies(base, extra, root / "merged.model", specials=["[PAD]"])
    random = np.random.default_rng(0)
    tensors = {
        param.name: from_array(random.normal(0, 0.02, param.shape).astype(np.float32), param.name)
        for param in parameters(CONFIG)
    }
    write_model(root / "llama", Checkpoint(CONFIG, tensors, root, "hf"), WriteOptions(tokenizer=load_tokenizer(base)))
    return {name: root / f"{name}.model" for name in ("base", "extra", "merged")} | {"llama": root / "llama"}


def pieces(path: Path) -> list[str]:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return [processor.id_to_piece(id) for id in range(len(processor))]


# SentencePiece models.


def test_the_published_tokenizers_are_reproduced(data_dir, tmp_path):
    """The sums are those that Chinese-LLaMA-Alpaca publishes for the tokenizer.model of its LLaMA and Alpaca models."""
    folder = data_dir / "chinese-llama-tokenizer"
    table = (folder / "SHA256.md").read_text()
    sums = [re.search(rf"{model} \(7B, 13B, 33B\) +\| ([0-9a-f]{{64}})", table) for model in ("LLaMA", "Alpaca")]
    base, extra = data_dir / "llama2-tokenizer/tokenizer.model", folder / "chinese_sp.model"
    llama = merge_vocabularies(base, extra, tmp_path / "llama.model")
    alpaca = merge_vocabularies(base, extra, tmp_path / "alpaca.model", specials=["[PAD]"])
    assert [llama.sha256, alpaca.sha256] == [found[1] for found in sums if found]
    assert llama == Merged(32_000, 20_000, 17_953, llama.sha256) and llama.total == 49_953 and alpaca.total == 49_954
    again = merge_vocabularies(tmp_path / "llama.model", extra, tmp_path / "again.model", specials=["[PAD]"])
    assert again.sha256 == hashlib.sha256((tmp_path / "alpaca.model").read_bytes()).hexdigest() == alpaca.sha256


def test_a_merge_appends_the_pieces_that_are_new(models):
    base, extra, merged = (pieces(models[name]) for name in ("base", "extra", "merged"))
    assert merged == base + [piece for piece in extra if piece not in base] + ["[PAD]"]
    tokenizer = load_tokenizer(models["merged"])
    assert tokenizer.pad_id == len(merged) - 1
    line = "羊驼 and the llama"
    assert tokenizer.decode(tokenizer.encode(line)) == line
    assert len(tokenizer.encode(line)) < len(load_tokenizer(models["base"]).encode(line))


def test_a_merge_with_nothing_new_changes_nothing(models, tmp_path):
    made = merge_vocabularies(models["merged"], models["extra"], tmp_path / "same.model", specials=["[PAD]"])
    assert made.added == 0 and made.total == made.base
    assert (tmp_path / "same.model").read_bytes() == models["merged"].read_bytes()
    assert made.sha256 == hashlib.sha256(models["merged"].read_bytes()).hexdigest()


def test_what_is_no_sentencepiece_model_is_not_merged(models, tmp_path):
    (tmp_path / "ranks.model").write_bytes(b"AA== 0\nAQ== 1\n")
    (tmp_path / "rubbish.model").write_bytes(b"\xff\xff")
    for name, words in (("ranks", "tiktoken ranks"), ("rubbish", "is no tokenizer")):
        with pytest.raises(PunaError, match=f"{name}.model.*{words}"):
            merge_vocabularies(models["base"], tmp_path / f"{name}.model", tmp_path / "out.model")
    shutil.copy(models["base"], tmp_path / "out.model")
    with pytest.raises(PunaError, match=r"out\.model exists"):
        merge_vocabularies(models["base"], models["extra"], tmp_path / "out.model")
    assert (tmp_path / "out.model").read_bytes() == models["base"].read_bytes()


# Embeddings.


def embeddings(folder: Path) -> dict[str, np.ndarray]:
    """Input and output embeddings, a row a token, in float32."""
    tensors = open_model(folder).tensors
    return {"embed": tensors["embed"].load(), "lm_head": tensors["lm_head"].load().T}


@pytest.mark.parametrize(
    ("format", "init", "multiple"),
    [("hf", "mean", 1), ("hf", "mean", 64), ("hf", "zero", 1), ("orbax", "zero", 64), ("meta", "mean", 64)],
)
def test_a_model_gets_a_row_for_every_token(models, tmp_path, format, init, multiple):
    source = tmp_path / "source"
    write_model(source, replace(open_model(models["llama"]), format=format))
    written = resize(source, tmp_path / "resized", models["merged"], init, multiple)
    tokenizer = load_tokenizer(tmp_path / "resized")
    assert written.config.vocab_size == -(-tokenizer.vocab_size // multiple) * multiple
    assert tokenizer.vocab_size == load_tokenizer(models["merged"]).vocab_size
    before, after = embeddings(source), embeddings(tmp_path / "resized")
    for name in before:
        assert after[name].shape[0] == written.config.vocab_size
        np.testing.assert_array_equal(after[name][:300], before[name])
        expected = before[name].mean(0) if init == "mean" else np.zeros(16)
        np.testing.assert_allclose(after[name][300:], np.broadcast_to(expected, after[name][300:].shape), atol=1e-7)
    others = open_model(source).tensors.keys() - {"embed", "lm_head"}
    for name in others:
        a, b = (open_model(path).tensors[name].load() for path in (source, tmp_path / "resized"))
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_mean_rows_in_half_precision_are_the_mean_rounded_once(models, dtype):
    numbers = np.random.default_rng(0).normal(3, 1, (300, 16)).astype(dtype)
    checkpoint = open_model(models["llama"])
    checkpoint = replace(checkpoint, tensors=checkpoint.tensors | {"embed": from_array(numbers, "")})
    grown = resized(checkpoint, 302).tensors["embed"].load()
    assert grown.dtype == dtype and grown.shape == (302, 16)
    np.testing.assert_array_equal(grown[300], numbers.astype(np.float64).mean(0).astype(dtype))
    np.testing.assert_array_equal(grown[301], grown[300])


@pytest.mark.slow
def test_a_resized_model_equals_transformers_resized_by_alpacas_rule(models, tmp_path):
    import torch
    from transformers import LlamaForCausalLM

    resize(models["llama"], tmp_path / "resized", models["merged"])
    tokenizer = load_tokenizer(tmp_path / "resized")
    theirs = LlamaForCausalLM.from_pretrained(models["llama"])
    theirs.resize_token_embeddings(tokenizer.vocab_size, mean_resizing=False)
    with torch.no_grad():
        for module in (theirs.get_input_embeddings(), theirs.get_output_embeddings()):
            module.weight[300:] = module.weight[:300].mean(0, keepdim=True)
    ours = LlamaForCausalLM.from_pretrained(tmp_path / "resized")
    assert ours.config.vocab_size == tokenizer.vocab_size and ours.config.pad_token_id == tokenizer.pad_id
    tokens = torch.tensor([[1, 299, 300, tokenizer.pad_id]])
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, atol=1e-5, rtol=0)


def test_resizing_reads_the_embeddings_alone(models):
    def unread(index):
        raise AssertionError("a tensor was read before it was written")

    checkpoint = open_model(models["llama"])
    locked = {name: replace(tensor, read=unread) for name, tensor in checkpoint.tensors.items()}
    locked |= {name: checkpoint.tensors[name] for name in ("embed", "lm_head")}
    assert resized(replace(checkpoint, tensors=locked), 310).tensors.keys() == checkpoint.tensors.keys()
    zero = {name: replace(tensor, read=unread) for name, tensor in checkpoint.tensors.items()}
    assert resized(replace(checkpoint, tensors=zero), 310, init="zero").tensors["lm_head"].shape == (16, 310)


def test_tied_embeddings_stay_tied(models, tmp_path):
    tied = replace(CONFIG, tie_word_embeddings=True)
    tensors = {name: tensor for name, tensor in open_model(models["llama"]).tensors.items() if name != "lm_head"}
    write_model(tmp_path / "tied", Checkpoint(tied, tensors, models["llama"], "hf"))
    written = resize(tmp_path / "tied", tmp_path / "resized", models["merged"])
    assert "lm_head" not in written.tensors and open_model(tmp_path / "resized").config.tie_word_embeddings


def test_the_tokenizer_files_are_the_new_ones_alone(models, tmp_path):
    source = shutil.copytree(models["llama"], tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    (source / "generation_config.json").write_text('{"temperature": 0.6}')
    resize(source, tmp_path / "resized", models["merged"])
    assert not (tmp_path / "resized/tokenizer.json").exists()
    assert (tmp_path / "resized/tokenizer.model").read_bytes() == models["merged"].read_bytes()
    assert json.loads((tmp_path / "resized/generation_config.json").read_text()) == {"temperature": 0.6}


@pytest.mark.parametrize(
    ("tokenizer", "options", "words"),
    [
        ("extra", {}, "290 tokens and the model 300 rows"),
        ("merged", {"init": "random"}, "init 'random' is not known; choose mean or zero"),
        ("merged", {"multiple": 0}, "multiple 0 is not positive"),
        ("llama", {"tokenizer": "nowhere"}, "nowhere: no such tokenizer"),
    ],
)
def test_a_wrong_request_writes_nothing(models, tmp_path, tokenizer, options, words):
    with pytest.raises(PunaError, match=words):
        resize(models["llama"], tmp_path / "resized", **{"tokenizer": models[tokenizer]} | options)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_did_not_grow_from_the_models_own_is_refused(models, tmp_path):
    other = train(tmp_path / "other.model", "three birds sing in a tall tree at dawn " * 3, 310)
    with pytest.raises(PunaError, match=r"other.model: token \d+ is .* in the model's own tokenizer"):
        resize(models["llama"], tmp_path / "resized", other)
    assert not (tmp_path / "resized").exists()


def test_the_commands(command, tmp_path):  # noqa: F811
    base, extra = (
        train(tmp_path / "a.model", "the quick brown fox", 280),
        train(tmp_path / "b.model", "a lazy dog sleeps", 280),
    )
    merged = tmp_path / "merged.model"
    code, said, _ = command("vocab", "merge", str(base), str(extra), str(merged), "--special", "[PAD]")
    size = sentencepiece.SentencePieceProcessor(str(merged)).vocab_size()
    assert (code, said[1]) == (0, f"sha256 {hashlib.sha256(merged.read_bytes()).hexdigest()}")
    assert said[0].endswith(f": {size}")
    assert command("vocab", "merge", str(base), str(extra), str(merged))[0] == 2  # it exists


def test_an_empty_special_piece_is_refused(models, tmp_path):
    with pytest.raises(PunaError, match="a special piece is empty"):
        merge_vocabularies(models["merged"], models["extra"], tmp_path / "x.model", specials=[""])
    assert not (tmp_path / "x.model").exists()
