"""GGUF's metadata means here what it means to llama.cpp: honoured, known to do nothing, said, or refused by name."""

import json
import math

import gguf
import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from convert.checkpoint import Checkpoint, WriteOptions
from convert.formats import open_model
from convert.gguf import read, write
from convert.lazy import from_array
from convert.names import parameters
from model import LlamaConfig
from model.config import RopeScaling
from model.errors import PunaError
from model.vocabulary import LLAMA3_SPLIT

TINY = LlamaConfig(
    vocab_size=8,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
)
KINDS = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A model's file as we write it."""
    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("plain")
    tensors = {
        param.name: from_array(random.normal(size=param.shape).astype(np.float32), "memory")
        for param in parameters(TINY)
    }
    return written(Checkpoint(TINY, tensors, folder / "nowhere", "hf"), folder / "plain.gguf")


def written(checkpoint, path):
    write(path, checkpoint, WriteOptions(dtype="float32"))
    return path


def copied(plain, path, tensors=lambda name: True, **said):
    """The file with these keys (`__` for a dot; None: left out), of those tensors, as the gguf library writes it."""
    reader, writer = gguf.GGUFReader(plain), gguf.GGUFWriter(path, "llama")
    keys = {key.replace("__", "."): value for key, value in said.items()}
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture" and name not in keys:
            kind = field.types[0]
            writer.add_key_value(name, field.contents(), kind, field.types[-1] if kind.name == "ARRAY" else None)
    for name, value in keys.items():
        if value is not None:
            sub = gguf.GGUFValueType.UINT32 if isinstance(value, list) else None
            writer.add_key_value(name, value, getattr(gguf.GGUFValueType, KINDS[type(value)]), sub)
    for tensor in reader.tensors:
        if tensors(tensor.name):
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


ROPE = "llama__rope__scaling__"
SCALED = {
    "a factor without a type": ({f"{ROPE}factor": 4.0}, RopeScaling("linear", 4.0)),
    "the old name of the factor": ({"llama__rope__scale_linear": 2.0}, RopeScaling("linear", 2.0)),
    "both names, of which the new one counts": (
        {f"{ROPE}factor": 4.0, "llama__rope__scale_linear": 2.0},
        RopeScaling("linear", 4.0),
    ),
    "a factor of type none, which does nothing": ({f"{ROPE}type": "none", f"{ROPE}factor": 4.0}, None),
    "a factor of 1": ({f"{ROPE}type": "linear", f"{ROPE}factor": 1.0}, None),
    "yarn": (
        {f"{ROPE}type": "yarn", f"{ROPE}factor": 4.0, f"{ROPE}original_context_length": 16},
        RopeScaling("yarn", 4.0, 16, beta_fast=32.0, beta_slow=1.0),
    ),
    "yarn without its original length": (
        {f"{ROPE}type": "yarn", f"{ROPE}factor": 2.0},
        RopeScaling("yarn", 2.0, 64, beta_fast=32.0, beta_slow=1.0),
    ),
    "yarn with another factor on its attention": (
        {f"{ROPE}type": "yarn", f"{ROPE}factor": 4.0, f"{ROPE}attn_factor": 0.5, f"{ROPE}original_context_length": 16},
        RopeScaling("yarn", 4.0, 16, attention_factor=0.5 * (0.1 * math.log(4.0) + 1.0), beta_fast=32.0, beta_slow=1.0),
    ),
    "how the weights came to be": ({f"{ROPE}finetuned": True}, None),
}


@pytest.mark.parametrize("name", SCALED)
def test_rope_is_stretched_as_in_llama_cpp(plain, tmp_path, name):
    """llama-model.cpp: load_hparams; ggml: rope_yarn, which multiplies attn_factor by 1 + 0.1 ln(factor)."""
    said, expected = SCALED[name]
    assert read(copied(plain, tmp_path / "m.gguf", **said)).config.rope_scaling == expected


