"""Ids and texts are transformers' under every setting that a tokenizer folder can have, as it writes such folders.

A folder with a SentencePiece model alone is read as SentencePiece reads it. transformers converts that model first, and
its conversion takes a text that begins with a space as one that does not: such texts are left out there.
"""

import json
import re
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_tokenizer import CHATML, small_tokenizer
from test_tokenizer import trained_sentencepiece
from tokenizers import AddedToken, Tokenizer, pre_tokenizers, processors
from transformers import AutoTokenizer

from model.chat import encode_prompt, get_template
from model.errors import PunaError
from model.tokenizer import load_tokenizer
from model.vocabulary import parse_sentencepiece

PLAIN = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": False}
TABLE = {
    str(id): {"content": text, **PLAIN, "special": True} for id, text in enumerate(["<unk>", "<s>", "</s>"])
}  # fmt: skip
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + ' [/]' }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token + bos_token }}{% endif %}{% endfor %}"
)


def extra(**flags):
    return {"added_tokens_decoder": TABLE | {"420": {"content": "<|x|>", **PLAIN, **flags}}}


# Of a folder with tokenizer.model: tokenizer_config.json, and other files beside it.
MODELS = {
    **{
        f"legacy {legacy}, add_prefix_space {space}": ({"legacy": legacy, "add_prefix_space": space}, {})
        for legacy in (True, False)
        for space in (True, False, None)
    },
    "LlamaTokenizerFast": ({"tokenizer_class": "LlamaTokenizerFast", "legacy": False}, {}),
    **{
        f"added, {flag}, legacy {legacy}": ({"legacy": legacy, **extra(**{flag: True})}, {})
        for flag in ("lstrip", "rstrip", "single_word", "normalized", "special")
        for legacy in (True, False)
    },
    "added word": ({"legacy": False, "added_tokens_decoder": TABLE | {"420": {"content": "llama herd", **PLAIN}}}, {}),
    "added_tokens.json": ({"legacy": False, "added_tokens_decoder": None}, {"added_tokens.json": {"<|x|>": 420}}),
    "added_tokens.json says more": ({"legacy": False, **extra()}, {"added_tokens.json": {"<|x|>": 420, "<|y|>": 421}}),
    "add_bos_token, add_eos_token": ({"legacy": False, "add_bos_token": True, "add_eos_token": True}, {}),
    "add_bos_token False": ({"legacy": False, "add_bos_token": False}, {}),
    "clean_up_tokenization_spaces": ({"legacy": False, "clean_up_tokenization_spaces": True}, {}),
    "a model that puts no space, add_prefix_space True": ({"add_prefix_space": True, "legacy": False}, {}),
    "a model that puts no space, add_prefix_space False": ({"add_prefix_space": False, "legacy": False}, {}),
    "spaces_between_special_tokens": ({"legacy": False, "spaces_between_special_tokens": True}, {}),
}
# Of a tokenizer.json: its Metaspace.
METASPACES = [(scheme, split) for scheme in ("always", "first", "never") for split in (True, False)]


def write_model(folder: Path, config, files) -> Path:
    folder.mkdir()
    data = trained_sentencepiece()
    if "no space" in folder.name:
        proto = parse_sentencepiece(data, "")
        proto.normalizer_spec.add_dummy_prefix = False
        data = proto.SerializeToString()
    (folder / "tokenizer.model").write_bytes(data)
    config = {**LLAMA, "added_tokens_decoder": TABLE, "chat_template": TEMPLATE, **config}
    config = {key: value for key, value in config.items() if value is not None or key == "add_prefix_space"}
    for name, content in {"tokenizer_config.json": config, **files}.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@cache
def both(folder: Path):
    return load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("settings")
    found = {f"{name}, old": write_model(root / f"{name}, old", *given) for name, given in MODELS.items()}
    for name in MODELS:
        both(found[f"{name}, old"])[1].save_pretrained(root / name)
        found[name] = root / name
    for scheme, split in METASPACES:
        folder = found[f"Metaspace {scheme}, split {split}"] = root / f"{scheme}{split}"
        library = Tokenizer.from_file(str(found["legacy True, add_prefix_space True"] / "tokenizer.json"))
        library.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=split)
        library.add_tokens([AddedToken("<|x|>", normalized=False)])
        folder.mkdir()
        library.save(str(folder / "tokenizer.json"))
        config = {**LLAMA, "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for prefix in (True, False):
        folder = found[f"ByteLevel, add_prefix_space {prefix}"] = root / f"bytes{prefix}"
        folder.mkdir()
        small_tokenizer(folder, chat_template=CHATML)
        library = Tokenizer.from_file(str(folder / "tokenizer.json"))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        library.save(str(folder / "tokenizer.json"))
    return found


NAMES = [
    *(f"{name}, old" for name in MODELS),
    *MODELS,
    *(f"Metaspace {scheme}, split {split}" for scheme, split in METASPACES),
    *(f"ByteLevel, add_prefix_space {prefix}" for prefix in (True, False)),
]
PARTS = [
    *(
        "a",
        "e",
        " ",
        "  ",
        "\n",
        "\t",
        ".",
        "'s",
        " ,",
        "the",
        "llama",
        " herd",
        "s",
        "é",
        "🦙",
        "ﬁ",
        "\u3000",
        "▁",
        "\x1f",
        "\x85",
    ),
    *("<|x|>", " <|x|>", "<|x|> ", "<|y|>", "<s>", "</s>", "<0x41>", "[PAD]"),
]
strings = st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=8).map("".join)


