"""What a record is, by its keys."""

from collections.abc import Mapping
from typing import Any

from model.errors import PunaError
from train.data.readers import kind

# The keys that make a format, in the order in which they are looked for.
KEYS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "instruction": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "preference": ("chosen", "rejected"),
    "text": ("text",),
}


def detect_format(record: Mapping[str, Any]) -> str:
    """The format whose keys `record` has; keys whose value is null count only where no others fit.

    Raises:
        PunaError: naming the keys it has, where there is none.
    """
    present = {key: value for key, value in record.items() if value is not None}
    for having in (present, record):
        for name, keys in KEYS.items():
            if all(key in having for key in keys):
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
