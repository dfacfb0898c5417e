"""`infer eval`: scores are those that transformers' logits give, prompts those of the published code and data."""

import csv
import json
import math
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from safetensors.numpy import load_file, save_file
from serving import chat_model
from typer.testing import CliRunner

from infer.__main__ import app
from infer.evaluate.ceval import CEval, extract
from infer.evaluate.dialogsum import DialogSum
from infer.evaluate.mmlu import LETTERS, Mmlu, category
from infer.evaluate.perplexity import windows
from infer.evaluate.results import Results
from model.errors import PunaError

SUBJECTS = {"formal_logic": 3, "abstract_algebra": 35}
WORDS = "the high grassland where a curious llama grazes is cold".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return chat_model(tmp_path_factory.mktemp("eval"))


@pytest.fixture(scope="module")
def theirs(model):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    return tokenizer, transformers.LlamaForCausalLM.from_pretrained(model, dtype="float32").eval()


def logprobs(theirs, ids):
    with torch.no_grad():
        return torch.log_softmax(theirs[1](torch.tensor([ids])).logits[0].double(), -1).numpy()


def write_rows(path, rows, header=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows] if header else rows)


def question(n):
    return [f"Which word, {n}?", *(WORDS[(n + i) % len(WORDS)] for i in range(4))]