HONOURED = {
    "further ends": (
        {f"tokenizer__ggml__{end}_token_id": id for end, id in (("eos", 3), ("eot", 5), ("eom", 3))},
        "eos_token_id",
        (3, 5),
    ),
    "padding": ({"tokenizer__ggml__padding_token_id": 3}, "pad_token_id", 3),
    "one number of heads for every layer": ({"llama__attention__head_count_kv": [2, 2]}, "num_key_value_heads", 2),
    "key_length left out": (
        {"llama__attention__key_length": None, "llama__attention__value_length": None},
        "head_dim",
        16,
    ),
    "no experts": ({"llama__expert_count": 0, "llama__expert_used_count": 0}, "hidden_size", 32),
    "scales of 1": ({"llama__logit_scale": 1.0, "llama__attention__scale": 0.25}, "hidden_size", 32),
    "a window beyond the context": ({"llama__attention__sliding_window": 4096}, "hidden_size", 32),
    "causal": ({"llama__attention__causal": True}, "hidden_size", 32),
    "remarks": ({"llama__tensor_data_layout": "Meta AI original pth", "general__author": "x"}, "hidden_size", 32),
}


@pytest.mark.parametrize("name", HONOURED)
def test_what_is_honoured_or_does_nothing(plain, tmp_path, capsys, name):
    said, field, expected = HONOURED[name]
    assert getattr(read(copied(plain, tmp_path / "m.gguf", **said)).config, field) == expected
    assert capsys.readouterr().err == ""


REFUSED = {
    "rope.dimension_count is 8 and heads have 16 entries": {"llama__rope__dimension_count": 8},
    "attention.value_length is 8 and heads have 16 entries": {"llama__attention__value_length": 8},
    "expert_count = 8 is not supported": {"llama__expert_count": 8, "llama__expert_used_count": 2},
    "attention.scale = 0.5": {"llama__attention__scale": 0.5},
    "attention.causal = False": {"llama__attention__causal": False},
    "attention.sliding_window = 16": {"llama__attention__sliding_window": 16},
    "logit_scale = 0.5": {"llama__logit_scale": 0.5},
    "embedding_scale = 12.0": {"llama__embedding_scale": 12.0},
    "residual_scale = 0.22": {"llama__residual_scale": 0.22},
    "final_logit_softcapping = 30.0": {"llama__final_logit_softcapping": 30.0},
    "attention.clamp_kqv = 8.0": {"llama__attention__clamp_kqv": 8.0},
    "rope.something_new = 3": {"llama__rope__something_new": 3},
    "use_parallel_residual = True": {"llama__use_parallel_residual": True},
    "layers that differ": {"llama__attention__head_count_kv": [1, 2]},
    "vocab_size is 9 and token_embd.weight has 8": {"llama__vocab_size": 9},
    "general.type is 'adapter'": {"general__type": "adapter"},
    "rope_type 'longrope' is not supported": {f"{ROPE}type": "longrope", f"{ROPE}factor": 4.0},
    "attn_factor of 2 .* type 'linear'": {f"{ROPE}attn_factor": 2.0},
    "yarn_ext_factor 0.5": {f"{ROPE}yarn_ext_factor": 0.5},
    "does not say llama.context_length": {"llama__context_length": None},
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_acts_and_is_not_honoured_is_refused_by_name(plain, tmp_path, words):
    with pytest.raises(PunaError, match=words):
        read(copied(plain, tmp_path / "m.gguf", **REFUSED[words]))


def test_a_key_that_nobody_knows_is_said_once(plain, tmp_path, capsys):
    path = copied(plain, tmp_path / "m.gguf", llama__my_note=3, mine__too="x", general__sampling__temp=0.5)
    for _ in range(2):
        read(path)
    keys = "general.sampling.temp, llama.my_note, mine.too"
    assert capsys.readouterr().err == f"{path}: unknown keys, not used: {keys}\n"


def test_a_split_model_is_read_whole_from_any_of_its_parts(plain, tmp_path):
    """As llama-gguf-split leaves it: the metadata in the first part, tensors in each."""
    parts = [tmp_path / f"m-{i}-of-00002.gguf" for i in ("00001", "00002")]
    for number, part in enumerate(parts):
        copied(plain, part, lambda name, n=number: ("blk.1" in name) == n, split__no=number, split__count=2)
    whole = open_model(plain)
    for place in (*parts, tmp_path):
        found = open_model(place)
        assert found.config == whole.config and found.parts == tuple(parts)
        for name, tensor in whole.tensors.items():
            np.testing.assert_array_equal(found.tensors[name].load(), tensor.load())
    parts[1].rename(tmp_path / "other.gguf")
    with pytest.raises(PunaError, match=r"is one part of 2; m-00002-of-00002.gguf is missing"):
        open_model(parts[0])
    with pytest.raises(PunaError, match="other.gguf says that it is one of 2 parts, and 1 is there"):
        open_model(tmp_path / "other.gguf")


# Tokenizers, written for llama.cpp.


@pytest.fixture(scope="module")
def exported(plain, tmp_path_factory):
    """Metadata of the tokenizer that lies in a folder, as written beside a model."""
    source = open_model(plain)

    def exported(folder):
        checkpoint = Checkpoint(source.config, source.tensors, folder, "hf")
        reader = gguf.GGUFReader(written(checkpoint, folder / "m.gguf"))
        fields = {name.removeprefix("tokenizer.ggml."): field for name, field in reader.fields.items()}
        return {
            name: fields[name].contents() if name in fields else None
            for name in ("model", "pre", "add_space_prefix", "add_bos_token", "add_eos_token")
        }

    return exported


def trained(folder, **options):
    """A SentencePiece model of a few words, as LLaMA's but for these options."""
    text = folder / "text"
    text.write_text("the grassland where the llamas graze is the puna\n" * 9)
    plain = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    plain |= {"remove_extra_whitespaces": False, "vocab_size": 290, "minloglevel": 9}
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), **(plain | options)
    )


