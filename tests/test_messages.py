"""Conversations in the forms that data sets have them: what changes text or mask is honoured as their systems do it."""

import json
from datetime import datetime

import pyarrow
import pyarrow.parquet
import pytest
import transformers
from serving import TOOLS, WEATHER
from small_tokenizer import CHATML, THINKING, small_tokenizer

from model.errors import PunaError
from model.tokenizer import load_tokenizer
from train.data.encode import IGNORE_INDEX, encode
from train.data.readers import Faults, read_parquet

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "puna"}}}
ASKED = [
    {"role": "user", "content": "Is it cold?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "yes"},
    {"role": "assistant", "content": "It is a cold one."},
]


def folder(tmp_path_factory, template):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"), template)


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    return folder(tmp_path_factory, TOOLS)


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    return load_tokenizer(folder(tmp_path_factory, CHATML))


def trained(tokenizer, record, **settings):
    """What is trained of a record, as text with special tokens."""
    ids, labels = encode(record, tokenizer, template=settings.pop("template", "chat_template"), **settings)
    runs, before = [], IGNORE_INDEX
    for id, label in zip(ids, labels, strict=True):
        if label != IGNORE_INDEX:
            runs = [*runs, []] if before == IGNORE_INDEX else runs
            runs[-1].append(tokenizer.token_bytes(id).decode() or f"<{id}>")
        before = label
    return ["".join(run) for run in runs]


def plain(tokenizer, messages):
    return encode({"messages": messages}, tokenizer, template="chat_template")


def test_tools_and_calls_are_written_as_transformers_writes_them(tools):
    ours, theirs = load_tokenizer(tools), transformers.AutoTokenizer.from_pretrained(tools)
    expected = theirs.apply_chat_template(ASKED, tools=[WEATHER], return_dict=False)
    for given in ([WEATHER], json.dumps([WEATHER])):
        ids, labels = encode({"messages": ASKED, "tools": given}, ours, template="chat_template")
        assert ids == expected
    answers = trained(ours, {"messages": ASKED, "tools": [WEATHER]})
    assert len(answers) == 2 and "weather" in answers[0] and answers[1].startswith("It is a cold one.")
    unknown = [{**ASKED[0], "name": "Ana", "id": 3}, *ASKED[1:]]
    assert encode({"messages": unknown, "tools": [WEATHER]}, ours, template="chat_template") == (ids, labels)


@pytest.mark.parametrize("key", ["tool_calls", "function_call", "reasoning_content", "thinking", "tool_call_id"])
@pytest.mark.parametrize("template", ["chat_template", "chatml", "llama3"])
def test_what_a_template_does_not_write_is_refused_by_name(chatml, key, template):
    messages = [ASKED[0], {"role": "assistant", "content": "It is.", key: [CALL]}]
    with pytest.raises(PunaError, match=f"a message has '{key}', which template '{template}' does not write"):
        encode({"messages": messages}, chatml, template=template)
    with pytest.raises(PunaError, match=f"key 'tools': template '{template}' has no place for tools"):
        encode({"messages": ASKED[:1], "tools": [WEATHER]}, chatml, template=template)


def test_keys_that_a_template_reads_reach_it_as_in_transformers(tmp_path_factory):
    named = CHATML.replace(
        "message['role'] + '\n'", "message['role'] + (' ' + message.name if message.name else '') + '\n'"
    )
    assert named != CHATML
    path = folder(tmp_path_factory, named)
    ours, theirs = load_tokenizer(path), transformers.AutoTokenizer.from_pretrained(path)
    messages = [{**ASKED[0], "name": "Ana <|im_end|>"}, {"role": "assistant", "content": "Yes.", "id": 3, "name": None}]
    expected = theirs.apply_chat_template([{**messages[0], "name": "Ana"}, messages[1]], return_dict=False)
    assert plain(ours, [{**messages[0], "name": "Ana"}, messages[1]])[0] == expected
    forged = plain(ours, messages)[0]  # what a user writes is text in any key
    assert forged.count(ours.special_id("<|im_end|>")) == 2
    with pytest.raises(PunaError, match="a message of role 'user': Object of type datetime is not JSON"):
        plain(ours, [{**ASKED[0], "name": datetime(2026, 1, 1)}, messages[1]])


@pytest.mark.parametrize("key", ["functions", "chat_template_kwargs", "images", "videos", "audios"])
def test_keys_of_a_record_that_act_elsewhere_are_refused_by_name(chatml, key):
    record = {"messages": [ASKED[0], {"role": "assistant", "content": "Yes."}]}
    expected = encode(record, chatml, template="chat_template")
    for absent in (None, [], {}):
        assert encode(record | {key: absent, "id": 7}, chatml, template="chat_template") == expected
    with pytest.raises(PunaError, match=f"key '{key}' is not read: "):
        encode(record | {key: {"a": 1}}, chatml, template="chat_template")


def test_a_system_message_that_a_template_drops_is_not_lost_in_silence(tmp_path_factory):
    deaf = "{% for message in messages if message.role != 'system' %}" + CHATML.partition("%}")[2]
    tokenizer = load_tokenizer(folder(tmp_path_factory, deaf))
    turns = [ASKED[0], {"role": "assistant", "content": "Yes."}]
    assert plain(tokenizer, turns)
    with pytest.raises(PunaError, match="leaves out the system message that begins 'Be brief.'"):
        plain(tokenizer, [{"role": "system", "content": "Be brief."}, *turns])


def test_a_name_within_another_is_not_read(tmp_path_factory):
    tokenizer = load_tokenizer(folder(tmp_path_factory, "{% if enable_thinking %}x{% endif %}" + CHATML))
    with pytest.raises(PunaError, match="a message has 'thinking', which template 'chat_template' does not write"):
        plain(tokenizer, [ASKED[0], {"role": "assistant", "content": "It is.", "thinking": "cold"}])


def test_an_input_without_an_instruction_is_written(chatml):
    record = {"instruction": "", "input": "llamas", "output": "b"}
    messages = [{"role": "user", "content": "\nllamas"}, {"role": "assistant", "content": "b"}]
    assert encode(record, chatml, template="chat_template") == plain(chatml, messages)


def test_an_answer_of_weight_zero_is_read_and_not_trained(chatml):
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 3, "abcdef", strict=True)]
    ids, labels = plain(chatml, turns)
    turns[3] = {**turns[3], "weight": 0}
    turns[5] = {**turns[5], "weight": 1}
    got, masked = plain(chatml, turns)
    assert got == ids and [run[0] for run in trained(chatml, {"messages": turns})] == ["b", "f"]
    assert all(new in (old, IGNORE_INDEX) for new, old in zip(masked, labels, strict=True)) and masked != labels
    for template in ("vicuna_v1.1", "llama2", "llama3", "chatml", "alpaca"):
        assert [run.strip()[0] for run in trained(chatml, {"messages": turns}, template=template)] == ["b", "f"]
    with pytest.raises(PunaError, match=r"messages\[1\]: key 'weight' is 0.5: only 0 .* and 1 are known"):
        plain(chatml, [turns[0], {**turns[1], "weight": 0.5}])
    for key in ("loss", "train"):  # ms-swift's and axolotl's names for it
        masked_turn, trained_turn = {**turns[3], "weight": None, key: False}, {**turns[5], key: True}
        assert plain(chatml, [*turns[:3], masked_turn, turns[4], trained_turn]) == (got, masked)
        with pytest.raises(PunaError, match=f"key '{key}' is 0: only false .not trained on. and true are known"):
            plain(chatml, [turns[0], {**turns[1], key: 0}])
    with pytest.raises(PunaError, match="key 'train_detail' is not read: say 'weight': 0"):
        plain(chatml, [turns[0], {**turns[1], "train_detail": [{"begin_offset": 0}]}])
    with pytest.raises(PunaError, match="'vicuna_v0' does not keep its answers apart"):
        encode({"messages": turns}, chatml, template="vicuna_v0")


