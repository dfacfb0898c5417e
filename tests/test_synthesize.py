"""`infer synthesize`: lists are read and filtered as Alpaca's code does, jobs go on where they stood."""

import json
import re

import pytest
from chat_server import chat_server
from rouge_score.rouge_scorer import RougeScorer
from typer.testing import CliRunner

from infer.__main__ import app
from infer.commands.synthesize import verb_and_object
from infer.endpoint import connect
from infer.synthesize.evol_instruct import WAYS, unfit_answer, unfit_instruction
from infer.synthesize.self_instruct import CANNOT, SelfInstruct, parse, unfit

WORDS = (
    "name list explain compare sort rewrite translate plan count describe rivers stars engines poems numbers laws "
    "trees birds cities wars games songs recipes molecules quickly kindly briefly plainly"
).split()


def task_text(number, instruction, given="<noinput>", output="Done."):
    return f"{number}. Instruction: {instruction}\n{number}. Input:\n{given}\n{number}. Output:\n{output}\n"


def listing(body):
    """A list whose tasks depend on the request alone: some too short, some alike, one that text cannot do."""
    shown = re.findall(r"\d+\. Instruction: (.*)", body["messages"][-1]["content"])
    seed = body["seed"]
    pick = [f"{WORDS[(seed * 7 + 3 * i) % len(WORDS)]}{seed}" for i in range(9)]
    return "###\n".join((
        f" {' '.join(pick[:5])}?\n4. Input:\n<noinput>\n4. Output:\nYes.\n",
        task_text(5, "Too short"),
        task_text(6, shown[0]),
        task_text(7, f"Draw {' '.join(pick)}"),
        task_text(8, " ".join(reversed(pick)), "A text.", "An answer."),
    ))  # fmt: skip


