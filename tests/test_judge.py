"""`infer judge` asks both ways, counts wins as MT-bench does, and goes on where it stood."""

import json
import re
from collections import Counter

import pytest
from chat_server import chat_server
from typer.testing import CliRunner

from infer.__main__ import app
from infer.evaluate.judge import read_pairs, verdict, win_rates, winner
from model.errors import PunaError


def a_judge(decide, dies_after=None):
    """A server whose verdict on two answers is that of `decide`."""

    def reply(body):
        found = re.search(r"# Answer A\n(.*)\n\n# Answer B\n(.*)", body["messages"][-1]["content"], re.DOTALL)
        assert found is not None
        return f"Well: {decide(*found.groups())}"

    return chat_server(reply, dies_after)


def longer(one, other):
    return "[[C]]" if len(one) == len(other) else "[[A]]" if len(one) > len(other) else "[[B]]"


@pytest.fixture
def files(tmp_path):
    """Twelve questions of two categories; of the first answers, those to every third are shorter."""
    lines = {"q": [], "a": [], "b": []}
    for n in range(12):
        lines["q"].append({"question_id": n, "text": f"Why {n}?", "category": "math" if n < 4 else "writing"})
        lines["a"].append({"question_id": n, "text": "a" * (1 if n % 3 == 0 else 5), "model_id": "a"})
        lines["b"].append({"question_id": n, "choices": [{"index": 0, "turns": ["b" * (5 if n == 1 else 3)]}]})
    for name, own in lines.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in own))
    return tmp_path


def judge(files, url, *more, code=0):
    command = [files / "a.jsonl", files / "b.jsonl", "--questions", files / "q.jsonl", "--endpoint", url]
    found = CliRunner().invoke(app, ["judge", *map(str, command), "--output", str(files / "out"), *more])
    assert found.exit_code == code, (found.output, found.exception)
    return found


def test_an_answer_wins_where_it_is_preferred_in_both_orders(files):
    with a_judge(longer) as (url, asked):
        found = judge(files, url, "--price", "1000,2000000")
    results = json.loads((files / "out" / "results.json").read_text())
    rates = {name: (one["wins"], one["ties"], one["losses"]) for name, one in results["rates"].items()}
    assert rates == {"all": (7, 1, 4), "math": (1, 1, 2), "writing": (6, 0, 2)}
    assert results["rates"]["all"]["rate"] == 7.5 / 12 and results["position bias"] == 0
    assert results["tokens"] == [24 * 7, 24 * 2] and results["cost"] == pytest.approx(0.168 + 96)
    assert "cost 96.17" in found.stdout and (files / "out" / "results.png").stat().st_size > 1000
    assert len(asked) == 24 and all(body["temperature"] == 0 for body in asked)


def test_a_judge_that_looks_at_the_place_alone_gives_ties(files):
    with a_judge(lambda one, other: "[[A]]") as (url, _):
        judge(files, url)
    results = json.loads((files / "out" / "results.json").read_text())
    assert results["rates"]["all"]["ties"] == 12 and results["position bias"] == 1
    assert results["rates"]["all"]["low"] == results["rates"]["all"]["high"] == 0.5


def test_judging_goes_on_where_it_stood(files):
    with a_judge(longer, dies_after=20) as (url, _):
        found = judge(files, url, code=1)
    assert "no credit left" in str(found.exception)
    with a_judge(longer) as (url, asked):
        judge(files, url)
        assert len(asked) == 8  # the last four questions: eight are written at once
        whole = (files / "out" / "judgments.jsonl").read_bytes()
        judge(files, url)
        assert len(asked) == 8 and (files / "out" / "judgments.jsonl").read_bytes() == whole
        (files / "a.jsonl").write_text((files / "a.jsonl").read_text().replace('"aaaaa"', '"aaaaaa"'))
        assert "judgments of other answers" in str(judge(files, url, code=1).exception)


def test_judgments_without_a_verdict_are_counted(files):
    with a_judge(lambda one, other: longer(one, other) if "aaaaa" in (one, other) else "hm") as (url, _):
        found = judge(files, url)
        assert "12 questions, 4 without a verdict" in found.stdout
    with a_judge(lambda one, other: "A") as (url, _):
        assert "no judgment ends in a verdict" in str(judge(files, url, "--overwrite", code=1).exception)


def test_the_last_verdict_counts():
    assert [verdict(text, False) for text in ("[[A]] no, [[B]]", "[[C]]", "A")] == ["second", "tie", None]
    assert [verdict(text, True) for text in ("[[A]]", "[[B]]")] == ["second", "first"]
    assert [winner(both) for both in (["first", "first"], ["first", "tie"], ["second", "first"], [None, "tie"])] == [
        "first", "tie", "tie", None,
    ]  # fmt: skip


def test_intervals_are_those_of_the_binomial():
    """900 questions at a rate of one half: 1.96 standard errors are 0.0327."""
    judged = [{"category": "x", "winner": ("first", "second")[n % 2]} for n in range(900)]
    one = win_rates(judged)["all"]
    assert one.rate == 0.5 and one.low == pytest.approx(0.5 - 0.0327, abs=0.004)
    assert one.high == pytest.approx(0.5 + 0.0327, abs=0.004)


def test_published_questions_and_answers_are_read(data_dir):
    vicuna, guanaco = data_dir / "vicuna", data_dir / "guanaco"
    answers = (vicuna / "answer_vicuna-13b.jsonl", next(guanaco.glob("7b-guanaco*.jsonl")))
    pairs = read_pairs(vicuna / "vicuna_question.jsonl", *answers, vicuna / "vicuna_reference_gpt-4.jsonl")
    assert len(pairs) == 80 and Counter(pair.category for pair in pairs)["generic"] == 10
    assert sum(pair.reference is not None for pair in pairs) == 10
    shown, swapped = (pairs[0].messages(swap)[1]["content"] for swap in (False, True))
    assert shown.index(pairs[0].answers[0]) < shown.index(pairs[0].answers[1])
    assert swapped.index(pairs[0].answers[0]) > swapped.index(pairs[0].answers[1])


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("b", '{"question_id": 0, "text": "x"}\n', r"b.jsonl does not answer question 1 of .*q.jsonl"),
        ("a", '{"question_id": 0}\n', r"a.jsonl:1: no answer under text, generation or choices"),
        ("a", '{"question_id": 0, "text": "x"}\n' * 2, r"a.jsonl:2: question 0 is answered twice"),
        ("q", '{"question_id": 0, "turns": []}\n', r"q.jsonl:1: no text or turns"),
        ("q", "", "no questions"),
    ],
)
def test_faults_of_the_files_are_said_with_their_line(files, file, text, said):
    (files / f"{file}.jsonl").write_text(text)
    with pytest.raises(PunaError, match=said):
        read_pairs(files / "q.jsonl", files / "a.jsonl", files / "b.jsonl")
