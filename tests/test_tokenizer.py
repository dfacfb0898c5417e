"""Tokenizers equal sentencepiece, tiktoken and transformers; text survives; special tokens are never read from text."""

import base64
import io
import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiktoken._educational import bpe_train

from model.errors import PunaError
from model.tokenizer import Tokenizer, load_tokenizer
from model.vocabulary import LLAMA3_SPECIALS, LLAMA3_SPLIT

CORPUS = [
    "The llama walked over the high grassland, and the wind walked with it.\n",
    "Once upon a time, there was a little llama who wanted to see the sea.\n",
    "Where the grass is short the herd walks on; where the water is, it stays.\n",
    "La puna está alta y fría. ¿Quién vive allí? Las llamas, los zorros y el viento.\n",
    "高原上的羊驼走得很慢。风吹过草地，天很蓝。\n",
    "def walk(herd):\n    for llama in herd:\n        llama.step(1.5)\n\n    return herd\n",
    "It's 4,000 metres high; they'll need 12345 steps.   Two  spaces,\ttabs\r\nand lines.\n",
]
TEXTS = [
    "",
    " ",
    "   leading and trailing   ",
    "Hello, world! It's 12345 o'clock.",
    "naïve café \u00a0 été",
    "白日依山尽，黄河入海流。",
    "🦙 emoji 👨\u200d👩\u200d👧 and \u0007 control",
    "line one\n\n\nline two\r\n\ttabbed",
    "unspaced" * 20,
    *CORPUS,
]
KINDS = ("sentencepiece", "ranks", "json")
SPECIALS = ["<s>", "</s>", "<unk>", "[PAD]", *LLAMA3_SPECIALS[:12]]
text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40)  # ▁ reads back as a space
spiked = st.lists(st.one_of(text, st.sampled_from(SPECIALS)), max_size=6).map("".join)
properties = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


@cache
def trained_sentencepiece() -> bytes:
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3),
        model_writer=stream,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return stream.getvalue()


