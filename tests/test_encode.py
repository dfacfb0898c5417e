"""`encode` gives the published recipes' ids and labels: their goldens, and their rules computed here by other means."""

import json

import pytest
import sentencepiece
import transformers
from small_tokenizer import LLAMA3, small_tokenizer

from model.errors import PunaError
from model.tokenizer import load_tokenizer
from train.data import IGNORE_INDEX, encode

BOS, EOS = 1, 2


@pytest.fixture
def llama2(data_dir):
    return load_tokenizer(data_dir / "llama2-tokenizer/tokenizer.model")


@pytest.fixture
def pieces(data_dir):
    """sentencepiece's own encoding, for references."""
    return sentencepiece.SentencePieceProcessor(model_file=str(data_dir / "llama2-tokenizer/tokenizer.model")).encode


@pytest.fixture
def conversations(data_dir):
    return json.loads((data_dir / "vicuna/dummy_conversation.json").read_text())


@pytest.fixture
def goldens(data_dir):
    return json.loads((data_dir / "prep-golden/prep_golden.json").read_text())


@pytest.fixture
def alpaca_rows(data_dir):
    return json.loads((data_dir / "alpaca/alpaca_en_demo.json").read_text())


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return load_tokenizer(small_tokenizer(tmp_path_factory.mktemp("tokenizer"), LLAMA3))


def masked(ids, count):
    """Labels of `ids` of which the first `count` are masked."""
    return [IGNORE_INDEX] * count + ids[count:]


# --- goldens


def test_alpaca_golden(goldens, llama2):
    for row in goldens["alpaca_512_pad32000"]:
        assert encode(row["row"], llama2, template="alpaca", max_length=512) == (row["input_ids"], row["labels"])
    assert any(len(row["input_ids"]) == 512 for row in goldens["alpaca_512_pad32000"])  # one was cut


def test_vicuna_golden(goldens, conversations, llama2):
    by_id = {row["id"]: row for row in conversations}
    for row in goldens["vicuna_v1.1_2048_legacyTrue"]:
        found = encode(by_id[row["id"]], llama2, template="vicuna_v1.1", max_length=2048)
        assert found == (row["input_ids"], row["labels"])


# --- the rules, computed with sentencepiece


def test_alpaca_masks_by_the_count_of_the_source(alpaca_rows, llama2, pieces):
    """A2, on every row: even where the output's first characters merge with the prompt's last."""
    merged = 0
    for row in alpaca_rows:
        kind = "Below is an instruction that describes a task"
        given = f"### Input:\n{row['input']}\n\n" if row["input"] else ""
        kind += ", paired with an input that provides further context" if row["input"] else ""
        source = (
            f"{kind}. Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{row['instruction']}\n\n{given}### Response:"
        )
        ids = [BOS, *pieces(source + row["output"]), EOS]
        count = 1 + len(pieces(source))
        assert encode(row, llama2, max_length=None) == (ids, masked(ids, count))
        merged += ids[: count - 1] != [BOS, *pieces(source)][:-1] or ids[count - 1] != pieces(source)[-1]
    assert merged  # the boundary effect is among them


def test_vicuna_masks_by_fastchats_arithmetic(conversations, llama2, pieces):
    """V3: rounds split at </s> and tokenized apart; a round's instruction counts two tokens fewer than with its BOS
    and its trailing space."""
    header = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    for row in conversations:
        turns = row["conversations"]
        text = header + " "
        for turn in turns:
            text += f"USER: {turn['value']} " if turn["from"] == "human" else f"ASSISTANT: {turn['value']}</s>"
        ids, labels = [BOS], [IGNORE_INDEX]
        for number, part in enumerate(text.split("</s>")[:-1]):
            new = [*pieces(part), EOS]
            instruction = len([BOS, *pieces(part.split("ASSISTANT: ")[0] + "ASSISTANT: ")]) - 2
            ids += new
            labels += masked(new, instruction)
            assert (new[0] == pieces("USER")[0]) == (number > 0)  # the dummy space is back after every </s>
        assert encode(row, llama2, template="vicuna_v1.1", max_length=2048) == (ids[:2048], labels[:2048])


def test_vicuna_v0_masks_human_turns_only(conversations, llama2, pieces):
    """V4, by the rule of FastChat v0.1.10: sentence lengths counted with a BOS, which stands for the "#" that joins
    differently inside a conversation. The header is trained on."""
    header = (
        "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions.\n\n"
    )
    for row in conversations:
        names = {"human": "Human", "gpt": "Assistant"}
        sentences = [f"### {names[turn['from']]}: {turn['value']}\n" for turn in row["conversations"]]
        ids = [BOS, *pieces(header + "".join(sentences))]
        labels, place = list(ids), len([BOS, *pieces(header)])
        labels[0] = IGNORE_INDEX  # of no effect: nothing stands before a BOS to predict it
        for turn, sentence in zip(row["conversations"], sentences, strict=True):
            count = len([BOS, *pieces(sentence)])
            if turn["from"] == "human":
                labels[place : place + count] = [IGNORE_INDEX] * count
            place += count
        assert encode(row, llama2, template="vicuna_v0", max_length=None) == (ids, labels)