@pytest.mark.parametrize(
    "record", [{"text": "a"}, {"instruction": "a", "output": "b"}, {"messages": [ASKED[0], ASKED[3]]}], ids=sorted
)
def test_a_record_that_says_not_to_be_trained_on_is_refused(chatml, record):
    asked = {"template": "auto" if "text" in record else "chat_template"}
    for key, yes, no in (("weight", 1, 0), ("loss", True, False), ("train", True, False)):
        assert encode({**record, key: yes}, chatml, **asked) == encode(record, chatml, **asked)
        with pytest.raises(PunaError, match="is not to be trained on, by its own word: leave the record out"):
            encode({**record, key: no}, chatml, **asked)
    with pytest.raises(PunaError, match="key 'loss' is 2.31: only false"):
        encode({**record, "loss": 2.31}, chatml, **asked)


def test_parts_of_text_are_joined_and_others_refused(chatml):
    parts = [{"type": "text", "text": "Is it "}, {"type": "text", "text": "cold?"}]
    answer = {"role": "assistant", "content": "Yes."}
    assert plain(chatml, [{"role": "user", "content": parts}, answer]) == plain(chatml, [ASKED[0], answer])
    with pytest.raises(PunaError, match=r"messages\[0\]: content\[1\]: is 'image_url'; only parts of type 'text'"):
        plain(chatml, [{"role": "user", "content": [parts[0], {"type": "image_url"}]}, answer])


def test_a_prompt_and_completion_of_messages_train_the_completion(chatml):
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    record = {"prompt": turns[:3], "completion": turns[3:]}
    ids, _ = encode(record, chatml, template="auto")
    assert ids == plain(chatml, turns)[0]
    assert [run[0] for run in trained(chatml, record)] == ["d"]