@cache
def trained_ranks() -> dict[bytes, int]:
    return bpe_train("".join(CORPUS), 420, LLAMA3_SPLIT, visualise=None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """One small checkpoint folder for each kind of tokenizer."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    root = tmp_path_factory.mktemp("tokenizers")
    paths = {kind: root / kind for kind in KINDS}
    for path in paths.values():
        path.mkdir()

    (paths["sentencepiece"] / "tokenizer.model").write_bytes(trained_sentencepiece())
    write_json(paths["sentencepiece"] / "added_tokens.json", {"[PAD]": 420})
    write_json(paths["sentencepiece"] / "special_tokens_map.json", {"pad_token": {"content": "[PAD]"}})

    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in trained_ranks().items())
    (paths["ranks"] / "tokenizer.model").write_bytes(b"".join(lines))

    class Converter(TikTokenConverter):
        load_tiktoken_bpe = staticmethod(lambda path: trained_ranks())

    converted = Converter(extra_special_tokens=list(LLAMA3_SPECIALS)).converted()
    converted.save(str(paths["json"] / "tokenizer.json"))
    roles = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|finetune_right_pad_id|>"}
    write_json(paths["json"] / "tokenizer_config.json", roles | {"chat_template": "{{ messages }}"})
    return paths


@pytest.fixture(params=KINDS, scope="module")
def tokenizer(request, folders) -> Tokenizer:
    return load_tokenizer(folders[request.param])


def special_ids(tokenizer: Tokenizer) -> set[int]:
    return {id for id in range(tokenizer.vocab_size) if tokenizer.token_bytes(id) == b""}


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    stream = tokenizer.stream()
    return "".join([stream.push(id) for id in ids]) + stream.flush()


# What holds for all three.


@given(text=spiked)
@properties
def test_text_survives_and_never_becomes_special(tokenizer, text):
    ids = tokenizer.encode(text)
    assert special_ids(tokenizer).isdisjoint(ids)
    assert tokenizer.decode(ids) == text
    assert streamed(tokenizer, ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)).decode().removeprefix(" " * (ids[:1] != [])) in (text, text[1:])


@given(data=st.data())
@properties
def test_a_stream_of_any_ids_joins_to_what_decode_gives(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)


@given(text=text)
@properties
def test_a_stream_never_splits_a_character(tokenizer, text):
    stream = tokenizer.stream()
    pushed = [stream.push(id) for id in tokenizer.encode(text)]
    assert "\ufffd" not in "".join(pushed).replace("\ufffd" * text.count("\ufffd"), "") and stream.flush() == ""


def test_special_tokens_are_added_on_request_and_shown_on_request(tokenizer):
    ids = tokenizer.encode("the llama", add_bos=True, add_eos=True)
    assert ids == [tokenizer.bos_id, *tokenizer.encode("the llama"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "the llama"
    bos, eos = ("<s>", "</s>") if tokenizer.bos_id == 1 else ("<|begin_of_text|>", "<|end_of_text|>")
    assert (tokenizer.special_id(bos), tokenizer.special_id(eos)) == (tokenizer.bos_id, tokenizer.eos_id)
    assert tokenizer.decode([ids[0], ids[-1]], skip_special=False) == bos + eos
    assert tokenizer.pad_id is not None and tokenizer.special_id("the") is None


def test_a_saved_tokenizer_is_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy")
    assert [copy.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    for name in ("vocab_size", "bos_id", "eos_id", "unk_id", "pad_id", "chat_template"):
        assert getattr(copy, name) == getattr(tokenizer, name)


def test_a_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(PunaError, match=r"'\\ud83e' at character 3"):
        tokenizer.encode("abc\ud83e")


@pytest.mark.parametrize("offset", [0, 7])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer, offset):
    id = tokenizer.vocab_size + offset
    with pytest.raises(PunaError, match=f"token id {id} .* vocab_size of {tokenizer.vocab_size}"):
        tokenizer.decode([5, id])
    with pytest.raises(PunaError, match="token id -1 "):
        tokenizer.decode([-1])


# Equal to the libraries that define each kind.


@given(text=spiked, ids=st.lists(st.integers(3, 419), max_size=20))
@properties
def test_sentencepiece_equals_the_library(folders, text, ids):
    ours = load_cached(folders["sentencepiece"])
    theirs = sentencepiece.SentencePieceProcessor(model_proto=trained_sentencepiece())
    assert ours.encode(text) == theirs.encode(text)
    if ids[:1] != [3 + 0x20]:  # a byte piece that spells the dummy space, which no encoder writes
        assert ours.decode(ids) == theirs.decode(ids)


@given(text=spiked, ids=st.lists(st.integers(0, 419), max_size=20))
@properties
def test_ranks_and_json_equal_tiktoken(folders, text, ids):
    theirs = tiktoken.Encoding("t", pat_str=LLAMA3_SPLIT, mergeable_ranks=trained_ranks(), special_tokens={})
    for kind in ("ranks", "json"):
        ours = load_cached(folders[kind])
        assert ours.encode(text) == theirs.encode_ordinary(text)
        assert ours.decode(ids) == theirs.decode(ids)


@given(text=spiked, ids=st.lists(st.integers(0, 675), max_size=20))
@properties
def test_json_equals_transformers(folders, text, ids):
    ours, theirs = load_cached(folders["json"]), fast_cached(folders["json"])
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
    for skip in (True, False):
        assert ours.decode(ids, skip_special=skip) == theirs.decode(ids, skip_special_tokens=skip)


load_cached = cache(load_tokenizer)


@cache
def fast_cached(folder: Path):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder, clean_up_tokenization_spaces=False)


def test_long_texts_and_long_runs_are_cut_as_meta_cuts_them(folders):
    ours = load_cached(folders["ranks"])
    plain = tiktoken.Encoding("t", pat_str=LLAMA3_SPLIT, mergeable_ranks=trained_ranks(), special_tokens={})
    run, long = "herd " + "a" * 60_000, "the herd walks " * 30_000
    cuts = [run[:25_005], run[25_005:50_005], run[50_005:]]
    assert ours.encode(run) == [id for part in cuts for id in plain.encode_ordinary(part)]
    assert ours.encode(long) == plain.encode_ordinary(long[:400_000]) + plain.encode_ordinary(long[400_000:])
    assert ours.decode(ours.encode(" " * 500_000)) == " " * 500_000


# Companion files.


@pytest.fixture
def llama(folders, tmp_path) -> Path:
    """A copy of the SentencePiece folder without companions."""
    shutil.copy(folders["sentencepiece"] / "tokenizer.model", tmp_path)
    return tmp_path


def test_a_model_alone_has_the_ids_it_was_trained_with(llama):
    for path in (llama, llama / "tokenizer.model"):
        tokenizer = load_tokenizer(path)
        assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2, None)
        assert tokenizer.vocab_size == 420


@pytest.mark.parametrize(
    "companions",
    [
        {"added_tokens.json": {"[PAD]": 420}, "special_tokens_map.json": {"pad_token": "[PAD]"}},
        {"added_tokens.json": {"[PAD]": 420}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"420": {"content": "[PAD]", "special": True}}}},
        {"tokenizer_config.json": {"pad_token": {"content": "[PAD]"}}},
    ],
)
def test_a_pad_token_is_added_after_the_pieces(llama, companions):
    for name, content in companions.items():
        write_json(llama / name, content)
    tokenizer = load_tokenizer(llama)
    assert tokenizer.vocab_size == 421 and tokenizer.pad_id == tokenizer.special_id("[PAD]") == 420
    assert 420 not in tokenizer.encode("a [PAD] b") and tokenizer.decode(tokenizer.encode("a [PAD] b")) == "a [PAD] b"
    assert tokenizer.decode([420], skip_special=False) == "[PAD]"


def test_roles_come_from_the_companions(llama):
    """WizardLM's special tokens map makes </s> the token of every role, so that training begins with id 2."""
    write_json(llama / "tokenizer_config.json", {"bos_token": "", "eos_token": None})
    assert load_tokenizer(llama).bos_id == 1
    write_json(llama / "special_tokens_map.json", dict.fromkeys(("bos_token", "eos_token", "unk_token"), "</s>"))
    tokenizer = load_tokenizer(llama)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id) == (2, 2, 2)


