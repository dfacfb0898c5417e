"""What fits into a prompt, which template writes it, and how a reply is shown: without a model."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizer import CHATML, LLAMA3, small_tokenizer

from infer.speaker import choose_template, fit, room, stripped
from model import LlamaConfig
from model.chat import TEMPLATES, encode_prompt
from model.errors import PunaError
from model.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(small_tokenizer(tmp_path_factory.mktemp("tokenizer"), LLAMA3))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 40), max_size=8), st.booleans(), st.integers(10, 200))
def test_what_fits_is_the_longest_end_of_the_conversation(tokenizer, lengths, system, room):
    template = TEMPLATES["chatml"]
    first = [{"role": "system", "content": "s"}] if system else []
    turns = [{"role": ("user", "assistant")[i % 2], "content": "x" * n} for i, n in enumerate(lengths)]
    turns = [*turns[: len(turns) // 2 * 2], {"role": "user", "content": "?"}]
    ends = [encode_prompt([*first, *turns[2 * k :]], template, tokenizer) for k in range(len(turns) // 2 + 1)]
    fitting = [(ids, left_out) for left_out, ids in enumerate(ends) if len(ids) <= room]
    assert fit([*first, *turns], template, tokenizer, room) == (fitting[0] if fitting else None)


def test_a_template_is_the_checkpoint_s_own_or_named(tokenizer, tmp_path):
    assert choose_template(None, tokenizer) == "chat_template"
    assert choose_template("llama2", tokenizer) == "llama2"
    bare = load_tokenizer(small_tokenizer(tmp_path))
    with pytest.raises(PunaError, match="brings no chat template: name .* --template, one of alpaca, vicuna_v1.1, "):
        choose_template(None, bare)
    with pytest.raises(PunaError, match="has no place for a system message"):
        choose_template("qlora", bare, "Be kind.")
    (tmp_path / "own.jinja").write_text(CHATML)
    assert choose_template(str(tmp_path / "own.jinja"), bare).endswith("own.jinja")
    (tmp_path / "own.jinja").write_bytes(b"\xff")
    with pytest.raises(PunaError, match="own.jinja cannot be read"):
        choose_template(str(tmp_path / "own.jinja"), bare)


@given(st.text(" \nab"), st.lists(st.integers(0, 6)))
def test_white_space_at_the_ends_of_a_text_is_left_out(text, sizes):
    cuts = [0, *(min(sum(sizes[:i]), len(text)) for i in range(1, len(sizes) + 1)), len(text)]
    pieces = list(stripped(text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)))
    assert "".join(pieces) == text.strip() and all(pieces)


def test_the_room_of_a_conversation():
    config = LlamaConfig(vocab_size=512, max_position_embeddings=512)
    wide = replace(config, max_position_embeddings=131072)
    assert room(config, None, None) == (512, 256) and room(wide, None, None) == (4096, 512)
    assert room(wide, 131072, 100) == (131072, 100)
    with pytest.raises(PunaError, match="--context is 513: give a number from 2 to 512"):
        room(config, 513, None)
    for new in (0, 64):
        with pytest.raises(PunaError, match=f"max_new_tokens is {new}: .* below the context of 64"):
            room(config, 64, new)