@pytest.fixture(scope="module")
def mmlu(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mmlu")
    for subject, count in SUBJECTS.items():
        rows = [[*question(n), LETTERS[n % 4]] for n in range(count)]
        write_rows(folder / "test" / f"{subject}_test.csv", rows)
        write_rows(folder / "dev" / f"{subject}_dev.csv", rows[:2])
    return folder


def run(*arguments):
    found = CliRunner().invoke(app, ["eval", *map(str, arguments)])
    assert found.exit_code == 0, (found.output, found.exception)
    return found.stdout


@pytest.mark.slow
def test_mmlu_is_the_likeliest_letter_of_transformers(model, mmlu, theirs, tmp_path):
    shown = run(model, "--task", "mmlu", "--data", mmlu, "--shots", 2, "--output", tmp_path / "out")
    tokenizer, _ = theirs
    ids = [tokenizer.encode(f"Answer: {letter}", add_special_tokens=False)[-1] for letter in LETTERS]
    expected = []
    for subject, count in sorted(SUBJECTS.items()):
        head = f"The following are multiple choice questions (with answers) about  {subject.replace('_', ' ')}.\n\n"
        texts = []
        for n in range(count):
            stem, *choices = question(n)
            texts.append("\n".join([stem, *(f"{x}. {y}" for x, y in zip(LETTERS, choices, strict=True)), "Answer:"]))
        for n, text in enumerate(texts):
            prompt = head + f"{texts[0]} A\n\n" + f"{texts[1]} B\n\n" + text
            asked = [tokenizer.bos_token_id, *tokenizer.encode(f"{prompt} A")[:-1]]
            best = int(np.argmax(logprobs(theirs, asked)[-1][ids]))
            expected.append({"subject": subject, "answer": LETTERS[best], "right": LETTERS[n % 4]})
    answers = [json.loads(line) for line in (tmp_path / "out" / "model.jsonl").read_text().splitlines()]
    assert answers == expected and len({one["answer"] for one in answers}) > 1
    found = json.loads((tmp_path / "out" / "results.json").read_text())["models"]["model"]
    right = [one["answer"] == one["right"] for one in answers]
    assert found["questions"] == 38 and found["scores"]["accuracy"] == sum(right) / 38
    assert found["groups"]["humanities"] == found["groups"]["formal_logic"] == sum(right[35:]) / 3
    assert found["scores"]["mean over subjects"] == pytest.approx((sum(right[:35]) / 35 + sum(right[35:]) / 3) / 2)
    assert "accuracy" in shown and (tmp_path / "out" / "results.png").stat().st_size > 1000


def test_prompts_of_mmlu_are_the_published_ones(data_dir, tmp_path):
    file = data_dir / "mmlu" / "zero_shot_mmlu_val.json"
    whole = Mmlu(file, shots=0)
    assert len(whole) == 1531
    found = Counter(category(subject) for subject in {subject for subject, *_ in whole.questions})
    assert found == {"STEM": 18, "humanities": 13, "social sciences": 12, "other": 14}
    pattern = re.compile(r".*?\n\n(.*)\nA\. (.*)\nB\. (.*)\nC\. (.*)\nD\. (.*)\nAnswer:", re.DOTALL)
    for subject in ("abstract_algebra", "us_foreign_policy"):
        own = [(prompts, letter) for name, prompts, letter in whole.questions if name == subject]
        rows = [[*pattern.fullmatch(prompts[0]).groups(), letter] for prompts, letter in own]
        write_rows(tmp_path / subject / "val" / f"{subject}_val.csv", rows)
        assert [(p, letter) for _, p, letter in Mmlu(tmp_path / subject, 0, "val").questions] == own


@pytest.mark.slow
def test_an_evaluation_goes_on_where_it_stood(model, mmlu, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    run(model, "--task", "mmlu", "--data", mmlu, "--shots", 0, "--output", whole)
    answer = Mmlu.answer

    def killed(self, subject, first, last):
        if first:
            raise KeyboardInterrupt
        return answer(self, subject, first, last)

    part = tmp_path / "part"
    command = (model, "--task", "mmlu", "--data", mmlu, "--shots", 0, "--output", part)
    monkeypatch.setattr(Mmlu, "answer", killed)
    with pytest.raises(AssertionError):  # the exit code is not 0
        run(*command)
    assert not (part / "results.json").exists() and len((part / "model.jsonl.part").read_text().splitlines()) == 32
    monkeypatch.setattr(Mmlu, "answer", answer)
    run(*command)
    assert (part / "model.jsonl").read_bytes() == (whole / "model.jsonl").read_bytes()
    monkeypatch.setattr(Mmlu, "answer", None)  # what is there is not asked for again
    assert "accuracy" in run(*command)


@pytest.mark.slow
def test_perplexity_is_transformers_over_sliding_windows(model, theirs, tmp_path):
    texts = [" ".join(WORDS * 9) + " é\n", "Hello! 2+2 is 4."]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer, _ = theirs
    nats = count = 0
    for text in texts:
        ids, done = tokenizer.encode(text), 1  # the first is the beginning-of-text token
        for begin in range(0, len(ids), 20):
            end = min(begin + 50, len(ids))
            if end > done:
                found = logprobs(theirs, ids[begin:end])
                nats -= sum(found[i - begin - 1, ids[i]] for i in range(done, end))
                count, done = count + end - done, end
    command = (model, "--task", "perplexity", "--data", tmp_path / "text.jsonl", "--output", tmp_path / "out")
    run(*command, "--window", 50, "--stride", 20)
    found = json.loads((tmp_path / "out" / "results.json").read_text())["models"]["model"]["scores"]
    assert found["loss"] == pytest.approx(nats / count, rel=1e-5) and found["tokens"] == count
    assert found["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert found["bits per byte"] == pytest.approx(nats / math.log(2) / len("".join(texts).encode()), rel=1e-5)


@given(st.integers(0, 60), st.integers(2, 20), st.data())
def test_windows_score_each_token_once_with_enough_before_it(count, window, data):
    stride = data.draw(st.integers(1, window - 1))
    ids = list(range(1, count + 1))
    found = windows(ids, 0, window, stride)
    assert [token for _, new in found for token in new] == ids
    assert all(0 < len(old) and len(old) + len(new) <= window for old, new in found)
    assert all(len(old) >= window - stride for old, _ in found[1:])
    assert all(old + new == list(range(old[0], old[0] + len(old) + len(new))) for old, new in found)


MAPPING = {"logic": ["Logic", "逻辑学", "Humanities"], "physics": ["Physics", "物理", "STEM"]}


@pytest.fixture(scope="module")
def ceval(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ceval")
    (folder / "subject_mapping.json").write_text(json.dumps(MAPPING))
    for subject, count in (("logic", 4), ("physics", 5)):
        rows = [[n, *question(n), LETTERS[n % 4]] for n in range(count)]
        head = ["id", "question", *LETTERS, "answer"]
        write_rows(folder / "val" / f"{subject}_val.csv", rows, head)
        write_rows(folder / "test" / f"{subject}_test.csv", [row[:-1] for row in rows], head[:-1])
        write_rows(folder / "dev" / f"{subject}_dev.csv", [[*row, ""] for row in rows[:2]], [*head, "explanation"])
    return folder


@pytest.mark.slow
def test_ceval_adds_the_logits_of_both_letters(model, ceval, theirs, tmp_path, data_dir):
    tokenizer, _ = theirs
    ids = [[tokenizer.encode(text, add_special_tokens=False)[-1] for text in (x, f"：{x}")] for x in LETTERS]
    assert len(np.unique(ids)) == 4  # byte-level: a letter after a colon is the same token
    run(model, "--task", "ceval", "--data", ceval, "--shots", 1, "--output", tmp_path / "val")
    expected = {}
    for subject, (_, chinese, _) in sorted(MAPPING.items()):
        texts = []
        for n in range(4 + (subject == "physics")):
            stem, *choices = question(n)
            texts.append("\n".join([stem, *(f"{x}. {y}" for x, y in zip(LETTERS, choices, strict=True)), "答案："]))
        for n, text in enumerate(texts):
            prompt = f"以下是中国关于{chinese}考试的单项选择题，请选出其中的正确答案。\n\n{texts[0]}A\n\n{text}"
            last = logprobs(theirs, [tokenizer.bos_token_id, *tokenizer.encode(prompt)])[-1]
            expected.setdefault(subject, {})[str(n)] = LETTERS[int(np.argmax(last[np.array(ids)].sum(1)))]
    own = tmp_path / "val" / "model"
    assert json.loads((own / "submission.json").read_text()) == expected
    right = {name: [letter == LETTERS[int(n) % 4] for n, letter in one.items()] for name, one in expected.items()}
    summary = json.loads((own / "summary.json").read_text())
    assert summary["physics"] == {"score": 20 * sum(right["physics"]), "num": 5, "correct": sum(right["physics"])}
    assert summary["grouped"]["All"]["correct"] == sum(map(sum, right.values()))
    assert summary["grouped"]["Humanities"]["num"] == 4
    run(model, "--task", "ceval", "--data", ceval, "--shots", 1, "--split", "test", "--output", tmp_path / "test")
    written = json.loads((tmp_path / "test" / "model" / "submission.json").read_text())
    published = json.loads((data_dir / "ceval" / "submission_example.json").read_text())
    assert written == expected and not (tmp_path / "test" / "model" / "summary.json").exists()
    assert all(type(one) is dict and set(one.values()) <= set(LETTERS) for one in published.values())  # the same form


ROW = dict(zip(LETTERS, ("甲", "乙", "丙", "丁"), strict=True))


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A不对，所以答案是C。", "C"),
        ("先看A。选项B正确", "B"),
        ("我认为答案为D", "D"),
        ("答案：A", "A"),
        ("应为 B。", "B"),
        ("应该是丙", "C"),
    ],
)
def test_the_letter_of_an_answer_in_words(text, letter):
    assert extract(text, ROW, "x") == {"answer": letter}


def test_an_answer_without_a_letter_is_a_guess_that_counts_as_one():
    guesses = [extract("不知道", ROW, f"logic/{n}") for n in range(40)]
    assert {one["answer"] for one in guesses} == set(LETTERS) and all(one["guessed"] for one in guesses)
    assert guesses[3] == extract("不知道", ROW, "logic/3")


def test_free_answers_of_ceval_are_read(ceval):
    class Speaker:
        prompt, fits = staticmethod(str), staticmethod(lambda prompt, count: True)

        def texts(self, prompts, count, stop=()):
            return [f"所以答案是{LETTERS[n % 4]}。" for n, _ in enumerate(prompts)]

    task = CEval(ceval, 0, decoding="free", in_template=True)
    assert task.questions[0][1][0].endswith("\n答案是什么？ ")
    scores = task.scores(task.answer(Speaker(), 0, len(task)))  # physics begins with the fifth question, an A again
    assert scores.overall == {"accuracy": 1.0, "guessed": 0.0}


def test_dialogsum_is_rouge_over_all_references(data_dir):
    file = data_dir / "dialogsum" / "dialogsum.test.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()][:20]

    class Speaker:
        prompt = staticmethod(str)

        def texts(self, prompts, count, stop):
            assert stop == ["### End"] and prompts[0].endswith(f"{records[0]['dialogue']}\n\n### Output:\n")
            return [f" {one['summary2']}\n" for one in records]

    task = DialogSum(file)
    answers = task.answer(Speaker(), 0, 20)
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
    for one, record in zip(answers, records, strict=True):
        found = [scorer.score(record[f"summary{n}"], record["summary2"]) for n in (1, 2, 3)]
        for kind in found[0]:
            assert one[kind] == pytest.approx(sum(each[kind].fmeasure for each in found) / 3)
    assert 33 < task.scores(answers).overall["rouge1"] < 100 and len(task) == 500


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "mmlu"], "--task mmlu needs --data"),
        (["--task", "mmlu", "--data", "{mmlu}", "--stride", "3"], "--task mmlu does not read --stride"),
        (["--task", "mmlu", "--data", "{mmlu}", "--shots", "6"], "--shots is 6"),
        (["--task", "mmlu", "--data", "{mmlu}", "--split", "val"], "give MMLU's folder with val/"),
        (["--task", "no_such_task"], "--task no_such_task: neither one of ours nor one of lm-eval's"),
        (["--task", "perplexity", "--data", "{mmlu}/none.txt"], "none.txt is missing"),
        (["--task", "perplexity", "--data", "{mmlu}/a.txt", "--window", "9", "--stride", "9"], "--stride 9"),
        (["--task", "perplexity", "--data", "{mmlu}"], "is a folder: give a file of it"),
        (["--task", "perplexity", "--data", "{mmlu}/a.txt", "--template", "llama3"], "does not read --template"),
        (["--task", "perplexity", "--data", "{mmlu}/a.txt", "--api-key", "x"], "no MODEL is the URL of one"),
        (["--task", "perplexity", "--data", "{mmlu}/a.txt", "--output", "{mmlu}/a.txt"], "is a file: give a folder"),
        (["--task", "mmlu", "--data", "{mmlu}/a.txt", "--shots", "0", "--split", "val"], "is one file, without splits"),
        (["--task", "mmlu", "--data", "{mmlu}/a.txt", "--shots", "0"], "a.txt:1: not valid JSON"),
        (["=x", "--task", "mmlu", "--data", "{mmlu}"], "=x: give a model, or NAME=MODEL"),
        (["{model}", "--task", "mmlu", "--data", "{mmlu}"], "a second model named 'model'"),
    ],
)
@pytest.mark.slow
def test_what_cannot_be_evaluated_is_said_by_name(model, mmlu, arguments, said):
    (mmlu / "a.txt").write_text("text")
    arguments = [text.format(model=model, mmlu=mmlu) for text in arguments]
    found = CliRunner().invoke(app, ["eval", str(model), *arguments])
    assert isinstance(found.exception, PunaError) and said in str(found.exception)


