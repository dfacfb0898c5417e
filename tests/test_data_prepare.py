"""Cleaning, filtering, de-duplicating and splitting conversations, held against the published rules."""

import hashlib
import json
import re
from collections import Counter

import pytest
import sentencepiece
from small_tokenizer import small_tokenizer
from typer.testing import CliRunner

from model.errors import PunaError
from model.tokenizer import load_tokenizer
from train.__main__ import app
from train.data.markdown import html_to_markdown
from train.data.prepare import held_out, prepare
from train.data.prepare_steps import (
    Dropped,
    alternating,
    clean,
    identity,
    in_script,
    split_long,
    without_duplicates,
    without_phrases,
)


def talk(*texts, id="a", first="human"):
    roles = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    return {"id": id, "conversations": [{"from": roles[n % 2], "value": text} for n, text in enumerate(texts)]}


def values(record):
    return [turn["value"] for turn in record["conversations"]]


# --- V6: cleaning


def test_conversations_run_from_a_human_to_an_answer():
    assert [values(record) for record in clean(talk("stray", "question", "an answer", first="gpt"))] == [
        ["question", "an answer"]
    ]
    assert [values(record) for record in clean(talk("question", "an answer", "left open"))] == [
        ["question", "an answer"]
    ]
    assert values(clean(talk("question", "an answer", "and then?", ""))[0]) == ["question", "an answer"]


@pytest.mark.parametrize(
    "record, reason",
    [
        (talk("question one", "I am ChatGPT"), "contains a blocked word"),
        (talk("What does OpenAI do?", "a good answer"), "contains a blocked word"),
        (talk("a question", "!Too many requests in 1 hour. Try again later."), "contains a rate-limit answer"),
        (talk("hi", "hello"), "is too short"),
        (talk("only a question, though a long one"), "is too short"),
        ({"conversations": [{"from": "human", "value": "a long question"}] * 3}, "roles do not alternate"),
        ({"conversations": [{"from": "human"}]}, "has no conversations"),
        ({"text": "x"}, "has no conversations"),
    ],
)
def test_what_is_dropped_and_why(record, reason):
    with pytest.raises(Dropped, match=reason):
        clean(record)


@pytest.mark.parametrize(
    "html, markdown",
    [
        ("plain text, 1 < 2 & x<y", "plain text, 1 < 2 & x<y"),
        (
            "<p>One <strong>bold</strong> and <em>slanted</em>.</p><p>Two &lt;3</p>",
            "One **bold** and *slanted*.\n\nTwo <3",
        ),
        ("<h2>Title</h2><p>Text<br>more</p>", "## Title\n\nText\nmore"),
        ("<ol><li>a</li><li><p>b</p><ul><li>c</li></ul></li></ol>", "1. a\n2. b\n    - c"),
        ('<p><a href="http://x.y">here</a> <code>f(x)</code></p>', "[here](http://x.y) `f(x)`"),
        (
            '<pre><div>python<button>Copy code</button></div><code class="x">def f():\n    return 1\n</code></pre>',
            "```python\ndef f():\n    return 1\n```",
        ),
        ("<pre><code>a &amp; b\n</code></pre><p>after</p>", "```\na & b\n```\n\nafter"),
        (
            "<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td>2</td></tr></tbody></table>",
            "| a | b |\n| --- | --- |\n| 1 | 2 |",
        ),
        ("2 / 3<div>answer</div>", "answer"),
        ("<p>words</p>Copy12 chars / 2 words", "words"),
    ],
)
def test_html_becomes_markdown(html, markdown):
    assert html_to_markdown(html) == markdown


def test_duplicates_go_by_id_and_by_first_exchange():
    step, counts = without_duplicates(), Counter()
    kept = []
    for record in (talk("q", "a", "r", "b"), talk("x", "y"), talk("q", "a", id="b"), talk("q", "other", id="c")):
        try:
            kept += step(record)
        except Dropped as reason:
            counts[str(reason)] += 1
    assert [values(record) for record in kept] == [["q", "a", "r", "b"], ["q", "other"]]
    assert counts == {"has the id of another": 1, "begins as another does": 1}


def test_scripts_are_told_apart():
    assert in_script("latin")(talk("¿Qué es esto?", "una llama"))
    assert in_script("cjk")({"instruction": "x", "output": "高原上的羊驼走得很慢风吹过草地天很蓝"}) is not None
    assert in_script("cjk")(talk("你好，请问今天天气怎么样？", "今天天气很好，适合出门散步。"))  # keys are no text
    with pytest.raises(Dropped, match="is not mostly latin"):
        in_script("latin")({"text": "高原上的羊驼走得很慢"})


# --- W1: refusals


def test_phrases_are_found_in_any_answer_whatever_their_case():
    step = without_phrases(["As an AI"])
    for record in (
        talk("q", "fine", "r", "AS AN AI model, no"),
        {"instruction": "q", "output": "well, as an ai ..."},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "As an AI"}]},
    ):
        with pytest.raises(Dropped, match="contains a listed phrase"):
            step(record)
    asked = talk("as an AI, what are you?", "a llama")
    assert step(asked) == [asked]


