"""The named templates in jinja, rendered by transformers: the ids that are trained on and prompted with here."""

import pytest
from small_tokenizer import small_tokenizer
from transformers import AutoTokenizer

from model.chat import TEMPLATES, encode_prompt, get_template
from model.chat_sources import SOURCES
from model.tokenizer import load_tokenizer

SYSTEM = {"role": "system", "content": "Answer in one word.\n"}
USER = {"role": "user", "content": " What is 2+2? "}
WITH_INPUT = {"role": "user", "content": "Name it.", "input": "the puna\nis cold"}
ANSWER = {"role": "assistant", "content": " It is 4. "}
CONVERSATIONS = {
    "one": [USER],
    "input": [WITH_INPUT],
    "system": [SYSTEM, USER],
    "answered": [USER, ANSWER],
    "two": [USER, ANSWER, WITH_INPUT],
    "system, two": [SYSTEM, WITH_INPUT, ANSWER, USER],
}
NO_SYSTEM = {"wizardlm", "plain", "qlora", "chinese-alpaca-inference"}
ONE_EXCHANGE = {"plain", "qlora"}
SEPARATE = {"chinese-alpaca", "chinese-alpaca-inference", "qlora"}  # pieces are encoded apart: no jinja can say that


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folders = {}
    for name, source in SOURCES.items():
        folders[name] = small_tokenizer(tmp_path_factory.mktemp("tokenizer"))
        (folders[name] / "chat_template.jinja").write_text(source)
    return folders


def test_every_named_template_has_its_jinja():
    assert SOURCES.keys() == TEMPLATES.keys()


def takes(name, kind):
    return not ("system" in kind and name in NO_SYSTEM) and not ("two" in kind and name in ONE_EXCHANGE)


CASES = [(name, kind) for name in SOURCES for kind in CONVERSATIONS if takes(name, kind)]


@pytest.mark.parametrize("name, kind", CASES)
def test_transformers_renders_the_ids_of_the_named_template(folders, name, kind):
    messages = CONVERSATIONS[kind]
    theirs, ours = AutoTokenizer.from_pretrained(folders[name]), load_tokenizer(folders[name])
    template = get_template("chat_template", ours)
    assert template is TEMPLATES[name]
    for prompt in (False, True) if messages[-1]["role"] == "user" else (False,):
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        pieces = template.render(messages, prompt)
        names = {"bos_token": theirs.bos_token, "eos_token": theirs.eos_token}
        assert text == "".join(names.get(piece.text, piece.text) if piece.special else piece.text for piece in pieces)
        if name not in SEPARATE:
            ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
            assert ids == template.encode(pieces, ours)[0]


def test_a_template_that_was_changed_is_no_named_one(folders):
    file = folders["chatml"] / "chat_template.jinja"
    kept = file.read_text()
    file.write_text(kept.replace("assistant", "bot"))
    try:
        tokenizer = load_tokenizer(folders["chatml"])
        assert get_template("chat_template", tokenizer).name == "chat_template"
        changed = encode_prompt([USER], get_template("chat_template", tokenizer), tokenizer)
        assert changed != encode_prompt([USER], TEMPLATES["chatml"], tokenizer)
    finally:
        file.write_text(kept)
