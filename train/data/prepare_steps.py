"""The steps of preparing conversations: cleaning, filtering, leaving out duplicates, splitting to length.

A step is a function of one record that gives the records it becomes, or drops it for a reason. The rules are FastChat's
for ShareGPT data (cleaning, splitting) and those of the WizardLM data without refusals (phrases).
"""

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from convert.tokenizer_files import find_tokenizer
from model.errors import PunaError
from model.tokenizer import Tokenizer
from train.data.formats import detect_format, text_at
from train.data.markdown import html_to_markdown
from train.data.messages import conversation_of

Record = Mapping[str, Any]
Step = Callable[[Record], list[Record]]

BLOCKED_WORDS = ("openai", "chatgpt")
RATE_LIMITED = ("Too many requests in 1 hour. Try again later.", "!Too many requests in 1 hour. Try again later.")
SHORTEST = 16  # characters in a conversation worth keeping
TURN_TOKENS = 6  # what FastChat counts for a turn beside its text

REFUSALS = (
    *("as an ai language model", "as a language model", "as an ai assistant", "as an artificial intelligence"),
    *("i cannot fulfill", "i can't fulfill", "i cannot comply", "i'm sorry, but i can", "i apologize, but i can"),
    *("it is not appropriate", "it's not appropriate", "against my programming", "ethical guidelines"),
)


class Dropped(Exception):
    """A record is left out, for the reason given."""


def turns_of(record: Record) -> list[dict[str, str]]:
    """The turns of a ShareGPT record.

    Raises:
        Dropped: they are not text under "from" and "value".
    """
    turns = record.get("conversations")
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)
        for turn in turns
    ):
        raise Dropped("has no conversations of from and value")
    return turns


