"""What a record means: its keys and types are checked, and it becomes the messages of a conversation, or text."""

from collections.abc import Mapping
from typing import Any

from model.chat import Message
from model.errors import PunaError
from train.data.readers import kind

# The keys that make a format, in the order in which they are looked for.
KEYS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "instruction": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "system": "system",
}


def detect_format(record: Mapping[str, Any]) -> str:
    """The format whose keys `record` has.

    Raises:
        PunaError: naming the keys it has, where there is none.
    """
    for name, keys in KEYS.items():
        if all(key in record for key in keys):
            return name
    known = "; ".join(" and ".join(keys) for keys in KEYS.values())
    raise PunaError(
        f"keys {', '.join(map(repr, record))} are those of no format ({known}): rename them with data.columns, "
        "or give a data.template with {column} placeholders"
    )


def rename(record: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """A record with its columns under our keys.

    Args:
        record: as it was read.
        columns: our key -> the record's; the record keeps its own keys too.

    Raises:
        PunaError: for a column that it lacks.
    """
    missing = [column for column in columns.values() if column not in record]
    if missing:
        raise PunaError(f"column {missing[0]!r}, named in data.columns, is missing")
    return {**record, **{key: record[column] for key, column in columns.items()}} if columns else record


def text_at(record: Mapping[str, Any], key: str) -> str:
    """The text under `key`.

    Raises:
        PunaError: it is missing or something else.
    """
    if key not in record:
        raise PunaError(f"key {key!r} is missing; the record has {', '.join(map(repr, record)) or 'no keys'}")
    if not isinstance(record[key], str):
        raise PunaError(f"key {key!r}: expected text, got {kind(record[key])}")
    return record[key]


def messages_of(record: Mapping[str, Any], form: str) -> list[Message]:
    """The conversation that a record holds.

    Args:
        record: under our keys.
        form: a key of KEYS, but not "text".

    Raises:
        PunaError: a key is missing, null or not text, or a role is unknown.
    """
    if form == "instruction":
        asked = {"role": "user", "content": text_at(record, "instruction")}
        if "input" in record:
            asked["input"] = text_at(record, "input")
        return [asked, {"role": "assistant", "content": text_at(record, "output")}]
    if form == "prompt_completion":
        answer = {"role": "assistant", "content": text_at(record, "completion")}
        return [{"role": "user", "content": text_at(record, "prompt")}, answer]
    role_key, text_key = ("role", "content") if form == "messages" else ("from", "value")
    turns = record.get(form)
    if not isinstance(turns, list) or not turns:
        found = "is missing" if form not in record else f"expected a list with messages, got {kind(turns)}"
        raise PunaError(f"key {form!r}: {found if turns != [] else 'the list is empty'}")
    messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise PunaError(f"{form}[{number}]: expected an object, got {kind(turn)}")
        try:
            role, text = text_at(turn, role_key), text_at(turn, text_key)
        except PunaError as error:
            raise PunaError(f"{form}[{number}]: {error}") from None
        if form == "conversations" and role not in ROLES:
            raise PunaError(f"{form}[{number}]: role {role!r} is unknown; it must be one of {', '.join(ROLES)}")
        messages.append({"role": ROLES[role] if form == "conversations" else role, "content": text})
    return messages
