"""Conversations made ready for training: put through steps and written, one by one, so that memory does not grow with
them; what became of them is counted and said in a report."""

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from cli.files import atomic_path, sha256_of
from model.errors import PunaError
from train.data.permute import mix_key, permute
from train.data.prepare_steps import Dropped, Record, Step
from train.data.readers import Faults, SourceRecord, read_rows

NAMED_PLACES = 5  # of each reason, in the report


@dataclass
class Report:
    """What became of records.

    Attributes:
        counts: how many were read, kept, held out, and dropped for each reason.
        places: `path:line` of the first records dropped for each reason.
    """

    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def dropped(self, reason: str, path: str, line: int) -> None:
        """Notes a record that is left out."""
        self.counts[f"dropped: {reason}"] += 1
        places = self.places.setdefault(reason, [])
        if len(places) < NAMED_PLACES:
            places.append(f"{path}:{line}")


def apply(
    rows: Iterable[SourceRecord], steps: Sequence[Step], report: Report, faults: Faults
) -> Iterator[tuple[int, Record]]:
    """The records of `rows` after all steps, in order, each with the number of the row that it comes from.

    Args:
        rows: the records.
        steps: each is applied to what the one before has made of a record.
        report: gets what became of them.
        faults: gets what is wrong with a record.
    """
    for number, (path, line, record) in enumerate(rows):
        report.counts["read"] += 1
        current: list[Record] = [record]
        for step in steps:
            following: list[Record] = []
            for each in current:
                try:
                    following += step(each)
                except Dropped as reason:
                    report.dropped(str(reason), path, line)
                except PunaError as error:
                    faults.add(path, line, str(error))
            current = following
        report.counts["kept"] += len(current)
        yield from ((number, each) for each in current)


def prepare(
    sources: Sequence[str],
    destination: str | Path,
    steps: Sequence[Step],
    added: Sequence[Record] = (),
    test: str | Path | None = None,
    test_fraction: float = 0.05,
    overwrite: bool = False,
) -> Counter[str]:
    """Read sources, put every record through the steps, and write what is left, and a report beside it.

    Args:
        sources: files, folders or Hub data sets, read one after another (and so merged).
        destination: the file to write: a JSON list where it ends in .json, else JSON lines. The report, as JSON, has
            its name with ".report" added: the counts, the first places of each reason, the SHA-256 of what was written.
        steps: see `apply`.
        added: records to append.
        test: a file for the part held out of `destination`; None holds nothing out.
        test_fraction: how much is held out, of the records as they were read: what one becomes stays together.
        overwrite: replace what stands at `destination`, `test` and the report.

    Returns:
        What `apply` counts, and how many were held out.

    Raises:
        PunaError: the sources have faults (named by line), nothing is left to train on, a file is there already,
            `test` is `destination`, or test_fraction is not between 0 and 1.
    """
    if test is not None and Path(test).absolute() == Path(destination).absolute():
        raise PunaError(f"--test {test} is the destination too: give the held-out part a file of its own")
    if not 0 < test_fraction < 1:
        raise PunaError(f"--test-fraction {test_fraction} is no part of the whole: give a number between 0 and 1")
    faults, report = Faults(), Report()
    rows = (row for source in sources for row in read_rows(source, faults))
    records = apply(rows, steps, report, faults)
    with ExitStack() as all_or_none:  # all are opened, and refused where they exist, before any is written
        names = [str(destination), *([] if test is None else [str(test)])]
        opened = [all_or_none.enter_context(atomic_path(name, overwrite)) for name in (*names, f"{destination}.report")]
        files = dict(zip(names, opened, strict=False))
        with tempfile.TemporaryFile("w+", encoding="utf-8", dir=Path(opened[0]).parent) as spool:
            documents = _spool(records, added, spool)
            faults.check()
            if not documents:
                raise PunaError(f"nothing is left of {', '.join(sources)}: {report.counts}")
            held = set[int]() if test is None else held_out(documents, test_fraction)
            with ExitStack() as both:
                listed = [Path(name).suffix == ".json" for name in names]
                write = [both.enter_context(_writer(*file)) for file in zip(files.values(), listed, strict=True)]
                for line in spool:
                    number, _, text = line.partition(" ")
                    write[int(number) in held](text)
                    report.counts["held out"] += int(number) in held
        if test is None:
            del report.counts["held out"]
        written = {name: sha256_of(file) for name, file in files.items()}
        said = {"sources": list(sources), **vars(report), "sha256": written}
        opened[-1].write_text(json.dumps(said, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return report.counts


def _spool(records: Iterable[tuple[int, Record]], added: Iterable[Record], spool: TextIO) -> int:
    """Write records to a file, to be read from its start: a line each, the number of its document and the record.

    Returns:
        How many documents there are: rows of which something is left, and added records.
    """
    documents, row = 0, None
    for number, record in records:
        documents += number != row
        row = number
        spool.write(f"{documents - 1} {json.dumps(record, ensure_ascii=False)}\n")
    for record in added:
        spool.write(f"{documents} {json.dumps(record, ensure_ascii=False)}\n")
        documents += 1
    spool.seek(0)
    return documents


@contextmanager
def _writer(path: Path, listed: bool) -> Iterator[Callable[[str], None]]:
    """Yields what writes a record's JSON text to the file: a JSON list, or JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        before = "[\n" if listed else ""

        def write(text: str) -> None:
            nonlocal before
            if listed:
                shown = json.dumps(json.loads(text), ensure_ascii=False, indent=2)
                text = before + "  " + shown.replace("\n", "\n  ")  # which within a text is written as \\n
                before = ",\n"
            file.write(text)

        yield write
        if listed:
            file.write("\n]\n" if before == ",\n" else "[]\n")


def held_out(documents: int, fraction: float, seed: int = 0) -> set[int]:
    """The numbers of the documents that are held out.

    Args:
        documents: how many there are.
        fraction: of them, rounded up, is held out.
        seed: chooses these.

    Raises:
        PunaError: none would be left to train on.
    """
    size = -int(-documents * fraction // 1)
    if size >= documents:
        raise PunaError(f"--test-fraction {fraction} leaves none of {documents} records to train on")
    return set(permute(range(size), documents, mix_key(seed, 4)).tolist())