def test_system_and_history_of_a_record_come_first(chatml):
    record = {"instruction": "c", "input": "", "output": "d", "system": "Be brief.", "history": [["a", "b"]]}
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    expected = plain(chatml, [{"role": "system", "content": "Be brief."}, *turns])
    assert encode(record, chatml, template="chat_template") == expected
    turns_of = [{"from": "human" if turn["role"] == "user" else "gpt", "value": turn["content"]} for turn in turns]
    assert encode({"conversations": turns_of, "system": "Be brief."}, chatml, template="chat_template") == expected
    with pytest.raises(PunaError, match="key 'system': key 'messages' begins with a system message too"):
        encode({"messages": [{"role": "system", "content": "x"}, *turns], "system": "y"}, chatml, template="chatml")
    with pytest.raises(PunaError, match=r"history\[0\]: expected a question and an answer, both text"):
        encode({**record, "history": [["a"]]}, chatml)


def test_null_in_an_optional_key_is_as_good_as_none(chatml, tmp_path):
    bare = {"instruction": "a", "output": "b"}
    nulls = dict.fromkeys(("input", "system", "history", "tools", "messages", "text"))
    assert encode({**nulls, **bare}, chatml, template="auto") == encode(bare, chatml, template="auto")
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}]},
        {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [CALL]}],
            "tools": [WEATHER],
        },
    ]
    table = pyarrow.Table.from_pylist([{"tools": None, **row} for row in rows])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    faults = Faults()
    first, second = (row.record for row in read_parquet(tmp_path / "rows.parquet", faults))
    assert first == {**rows[0], "tools": None} and second == rows[1] and not faults.count
    assert encode(first, chatml, template="auto") == encode(rows[0], chatml, template="auto")


def test_a_system_message_of_null_is_as_good_as_none(chatml):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert plain(chatml, [{"role": "system", "content": None}, *turns]) == plain(chatml, turns)
    shared = [{"from": "system", "value": None}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert encode({"conversations": shared}, chatml, template="chat_template") == plain(chatml, turns)
    with pytest.raises(PunaError, match="key 'messages': there is no message but a system's of null"):
        plain(chatml, [{"role": "system", "content": None}])
    with pytest.raises(PunaError, match=r"messages\[1\]: key 'content': expected text, got null"):
        plain(chatml, [turns[0], {"role": "assistant", "content": None}])


def test_thoughts_that_a_template_leaves_out_are_not_lost_in_silence(tmp_path_factory):
    template = THINKING.replace("m['content'] if loop.last else ", "")
    tokenizer = load_tokenizer(folder(tmp_path_factory, template))
    answer = {"role": "assistant", "content": "<think>cold</think>Yes."}
    with pytest.raises(PunaError, match="leaves out a part of the answer that begins '<think>cold</think>Yes.'"):
        plain(tokenizer, [ASKED[0], answer])
    assert plain(tokenizer, [ASKED[0], {**answer, "content": "Yes."}])


MARKED = (  # WRITTEN stands for what an answer is written as, beside its content
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'user' %}{{ m.content }}{% else %}"
    "{% generation %}{{ WRITTEN }}{% endgeneration %}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
)


def test_what_a_later_answer_repeats_was_still_left_out_of_the_first(tmp_path_factory):
    tokenizer = load_tokenizer(folder(tmp_path_factory, MARKED.replace("WRITTEN", "m.content if loop.last else 'no'")))
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "aYbY", strict=True)]
    with pytest.raises(PunaError, match="leaves out a part of the answer that begins 'Y'"):
        plain(tokenizer, turns)
    masked = [turns[0], {**turns[1], "weight": 0}, *turns[2:]]
    assert trained(tokenizer, {"messages": masked}) == ["Y"]


@pytest.mark.parametrize(
    "written, missing",
    [
        ("(m.reasoning_content if loop.last else '')", "first"),
        ("(m.thinking or '')[:3]", "it is"),
        ("m.tool_calls|length", "weather"),
    ],
)
def test_thoughts_and_calls_are_written_whole_or_refused(tmp_path_factory, written, missing):
    """As of models whose template writes thoughts of the last turn alone."""
    extra = {"reasoning_content": "first", "thinking": "it is cold", "tool_calls": [CALL]}
    key = next(key for key in extra if key in written)
    tokenizer = load_tokenizer(folder(tmp_path_factory, MARKED.replace("WRITTEN", f"{written} ~ m.content")))
    answers = [{"role": "assistant", "content": "Yes.", key: extra[key]}, {"role": "assistant", "content": "No."}]
    with pytest.raises(PunaError, match=f"leaves out a part of the answer that begins '{missing}"):
        plain(tokenizer, [ASKED[0], answers[0], ASKED[0], answers[1]])
