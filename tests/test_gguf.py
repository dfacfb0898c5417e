"""GGUF files hold the tensors, metadata and tokens that llama.cpp expects, as the gguf library reads them."""

import base64
import json
import math
import shutil
import sys
from dataclasses import replace
from functools import cache

import gguf
import numpy as np
import pytest
import sentencepiece
import torch
from converting import command, save_hf, write_gguf  # noqa: F401
from small_tokenizer import LLAMA2, LLAMA3, small_tokenizer

from convert.checkpoint import Checkpoint
from convert.formats import open_model
from convert.gguf import TYPES
from convert.gguf import read as read_gguf
from convert.lazy import from_array
from convert.names import parameters
from model import LlamaConfig
from model.config import RopeScaling
from model.errors import PunaError
from model.vocabulary import LLAMA3_SPECIALS

pytestmark = pytest.mark.slow

GQA = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 112, "attention_bias": True}
TINY = LlamaConfig(
    vocab_size=8,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=64,
)


def model(config, folder, seed=0):
    random = np.random.default_rng(seed)
    tensors = {
        param.name: from_array(random.normal(size=param.shape).astype(np.float32), "memory")
        for param in parameters(config)
    }
    return Checkpoint(config, tensors, folder, "hf")


def field(reader, key):
    found = reader.get_field(key)
    return None if found is None else found.contents()


def interleaved(weight, heads):
    """llama.cpp's converter, conversion/llama.py: the two halves of each head's rows become adjacent pairs."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("type", TYPES)
def test_tensors(tmp_path, type, tied):
    """Every tensor of a model with grouped heads and biases: llama.cpp's order, the library's own quantization."""
    state = save_hf(tmp_path / "hf", tie_word_embeddings=tied, **GQA).state_dict()
    write_gguf(tmp_path / "model.gguf", open_model(tmp_path / "hf"), type)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    state = {name: weight for name, weight in state.items() if not (tied and name == "lm_head.weight")}
    assert found.keys() == {names.get_name(name, (".weight", ".bias")) for name in state}
    for name, weight in state.items():
        weight = weight.numpy()
        if "q_proj" in name or "k_proj" in name:
            weight = interleaved(weight, 4 if "q_proj" in name else 2)
        kind = gguf.GGMLQuantizationType[TYPES[type][0]]
        if weight.ndim == 1:
            kind = gguf.GGMLQuantizationType.F32
        elif type in ("q8_0", "q4_0") and weight.shape[-1] % 32:
            kind = gguf.GGMLQuantizationType.F16
        tensor = found[names.get_name(name, (".weight", ".bias"))]
        assert tensor.tensor_type == kind
        assert tensor.shape.tolist() == list(weight.shape[::-1])
        assert tensor.data.tobytes() == gguf.quants.quantize(weight, kind).tobytes()


@pytest.mark.parametrize("type", ["float32", "q8_0"])
def test_metadata(tmp_path, type):
    config = replace(TINY, num_key_value_heads=1, head_dim=24, rms_norm_eps=3e-6, rope_theta=12345.0)
    write_gguf(tmp_path / "model.gguf", model(config, tmp_path), type)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": tmp_path.name,
        "general.file_type": gguf.LlamaFileType.ALL_F32 if type == "float32" else gguf.LlamaFileType.MOSTLY_Q8_0,
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "llama.block_count": 1,
        "llama.context_length": 64,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 32,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.attention.key_length": 24,
        "llama.attention.value_length": 24,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(3e-6)),
        "llama.rope.freq_base": 12345.0,
        "llama.rope.dimension_count": 24,
        "llama.vocab_size": 8,
        "tokenizer.ggml.model": "none",
        "llama.rope.scaling.type": None,
    }
    assert {key: field(reader, key) for key in expected} == expected


SCALINGS = [
    RopeScaling("linear", 4.0),
    RopeScaling("yarn", 4.0, 32, beta_fast=24.0, beta_slow=2.0),
    RopeScaling("llama3", 8.0, 8192, 1.0, 4.0),
    RopeScaling("llama3", 32.0, 8192, 1.0, 4.0),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: f"{scaling.rope_type}{scaling.factor:g}")
def test_rope_scaling(tmp_path, scaling):
    config = replace(TINY, head_dim=64, rope_theta=500000.0, rope_scaling=scaling, max_position_embeddings=131072)
    write_gguf(tmp_path / "model.gguf", model(config, tmp_path), "float16")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    factors = {tensor.name: tensor.data for tensor in reader.tensors}.get("rope_freqs.weight")
    if scaling.rope_type == "llama3":
        assert field(reader, "llama.rope.scaling.type") is None
        np.testing.assert_allclose(factors, llama3_factors(config), rtol=1e-6)
    else:
        assert factors is None
        assert field(reader, "llama.rope.scaling.type") == scaling.rope_type
        assert field(reader, "llama.rope.scaling.factor") == 4.0
    if scaling.rope_type == "yarn":
        keys = ("original_context_length", "yarn_beta_fast", "yarn_beta_slow")
        assert [field(reader, f"llama.rope.scaling.{key}") for key in keys] == [32, 24.0, 2.0]
    assert read_gguf(tmp_path / "model.gguf").config == config


def llama3_factors(config):
    """llama.cpp's converter, conversion/llama.py: what each frequency is divided by."""
    s = config.rope_scaling
    factors = []
    for i in range(0, config.head_dim, 2):
        wavelength = 2 * math.pi * config.rope_theta ** (i / config.head_dim)
        smooth = (s.original_max_position_embeddings / wavelength - s.low_freq_factor) / 3.0
        between = 1 / ((1 - smooth) / s.factor + smooth)
        factors.append(1.0 if wavelength < 2048 else s.factor if wavelength > 8192 else between)
    return factors


