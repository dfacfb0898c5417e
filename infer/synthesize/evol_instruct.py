"""Evol-Instruct (WizardLM, arXiv:2304.12244): a model makes instructions harder, or new of their kind, and answers."""

import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infer.endpoint import Endpoint
from infer.evaluate.task import read_records
from infer.synthesize.requests import Reply
from model.errors import PunaError

HARDER = """Rewrite the instruction below into one that is a little harder for a good assistant, still makes sense to \
a person, and can be answered in text. {how} Keep tables, code and whatever else it works on. Add 10 to 20 words, \
not more. Answer with the new instruction alone.

# Instruction
{instruction}"""
WAYS = {
    "constraints": HARDER.replace("{how}", "Add one more requirement that the answer must meet."),
    "deepening": HARDER.replace("{how}", "Where it asks about something, ask for more depth and breadth."),
    "concretizing": HARDER.replace("{how}", "Replace something general by something particular."),
    "reasoning": HARDER.replace("{how}", "Where a few simple thoughts would do, ask for several steps of reasoning."),
    "breadth": """Write a new instruction of the same field as the one below, rarer than it, about as long and as \
hard, that makes sense to a person and can be answered in text. Answer with the new instruction alone.

# Instruction
{instruction}""",
}
# What a rewriting that talks about itself says.
OWN_WORDS = re.compile(r"(given|rewritten|new|created|original) (prompt|instruction)|# ?instruction", re.IGNORECASE)
STOP_WORDS = set("a an and are as at be by for from in is it no not of on or so that the this to was with yes".split())


class EvolInstruct:
    """Each instruction, in each round, is evolved by one way drawn for it, and answered.

    An evolution that fails leaves the instruction as it was for the next round (the paper's elimination): where it is
    the same, speaks of itself, or its answer is a short excuse or no words at all.

    Args:
        server: who is asked.
        seeds: JSON or JSONL of records with `instruction`, and `input` if any.
        rounds: of evolution.
        seed: of the ways.

    Attributes:
        made: evolved instructions with their answers.
        rejected: evolutions that failed, each with its `reason`.

    Raises:
        PunaError: `path:line: reason`, or no instructions.
    """

    def __init__(self, server: Endpoint, seeds: Path, rounds: int = 4, seed: int = 0):
        self.server, self.rounds, self._seed = server, rounds, seed
        self.current = []
        for record in read_records(seeds, {"instruction": str}):
            given = record.get("input")
            self.current.append(record["instruction"] + (f"\n{given}" if given and isinstance(given, str) else ""))
        if not self.current:
            raise PunaError(f"{seeds} has no instructions")
        self.made: list[dict[str, Any]] = []
        self.rejected: list[dict[str, Any]] = []
        self._taken = 0

    @property
    def count(self) -> int:
        """Requests of all rounds."""
        return self.rounds * len(self.current)

    @property
    def done(self) -> bool:
        """See `Maker`."""
        return self._taken >= self.count

    def next(self, number: int) -> Callable[[], Reply] | None:
        """See `Maker`. A round begins when the one before it is through."""
        round_, index = divmod(number - 1, len(self.current))
        if number > self.count or round_ * len(self.current) > self._taken:
            return None
        before = self.current[index]
        way = random.Random(f"{self._seed}/{number}").choice(list(WAYS))

        def request() -> Reply:
            asked = WAYS[way].format(instruction=before)
            text, read, _ = self.server.complete([{"role": "user", "content": asked}], number)
            instruction = text.strip()
            answer, written = "", [0, 0]
            if unfit_instruction(before, instruction) is None:
                answer, written, _ = self.server.complete([{"role": "user", "content": instruction}], number)
            return {
                "request": number, "round": round_ + 1, "way": way, "from": before, "instruction": instruction,
                "output": answer.strip(), "tokens": [a + b for a, b in zip(read, written, strict=True)],
            }  # fmt: skip

        return request

    def take(self, reply: Reply) -> None:
        """See `Maker`."""
        reason = unfit_instruction(reply["from"], reply["instruction"]) or unfit_answer(reply["output"])
        kept = {name: reply[name] for name in ("instruction", "output", "round", "way", "from")}
        if reason is None:
            self.current[(reply["request"] - 1) % len(self.current)] = reply["instruction"]
            self.made.append(kept)
        else:
            self.rejected.append({**kept, "reason": reason})
        self._taken += 1


def unfit_instruction(before: str, after: str) -> str | None:
    """Why an evolved instruction is no gain; None where it may be one."""
    if not after:
        return "empty"
    if Counter(after.lower().split()) == Counter(before.lower().split()):
        return "the same instruction"
    if found := OWN_WORDS.search(after):
        return f"speaks of itself: {found[0]}"
    return None


def unfit_answer(text: str) -> str | None:
    """Why an answer shows that its instruction is too hard, or none; None where it is an answer."""
    words = re.findall(r"\w+", text.lower())
    if set(words) <= STOP_WORDS:
        return "no answer in words"
    if "sorry" in words and len(words) < 80:
        return "a short excuse"
    return None