def test_wizardlm_begins_with_the_eos_id_and_ignores_inputs(alpaca_rows, llama2, pieces):
    """W2 and W3: Llama-X made BOS, EOS and unk all </s>."""
    for row in alpaca_rows[:100]:
        source = f"{row['instruction']}\n\n### Response:"
        ids = [EOS, *pieces(source + row["output"]), EOS]
        assert encode(row, llama2, template="wizardlm", max_length=None) == (ids, masked(ids, 1 + len(pieces(source))))


def test_chinese_alpaca_tokenizes_source_and_target_apart(data_dir):
    """C4, with its own tokenizer of 49,954 pieces: the prompt ends in a space, EOS comes before the cut."""
    model = data_dir / "chinese-llama-tokenizer/chinese_alpaca.tokenizer.model"
    tokenizer = load_tokenizer(model)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model)).encode
    for row in json.loads((data_dir / "alpaca/alpaca_zh_demo.json").read_text())[:200]:
        asked = row["instruction"] + ("\n" + row["input"] if row["input"] else "")
        source = (
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            f"\n\n### Instruction:\n{asked}\n\n### Response: "
        )
        ids = [BOS, *pieces(source), *pieces(row["output"]), EOS]
        labels = masked(ids, 1 + len(pieces(source)))
        assert encode(row, tokenizer, template="chinese-alpaca", max_length=512) == (ids[:512], labels[:512])


def test_qlora_tokenizes_apart_and_trains_on_everything_after_bos_where_there_is_no_source(llama2, pieces):
    """Q8."""
    record = {"prompt": "### Human: Hi ### Assistant: ", "completion": "Hello"}
    ids = [BOS, *pieces(record["prompt"]), *pieces("Hello"), EOS]
    assert encode(record, llama2, template="qlora") == (ids, masked(ids, len(ids) - 2))
    text = "### Human: Hi### Assistant: Hello"
    ids = [BOS, *pieces(text), EOS]
    assert encode({"text": text}, llama2, template="qlora") == (ids, masked(ids, 1))
    assert encode({"prompt": "", "completion": text}, llama2, template="qlora") == (ids, masked(ids, 1))


DIALOGSUM = (
    "\nBelow is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruct: Summarize the below conversation.\n\n{dialogue}\n\n### Output:\n{summary}\n\n### End"
)


def test_dialogsum_through_a_template_of_columns(data_dir, llama2, pieces):
    """Q2: parts joined by blank lines, empty ones skipped."""
    lines = (data_dir / "dialogsum/dialogsum.dev.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[:50]]
    for row in [*rows, {**rows[0], "dialogue": ""}]:
        parts = [
            "\nBelow is an instruction that describes a task. "
            "Write a response that appropriately completes the request.",
            "### Instruct: Summarize the below conversation.",
            row["dialogue"],
            f"### Output:\n{row['summary']}",
            "### End",
        ]
        text = "\n\n".join(part for part in parts if part)
        ids = [BOS, *pieces(text), EOS]
        assert encode(row, llama2, template=DIALOGSUM, max_length=None) == (ids, ids)
        prompt = text[: text.index("### Output:\n") + len("### Output:\n")]
        found = encode(row, llama2, template=DIALOGSUM, max_length=None, response_template="### Output:\n")
        assert found == (ids, masked(ids, 1 + len(pieces(prompt))))


def test_a_paragraph_whose_column_is_null_goes_as_an_empty_one_does(small):
    template = "{question}\n\n{context}\n\n{answer}"
    record = {"question": "Is it cold?", "context": "", "answer": "Yes."}
    assert encode({**record, "context": None}, small, template) == encode(record, small, template)
    for wrong in ({**record, "question": None}, {"question": "a", "answer": "b"}):
        with pytest.raises(PunaError, match="key '(question|context)'"):
            encode(wrong, small, template)


def test_columns_are_not_templates_themselves(small):
    ids, _ = encode({"a": "{b}", "b": "x"}, small, template="{a} and {b}")
    assert small.decode(ids) == "{b} and x"


def test_llama3_masks_what_transformers_marks_as_the_assistants(small, tmp_path):
    """M10, against transformers' {% generation %} mask."""
    tagged = (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] | trim }}{{ '<|eot_id|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] | trim }}{{ '<|eot_id|>' }}{% endif %}{% endfor %}"
    )
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": " 4\n"},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "Yes, I am."},
    ]
    theirs = transformers.AutoTokenizer.from_pretrained(small_tokenizer(tmp_path, LLAMA3)).apply_chat_template(
        messages, chat_template=tagged, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    labels = [i if m else IGNORE_INDEX for i, m in zip(theirs["input_ids"], theirs["assistant_masks"], strict=True)]
    for template in ("llama3", "chat_template"):
        assert encode({"messages": messages}, small, template=template) == (theirs["input_ids"], labels)


# --- formats


def test_every_format_says_the_same_thing(small):
    turns = [("human", "user", "Hi"), ("gpt", "assistant", "Hello!")]
    records = [
        {"instruction": "Hi", "input": "", "output": "Hello!", "more": 1},
        {"instruction": "Hi", "output": "Hello!"},
        {"prompt": "Hi", "completion": "Hello!"},
        {"conversations": [{"from": name, "value": text} for name, _, text in turns]},
        {"messages": [{"role": role, "content": text} for _, role, text in turns]},
    ]
    for template in ("alpaca", "llama3", "chatml", "chat_template", "plain"):
        assert len({str(encode(record, small, template=template)) for record in records}) == 1


def test_a_stray_answer_before_the_first_question_is_left_out(small):
    """V3."""
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]
    stray = {"conversations": [{"from": "gpt", "value": "Welcome"}, *turns]}
    assert encode(stray, small, template="vicuna_v1.1") == encode(
        {"conversations": turns}, small, template="vicuna_v1.1"
    )
    with pytest.raises(PunaError, match="turn 2 is 'user', not 'assistant'"):
        encode({"conversations": [turns[0], turns[0]]}, small, template="vicuna_v1.1")