# Tokenizers.


def tokens_of(path):
    reader = gguf.GGUFReader(path)
    keys = (
        "model",
        "pre",
        "tokens",
        "scores",
        "token_type",
        "merges",
        "bos_token_id",
        "eos_token_id",
        "chat_template",
        "add_bos_token",
    )
    return {key: field(reader, f"tokenizer.{'' if key == 'chat_template' else 'ggml.'}{key}") for key in keys}


def exported(folder, vocab_size):
    write_gguf(folder / "model.gguf", model(replace(TINY, vocab_size=vocab_size), folder), "float16")
    return tokens_of(folder / "model.gguf")


def test_the_llama2_tokenizer(data_dir, tmp_path):
    shutil.copyfile(data_dir / "llama2-tokenizer/tokenizer.model", tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]", "chat_template": LLAMA2}))
    found = exported(tmp_path, 32016)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert (found["model"], found["pre"], found["merges"]) == ("llama", "default", None)
    assert found["tokens"][:32000] == [pieces.id_to_piece(id) for id in range(32000)]
    assert found["scores"][:32000] == [pieces.get_score(id) for id in range(32000)]
    assert found["token_type"][:32000] == [2, 3, 3, *[6] * 256, *[1] * 31741]
    assert found["tokens"][32000:] == ["[PAD]", *(f"[PAD{id}]" for id in range(32001, 32016))]
    assert found["token_type"][32000:] == [3, *[5] * 15]
    assert (found["bos_token_id"], found["eos_token_id"], found["chat_template"]) == (1, 2, LLAMA2)


@cache
def converted(ranks_path):
    """Tokens and merges as transformers converts tiktoken ranks."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    return TikTokenConverter(vocab_file=str(ranks_path)).extract_vocab_merges_from_model(str(ranks_path))


def test_llama3_ranks(tmp_path):
    """Meta's kind of file, small: all bytes, then what they merge to."""
    pairs = [b"th", b"he", b"the", b" t", b" the", b"in", b"ing", b"thing", b"\xc3\xa9"]
    tokens = [bytes([byte]) for byte in range(256)] + pairs
    lines = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    found = exported(tmp_path, 265 + 256)
    vocabulary, merges = converted(tmp_path / "tokenizer.model")
    assert (found["model"], found["pre"], found["scores"]) == ("gpt2", "llama-bpe", None)
    assert found["tokens"][:265] == list(vocabulary)
    assert found["merges"] == [" ".join(merge) for merge in merges]
    assert found["tokens"][265:] == list(LLAMA3_SPECIALS)
    assert found["token_type"] == [1] * 265 + [3] * 256
    assert (found["bos_token_id"], found["eos_token_id"]) == (265, 266)


