"""Of two files that say a tokenizer or a chat template, transformers' choice is taken, and the other is said."""

import json

import gguf
import pytest
import sentencepiece
from small_tokenizer import CHATML, LLAMA3, small_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import generate_merges

from convert.gguf_tokenizer import add_tokenizer
from model.tokenizer import load_tokenizer


@pytest.fixture
def folder(tmp_path):
    """A SentencePiece model, and the tokenizer.json converted from it."""
    text = tmp_path / "text"
    text.write_text("the grassland where the llamas graze is the puna\n" * 9)
    plain = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "minloglevel": 9}
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=290,
        remove_extra_whitespaces=False,
        **plain,
    )
    return convert(tmp_path)


def convert(folder, more=()):
    """tokenizer.json as transformers' converter has it, with tokens that join the pairs `more`."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    vocab = {model.id_to_piece(id): id for id in range(len(model))}
    merges = generate_merges(vocab, {piece: model.get_score(id) for piece, id in vocab.items()})
    for pair in more:
        vocab["".join(pair)] = len(vocab)
    bpe = models.BPE(vocab, [*merges, *more], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<unk>", "<s>", "</s>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


TEXT = "the llamas graze where the puna is"


def test_a_conversion_of_the_model_is_the_same_tokenizer(folder, caplog):
    tokenizer = load_tokenizer(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode(TEXT) == theirs.encode(TEXT, add_special_tokens=False)
    assert tokenizer.vocab_size == 290 and not caplog.records


def test_a_tokenizer_json_with_other_tokens_is_taken_and_said_once(folder, caplog):
    known = list(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    pair = tuple(
        known[id] for id in load_tokenizer(folder).encode(TEXT)[:2]
    )  # the first two tokens of the text become one
    convert(folder, more=[pair])
    for _ in range(2):
        tokenizer = load_tokenizer(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode(TEXT) == theirs.encode(TEXT, add_special_tokens=False)
    assert tokenizer.vocab_size == 291 and 290 in tokenizer.encode(TEXT)
    said = f"tokenizer.model beside it is not: 1 of their tokens differ, as {''.join(pair)!r}"
    assert [said in record.getMessage() for record in caplog.records] == [True]
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
    add_tokenizer(writer, folder, 291)
    assert writer.kv_data[0]["tokenizer.ggml.tokens"].value[290] == "".join(pair).encode()


def test_a_token_of_the_model_alone_is_a_difference_too(folder, caplog):
    spec = json.loads((folder / "tokenizer.json").read_text())
    merged = [piece for piece in spec["model"]["vocab"] if len(piece) > 1 and "<" not in piece]
    lost = max(merged, key=spec["model"]["vocab"].get)  # which no later merge takes
    del spec["model"]["vocab"][lost]
    spec["model"]["merges"] = [pair for pair in spec["model"]["merges"] if "".join(pair) != lost]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode(TEXT) == theirs.encode(TEXT, add_special_tokens=False)
    assert f"1 of their tokens differ, as {lost!r}" in caplog.records[0].getMessage()


def test_two_chat_templates_that_differ_are_said(tmp_path, caplog):
    small_tokenizer(tmp_path, chat_template=LLAMA3)
    (tmp_path / "chat_template.jinja").write_text(LLAMA3)
    load_tokenizer(tmp_path)
    assert not caplog.records
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert load_tokenizer(tmp_path).chat_template == AutoTokenizer.from_pretrained(tmp_path).chat_template == CHATML
    assert "tokenizer_config.json beside it has another chat_template" in caplog.records[0].getMessage()


def test_chat_templates_that_nobody_reads_are_said(tmp_path, caplog):
    small_tokenizer(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    assert load_tokenizer(tmp_path).chat_template is None is AutoTokenizer.from_pretrained(tmp_path).chat_template
    assert "chat_template.json not read: its chat template is none" in caplog.records[0].getMessage()