def is_converted_alike(text: str) -> bool:
    """Whether transformers' conversion of a SentencePiece model reads a text as SentencePiece does."""
    return re.search(r"(?:^|(?:>|herd)\s*)[ ▁]", text) is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("examples", [15, pytest.param(1500, marks=pytest.mark.soak)])
def test_ids_and_texts_are_those_of_transformers(folders, name, examples):
    ours, theirs = both(folders[name])

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(text=strings)
    def check(text):
        ids = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        if not name.endswith(", old") or is_converted_alike(text):
            assert ours.encode(text) == ids, text
        for skip in (True, False):
            expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert ours.decode(ids, skip_special=skip) == expected, text

    check()


@pytest.mark.parametrize("name", NAMES)
def test_conversations_are_those_of_transformers(folders, name):
    ours, theirs = both(folders[name])
    turns = [text for text in TURNS if "special" not in name or "<|x|>" not in text]  # which no user can write here
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert encode_prompt(messages, get_template("chat_template", ours), ours)[: len(ids)] == ids


TURNS = ("Is it a llama herd?", "It is.", "Why?", "So.", "One <|x|>?", "Two")


def test_there_are_as_many_settings_as_are_claimed():
    assert len(MODELS) >= 24 - len(METASPACES) and len(NAMES) >= 48


@pytest.mark.parametrize("key", ["legacy", "add_prefix_space"])
def test_a_setting_that_is_no_boolean_is_named(tmp_path, key):
    write_model(tmp_path / "t", {key: "yes"}, {})
    with pytest.raises(PunaError, match=rf"tokenizer_config.json: {key} is 'yes': expected true or false"):
        load_tokenizer(tmp_path / "t")


def test_without_legacy_a_model_puts_a_space_before_each_text(tmp_path):
    """As transformers did when such folders were written; version 5 takes false for it."""
    folders = [write_model(tmp_path / name, given, {}) for name, given in (("a", {}), ("b", {"legacy": True}))]
    pieces = list(map(load_tokenizer, folders))
    assert pieces[0].encode("a", follows=True) == pieces[1].encode("a", follows=True) == pieces[0].encode("a")
    other = load_tokenizer(write_model(tmp_path / "false", {"legacy": False}, {}))
    assert other.encode("a", follows=True) != other.encode("a") == pieces[0].encode("a")


def test_tokens_that_transformers_does_not_read_are_said(tmp_path, caplog):
    folder = write_model(tmp_path / "t", *MODELS["added_tokens.json says more"])
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.added_id("<|y|>") is None and "<|y|>" not in theirs.get_vocab() and ours.added_id("<|x|>") == 420
    (said,) = (record.getMessage() for record in caplog.records if record.name.startswith("model"))
    assert said.endswith("the table in tokenizer_config.json is, and has no '<|y|>' of that id")


POST_PROCESSORS = {
    "none": None,
    "begins": processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]),
    "ends": processors.TemplateProcessing(single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", 2)]),
}
POST_PROCESSORS["one of several"] = processors.Sequence([processors.ByteLevel(), POST_PROCESSORS["begins"]])


@pytest.mark.parametrize("has_model", [True, False])
@pytest.mark.parametrize("says", [None, True, False])
@pytest.mark.parametrize("name", POST_PROCESSORS)
@pytest.mark.parametrize("kind", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", None])
def test_a_tokenizer_json_begins_texts_as_its_post_processor_does(
    folders, tmp_path, caplog, kind, name, says, has_model
):
    library = Tokenizer.from_file(str(folders["legacy False, add_prefix_space None"] / "tokenizer.json"))
    library.post_processor = POST_PROCESSORS[name]
    library.save(str(tmp_path / "tokenizer.json"))
    if has_model:
        (tmp_path / "tokenizer.model").write_bytes(trained_sentencepiece())
    given = {**LLAMA, "tokenizer_class": kind, "add_bos_token": says}
    config = {key: value for key, value in given.items() if value is not None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = both(tmp_path)
    assert ours.adds_bos == (theirs("the llama").input_ids[0] == ours.bos_id)
    is_said = "add_bos_token in tokenizer_config.json says otherwise" in caplog.text
    assert is_said == (says is not None and says != ours.adds_bos)


def test_texts_begin_without_bos_where_the_folder_says_so(folders):
    ours, theirs = both(folders["add_bos_token False, old"])
    assert ours.encode("the llama", add_bos=ours.adds_bos) == theirs("the llama").input_ids
    assert both(folders["add_bos_token, add_eos_token, old"])[0].adds_bos and not ours.adds_bos