def test_byte_level_tokenizer_json(tmp_path):
    small_tokenizer(tmp_path, chat_template=LLAMA3)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    found = exported(tmp_path, 512)
    size = len(spec["model"]["vocab"])
    added = {token["id"]: token["content"] for token in spec["added_tokens"]}
    texts = {id: text for text, id in spec["model"]["vocab"].items()} | added
    assert (found["model"], found["pre"], found["chat_template"]) == ("gpt2", "gpt-2", LLAMA3)
    assert found["tokens"] == [texts.get(id, f"[PAD{id}]") for id in range(512)]
    assert found["merges"] == [" ".join(m) if isinstance(m, list) else m for m in spec["model"]["merges"]]
    assert found["token_type"] == [1] * size + [3] * len(added) + [5] * (512 - size - len(added))


def test_a_tokenizer_json_converted_from_sentencepiece(data_dir, tmp_path):
    """Scores order the pieces as the SentencePiece model orders those that merges make."""
    from transformers.convert_slow_tokenizer import generate_merges

    source = data_dir / "stories260k/tokenizer.model"
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(source))
    size = len(pieces)
    scores = {pieces.id_to_piece(id): (id, pieces.get_score(id)) for id in range(size)}
    merges = generate_merges({text: id for text, (id, _) in scores.items()}, {t: s for t, (_, s) in scores.items()})
    vocab = {text: id for text, (id, _) in scores.items()}
    decoder = {
        "type": "Sequence",
        "decoders": [{"type": "ByteFallback"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}],
    }
    bpe = {"type": "BPE", "vocab": vocab, "merges": merges, "byte_fallback": True, "unk_token": "<unk>"}
    added = [{"id": id, "content": text, "special": True} for id, text in enumerate(("<unk>", "<s>", "</s>"))]
    spec = {"model": bpe, "decoder": decoder, "added_tokens": added}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    found = exported(tmp_path, size)
    assert found["tokens"] == list(vocab)
    assert found["token_type"][:259] == [2, 3, 3, *[6] * 256]
    merged = [id for id in range(size) if found["scores"][id] < 0]
    by_ours = sorted(merged, key=lambda id: -found["scores"][id])
    assert by_ours == sorted(merged, key=lambda id: -pieces.get_score(id)) and len(merged) > 100


# Round trips, commands and faults.


@pytest.mark.parametrize("type", TYPES)
def test_what_is_written_is_read_back(data_dir, tmp_path, type):
    source = open_model(data_dir / "stories260k-derived/hf_sharded")
    write_gguf(tmp_path / "model.gguf", source, type)
    back = read_gguf(tmp_path)
    assert back.config == source.config
    kind = gguf.GGMLQuantizationType[TYPES[type][0]]
    for name, tensor in source.tensors.items():
        array, found = tensor.load(), np.asarray(back.tensors[name].load(), np.float32)
        if array.ndim == 1 or type == "float32":
            assert np.array_equal(found, array)
        elif kind < gguf.GGMLQuantizationType.Q4_0 or type == "bfloat16":
            assert np.array_equal(found, torch.tensor(array).to(getattr(torch, type)).float().numpy())
        else:  # a permutation of rows, which the blocks run along, or rows of no whole blocks
            rows = array if name == "embed" else array.T
            kind_here = kind if rows.shape[1] % 32 == 0 else gguf.GGMLQuantizationType.F16
            expected = gguf.quants.dequantize(gguf.quants.quantize(rows.copy(), kind_here), kind_here)
            assert np.array_equal(found if name == "embed" else found.T, expected)


