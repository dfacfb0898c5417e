"""Answers every line of a JSONL file: the lines come as a stream, many are worked on at once, the answers go out in
order. What a line may be is in `batch_kinds.py`, how a job survives being killed in `batch_output.py`.
"""

import hashlib
import json
import math
import os
import time
from array import array
from codecs import BOM_UTF8
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from cli.files import check_apart
from cli.lines import read_raw_lines
from infer.batch_kinds import KINDS, Kind, NoTemplate, Record, Settings, check_record, kind_of, make_request
from infer.batch_openai import shown
from infer.batch_output import Output
from infer.engine import Engine, Progress
from model.errors import PunaError

UNFINISHED = 2  # lines in work for each row of the engine: a row that is free finds the next one waiting
WAITING = 64  # lines for each row that may be done and wait for an earlier one; they hold text alone


class Line(NamedTuple):
    """A line of the input that is not blank: its number, from 1, and its bytes as they stand."""

    number: int
    raw: bytes


def read_lines(path: Path, shard: tuple[int, int] = (0, 1)) -> Iterator[Line]:
    """The lines with (number - 1) % N == I of the shard I/N that are not blank. A byte order mark is nothing."""
    for number, raw in read_raw_lines(path):
        raw = raw.removeprefix(BOM_UTF8) if number == 1 else raw
        if (number - 1) % shard[1] == shard[0] and raw.strip():
            yield Line(number, raw)