def test_texts_are_trained_on_whole_and_columns_can_be_renamed(small):
    ids = [small.bos_id, *small.encode("The puna."), small.eos_id]
    assert encode({"text": "The puna."}, small) == (ids, ids)
    assert encode({"body": "The puna."}, small, columns={"text": "body"}) == (ids, ids)
    assert encode({"text": "The puna."}, small, max_length=2) == (ids[:2], ids[:2])


def test_eos_is_trained_even_where_pad_is_eos(small):
    """So that a tuned model stops."""
    for template in ("alpaca", "plain", "chinese-alpaca", "qlora"):
        ids, labels = encode({"instruction": "Hi", "output": "Hello!"}, small, template=template)
        assert ids[-1] == labels[-1] == small.eos_id


def test_bos_is_written_once(small):
    for template in ("alpaca", "llama3", "chat_template", "plain", "vicuna_v1.1", "llama2"):
        ids, _ = encode({"instruction": "Hi", "output": "Hello!"}, small, template=template)
        assert ids.count(small.bos_id) == 1


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"text": None}, "key 'text': expected text, got null"),
        ({"text": 3}, "key 'text': expected text, got the number 3"),
        ({"instruction": "x", "input": 3, "output": "y"}, "key 'input': expected text, got the number 3"),
        ({"instruction": "x", "output": None}, "key 'output': expected text, got null"),
        ({"words": "x"}, "keys 'words' are those of no format"),
        ({"messages": []}, "key 'messages': the list is empty"),
        ({"messages": "x"}, "key 'messages': expected a list with messages, got text"),
        ({"messages": ["x"]}, r"messages\[0\]: expected an object, got text"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]: key 'content' is missing; the record has 'role'"),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\]: key 'content': expected text, got null"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, r"conversations\[0\]: role 'robot' is unknown"),
        ({"prompt": ["x"], "completion": "y"}, "key 'prompt': expected text, got a list"),
    ],
)
def test_what_is_wrong_with_a_record_is_said(small, record, reason):
    with pytest.raises(PunaError, match=reason):
        encode(record, small)


def test_wrong_settings_are_said(small):
    with pytest.raises(PunaError, match="data.format 'alpaca' is unknown: use one of messages"):
        encode({"text": "x"}, small, format="alpaca")
    with pytest.raises(PunaError, match="response_template"):
        encode({"text": "x"}, small, response_template="### Output:")
    with pytest.raises(PunaError, match="must stand once in data.template"):
        encode({"text": "x"}, small, template="{text}", response_template="### Output:")
    with pytest.raises(PunaError, match="column 'body', named in data.columns, is missing"):
        encode({"text": "x"}, small, columns={"text": "body"})


def test_a_template_that_is_not_there_is_refused_for_texts_too(small):
    with pytest.raises(PunaError, match="template 'bogus' is unknown"):
        encode({"text": "x"}, small, template="bogus")