def test_an_ordinary_piece_that_is_declared_special_is_no_longer_spelled(llama):
    before = load_tokenizer(llama)
    herd = before.encode("herd herd")
    piece = before.decode(herd[:1])
    assert piece == "herd"
    write_json(llama / "tokenizer_config.json", {"additional_special_tokens": ["▁herd"]})
    after = load_tokenizer(llama)
    assert after.special_id("▁herd") == herd[0] and herd[0] not in after.encode("herd herd")
    assert after.decode(after.encode("herd herd")) == "herd herd"


@pytest.mark.parametrize("flags", [{}, {"lstrip": True}, {"rstrip": True}, {"single_word": True}])
def test_an_added_token_that_is_not_special_is_found_in_text_as_transformers_finds_it(folders, tmp_path, flags):
    shutil.copytree(folders["json"], tmp_path, dirs_exist_ok=True)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    library.add_tokens([tokenizers.AddedToken("<herd>", normalized=False, **flags), tokenizers.AddedToken("<he")])
    library.save(str(tmp_path / "tokenizer.json"))
    ours, theirs = load_tokenizer(tmp_path), fast_cached(tmp_path)
    for text in ("a <herd> b", "a<herd>b", " <herd><herd>\n <he", "<|eot_id|> <herd>", "<herd"):
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.vocab_size == 678 and ours.special_id("<herd>") is None and ours.token_bytes(676) == b"<herd>"