# --- V5: splitting


def fastchat_split(record, size, max_length):
    """The published rule: pairs are added up, a part ends before the pair that would go above `max_length`, and the
    part that is open at the end is written only where the last pair did not open it."""
    turns = record["conversations"][: len(record["conversations"]) // 2 * 2]
    parts, start, total = [], 0, 0
    for number in range(0, len(turns), 2):
        pair = size(turns[number]) + size(turns[number + 1])
        if total + pair > max_length:
            parts.append((start, number))
            start, total = number, 0
        elif number == len(turns) - 2:
            parts.append((start, number + 2))
        total += pair
    return [{"id": f"{record['id']}_{start}", "conversations": turns[start:end]} for start, end in parts if start < end]


@pytest.mark.parametrize("max_length", [40, 60, 90, 150, 2048])
def test_splitting_equals_fastchats_on_its_own_data(data_dir, max_length):
    model = data_dir / "llama2-tokenizer/tokenizer.model"
    tokenizer = load_tokenizer(model)
    encode = sentencepiece.SentencePieceProcessor(model_file=str(model)).encode
    records = json.loads((data_dir / "vicuna/dummy_conversation.json").read_text())
    as_theirs, whole = split_long(tokenizer, max_length, lose_last=True), split_long(tokenizer, max_length)
    lost = 0
    for record in records:
        expected = fastchat_split(record, lambda turn: len(encode(turn["value"])) + 1 + 6, max_length)
        assert as_theirs(record) == expected
        kept = [turn for part in whole(record) for turn in part["conversations"]]
        assert kept == record["conversations"][: len(record["conversations"]) // 2 * 2]
        lost += len(kept) - sum(len(part["conversations"]) for part in expected)
    assert lost > 0 or max_length > 100


def test_parts_that_do_not_alternate_are_dropped(tmp_path):
    tokenizer = load_tokenizer(small_tokenizer(tmp_path))
    record = {
        "id": "a",
        "conversations": [*talk("q" * 50, "a" * 50)["conversations"], *talk("b", "c", first="gpt")["conversations"]],
    }
    parts = split_long(tokenizer, 120)(record)
    assert [part["id"] for part in parts] == ["a_0", "a_2"]
    assert alternating(parts[0]) == [parts[0]]
    with pytest.raises(Dropped, match="roles do not alternate"):
        alternating(parts[1])


# --- all together


def test_prepare_merges_counts_and_writes(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([talk("a question", "an answer", id="1"), talk("hi", "ho", id="2")]))
    (tmp_path / "b.jsonl").write_text(json.dumps(talk("a question", "an answer", id="3")) + "\n")
    sources = [str(tmp_path / "a.json"), str(tmp_path / "b.jsonl")]
    added = list(identity("Paco", "the herd"))
    counts = prepare(sources, tmp_path / "out.json", [clean, without_duplicates()], added)
    assert counts == {"read": 3, "kept": 1, "dropped: is too short": 1, "dropped: begins as another does": 1}
    written = json.loads((tmp_path / "out.json").read_text())
    assert written == [talk("a question", "an answer", id="1"), *added]
    assert "Paco" in values(added[0])[1] and "the herd" in values(added[0])[1]
    prepare(sources, tmp_path / "out.jsonl", [])
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 3


def test_prepare_names_faults_by_line_and_writes_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"body": 1}\n{\n')
    with pytest.raises(PunaError, match=r"(?s)a.jsonl:3: is not valid JSON.*|a.jsonl:2: keys 'body'") as raised:
        prepare([str(tmp_path / "a.jsonl")], tmp_path / "out.jsonl", [without_phrases()])
    assert "a.jsonl:2" in str(raised.value) and "a.jsonl:3" in str(raised.value)
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(PunaError, match="nothing is left"):
        (tmp_path / "b.json").write_text(json.dumps([talk("hi", "ho")]))
        prepare([str(tmp_path / "b.json")], tmp_path / "out.jsonl", [clean])


def test_records_of_wrong_types_are_faults_by_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": null}\n{"text": ["b"], "id": [1]}\n')
    for step in (without_phrases(), without_duplicates(), in_script("latin")):
        with pytest.raises(PunaError, match=r"a.jsonl:2: key 'text': expected text, got null\n.*a.jsonl:3: key 'text'"):
            prepare([str(tmp_path / "a.jsonl")], tmp_path / "out.jsonl", [step])
    ids = '{"text": "a", "id": [1]}\n{"text": "b", "id": [1]}\n'
    (tmp_path / "a.jsonl").write_text(ids)
    assert prepare([str(tmp_path / "a.jsonl")], tmp_path / "out.jsonl", [without_duplicates()])["kept"] == 1


@pytest.mark.parametrize("fraction", [10, 1.0, 0.0, -0.05, 0.999])
def test_a_held_out_part_that_is_no_part_is_refused(tmp_path, fraction):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(PunaError, match="--test-fraction"):
        prepare([str(tmp_path / "a.jsonl")], tmp_path / "out.jsonl", [], test=tmp_path / "t", test_fraction=fraction)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_both_parts_are_written_or_neither(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "out.jsonl").write_text("mine")
    with pytest.raises(PunaError, match=r"out.jsonl exists"):
        prepare([str(tmp_path / "a.jsonl")], tmp_path / "out.jsonl", [], test=tmp_path / "test.jsonl")
    assert not (tmp_path / "test.jsonl").exists() and (tmp_path / "out.jsonl").read_text() == "mine"
    with pytest.raises(PunaError, match=r"is the destination too"):
        prepare([str(tmp_path / "a.jsonl")], tmp_path / "b.jsonl", [], test=str(tmp_path / "b.jsonl"))


def test_what_a_conversation_becomes_is_held_out_together_or_not_at_all(tmp_path):
    records = [talk(*[f"{word}\u2028\n{n}" for word in ("q", "a") * 5], id=str(n)) for n in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    steps = [split_long(load_tokenizer(small_tokenizer(tmp_path)), 30)]
    parts = [tmp_path / "train.json", tmp_path / "test.jsonl"]
    added = list(identity("Paco", "the herd"))
    counts = prepare([str(tmp_path / "a.jsonl")], parts[0], steps, added, parts[1], 0.1)
    train, test = json.loads(parts[0].read_text()), [json.loads(line) for line in parts[1].read_text().split("\n")[:-1]]
    assert parts[0].read_text() == json.dumps(train, ensure_ascii=False, indent=2) + "\n"
    sources = [{re.sub(r"^(\d+)_\d+$", r"\1", part["id"]) for part in of} for of in (train, test)]
    assert not sources[0] & sources[1] and len(sources[1]) == -(-(40 + len(added)) // 10)
    assert len(train) + len(test) == counts["kept"] + len(added) > 100 and counts["held out"] == len(test)
    before = [part.read_bytes() for part in parts]
    prepare([str(tmp_path / "a.jsonl")], parts[0], steps, added, parts[1], 0.1, overwrite=True)
    assert [part.read_bytes() for part in parts] == before
    assert held_out(101, 0.1) != held_out(101, 0.1, seed=1) and len(held_out(101, 0.1)) == 11


def test_a_report_says_what_became_of_the_records(tmp_path):
    records = [talk("hi", "ho"), talk("a question", "an answer", id="1"), talk("a question", "an answer", id="2")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    counts = prepare([str(tmp_path / "a.jsonl")], tmp_path / "out.jsonl", [clean, without_duplicates()])
    report = json.loads((tmp_path / "out.jsonl.report").read_text())
    assert report == {
        "sources": [f"{tmp_path}/a.jsonl"],
        "counts": counts,
        "places": {"is too short": [f"{tmp_path}/a.jsonl:1"], "begins as another does": [f"{tmp_path}/a.jsonl:3"]},
        "sha256": {f"{tmp_path}/out.jsonl": hashlib.sha256((tmp_path / "out.jsonl").read_bytes()).hexdigest()},
    }
    with pytest.raises(PunaError, match="out.jsonl.report exists"):
        (tmp_path / "out.jsonl").unlink()
        prepare([str(tmp_path / "a.jsonl")], tmp_path / "out.jsonl", [])
    assert not (tmp_path / "out.jsonl").exists()


def test_the_command(tmp_path):
    small_tokenizer(tmp_path)
    (tmp_path / "a.json").write_text(
        json.dumps(
            [talk(f"<p>question {n % 9}</p>", f"answer {n}" * 30, f"and {n}?", "yes", id=str(n)) for n in range(20)]
        )
    )
    (tmp_path / "phrases.txt").write_text("ANSWER 3\n\n")
    command = ["prepare", tmp_path / "a.json", tmp_path / "out.jsonl", "--clean"]
    command += ["--phrases", tmp_path / "phrases.txt", "--max-length", "120", "--tokenizer", tmp_path, "--dedupe"]
    command += ["--identity", "Paco", "the herd", "--test", tmp_path / "test.jsonl", "--test-fraction", "0.25"]
    done = CliRunner().invoke(app, list(map(str, command)), catch_exceptions=False)
    kept, test = ((tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("out", "test"))
    written = [json.loads(line) for line in [*kept, *test]]
    assert done.stdout.splitlines()[0] == "read: 20" and "dropped: contains a listed phrase: 1" in done.stdout
    assert f"held out: {len(test)}" in done.stdout
    assert not any("<p>" in value for record in written for value in values(record))
    assert {part["id"] for part in written} >= {"0_0", "0_2", "identity_0"}
    with pytest.raises(PunaError, match="out.jsonl exists"):
        CliRunner().invoke(app, list(map(str, command[:-2])), catch_exceptions=False)
