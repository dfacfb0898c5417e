"""C-Eval (arXiv:2305.08322) as Chinese-LLaMA-Alpaca measures it: 52 subjects in Chinese, four choices each."""

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from infer.evaluate.subject import Subject
from infer.evaluate.task import Answer, Scores, read_csv
from model.errors import PunaError
from model.json_file import read_json

LETTERS = ("A", "B", "C", "D")
ANSWER_TOKENS = 512  # of a free answer
# What an answer in words may say its letter with, in the order in which they are tried.
SAID = [
    re.compile(pattern)
    for pattern in (
        *("([A-D])是正确的", "选项([A-D])正确", "答案为([A-D])", "答案是([A-D])", "答案([A-D])", "选择([A-D])"),
        *("答案：([A-D])", "选择答案([A-D])"),
    )
]
CONCLUSION = re.compile("所以答案是(.+?)。")

Decoding = Literal["constrained", "free"]


class CEval:
    """The questions of C-Eval's folder.

    Args:
        data: the published folder: `subject_mapping.json`, and `dev`, `val` and `test` with files SUBJECT_SPLIT.csv.
        shots: examples before each question, from `dev`; fewer where the context has no room.
        split: "val", whose answers are published, or "test", whose answers go to the publishers as submission.json.
        decoding: "constrained" takes the likeliest letter, by the sum of its logits as a word of its own and as what
            follows the colon; "free" writes an answer and looks for the letter in it.
        in_template: whether questions are asked in a template, and so end in a question.

    Raises:
        PunaError: no such files, or `path:line: reason`.
    """

    name = "ceval"

    def __init__(
        self,
        data: Path,
        shots: int = 5,
        split: str = "val",
        decoding: Decoding = "constrained",
        in_template: bool = False,
    ):
        self.decoding, self._ending = decoding, "\n答案是什么？ " if in_template else "\n答案："
        self.mapping = read_json(data / "subject_mapping.json")
        self.split = split
        self.questions: list[tuple[str, list[str], dict[str, str]]] = []  # subject, prompts, row
        for subject, said in sorted(self.mapping.items()):
            if not isinstance(said, list) or len(said) != 3:
                raise PunaError(
                    f"{data / 'subject_mapping.json'}: {subject} has no English name, Chinese name and group"
                )
            path = data / split / f"{subject}_{split}.csv"
            if path.is_file():
                self._read_subject(data, path, subject, said[1], shots)
        if not self.questions:
            raise PunaError(f"{data}: no questions; give C-Eval's folder with {split}/SUBJECT_{split}.csv")

    def _read_subject(self, data: Path, path: Path, subject: str, chinese: str, shots: int) -> None:
        columns = ("id", "question", *LETTERS)
        rows = read_csv(path, columns if self.split == "test" else (*columns, "answer"), header=True)
        examples = read_csv(data / "dev" / f"{subject}_dev.csv", (*columns, "answer"), header=True) if shots else []
        intro = f"以下是中国关于{chinese}考试的单项选择题，请选出其中的正确答案。\n\n"
        shown = [f"{_question(one)}\n答案：{one['answer']}\n\n" for one in examples[:shots]]
        for row in rows:
            asked = _question(row) + self._ending
            prompts = [intro + "".join(shown[:count]) + asked for count in range(len(shown), -1, -1)]
            self.questions.append((subject, prompts, row))

    def __len__(self) -> int:
        return len(self.questions)

    def answer(self, subject: Subject, first: int, last: int) -> list[Answer]:
        """See `Task`."""
        asked = self.questions[first:last]
        room = 1 if self.decoding == "constrained" else ANSWER_TOKENS
        prompts = [
            next((one for one in map(subject.prompt, several) if subject.fits(one, room)), subject.prompt(several[-1]))
            for _, several, _ in asked
        ]
        if self.decoding == "constrained":
            found = subject.choose(prompts, LETTERS, ["{}", "：{}"])
            said: list[dict[str, Any]] = [{"answer": LETTERS[row.argmax()]} for row in found]
        else:
            texts = subject.texts(prompts, ANSWER_TOKENS)
            said = [
                {"text": text, **extract(text, row, seed=f"{name}/{row['id']}")}
                for text, (name, _, row) in zip(texts, asked, strict=True)
            ]
        return [
            {"subject": name, "id": row["id"], **one, "right": row.get("answer")}
            for one, (name, _, row) in zip(said, asked, strict=True)
        ]

    def scores(self, answers: Sequence[Answer]) -> Scores:
        """Accuracy over all questions, by group and by subject, and the files summary.json and submission.json."""
        letters: dict[str, dict[str, str]] = defaultdict(dict)
        for one in answers:
            letters[one["subject"]][one["id"]] = one["answer"]
        files: dict[str, Any] = {"submission.json": dict(letters)}
        guessed = float(sum(one.get("guessed", False) for one in answers))
        if self.split == "test":
            return Scores({"guessed": guessed}, {}, len(answers), files)
        right: dict[str, list[bool]] = defaultdict(list)
        for one in answers:
            right[one["subject"]].append(one["answer"] == one["right"])
        grouped: dict[str, list[bool]] = defaultdict(list)
        for name, values in right.items():
            grouped[self.mapping[name][2]] += values
            grouped["All"] += values
        summary: dict[str, Any] = {name: _summary(values) for name, values in right.items()}
        files["summary.json"] = summary | {"grouped": {name: _summary(values) for name, values in grouped.items()}}
        overall = {"accuracy": _mean(grouped.pop("All")), "guessed": guessed}
        groups = {name: _mean(values) for name, values in sorted(grouped.items())}
        return Scores(overall, groups | {name: _mean(values) for name, values in right.items()}, len(answers), files)


def extract(text: str, row: dict[str, str], seed: str) -> dict[str, Any]:
    """The letter that an answer in words means: what it concludes, what it says by one of several patterns, the first
    letter that stands in it, the choice whose text it holds; else one drawn by `seed`, which counts as `guessed`."""
    conclusions = CONCLUSION.findall(text)
    if conclusions and (letter := re.search("[A-D]", conclusions[-1])):
        return {"answer": letter[0]}
    for pattern in SAID:
        if found := pattern.search(text):
            return {"answer": found[1]}
    if letter := re.search("[A-D]", text):
        return {"answer": letter[0]}
    for one in LETTERS:
        if row[one] and row[one] in text:
            return {"answer": one}
    return {"answer": random.Random(seed).choice(LETTERS), "guessed": True}


def _question(row: dict[str, str]) -> str:
    return row["question"] + "".join(f"\n{letter}. {row[letter]}" for letter in LETTERS)


def _mean(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def _summary(values: Sequence[bool]) -> dict[str, Any]:
    return {"score": 100 * _mean(values), "num": len(values), "correct": sum(values)}
