"""Tokenizer files that are damaged, one fault each; tests/test_fuzz.py damages them at random."""

import json

import pytest
from small_tokenizer import CHATML, small_tokenizer

from model.errors import PunaError
from model.tokenizer import load_tokenizer


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "t").mkdir()
    small_tokenizer(tmp_path / "t")
    (tmp_path / "t" / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    return tmp_path / "t"


@pytest.mark.parametrize("value", [None, "x", 3, [], {"1": None}, {"x": {"content": "a"}}, {"1": {"content": 2}}])
def test_a_table_of_added_tokens_of_the_wrong_type_is_named(folder, value):
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": value}))
    with pytest.raises(PunaError, match=r"tokenizer_config\.json"):
        load_tokenizer(folder)


def test_a_template_that_is_not_utf8_is_named(folder):
    (folder / "chat_template.jinja").write_bytes("é".encode("latin-1"))
    with pytest.raises(PunaError, match=r"chat_template\.jinja"):
        load_tokenizer(folder)