def clean(record: Record) -> list[Record]:
    """A ShareGPT record as Markdown, from a human's turn to an answer: FastChat's rules.

    Raises:
        Dropped: see `turns_of`; or its roles do not alternate, it is too short, or a turn holds a blocked word or a
            rate limit's answer.
    """
    turns = turns_of(record)
    if turns and turns[0]["from"] != "human":
        turns = turns[1:]
    if turns and turns[-1]["from"] == "human":
        turns = turns[:-1]
    kept = []
    for number, turn in enumerate(turns):
        if turn["from"] != ("human", "gpt")[number % 2]:
            raise Dropped("roles do not alternate")
        if any(word in turn["value"].lower() for word in BLOCKED_WORDS):
            raise Dropped("contains a blocked word")
        text = html_to_markdown(turn["value"])
        if turn["from"] == "gpt" and text.startswith(RATE_LIMITED):
            raise Dropped("contains a rate-limit answer")
        if not text or not text[0].isprintable():
            break  # an answer that was never given; what came before stands
        kept.append({"from": turn["from"], "value": text})
    kept = kept[: len(kept) // 2 * 2]
    if sum(len(turn["value"]) for turn in kept) < SHORTEST:
        raise Dropped("is too short")
    return [{**record, "conversations": kept}]


def _texts(record: Record) -> list[tuple[str, str]]:
    """The texts of a record of any format and whose they are: a role, or "text" where there are none."""
    form = detect_format(record)
    if form == "text":
        return [("text", text_at(record, "text"))]
    turns = conversation_of(record, form).messages
    return [(turn["role"], (turn.get("content") or "") + turn.get("input", "")) for turn in turns]


def without_phrases(phrases: Sequence[str] = REFUSALS) -> Step:
    """The step that drops a record of any format in which an answer holds a phrase; others stay as they are.

    Args:
        phrases: what to look for, whatever the case.
    """
    folded = [phrase.casefold() for phrase in phrases]

    def step(record: Record) -> list[Record]:
        answers = [text for role, text in _texts(record) if role in ("assistant", "text")]
        if any(phrase in answer.casefold() for answer in answers for phrase in folded):
            raise Dropped("contains a listed phrase")
        return [record]

    return step


def without_duplicates() -> Step:
    """The step that drops a record whose id, or whose first question and answer, was seen before. It is for one run."""
    seen: set[Any] = set()

    def step(record: Record) -> list[Record]:
        named = json.dumps(record.get("id"))
        if record.get("id") is not None and named in seen:
            raise Dropped("has the id of another")
        texts = json.dumps([text for _, text in _texts(record)[:2]]).encode()
        first = hashlib.blake2b(texts, digest_size=16).digest()  # in place of the texts, which would fill memory
        if first in seen:
            raise Dropped("begins as another does")
        seen.update({first, named})
        return [record]

    return step


def in_script(script: str, share: float = 0.5) -> Step:
    """The step that drops a record which is not mostly in one script.

    This tells languages apart by their writing only: FastChat's filter used a language detector.

    Args:
        script: a Unicode script, as "latin" or "cjk".
        share: the least part of the letters of all texts that is of it.
    """
    name = script.upper()

    def step(record: Record) -> list[Record]:
        letters = [letter for _, text in _texts(record) for letter in text if letter.isalpha()]
        found = sum(unicodedata.name(letter, "").startswith(name) for letter in letters)
        if found < share * len(letters):
            raise Dropped(f"is not mostly {script}")
        return [record]

    return step


def split_long(tokenizer: Tokenizer, max_length: int, lose_last: bool = False) -> Step:
    """The step that splits a ShareGPT record where the next question and answer would take it above a length.

    Parts have the id `<id>_<first turn>`, and an odd last turn goes.

    Args:
        tokenizer: counts the tokens of a turn; TURN_TOKENS are added.
        max_length: most tokens of a part, unless one question and answer are longer.
        lose_last: as FastChat, lose the last pair where that is what causes a split.
    """

    def step(record: Record) -> list[Record]:
        turns = turns_of(record)
        turns = turns[: len(turns) // 2 * 2]
        bos = tokenizer.bos_id is not None
        sizes = [len(tokenizer.encode(turn["value"])) + bos + TURN_TOKENS for turn in turns]
        cuts, total = [0], 0
        for number in range(0, len(turns), 2):
            pair = sizes[number] + sizes[number + 1]
            if total + pair > max_length:
                cuts.append(number)
                total = 0
            total += pair
        if not (lose_last and cuts[-1] == len(turns) - 2 and len(cuts) > 1):
            cuts.append(len(turns))
        return [
            {**record, "id": f"{record.get('id', '')}_{start}", "conversations": turns[start:end]}
            for start, end in zip(cuts, cuts[1:], strict=False)
            if start < end
        ]

    return step


def alternating(record: Record) -> list[Record]:
    """A ShareGPT record as it is.

    Raises:
        Dropped: it is empty, or human and gpt do not take turns.
    """
    turns = turns_of(record)
    if not turns or any(turn["from"] != ("human", "gpt")[number % 2] for number, turn in enumerate(turns)):
        raise Dropped("roles do not alternate")
    return [record]


def identity(name: str, maker: str) -> Iterator[Record]:
    """ShareGPT records in which an assistant says who it is.

    Args:
        name: the assistant's.
        maker: who trained it.
    """
    asked = (
        *("Who are you?", "What is your name?", "Who made you?", "What are you?", "Introduce yourself."),
        *("Who created you?", "Are you a person?", "What should I call you?", "Which model are you?"),
    )
    answers = (
        f"I am {name}, a language model trained by {maker}.",
        f"My name is {name}, and I am a language model developed by {maker}.",
        f"You can call me {name}. I am an assistant trained by {maker}.",
    )
    for number, (question, answer) in enumerate((q, a) for q in asked for a in answers):
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        yield {"id": f"identity_{number}", "conversations": turns}


def chosen_steps(
    cleaned: bool,
    deduplicated: bool,
    refusals: bool,
    phrases: Path | None,
    script: str | None,
    max_length: int | None,
    tokenizer: Path | None,
) -> list[Step]:
    """The steps that the command's options ask for, in order.

    Args:
        cleaned: `clean` records.
        deduplicated: `without_duplicates`.
        refusals: drop REFUSALS.
        phrases: a file, of which each line is a phrase to drop.
        script: see `in_script`.
        max_length: see `split_long`.
        tokenizer: the file or folder of the tokenizer that counts it.

    Raises:
        PunaError: max_length and tokenizer need each other, or there is no tokenizer.
    """
    if (max_length is None) != (tokenizer is None):
        raise PunaError("--max-length counts a tokenizer's tokens: give --max-length and --tokenizer together")
    steps: list[Step] = [clean] if cleaned else []
    if script:
        steps.append(in_script(script))
    if refusals:
        steps.append(without_phrases())
    if phrases:
        lines = phrases.read_text(encoding="utf-8").splitlines()
        steps.append(without_phrases([line for line in lines if line.strip()]))
    if deduplicated:
        steps.append(without_duplicates())
    if max_length is not None and tokenizer is not None:
        steps += [split_long(find_tokenizer(tokenizer), max_length), alternating]
    return steps