def test_no_merge_spells_a_special_token(tmp_path):
    """Some converted files merge "</" and "s>" into "</s>"; text must not become the end of a sequence by it."""
    vocab = {piece: id for id, piece in enumerate(["</s>", "<", "/", "s", ">", "</", "s>"])}
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, [("<", "/"), ("s", ">"), ("</", "s>")], ignore_merges=True)
    )
    library.decoder = tokenizers.decoders.ByteLevel()
    library.add_special_tokens(["</s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    assert fast_cached(tmp_path).encode("</s>", split_special_tokens=True) == [0]
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("</s>") == [5, 6] and tokenizer.eos_id == tokenizer.special_id("</s>") == 0


def test_json_goes_before_another_sentencepiece_model_and_before_ranks(folders, tmp_path):
    shutil.copytree(folders["json"], tmp_path, dirs_exist_ok=True)
    shutil.copy(folders["ranks"] / "tokenizer.model", tmp_path)
    write_json(tmp_path / "added_tokens.json", {"<more>": 700})
    assert load_tokenizer(tmp_path).vocab_size == 701
    shutil.copy(folders["sentencepiece"] / "tokenizer.model", tmp_path)
    ours, theirs = load_tokenizer(tmp_path), load_tokenizer(folders["json"])
    assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]


def test_the_chat_template_file_goes_before_the_configuration(folders, tmp_path):
    shutil.copytree(folders["json"], tmp_path, dirs_exist_ok=True)
    assert load_tokenizer(tmp_path).chat_template == "{{ messages }}"
    named = [{"name": "tool_use", "template": "B"}, {"name": "default", "template": "A"}]
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": named})
    assert load_tokenizer(tmp_path).chat_template == "A"
    (tmp_path / "chat_template.jinja").write_text("C")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.chat_template == "C"
    tokenizer.save(tmp_path / "copy")
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


# Wrong input.


def test_a_folder_without_a_tokenizer_says_what_was_looked_for(tmp_path):
    with pytest.raises(PunaError, match=r"looked for tokenizer\.model and tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(PunaError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "missing")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.model", b"", "is no tokenizer"),
        ("tokenizer.model", b"\x00\xff rubbish", "is no tokenizer"),
        ("tokenizer.model", b"AA== 0\nAQ== 2\n", "ranks do not count up"),
        ("tokenizer.model", b"AA== 0\n!! 1\n", "file is damaged"),
        ("tokenizer.json", b'{"model": ', "not valid JSON"),
        ("tokenizer.json", b'{"model": {"type": "Unigram"}}', "'Unigram' is not supported"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "decoder of .* is not supported"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PunaError, match=f"{name}.*{words}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kept", [1, 2, 3, 500, 2000, -200, -1])
def test_a_truncated_model_is_named(llama, kept):
    data = (llama / "tokenizer.model").read_bytes()
    (llama / "tokenizer.model").write_bytes(data[:kept])
    with pytest.raises(PunaError, match=r"tokenizer\.model is (no tokenizer|a damaged)"):
        load_tokenizer(llama)


def test_a_token_that_the_tokenizer_lacks_cannot_be_added(folders, tmp_path):
    shutil.copy(folders["json"] / "tokenizer.json", tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {})
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    write_json(tmp_path / "tokenizer.json", spec | {"added_tokens": []})
    with pytest.raises(PunaError, match="no bos token"):
        load_tokenizer(tmp_path).encode("x", add_bos=True)


# The real files.


@pytest.mark.parametrize(
    "name",
    ["llama2-tokenizer/tokenizer.model", "stories260k/tokenizer.model", "tokenizer-fixtures/m.model"]
    + [f"chinese-llama-tokenizer/{name}.model" for name in ("chinese_sp", "chinese_alpaca.tokenizer")],
)
def test_real_sentencepiece_models_equal_the_library(data_dir, name):
    ours = load_tokenizer(data_dir / name)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(data_dir / name))
    assert len(theirs) == ours.vocab_size
    for text in [*TEXTS, *SPECIALS, (data_dir / "stories260k/tinystories_sample.txt").read_text()]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        if ours.unk_id not in ids:
            assert ours.decode(ids) == theirs.decode(ids) == streamed(ours, ids)


