"""A task: questions from files, answers from a model, and what the answers amount to."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from infer.evaluate.subject import Subject
from model.errors import PunaError

Answer = dict[str, Any]  # what is kept of one question: a JSON object


@dataclass(frozen=True)
class Scores:
    """What the answers of one model amount to.

    Attributes:
        overall: by name, the one to compare models by first.
        groups: the first of `overall`, for each part of the task.
        count: questions.
        files: further files that the task's publishers ask for: names and JSON values.
    """

    overall: dict[str, float]
    groups: dict[str, float] = field(default_factory=dict)
    count: int = 0
    files: dict[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """Questions, each of which leaves one answer, in order."""

    name: str

    def __len__(self) -> int: ...

    def answer(self, subject: Subject, first: int, last: int) -> Sequence[Answer]:
        """The answers to the questions from `first` up to, not including, `last`."""
        ...

    def scores(self, answers: Sequence[Answer]) -> Scores:
        """What all answers amount to."""
        ...


def check_file(path: Path) -> None:
    """Raises PunaError where `path` is no file."""
    if path.is_dir():
        raise PunaError(f"{path} is a folder: give a file of it")
    if not path.exists():
        raise PunaError(f"{path} is missing")


def read_csv(path: Path, columns: Sequence[str], header: bool) -> list[dict[str, str]]:
    """The rows of a CSV file.

    Args:
        path: a UTF-8 file.
        columns: the names that each row must have; what else it has is left out.
        header: whether the first row names the columns; else they are `columns`, in order.

    Raises:
        PunaError: `path:line: reason`.
    """
    with _open(path) as file:
        reader = csv.DictReader(file) if header else csv.DictReader(file, fieldnames=columns)
        rows = []
        try:
            for row in reader:
                if missing := [name for name in columns if not isinstance(row.get(name), str)]:
                    raise PunaError(f"{path}:{reader.line_num}: column {missing[0]} is missing")
                rows.append({name: row[name] for name in columns})
        except (csv.Error, UnicodeDecodeError) as error:
            raise PunaError(f"{path}:{reader.line_num + 1}: {error}") from None
    return rows


def read_records(path: Path, columns: Mapping[str, type]) -> Iterator[dict[str, Any]]:
    """The objects of a JSON file that holds a list, or of a JSONL file.

    Args:
        path: a UTF-8 file.
        columns: the keys that each object must have, with the type of the value.

    Raises:
        PunaError: `path:line: reason`; the number of an object stands for its line in a list.
    """
    with _open(path) as file:
        try:
            text = file.read()
        except UnicodeDecodeError as error:
            raise PunaError(f"{path}: {error}") from None
    if text.lstrip().startswith("["):
        records = list(enumerate(_decoded(text, str(path)), 1))
    else:
        lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
        records = [(number, _decoded(line, f"{path}:{number}")) for number, line in lines]
    for number, record in records:
        for name, kind in columns.items():
            if not isinstance(record, dict) or name not in record:
                raise PunaError(f"{path}:{number}: {name} is missing")
            if not isinstance(record[name], kind):
                raise PunaError(f"{path}:{number}: {name} is {record[name]!r}, which is no text")
        yield record


def _decoded(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PunaError(f"{where}: not valid JSON: {error}") from None


def _open(path: Path) -> Any:
    check_file(path)
    return path.open(encoding="utf-8-sig", newline="")