def test_the_commands(data_dir, tmp_path, command):  # noqa: F811
    source, file = data_dir / "stories260k-derived/hf_sharded", tmp_path / "stories.gguf"
    assert command("model", source, file, "--to", "gguf")[:2] == (0, [])
    assert tokens_of(file)["model"] == "llama"
    code, out, _ = command("verify", source, file)
    assert (code, out[-1]) == (0, "same")
    assert command("model", file, tmp_path / "back", "--to", "hf")[0] == 0
    assert command("verify", source, tmp_path / "back")[0] == 0
    for arguments, kind in ((("--dtype", "float16"), "F16"), (("--quantize", "int8"), "Q8_0")):
        assert command("model", source, file, "--to", "gguf", "--overwrite", *arguments)[0] == 0
        reader = gguf.GGUFReader(file)
        assert reader.get_tensor(0).tensor_type == gguf.GGMLQuantizationType[kind]
        (norm,) = (tensor.data for tensor in reader.tensors if tensor.name == "output_norm.weight")
        assert np.array_equal(norm, open_model(source).tensors["final_norm"].load())  # vectors are exact in every type
    (tmp_path / "another.gguf").write_bytes(b"not of this model")
    code, out, _ = command("inspect", file)
    assert code == 0 and out[-1].startswith("stories.gguf ") and not any("another.gguf" in line for line in out)
    code, _, err = command("model", source, tmp_path / "back", "--to", "gguf", "--overwrite")
    assert code == 2 and "is a folder: give the file to write" in err[-1] and (tmp_path / "back/config.json").exists()
    code, _, err = command(
        "model", source, tmp_path / "dst.gguf", "--to", "gguf", "--quantize", "int8", "--dtype", "float16"
    )
    assert code == 2 and "give one of them" in err[-1] and not list(tmp_path.glob("*dst*"))
    code, _, err = command("model", source, tmp_path / "dst.gguf", "--to", "gguf", "--quantize", "nf4")
    assert code == 2 and "--to gguf has no --quantize nf4; choose int8 or int4" in err[-1]
    assert not list(tmp_path.glob("*dst*"))


@pytest.mark.parametrize("says", [True, False, None])
def test_whether_texts_begin_with_bos_is_what_the_tokenizers_settings_say(data_dir, tmp_path, says):
    shutil.copy(data_dir / "stories260k-derived/hf_sharded/tokenizer.model", tmp_path)
    if says is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": says}))
    found = exported(tmp_path, 512)["add_bos_token"]
    assert found is (says is not False)
    if says is not None:
        assert gguf.SpecialVocab(tmp_path).add_special_token["bos"] is says


def test_wrong_input_is_named_and_nothing_is_written(tmp_path, monkeypatch):
    def refuses(checkpoint, match, type="float16"):
        with pytest.raises(PunaError, match=match):
            write_gguf(tmp_path / "dst.gguf", checkpoint, type)
        assert not list(tmp_path.glob("*dst*"))

    refuses(model(TINY, tmp_path), "'q4_k' is not known", type="q4_k")
    refuses(model(replace(TINY, rope_scaling=RopeScaling("dynamic", 2.0)), tmp_path), "dynamic.*cannot be said in GGUF")
    yarn = RopeScaling("yarn", 2.0, 32, attention_factor=1.5)
    refuses(model(replace(TINY, rope_scaling=yarn), tmp_path), "attention_factor.*cannot be said in GGUF")
    for number, type, match in (
        (1e9, "q8_0", "ffn_up.weight has 1 blocks of numbers beyond float16, which Q8_0's scales are in; .* 1e.09"),
        (1e9, "float16", "ffn_up.weight holds 1 numbers beyond float16"),
    ):
        spoiled = model(TINY, tmp_path)
        spoiled.tensors["layers.0.w_up"].load()[3, 3] = number
        refuses(spoiled, match, type=type)
    small_tokenizer(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": r"\s+"}, "behavior": "Isolated", "invert": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    refuses(model(TINY, tmp_path), "not known to do")
    monkeypatch.setitem(sys.modules, "gguf", None)
    refuses(model(TINY, tmp_path), r"pip install 'puna\[gguf\]'")


def test_damaged_files_are_named(tmp_path):
    write_gguf(tmp_path / "model.gguf", model(TINY, tmp_path / "nowhere"), "float16")
    data = (tmp_path / "model.gguf").read_bytes()
    for size in (2, 100, len(data) // 2, len(data) - 4000):
        (tmp_path / "short.gguf").write_bytes(data[:size])
        with pytest.raises(PunaError, match="short.gguf is truncated or no GGUF file"):
            read_gguf(tmp_path / "short.gguf")
    with pytest.raises(PunaError, match="holds 2 GGUF files"):
        read_gguf(tmp_path)
    (tmp_path / "short.gguf").write_bytes(data.replace(b"blk.0.ffn_up.weight", b"blk.1.ffn_up.weight"))
    with pytest.raises(PunaError, match="lacks 1 tensor .*blk.0.ffn_up.weight.* has unknown 1 tensor"):
        read_gguf(tmp_path / "short.gguf")
    writer = gguf.GGUFWriter(tmp_path / "qwen.gguf", "qwen2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with pytest.raises(PunaError, match="architecture 'qwen2'"):
        read_gguf(tmp_path / "qwen.gguf")