def test_whether_a_space_is_put_before_a_text_is_said(exported, tmp_path):
    """llama.cpp puts one unless add_space_prefix is false."""
    trained(tmp_path)
    assert exported(tmp_path)["add_space_prefix"] is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": False, "add_eos_token": True}))
    found = exported(tmp_path)
    assert (found["add_space_prefix"], found["add_eos_token"]) == (False, True)
    (tmp_path / "tokenizer_config.json").unlink()
    trained(tmp_path, add_dummy_prefix=False)
    assert exported(tmp_path)["add_space_prefix"] is False


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizes text by nmt_nfkc"),
        ({"remove_extra_whitespaces": True}, "makes runs of spaces one"),
        ({"model_type": "unigram", "vocab_size": 280}, "is a unigram model"),
        ({"byte_fallback": False, "vocab_size": 30}, "has no tokens for single bytes"),
        ({"treat_whitespace_as_suffix": True}, "puts spaces behind words"),
    ],
)
def test_a_sentencepiece_model_that_llama_cpp_would_run_otherwise_is_refused(exported, tmp_path, options, words):
    trained(tmp_path, **options)
    with pytest.raises(PunaError, match=f"tokenizer.model .*{words}.*, which llama.cpp does not do"):
        exported(tmp_path)


def test_spaces_that_are_kept_as_they_are_are_refused(exported, tmp_path):
    trained(tmp_path)
    proto = sentencepiece_model_pb2.ModelProto.FromString((tmp_path / "tokenizer.model").read_bytes())
    proto.normalizer_spec.escape_whitespaces = False
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    with pytest.raises(PunaError, match="keeps spaces as they are"):
        exported(tmp_path)


def byte_level(folder, normalizer=None, pre_tokenizer=None):
    vocab = {letter: id for id, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


LETTERS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
CUT = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"), LETTERS]),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}


@pytest.mark.parametrize("name", CUT)
def test_how_text_is_cut_has_llama_cpps_name(exported, tmp_path, name):
    byte_level(tmp_path, pre_tokenizer=CUT[name])
    found = exported(tmp_path)
    assert (found["model"], found["pre"], found["add_space_prefix"]) == ("gpt2", name, None)


@pytest.mark.parametrize(
    "cut",
    [
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        LETTERS,
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "removed"), LETTERS]),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\d"), "isolated"), LETTERS]),
    ],
    ids=range(5),
)
def test_another_way_to_cut_text_is_refused(exported, tmp_path, cut):
    byte_level(tmp_path, pre_tokenizer=cut)
    with pytest.raises(PunaError, match="cuts text by .*, which llama.cpp is not known to do"):
        exported(tmp_path)


def test_a_tokenizer_json_that_normalizes_text_is_refused(exported, tmp_path):
    byte_level(tmp_path, normalizers.NFC())
    with pytest.raises(PunaError, match=r"normalizes text \(NFC\), which llama.cpp does not do"):
        exported(tmp_path)


@pytest.mark.parametrize("begins", [True, False])
def test_whether_texts_begin_with_bos_is_what_the_post_processor_does(exported, tmp_path, begins):
    byte_level(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["added_tokens"] = [{"id": 256, "content": "<s>", "special": True}]
    text, bos = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<s>", "type_id": 0}}
    spec["post_processor"] = {"type": "TemplateProcessing", "single": [bos, text] if begins else [text], "pair": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert exported(tmp_path)["add_bos_token"] is begins
