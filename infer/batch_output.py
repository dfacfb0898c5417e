"""The files that `batch` writes, line by line, so that a job killed at any moment goes on where it stood.

While a job runs its answers go to OUT.part and its rejects to REJECTS.part, each in the order of the input, and
OUT.part.json says what the job is. Every line of the input leaves exactly one line in one of the two, so what they
hold tells where to go on. At the end OUT.part.json is marked complete, and then both get their names.
"""

import fcntl
import json
import os
import time
from array import array
from collections.abc import Iterable
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from typing import Any

from cli.command import Interrupted
from cli.files import write_json
from model.errors import PunaError
from model.json_file import read_json

SYNC_SECONDS = 5.0  # between two times that the disk is told to keep what is written: what a power cut may cost


class Output:
    """The answers and rejects of one job, open for appending; `answered` and `rejected` are their lines so far.

    Use as a context manager. `complete` is whether nothing is left to do: a job that was killed between its last line
    and its end.

    Args:
        header: what the job is; a job is gone on with only where all of it is the same.
        overwrite: replace what stands at `out` and `rejects`, and begin anew where the header differs.

    Raises:
        PunaError: `out` or `rejects` exists, a job of another header was begun, or another process is writing.
    """

    def __init__(self, out: Path, rejects: Path, header: dict[str, Any], overwrite: bool):
        self.out, self.rejects = out, rejects
        self.part, self.rejects_part = _part(out), _part(rejects)
        self._header = out.with_name(f"{out.name}.part.json")
        self.answered = self.rejected = 0
        self.complete = self._finish_earlier(header)
        if self.complete:
            return
        for path in (out, rejects):
            if os.path.lexists(path) and not overwrite:
                raise PunaError(f"{path} exists: give another destination, or overwrite=True to replace it")
        out.parent.mkdir(parents=True, exist_ok=True)
        rejects.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opened:
            self._answers = opened.enter_context(_lock(self.part))
            self._check(header, overwrite)
            self._refusals = opened.enter_context(FileIO(self.rejects_part, "a"))
            self._begin(header)
            self._files = opened.pop_all()
        self._synced, self._refusals_synced, self._ending = time.monotonic(), True, False

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Closes the files. A job that ended before its first line leaves none."""
        if self.complete:
            return
        if error is not None and self._empty() and not self._ending:
            for path in (self._header, self.rejects_part, self.part):
                path.unlink(missing_ok=True)
        elif isinstance(error, Interrupted):
            error.outcome = f"what is done is in {self.part}, and the same command goes on from there"
        self._files.close()

    def _empty(self) -> bool:
        return not any(path.exists() and path.stat().st_size for path in (self.part, self.rejects_part))

    # --- where to go on

    def _begun(self) -> dict[str, Any] | None:
        return read_json(self._header) if self._header.exists() else None

    def _check(self, header: dict[str, Any], overwrite: bool) -> None:
        begun = self._begun()
        if begun != header and not self._empty() and not overwrite:
            raise PunaError(f"{_difference(self.part, begun, header)}, or overwrite=True to begin anew")

    def _begin(self, header: dict[str, Any]) -> None:
        if self._begun() != header:
            self._answers.truncate(0)
            self._refusals.truncate(0)
            self._write_header(header)

    def resume(self, numbers: Iterable[int]) -> int:
        """The number of the last line that is done, 0 for none; what is beyond, or was cut short, is removed.

        Args:
            numbers: those of the lines to answer, in order.
        """
        answers, size = _whole_lines(self.part)
        self._answers.truncate(size)
        refused = array("Q", map(self._refused_number, _lines(self.rejects_part)))
        last = 0
        for number in numbers:
            if self.rejected < len(refused) and refused[self.rejected] == number:
                self.rejected += 1
            elif self.answered < answers:
                self.answered += 1
            else:
                break
            last = number
        if self.answered < answers:
            raise PunaError(f"{self.part} holds more lines than the input asks for: overwrite=True begins anew")
        self._refusals.truncate(_size_of_lines(self.rejects_part, self.rejected))
        return last

    def _refused_number(self, line: bytes) -> int:
        """The number of the line of the input that a reject is about."""
        try:
            number = int(json.loads(line)["where"].rsplit(":", 1)[1])
            array("Q", [number])
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
            raise PunaError(
                f"{self.rejects_part} holds a line that no batch has written, so that it cannot be said where to go "
                "on: overwrite=True begins anew"
            ) from None
        return number

    # --- the lines

    def answer(self, value: dict[str, Any]) -> None:
        """Appends an answer. The rejects before it reach the disk first: `resume` counts on their order."""
        if not self._refusals_synced:
            os.fsync(self._refusals.fileno())
            self._refusals_synced = True
        _append(self._answers, value)
        self.answered += 1
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._answers.fileno())
            self._synced = time.monotonic()

    def reject(self, value: dict[str, Any]) -> None:
        """Appends a reject."""
        _append(self._refusals, value)
        self.rejected += 1
        self._refusals_synced = False

    def finish(self) -> None:
        """Gives the files their names. No rejects leave no file."""
        self._ending = True
        for file in (self._answers, self._refusals):
            os.fsync(file.fileno())
        self._write_header(read_json(self._header) | {"complete": [self.answered, self.rejected]})
        self._rename()

    def _write_header(self, header: dict[str, Any]) -> None:
        """In one step: there is never a moment without the old one or the new."""
        temporary = self._header.with_name(f".{self._header.name}.tmp")
        write_json(temporary, header)
        temporary.replace(self._header)

    def _finish_earlier(self, header: dict[str, Any]) -> bool:
        """Ends what a killed process left complete; whether it was this very job."""
        earlier = self._begun() or {}
        counts = earlier.pop("complete", None)
        if counts is None:
            return False
        self._rename()
        self.answered, self.rejected = counts if earlier == header else (0, 0)
        return earlier == header

    def _rename(self) -> None:
        """Each step may have been taken before: a process may be killed between any two."""
        if self.rejects_part.exists():
            if self.rejects_part.stat().st_size:
                self.rejects_part.replace(self.rejects)
            else:
                self.rejects.unlink(missing_ok=True)
                self.rejects_part.unlink()
        if self.part.exists():
            self.part.replace(self.out)
        self._header.unlink()


def read_answers(path: Path) -> list[dict[str, Any]]:
    """The objects of a whole file of answers."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _lock(path: Path) -> FileIO:
    """The file open for appending, and by no other process of ours. The lock goes with the process, however it ends."""
    file = FileIO(path, "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
    except BlockingIOError:
        mine = False
    if not mine:
        file.close()
        raise PunaError(f"{path} is being written by another process: wait for it, or give another destination")
    return file


def _append(file: FileIO, value: dict[str, Any]) -> None:
    data = memoryview(json.dumps(value, ensure_ascii=False).encode() + b"\n")
    while data:
        data = data[file.write(data) :]


def _whole_lines(path: Path) -> tuple[int, int]:
    """How many lines end in a newline, and how many bytes they have."""
    count = size = 0
    for line in _lines(path):
        count, size = count + 1, size + len(line)
    return count, size


def _lines(path: Path) -> Iterable[bytes]:
    with path.open("rb") as file:
        yield from (line for line in file if line.endswith(b"\n"))


def _size_of_lines(path: Path, count: int) -> int:
    return sum(len(line) for line, _ in zip(_lines(path), range(count), strict=False))


def _difference(part: Path, begun: dict[str, Any] | None, header: dict[str, Any]) -> str:
    """What is said of a job that was begun as another."""
    if begun is None:
        return f"{part} exists without {part.name}.json, which would say what it is: remove it"
    name = next(name for name in [*header, *begun] if begun.get(name) != header.get(name))
    if name == "input":
        return f"{part} was begun on other lines: the input has changed since. Give the input it was begun with"
    if name in ("model", "adapters"):
        return f"{part} was begun with other files of the {name}: give those it was begun with"
    old, new = (json.dumps(value.get(name)) for value in (begun, header))
    return f"{part} was begun with {name} {old}, and now it is {new}: give the settings it was begun with"
