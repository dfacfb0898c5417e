"""Self-Instruct (arXiv:2212.10560) as Alpaca does it: a model continues a list that begins with three of our tasks."""

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from infer.endpoint import Endpoint
from infer.evaluate.task import read_records
from infer.synthesize.requests import Reply
from model.errors import PunaError

SHOWN = 3  # tasks of ours in a request
LIKENESS = 0.7  # ROUGE-L from which on two instructions are one
PROMPT = """Write a list of {count} different tasks that someone might give to a text assistant, each with an answer.

- No two tasks use the same verb. Some are questions, some are orders, in one or two sentences of plain English.
- Mix the kinds: writing, rewriting, sorting into classes, explaining, calculating, summarizing, planning, talking.
- Each can be done in writing alone: nothing to draw, to play or to watch, no clock, no files, no web pages.
- Where a task needs something to work on, the input gives it: real and particular, up to 100 words, no placeholders. \
Where it needs nothing, the input is <noinput>.
- The output is what a good assistant would answer, in fewer than 100 words.

Keep the form of the first ones: ### between two tasks, and numbered Instruction, Input and Output.

{tasks}###
{next}. Instruction:"""
# Words of tasks that text alone cannot do; Alpaca's list.
CANNOT = (
    "image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw", "plot",
    "go to", "video", "audio", "music", "flowchart", "diagram",
)  # fmt: skip
PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"


class SelfInstruct:
    """Tasks from a server's model, until there are enough.

    Args:
        server: who is asked.
        seeds: JSONL of tasks with `instruction` and `instances` of `input` and `output`, as Alpaca's 175; or with
            `input` and `output` themselves.
        count: tasks to make.
        per_request: tasks of a list, the SHOWN ones among them.
        seed: of the choice of tasks that are shown.

    Attributes:
        made: the tasks so far.
        rejected: those left out, each with its `reason`.

    Raises:
        PunaError: `path:line: reason`, or fewer than SHOWN seeds.
    """

    def __init__(self, server: Endpoint, seeds: Path, count: int, per_request: int = 20, seed: int = 0):
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ModuleNotFoundError as error:
            raise PunaError(f"{error.name} is not installed: pip install 'puna[eval]'") from None
        self._rouge = RougeScorer(["rougeL"], use_stemmer=False)
        self.server, self.count, self.per_request, self._seed = server, count, per_request, seed
        self.seeds = [_seed_task(seeds, n, one) for n, one in enumerate(read_records(seeds, {"instruction": str}), 1)]
        if len(self.seeds) < SHOWN:
            raise PunaError(f"{seeds} has {len(self.seeds)} tasks: give {SHOWN} or more")
        self.made: list[dict[str, str]] = []
        self.rejected: list[dict[str, Any]] = []
        self._known = [(one["instruction"], _bag(one["instruction"])) for one in self.seeds]
        self.empty = 0  # requests in a row that gave nothing new

    @property
    def done(self) -> bool:
        """Whether there are enough tasks. Raises PunaError where many requests in a row gave none."""
        if self.empty >= 50 and len(self.made) < self.count:
            raise PunaError(
                f"50 requests in a row gave no new task, after {len(self.made)}: this model cannot continue the list"
            )
        return len(self.made) >= self.count

    def next(self, number: int) -> Callable[[], Reply]:
        """See `Maker`."""
        shown = random.Random(f"{self._seed}/{number}").sample(self.seeds, SHOWN)
        text = "".join(
            f"###\n{n}. Instruction: {one['instruction']}\n{n}. Input:\n{one['input'] or '<noinput>'}\n"
            f"{n}. Output:\n{one['output']}\n"
            for n, one in enumerate(shown, 1)
        )
        prompt = PROMPT.format(count=self.per_request, tasks=text, next=SHOWN + 1)

        def request() -> Reply:
            said, tokens, finish = self.server.complete([{"role": "user", "content": prompt}], number)
            return {"request": number, "text": said, "finish": finish, "tokens": tokens}

        return request

    def take(self, reply: Reply) -> None:
        """See `Maker`."""
        before = len(self.made)
        for task in parse(reply["text"], SHOWN + 1, cut=reply["finish"] == "length"):
            reason = unfit(task) or self._likeness(task["instruction"])
            if reason is None:
                self.made.append(task)
                self._known.append((task["instruction"], _bag(task["instruction"])))
            else:
                self.rejected.append({**task, "request": reply["request"], "reason": reason})
        self.empty = 0 if len(self.made) > before else self.empty + 1
        del self.made[self.count :]

    def _likeness(self, instruction: str) -> str | None:
        bag = _bag(instruction)
        size = bag.total()
        for known, other in self._known:
            # The longest common subsequence has at most the words that both have: most need no more than that.
            if 2 * (bag & other).total() > LIKENESS * (size + other.total()):
                value = self._rouge.score(known, instruction)["rougeL"].fmeasure
                if value > LIKENESS:
                    return f"ROUGE-L {value:.2f} with {known!r}"
        return None


def _bag(text: str) -> Counter[str]:
    return Counter(re.findall(r"[a-z0-9]+", text.lower()))  # rouge-score's words


def _seed_task(path: Path, number: int, record: dict[str, Any]) -> dict[str, str]:
    instances = record.get("instances")
    one = instances[0] if isinstance(instances, list) and instances else record
    if not isinstance(one, dict) or not isinstance(one.get("output"), str):
        raise PunaError(f"{path}:{number}: no output")
    given = one.get("input") or ""
    if not isinstance(given, str):
        raise PunaError(f"{path}:{number}: input is no text")
    return {"instruction": " ".join(record["instruction"].split()).rstrip(":"), "input": given, "output": one["output"]}


def parse(text: str, first: int, cut: bool) -> list[dict[str, str]]:
    """The tasks of a reply that continues a list.

    Args:
        text: the reply, which begins within or at task number `first`.
        first: that number.
        cut: whether the reply was ended by its length: its last task is left out.
    """
    begins = re.match(r"\s*(#+\s*)?\d+\s*\.\s*Instruction\s*:", text)
    pieces = re.split("###", text if begins else f"{first}. Instruction:{text}")
    pieces = [piece for piece in pieces if piece.strip()]
    found = []
    for piece in pieces[:-1] if cut else pieces:
        parts = re.split(r"\d+\s*\.\s+(Instruction|Input|Output)\s*:", piece)
        if len(parts) != 7 or parts[1::2] != ["Instruction", "Input", "Output"]:
            continue
        instruction, given, output = (part.strip() for part in parts[2::2])
        found.append({
            "instruction": instruction, "input": "" if given.lower() == "<noinput>" else given, "output": output,
        })  # fmt: skip
    return found


def unfit(task: dict[str, str]) -> str | None:
    """Why a task is left out, by Alpaca's rules; None where it may stay."""
    text = task["instruction"]
    words = text.split()
    if not 4 <= len(words) <= 150:
        return f"{len(words)} words: not from 4 to 150"
    if word := next((word for word in CANNOT if re.search(rf"\b{word}\b", text, re.IGNORECASE)), None):
        return f"text alone cannot do it: {word}"
    if text.startswith("Write a program"):
        return "begins with 'Write a program'"
    if text[0] in PUNCTUATION:
        return "begins with punctuation"
    if not text[0].isascii():
        return "begins with no ASCII character"
    return None


def reasons(rejected: Sequence[dict[str, Any]]) -> Counter[str]:
    """How many tasks were left out, by the kind of reason."""
    return Counter(re.split(r"[:\d]", one["reason"], maxsplit=1)[0].strip() or "length" for one in rejected)