@pytest.mark.slow
def test_real_llama_2_equals_transformers(data_dir, tmp_path):
    from transformers import LlamaTokenizer

    shutil.copy(data_dir / "llama2-tokenizer/tokenizer.model", tmp_path)
    ours, theirs = load_tokenizer(tmp_path), LlamaTokenizer.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "json")
    converted = load_tokenizer(tmp_path / "json")
    assert (tmp_path / "json/tokenizer.json").exists() and not (tmp_path / "json/tokenizer.model").exists()
    for text in [*TEXTS, *SPECIALS, *map("a{} b".format, SPECIALS)]:
        ids = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert converted.encode(text) == ids
        assert converted.decode(ids) == theirs.decode(ids)
        assert ours.decode(ours.encode(text)) == text
        if text[:1] != " " and "  " not in text:  # where transformers' conversion is not equal to SentencePiece
            assert ours.encode(text) == ids


def test_real_llama_3_equals_tiktoken_and_its_published_ids(data_dir):
    path = data_dir / "llama3-tokenizer/tokenizer.model"
    ours = load_tokenizer(path)
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, path.read_text().splitlines())}
    theirs = tiktoken.Encoding("llama3", pat_str=LLAMA3_SPLIT, mergeable_ranks=ranks, special_tokens={})
    for text in [*TEXTS, *SPECIALS]:
        ids = ours.encode(text)
        assert ids == theirs.encode_ordinary(text) and max(ids, default=0) < 128_000
        assert ours.decode(ids) == text
    assert ours.vocab_size == 128_256 and (ours.bos_id, ours.eos_id, ours.pad_id) == (128_000, 128_001, 128_004)
    named = ("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>")
    assert [ours.special_id(name) for name in named] == [128_006, 128_007, 128_008, 128_009, 128_010]
    assert ours.special_id("<|reserved_special_token_245|>") == 128_255


@pytest.mark.parametrize("name", ["tiny_bpe_tokenizer", "torchtitan_tokenizer"])
def test_real_json_equals_transformers(data_dir, tmp_path, name):
    shutil.copy(data_dir / f"tokenizer-fixtures/{name}.json", tmp_path / "tokenizer.json")
    config = data_dir / f"tokenizer-fixtures/{name}_config.json"
    write_json(tmp_path / "tokenizer_config.json", json.loads(config.read_text()) if config.exists() else {})
    ours, theirs = load_tokenizer(tmp_path), fast_cached(tmp_path)
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    for text in [*TEXTS, *SPECIALS]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.decode(ids) == theirs.decode(ids)


def test_chinese_vocabulary_shortens_the_published_example(data_dir):
    """Chinese-LLaMA-Alpaca prints these two lines with its merged tokenizer: 37 tokens where LLaMA's takes 53."""
    lines = "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。\n"
    lines += "The primary use of LLaMA is research on large language models, including"
    merged = load_tokenizer(data_dir / "chinese-llama-tokenizer/chinese_llama_merged.tokenizer.model")
    assert len(merged.encode(lines)) == 37
    assert len(load_tokenizer(data_dir / "llama2-tokenizer").encode(lines)) == 53
    alpaca = load_tokenizer(data_dir / "chinese-llama-tokenizer/chinese_alpaca.tokenizer.model")
    assert alpaca.encode(lines) == merged.encode(lines)
    assert alpaca.pad_id == 49_953 and alpaca.vocab_size == 49_954 and 49_953 not in alpaca.encode("[PAD]")


def test_the_published_story_reads_as_published(data_dir):
    golden = json.loads((data_dir / "stories260k/golden_stories260K.json").read_text())["greedy_ids"]
    tokenizer = load_tokenizer(data_dir / "stories260k-derived/hf_sharded")
    story = tokenizer.decode(golden)
    assert story in (data_dir / "stories260k/stories260K.md").read_text()
    assert tokenizer.encode(story, add_bos=True) == golden