def test_results_of_another_task_are_not_mixed(tmp_path):
    first = Results(tmp_path, {"task": "mmlu", "shots": 5})
    (tmp_path / "results.json").write_text(json.dumps({"task": {"task": "mmlu", "shots": 0}, "models": {}}))
    assert first.scores == {}
    with pytest.raises(PunaError, match="give another folder"):
        Results(tmp_path, {"task": "mmlu", "shots": 5})


def test_a_fault_of_the_data_is_said_with_its_line(tmp_path):
    write_rows(tmp_path / "test" / "formal_logic_test.csv", [[*question(0), "A"], question(1)])
    with pytest.raises(PunaError, match=r"formal_logic_test.csv:2: column answer is missing"):
        Mmlu(tmp_path, 0)
    (tmp_path / "bad.jsonl").write_text('{"dialogue": "a", "summary": "b"}\n{"dialogue": 3}\n')
    with pytest.raises(PunaError, match=r"bad.jsonl:2: dialogue is 3, which is no text"):
        DialogSum(tmp_path / "bad.jsonl")


@pytest.mark.slow
def test_weights_that_are_not_finite_are_said_and_score_nothing(tmp_path):
    chat_model(tmp_path)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.nan)
    save_file(tensors, path, {"format": "pt"})
    (tmp_path / "text.jsonl").write_text('{"text": "the high grassland"}\n')
    said = r"norm holds NaN or infinite numbers"
    asked = ["eval", str(tmp_path / "model"), "--task", "perplexity", "--data", str(tmp_path / "text.jsonl")]
    found = run_command(asked)
    assert found.returncode == 1 and re.search(said, found.stderr) and "logits are not finite" in found.stderr
    assert "Traceback" not in found.stderr
    found = run_command(["generate", str(tmp_path / "model"), "--prompt", "the", "--max-new-tokens", "2"])
    assert found.returncode == 0 and re.search(said, found.stderr)


def run_command(arguments):
    command = [sys.executable, "-m", "infer", *arguments]
    return subprocess.run(command, capture_output=True, text=True)