@pytest.fixture
def seeds(tmp_path):
    path = tmp_path / "seeds.jsonl"
    rows = [
        {
            "instruction": f"Tell me about {WORDS[n]} and {WORDS[n + 5]} now.",
            "instances": [{"input": "", "output": "x"}],
        }
        for n in range(8)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(kind, out, url, seeds, *more, code=0):
    command = ["synthesize", kind, str(out), "--endpoint", url, "--seeds", str(seeds), *more]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == code, (found.output, found.exception)
    return found


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_tasks_are_kept_until_there_are_enough_and_none_is_like_another(seeds, tmp_path):
    with chat_server(listing) as (url, asked):
        found = run("self-instruct", tmp_path / "out.jsonl", url, seeds, "--count", "12", "--price", "10,10")
    made = rows_of(tmp_path / "out.jsonl")
    assert len(made) == 12 and all(one.keys() == {"instruction", "input", "output"} for one in made)
    assert {one["input"] for one in made} == {"", "A text."}
    score = RougeScorer(["rougeL"], use_stemmer=False).score
    known = [row["instruction"] for row in rows_of(seeds)]
    for one in made:
        assert all(score(other, one["instruction"])["rougeL"].fmeasure <= 0.7 for other in known)
        known.append(one["instruction"])
    rejected = rows_of(tmp_path / "out.rejects.jsonl")
    reasons = [re.split(r"[\d:]", one["reason"])[0] for one in rejected]
    assert {"text alone cannot do it", "ROUGE-L ", ""} == set(reasons)
    for one in rejected:  # every likeness that is named is one
        if said := re.fullmatch(r"ROUGE-L ([\d.]+) with (['\"])(.*)\2", one["reason"]):
            assert score(said[3], one["instruction"])["rougeL"].fmeasure == pytest.approx(float(said[1]), abs=0.006)
    assert f"{7 * len(rows_of(tmp_path / 'out.requests.jsonl')):,} tokens read" in found.stdout
    assert (tmp_path / "out.png").stat().st_size > 1000 and len(asked) >= len(rows_of(tmp_path / "out.requests.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["self-instruct", "evol-instruct"])
def test_a_job_that_broke_off_ends_with_the_same_bytes(kind, seeds, tmp_path):
    reply = listing if kind == "self-instruct" else evolved
    more = ("--count", "60") if kind == "self-instruct" else ("--rounds", "3")
    with chat_server(reply) as (url, _):
        run(kind, tmp_path / "whole.jsonl", url, seeds, *more)
        for limit in (5, 9):
            with chat_server(reply, dies_after=limit) as (dying, _):
                found = run(kind, tmp_path / "part.jsonl", dying, seeds, *more, code=1)
            assert "no credit left" in str(found.exception) and not (tmp_path / "part.jsonl").exists()
        assert (tmp_path / "part.requests.jsonl.part").read_text()
        changed = run(kind, tmp_path / "part.jsonl", url, seeds, *more, "--seed", "1", code=1)
        assert "was begun with" in str(changed.exception)
        run(kind, tmp_path / "part.jsonl", url, seeds, *more)
        assert "exists: give another destination" in str(
            run(kind, tmp_path / "part.jsonl", url, seeds, *more, code=1).exception
        )
    for suffix in (".jsonl", ".rejects.jsonl", ".requests.jsonl"):
        assert (tmp_path / f"part{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()


def test_lists_are_read_as_alpaca_reads_them():
    text = " Name a river.\n4. Input:\n<noinput>\n4. Output:\nThe Loa.\n###\n"
    text += f"{task_text(5, 'Add: 2+2', 'x', '4')}###\n6. In"
    whole = [
        {"instruction": "Name a river.", "input": "", "output": "The Loa."},
        {"instruction": "Add: 2+2", "input": "x", "output": "4"},
    ]
    assert parse(text, 4, cut=True) == whole == parse(text, 4, cut=False)
    assert parse("###\n" + task_text(4, "Name a river.", output="The Loa."), 4, cut=False) == whole[:1]
    assert parse(task_text(4, "Name a river.", output="The Loa."), 4, cut=True) == []
    assert parse("I cannot help with that.", 4, cut=False) == []


@pytest.mark.parametrize(
    ("instruction", "reason"),
    [
        ("Name three rivers", "3 words"),
        ("word " * 151, "151 words"),
        ("Describe the image of a llama", "image"),
        ("Please go to the shop now", "go to"),
        ("Write a program that sorts numbers", "Write a program"),
        ("- name three long rivers", "punctuation"),
        ("名 three long rivers please", "no ASCII"),
        ("Explain the imagery of this poem", None),
    ],
)
def test_alpacas_rules(instruction, reason):
    found = unfit({"instruction": instruction.strip(), "input": "", "output": ""})
    assert found is None if reason is None else found and reason in found
    assert len(CANNOT) == 18


def test_alpacas_seeds_are_read(data_dir):
    with chat_server(listing) as (url, _), connect(url, None, None, 100, {"seed": 0}) as server:
        maker = SelfInstruct(server, data_dir / "alpaca" / "seed_tasks.jsonl", 1)
        assert len(maker.seeds) == 175
        first, again, other = (maker.next(number)()["text"] for number in (1, 1, 2))
        assert first == again != other


def evolved(body):
    text = body["messages"][-1]["content"]
    if "# Instruction" in text:
        before = text.split("# Instruction\n")[1]
        if "stars" in before:
            return before  # nothing new
        return f"{before} Add {WORDS[body['seed'] % len(WORDS)]}."
    return "I am sorry." if "engines" in text else f"An answer to {len(text)} letters."


def test_instructions_evolve_round_by_round(seeds, tmp_path):
    with chat_server(evolved) as (url, asked):
        run("evol-instruct", tmp_path / "out.jsonl", url, seeds, "--rounds", "3", "--parallel", "3")
    made, rejected = rows_of(tmp_path / "out.jsonl"), rows_of(tmp_path / "out.rejects.jsonl")
    assert len(made) + len(rejected) == 24 and {one["way"] for one in made} == set(WAYS)
    latest = {}
    for one in made:  # each begins with what the last one that succeeded made of the same seed
        root = next(row["instruction"] for row in rows_of(seeds) if one["from"].startswith(row["instruction"]))
        assert one["from"] == latest.get(root, root) and one["instruction"].startswith(one["from"])
        assert one["output"] == f"An answer to {len(one['instruction'])} letters."
        latest[root] = one["instruction"]
    kinds = {one["reason"] for one in rejected}
    assert kinds == {"the same instruction", "a short excuse"}
    assert len(asked) == 48 - sum(one["reason"] == "the same instruction" for one in rejected)


def test_the_papers_elimination():
    assert unfit_instruction("Name a river.", "name a River.") == "the same instruction"
    assert "speaks of itself" in str(unfit_instruction("Name it.", "# Rewritten Prompt: Name it and say why."))
    assert unfit_instruction("Name a river.", "Name a river of Chile.") is None
    assert unfit_answer("Sorry, I can't.") == "a short excuse" and unfit_answer("the, and.") == "no answer in words"
    assert unfit_answer("Sorry " + "word " * 90) is None and unfit_answer("The Loa.") is None


def test_verbs_and_objects():
    assert verb_and_object("Write a poem about the sea.") == ("write", "poem")
    assert verb_and_object("") == ("", "")


def test_a_model_that_cannot_continue_is_given_up(seeds, tmp_path):
    with chat_server(lambda body: "No.") as (url, _):
        found = run("self-instruct", tmp_path / "out.jsonl", url, seeds, "--count", "3", code=1)
    assert "50 requests in a row gave no new task" in str(found.exception)