def decode(raw: bytes) -> Record:
    """The object that a line holds.

    Raises:
        PunaError: it is no UTF-8, no JSON or no object, or holds what JSON cannot say (NaN, lone surrogates).
    """
    try:
        value = json.loads(raw.decode(), parse_constant=_refuse_constant, parse_float=_finite)
        if b"\\u" in raw:  # the only way to write a lone surrogate
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise PunaError(f"is not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start}") from None
    except UnicodeEncodeError as error:
        raise PunaError(f"holds the lone surrogate {ascii(error.object[error.start])}, which is no text") from None
    except RecursionError:
        raise PunaError("is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise PunaError(f"is not valid JSON: {error.msg} at column {error.colno}") from None
    except ValueError as error:
        raise PunaError(f"is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise PunaError(f"expected an object, got {shown(value)}")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def parse_shard(text: str) -> tuple[int, int]:
    """I and N of "I/N".

    Raises:
        PunaError: it is none.
    """
    index, _, count = text.partition("/")
    if not index.isdecimal() or not count.isdecimal() or int(index) >= int(count):
        raise PunaError(f"--shard {text}: give I/N, such as 0/4, with I from 0 to N - 1")
    return int(index), int(count)


# --- what the file holds


class Survey(NamedTuple):
    """What one pass over the input finds.

    Args:
        digest: SHA-256 of the file.
        told_by: the number of the first good line.
        lines: those of the shard that are not blank.
        doubled: of each line whose id an earlier one has, the number of that one.
    """

    kind: Kind
    told_by: int | None
    digest: str
    lines: int
    doubled: Mapping[int, int]


def survey(path: Path, name: str = "auto", shard: tuple[int, int] = (0, 1)) -> Survey:
    """Reads the whole input once: the kind of its lines, their number, and ids that come twice.

    Raises:
        PunaError: `name` is "auto" and no line is of a kind that we know.
    """
    with Console(stderr=True).status(f"Reading {path}"):
        found = _survey(path, name, shard)
        with path.open("rb") as file:
            return found._replace(digest=hashlib.file_digest(file, "sha256").hexdigest())


def _survey(path: Path, name: str, shard: tuple[int, int]) -> Survey:
    kind, told_by = KINDS.get(name), None
    digests, numbers, count, fault = bytearray(), array("Q"), 0, ""
    for number, raw in read_lines(path):
        count += (number - 1) % shard[1] == shard[0]
        if kind is not None and kind.id is None and told_by is not None:
            continue
        try:
            record = decode(raw)
            kind = kind or kind_of(record)
            if kind is None:
                raise PunaError(f"no kind has lines with these keys: {', '.join(record) or 'none'}")
            check_record(record, kind)
        except PunaError as error:
            fault = fault or f"{path}:{number}: {error}"
            continue  # said when its turn to be answered comes
        told_by = told_by or number
        if kind.id is not None:
            digests += hashlib.blake2b(json.dumps(record[kind.id]).encode(), digest_size=16).digest()
            numbers.append(number)
    if kind is None:
        if not fault:
            raise PunaError(f"{path} holds no line")
        raise PunaError(
            f"{path} holds no line of a kind that we know: give kind='openai', 'wizardlm', 'mt_bench', 'vicuna' or "
            f"'prompt', and the rejects will say what is wrong with each line. {fault}"
        )
    return Survey(kind, told_by, "", count, _doubled(digests, numbers))


def _doubled(digests: bytearray, numbers: array) -> dict[int, int]:
    """16 bytes a line, sorted, instead of a set of ids: an input of gigabytes is surveyed in little memory."""
    keys = np.frombuffer(digests, "<u8").reshape(-1, 2)
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: equal ids stay in the order of their lines
    same = np.concatenate([[False], (keys[order[1:]] == keys[order[:-1]]).all(axis=1)])[: len(order)]
    first, found = 0, {}
    for place in np.flatnonzero(same).tolist():
        first = order[place - 1] if not same[place - 1] else first
        found[numbers[order[place]]] = numbers[first]
    return found


# --- answers


class Outcome(NamedTuple):
    """What became of a line: an answer or, where `answered` is false, a reject; and the tokens that were made."""

    number: int
    value: Record
    answered: bool
    tokens: int


@dataclass
class _Work:
    """A line that is being answered: `current` is the request in work."""

    line: Line
    record: Record = field(default_factory=dict)
    answers: list[Progress] = field(default_factory=list)
    current: Progress | None = None
    outcome: Outcome | None = None


class Answers:
    """Answers lines of one kind with an engine that nobody else steps.

    Args:
        path: what rejects call the input.
        doubled: see `Survey`.
    """

    def __init__(self, engine: Engine, kind: Kind, settings: Settings, path: Path, doubled: Mapping[int, int]):
        self._engine, self._kind, self._settings = engine, kind, settings
        self._path, self._doubled = path, doubled

    def run(self, lines: Iterable[Line], rows: int) -> Iterator[Outcome]:
        """One outcome for each line, in order. Few lines are held at once, however many there are."""
        coming = iter(lines)
        held: deque[_Work] = deque()
        unfinished: list[_Work] = []
        while True:
            while len(unfinished) < UNFINISHED * rows and len(held) < WAITING * rows and (line := next(coming, None)):
                held.append(work := _Work(line))
                self._begin(work)
                unfinished += [work] if work.outcome is None else []
            if unfinished:
                self._engine.step()
            for work in unfinished:
                if work.current is not None and work.current.finish is not None:
                    work.answers.append(work.current)
                    self._go_on(work)
            unfinished = [work for work in unfinished if work.outcome is None]
            if not held:
                return
            while held and (outcome := held[0].outcome) is not None:
                held.popleft()
                yield outcome

    def _begin(self, work: _Work) -> None:
        try:
            work.record = decode(work.line.raw)
            check_record(work.record, self._kind)
            if earlier := self._doubled.get(work.line.number):
                raise PunaError(f"{self._kind.id} {json.dumps(work.record[self._kind.id or ''])} is line {earlier}'s")
        except PunaError as error:
            self._reject(work, error)
            return
        self._go_on(work)

    def _go_on(self, work: _Work) -> None:
        """Asks what the line asks next, or writes its answer."""
        kind, record, number = self._kind, work.record, work.line.number
        if len(work.answers) == kind.turns(record):
            self._end(work, kind.write(record, work.answers, self._settings))
            return
        texts = [answer.text for answer in work.answers]
        try:
            work.current = self._engine.submit(make_request(kind, record, texts, number, self._settings))
        except NoTemplate:
            raise
        except PunaError as error:
            if kind.on_error is not None:
                self._end(work, kind.on_error(record, error))
            else:
                self._reject(work, error)

    def _reject(self, work: _Work, error: PunaError) -> None:
        line = work.line.raw.decode(errors="replace").rstrip("\r\n")
        value = {"where": f"{self._path}:{work.line.number}", "reason": str(error), "line": line}
        self._end(work, value, answered=False)

    def _end(self, work: _Work, value: Record, answered: bool = True) -> None:
        work.outcome = Outcome(work.line.number, value, answered, sum(len(answer.tokens) for answer in work.answers))


# --- a job


@dataclass(frozen=True)
class Files:
    """What a job reads and writes; of shard I/N the lines with (number - 1) % N == I alone are answered."""

    lines: Path
    out: Path
    rejects: Path | None = None
    shard: tuple[int, int] = (0, 1)

    @property
    def refused(self) -> Path:
        """Where the rejects go: beside `out` unless said otherwise."""
        return self.rejects or self.out.with_name(f"{self.out.stem}.rejects{self.out.suffix or '.jsonl'}")

    def check(self) -> None:
        """Raises PunaError where two of them are one, or the input is a pipe."""
        if self.lines.exists() and not self.lines.is_file():
            raise PunaError(f"{self.lines} is no file, and is read more than once: give a file")
        for written in (self.out, self.refused):
            check_apart(written, self.lines)
        if self.out.absolute() == self.refused.absolute():
            raise PunaError(f"rejects={self.refused} is the output too: give another file")


def run_job(
    files: Files,
    found: Survey,
    settings: Settings,
    header: dict[str, Any],
    rows: int,
    make_engine: Callable[[], Engine],
    overwrite: bool = False,
) -> str:
    """Answers the lines that are not answered yet; returns what is to be said at the end.

    Args:
        found: the survey of `files.lines`.
        header: what answers depend on beside the input: a job that was begun is gone on with under these alone.
        rows: of the engine that `make_engine` makes, which is asked once the files are known to be in order.

    Raises:
        PunaError: see `Output`; or messages that no template is there for.
    """
    place = os.path.relpath(files.refused.absolute(), files.out.absolute().parent)  # the folder may move in between
    header = {"input": found.digest, "kind": found.kind.name, "shard": list(files.shard), "rejects": place} | header
    made, started = 0, time.monotonic()
    with Output(files.out, files.refused, header, overwrite) as output:
        if not output.complete:
            last = output.resume(number for number, _ in read_lines(files.lines, files.shard))
            lines = (line for line in read_lines(files.lines, files.shard) if line.number > last)
            answers = Answers(make_engine(), found.kind, settings, files.lines, found.doubled)
            started = time.monotonic()
            with _bar(found.lines, output.answered + output.rejected) as advance:
                for outcome in answers.run(lines, rows):
                    (output.answer if outcome.answered else output.reject)(outcome.value)
                    made += outcome.tokens
                    advance(outcome.tokens)
            output.finish()
    seconds = time.monotonic() - started
    rejected = f"{output.rejected} rejected" + (f" (see {files.refused})" if output.rejected else "")
    speed = f"{made:,} tokens in {seconds:.1f} s, {made / max(seconds, 1e-9):,.0f} tokens/s"
    return f"{files.out}: {output.answered} answered, {rejected}; {speed}"


@contextmanager
def _bar(total: int, done: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr with the time left and tokens a second; yields what hears of each line and its tokens."""
    columns = (
        TextColumn("Answering"), BarColumn(), MofNCompleteColumn(), TextColumn("lines"),
        TextColumn("{task.fields[rate]:,.0f} tokens/s"), TimeRemainingColumn(elapsed_when_finished=True),
    )  # fmt: skip
    made, started = 0, time.monotonic()
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, completed=done, rate=0.0)

        def advance(tokens: int) -> None:
            nonlocal made
            made += tokens
            bar.update(task, advance=1, rate=made / (time.monotonic() - started))

        yield advance


def fingerprint(place: Path) -> str:
    """A digest of a file, or of all files of a folder: names, sizes, and the first and last MiB of each, so that the
    weights of a large model need not be read. Another training step changes it; a copy or a new date does not."""
    sum_ = hashlib.sha256()
    paths = [place] if place.is_file() else sorted(place.rglob("*"))
    paths = [path for path in paths if path.is_file() and ".jsonl" not in path.suffixes]  # what a job may write there
    for path in paths:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(1 << 20)
            file.seek(max(0, size - (1 << 20)))
            parts = (str(path.relative_to(place)).encode(), str(size).encode(), first, file.read())
        for part in parts:
            sum_.update(hashlib.sha256(part).digest())
    return sum_.hexdigest()
