"""Two sets of answers to the same questions, compared by a model: each pair twice, in both orders.

An answer wins a question where the judge prefers it in both orders; where its verdicts differ, or either is a tie, the
question is a tie (MT-bench, arXiv:2306.05685, section 3.4).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from infer.evaluate.task import read_records
from model.errors import PunaError

VERDICT = re.compile(r"\[\[([ABC])\]\]")
RESAMPLES = 2000  # of the bootstrap
SYSTEM = (
    "You compare two answers to the same question and say which one serves the person who asked better. Look at "
    "whether each does what was asked, is correct, complete and clear, and is useful. The order of the answers, their "
    "length and the names of those who gave them do not count. Explain your comparison in a few sentences. Then end "
    "with your verdict, exactly in this form: [[A]] if answer A is better, [[B]] if answer B is better, [[C]] if they "
    "are equally good."
)
PROMPT = "# Question\n{question}\n\n{reference}# Answer A\n{answer_a}\n\n# Answer B\n{answer_b}"
REFERENCE = "# A correct answer, to check both by\n{reference}\n\n"


@dataclass(frozen=True)
class Pair:
    """A question and its two answers; of a conversation, all turns as one text each."""

    id: Any
    category: str
    question: str
    answers: tuple[str, str]
    reference: str | None = None

    def messages(self, swapped: bool) -> list[dict[str, str]]:
        """What the judge is asked; `swapped` shows the second answer first."""
        first, second = reversed(self.answers) if swapped else self.answers
        reference = "" if self.reference is None else REFERENCE.format(reference=self.reference)
        asked = PROMPT.format(question=self.question, reference=reference, answer_a=first, answer_b=second)
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": asked}]


def read_pairs(questions: Path, first: Path, second: Path, references: Path | None = None) -> list[Pair]:
    """The pairs of all questions.

    Args:
        questions: JSONL with `question_id`, `text` or `turns`, and `category`: Vicuna's or MT-bench's.
        first: JSONL of answers with `question_id`, and `text`, `choices` or `generation`, as `infer batch` writes them.
        second: the other answers.
        references: correct answers in the same form, of some questions.

    Raises:
        PunaError: `path:line: reason`, or a question that one of the two does not answer.
    """
    both = [_by_id(path) for path in (first, second)]
    correct = {} if references is None else _by_id(references)
    pairs = []
    for number, record in enumerate(read_records(questions, {"question_id": object}), 1):
        id, turns = record["question_id"], record.get("turns", [record.get("text")])
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
            raise PunaError(f"{questions}:{number}: no text or turns")
        for path, answers in zip((first, second), both, strict=True):
            if id not in answers:
                raise PunaError(f"{path} does not answer question {id} of {questions}")
        texts = (_conversation(both[0][id], len(turns)), _conversation(both[1][id], len(turns)))
        reference = _conversation(correct[id], len(turns)) if id in correct else None
        pairs.append(Pair(id, str(record.get("category", "all")), _conversation(turns, len(turns)), texts, reference))
    if not pairs:
        raise PunaError(f"{questions}: no questions")
    return pairs


def _by_id(path: Path) -> dict[Any, list[str]]:
    found: dict[Any, list[str]] = {}
    for number, record in enumerate(read_records(path, {"question_id": object}), 1):
        turns = record.get("generation", record.get("text"))  # with a generation, `text` is the question
        choices = record.get("choices")
        if turns is None and isinstance(choices, list) and choices and isinstance(choices[0], dict):
            turns = choices[0].get("turns")
        turns = [turns] if isinstance(turns, str) else turns
        if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
            raise PunaError(f"{path}:{number}: no answer under text, generation or choices")
        if record["question_id"] in found:
            raise PunaError(f"{path}:{number}: question {record['question_id']} is answered twice")
        found[record["question_id"]] = turns
    return found


def _conversation(turns: Sequence[str], count: int) -> str:
    if count == 1:
        return turns[0]
    return "\n\n".join(f"## Turn {number}\n{turn}" for number, turn in enumerate(turns[:count], 1))


def verdict(text: str, swapped: bool) -> str | None:
    """Which answer a judgment prefers: "first", "second" or "tie"; None where it does not say."""
    found = VERDICT.findall(text)
    if not found:
        return None
    return "tie" if found[-1] == "C" else "first" if (found[-1] == "A") != swapped else "second"


def winner(verdicts: Sequence[str | None]) -> str | None:
    """Of the verdicts in both orders: the answer that wins, "tie", or None where either can't be read."""
    if None in verdicts:
        return None
    return verdicts[0] if len(set(verdicts)) == 1 else "tie"


@dataclass(frozen=True)
class Rate:
    """How often the first answers win.

    Attributes:
        wins, ties, losses: questions.
        rate: the share of wins, a tie being half of one.
        low, high: its 95 % interval over resamples of the questions.
    """

    wins: int
    ties: int
    losses: int
    rate: float
    low: float
    high: float


def win_rates(judged: Sequence[Mapping[str, Any]], seed: int = 0) -> dict[str, Rate]:
    """The win rate of the first answers over all questions, and in each category.

    Args:
        judged: of each question its `category` and its `winner`; those without one are left out.
        seed: of the resamples.
    """
    points = {"first": 1.0, "tie": 0.5, "second": 0.0}
    values: dict[str, list[float]] = {"all": []}
    for one in judged:
        if one["winner"] is not None:
            values["all"].append(points[one["winner"]])
            values.setdefault(one["category"], []).append(points[one["winner"]])
    random = np.random.default_rng(seed)
    found = {}
    for name, own in values.items():
        if own:
            means = random.choice(own, (RESAMPLES, len(own))).mean(axis=1)
            low, high = np.quantile(means, (0.025, 0.975))
            wins, ties, losses = (own.count(points[kind]) for kind in ("first", "tie", "second"))
            found[name] = Rate(wins, ties, losses, float(np.mean(own)), float(low), float(high))
    return found


def position_bias(judged: Sequence[Mapping[str, Any]]) -> float:
    """The share of questions whose two verdicts prefer the same place, whichever answer stood there."""
    both = [one["verdicts"] for one in judged if None not in one["verdicts"]]
    return sum(sorted(one) == ["first", "second"] for one in both) / max(1, len(both))


def tokens_of(judged: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Tokens that the judge read and wrote, as the server counted them."""
    return sum(one["tokens"][0] for one in judged), sum(one["tokens"][1] for one in judged)
