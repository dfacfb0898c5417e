"""Strict readers: every record comes with its path and line, and whatever is wrong is said as `path:line: reason`.

A fault never stops the reading by itself: up to 20 are named and the rest counted, in one error.
"""

import codecs
import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cli.files import at_home
from cli.lines import read_raw_lines
from convert.hub import HUB_ID
from model.errors import PunaError
from train.data.splits import Split, files_of_split

NAMED_FAULTS = 20

_NOT_BLANK = re.compile(r"\S")
_HUB_ID = re.compile(HUB_ID + r"(?::([\w\[\]%:.-]+))?")  # with the split after it


class SourceRecord(NamedTuple):
    """A record and where it stands.

    Attributes:
        path: the file, or the Hub data set.
        line: counts from 1 (rows, in parquet, arrow and Hub data).
        record: its values by their keys.
    """

    path: str
    line: int
    record: dict[str, Any]


class Faults:
    """Collects what is wrong with the data, to be raised as one error."""

    def __init__(self) -> None:
        self.named: list[str] = []
        self.count = 0

    def add(self, path: str, line: int | None, reason: str) -> None:
        """Notes what is wrong at a line of a file, or in a file as a whole where `line` is None."""
        self.count += 1
        if len(self.named) < NAMED_FAULTS:
            self.named.append(f"{path}{'' if line is None else f':{line}'}: {reason}")

    def check(self) -> None:
        """Check that no fault was added.

        Raises:
            PunaError: naming the first NAMED_FAULTS and counting the rest.
        """
        if self.count:
            more = f"\nand {self.count - len(self.named)} more" if self.count > len(self.named) else ""
            raise PunaError("\n".join(self.named) + more)


def read_rows(path: str, faults: Faults) -> Iterator[SourceRecord]:
    """The records of a source, in order.

    Args:
        path: a file, a folder with the split behind a colon (train unless given), or a Hub data set
            "org/name[@revision][:split]".
        faults: gets what is wrong with a record or a file.

    Raises:
        PunaError: there is nothing of that name, or nothing in it that we read.
    """
    files, of_none = _found(path)
    if of_none:
        names = ", ".join(map(str, of_none[:NAMED_FAULTS]))
        print(f"{path}: not read, since their names are of no split: {names}", file=sys.stderr)
    for file in files:
        empty, before = True, faults.count
        for row in READERS[file.suffix.lower()](file, faults):
            empty = False
            yield row
        if empty and faults.count == before:
            faults.add(str(file), None, "holds no records")
    if not files:
        yield from read_hub(path)


def source_files(path: str, setting: str = "data.path") -> list[Path]:
    """The files that `path` stands for, sorted; none for a Hub data set.

    Args:
        path: as data.path has it.
        setting: what names it, for the message.

    Raises:
        PunaError: there is nothing of that name, or nothing in it that we read.
    """
    return _found(path, setting).files


def _found(path: str, setting: str = "data.path") -> Split:
    place, split = at_home(path), None
    if not place.exists():
        for colon in re.finditer(":", path):
            if at_home(path[: colon.start()]).exists():
                place, split = at_home(path[: colon.start()]), path[colon.end() :]
    if place.is_dir():
        return files_of_split(place, split, READERS)
    if place.is_file():
        if split is not None:
            raise PunaError(f"{setting} {path!r}: one file has no splits; leave out ':{split}'")
        if place.suffix.lower() not in READERS:
            raise PunaError(f"{path} is of no kind that can be read: use one of {', '.join(READERS)}")
        return Split([place], [])
    if is_hub_id(path):
        return Split([], [])
    raise PunaError(f"{setting} {path!r} does not exist, and is no Hub data set (org/name[@revision][:split])")


# --- text


def _decoded_lines(file: Path, faults: Faults) -> Iterator[tuple[int, str]]:
    """The file's lines with their numbers; a line that is not UTF-8 is a fault, and a byte order mark is nothing."""
    for number, raw in read_raw_lines(file):
        if number == 1:
            if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                faults.add(str(file), 1, "is UTF-16: save the file as UTF-8")
                return
            raw = raw.removeprefix(codecs.BOM_UTF8)
        try:
            yield number, raw.decode()
        except UnicodeDecodeError as error:
            faults.add(str(file), number, f"is not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start}")


def read_txt(file: Path, faults: Faults) -> Iterator[SourceRecord]:
    """Every line that is not blank, as {"text": line}."""
    for number, line in _decoded_lines(file, faults):
        if line.strip():
            yield SourceRecord(str(file), number, {"text": line.rstrip("\r\n")})


# --- JSON


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"key {twice!r} appears twice in one object")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)
_SCANNER = json.JSONDecoder(parse_int=str)  # only tells where a value ends


def _reason(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    if isinstance(error, json.JSONDecodeError):
        return f"is not valid JSON: {error.msg} at column {error.colno}"
    if "integer string conversion" in str(error):
        return f"holds an integer of more than {sys.get_int_max_str_digits()} digits"
    return str(error)


def _check_record(value: Any, written: str) -> dict[str, Any]:
    """`value` where it is an object of proper text; `written` is its JSON."""
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {kind(value)}")
    if "\\u" in written:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"holds the lone surrogate {ascii(error.object[error.start])}, which is no text") from None
    return value


def kind(value: Any) -> str:
    """The JSON name of a value's type; of what tables hold beside, the type's own."""
    names = {dict: "an object", list: "a list", type(None): "null", bool: "a boolean", str: "text"}
    number = f"the number {value!r}" if isinstance(value, int | float) else f"{type(value).__name__} {value!r}"
    return names.get(type(value), number)


def read_jsonl(file: Path, faults: Faults) -> Iterator[SourceRecord]:
    """One object a line; blank lines count but are no records."""
    name = str(file)
    for number, line in _decoded_lines(file, faults):
        if not line.strip():
            continue
        try:
            yield SourceRecord(name, number, _check_record(_DECODER.decode(line.rstrip("\r\n")), line))
        except (ValueError, RecursionError) as error:
            faults.add(str(file), number, _reason(error))


def read_json_records(file: Path, faults: Faults) -> Iterator[SourceRecord]:
    """A list of objects, or objects one after another; each is placed by the line it begins on."""
    before = faults.count
    text = "".join(line for _, line in _decoded_lines(file, faults))
    if faults.count > before:  # what could not be decoded is missing from the text
        return
    line, counted = 1, 0
    try:
        for start, end in _values(text):
            line, counted = line + text.count("\n", counted, start), start
            try:
                value, _ = _DECODER.raw_decode(text, start)
                yield SourceRecord(str(file), line, _check_record(value, text[start:end]))
            except ValueError as error:
                faults.add(str(file), line, _reason(error))
    except json.JSONDecodeError as error:
        faults.add(str(file), error.lineno, _reason(error))
    except RecursionError as error:
        faults.add(str(file), line, _reason(error))


def _values(text: str) -> Iterator[tuple[int, int]]:
    """Where each value of a JSON list, or of values in a row, starts and ends. Raises json.JSONDecodeError."""
    position = _skip_blank(text, 0)
    listed = text.startswith("[", position)
    if listed:
        position = _skip_blank(text, position + 1)
    while position < len(text) and not (listed and text.startswith("]", position)):
        _, end = _SCANNER.raw_decode(text, position)
        yield position, end
        position = _skip_blank(text, end)
        if listed and text.startswith(",", position):
            position = _skip_blank(text, position + 1)
        elif listed and not text.startswith("]", position):
            raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
    if listed and _skip_blank(text, position + 1) < len(text):
        raise json.JSONDecodeError("Extra data", text, position + 1)
    if listed and position == len(text):
        raise json.JSONDecodeError("the list is not closed", text, position)


def _skip_blank(text: str, position: int) -> int:
    found = _NOT_BLANK.search(text, position)
    return found.start() if found else len(text)


# --- tables


def read_csv(file: Path, faults: Faults) -> Iterator[SourceRecord]:
    """Records of text under the header's names; the line is where the record begins."""
    before = faults.count
    text = "".join(line for _, line in _decoded_lines(file, faults))
    if faults.count > before:
        return
    csv.field_size_limit(sys.maxsize)  # the default refuses fields above 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            faults.add(str(file), 1, f"column {next(key for key in header if header.count(key) > 1)!r} appears twice")
            return
        line = reader.line_num
        for values in reader:
            if len(values) == len(header):
                yield SourceRecord(str(file), line + 1, dict(zip(header, values, strict=True)))
            elif values:
                faults.add(str(file), line + 1, f"has {len(values)} fields where the header has {len(header)}")
            line = reader.line_num
    except csv.Error as error:
        faults.add(str(file), reader.line_num, f"is not valid CSV: {error}")


def read_parquet(file: Path, faults: Faults) -> Iterator[SourceRecord]:
    """The rows of a parquet file, counted from 1."""
    import pyarrow.parquet

    yield from _read_batches(file, faults, lambda: pyarrow.parquet.ParquetFile(file).iter_batches())


def read_arrow(file: Path, faults: Faults) -> Iterator[SourceRecord]:
    """An arrow file or stream (which is what the datasets library writes)."""
    import pyarrow

    def batches() -> Iterator[Any]:
        with pyarrow.memory_map(str(file)) as source:
            magic = source.read(6)
            source.seek(0)
            if magic == b"ARROW1":
                stored = pyarrow.ipc.open_file(source)
                yield from (stored.get_batch(number) for number in range(stored.num_record_batches))
            else:
                yield from pyarrow.ipc.open_stream(source)

    yield from _read_batches(file, faults, batches)


def _read_batches(file: Path, faults: Faults, batches: Callable[[], Iterator[Any]]) -> Iterator[SourceRecord]:
    import pyarrow

    line = 0
    try:
        for batch in batches():
            names = batch.schema.names
            if len(set(names)) < len(names):
                faults.add(str(file), None, f"column {next(n for n in names if names.count(n) > 1)!r} appears twice")
                return
            batch.validate(full=True)  # what offsets of damaged files point to may not exist
            for record in batch.to_pylist():
                line += 1
                yield SourceRecord(str(file), line, {key: _without_nulls(value) for key, value in record.items()})
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # the system says it: there is no such file, or no permission
        faults.add(str(file), line, f"cannot be read: {' '.join(str(error).split())}")


def _without_nulls(value: Any) -> Any:
    """A value without the keys that tables fill with null because other rows have them."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def is_hub_id(path: str) -> bool:
    """Whether `path` has the form of a Hub data set, and not the suffix of a file that we read."""
    return _HUB_ID.fullmatch(path) is not None and Path(path).suffix.lower() not in READERS


def read_hub(path: str) -> Iterator[SourceRecord]:
    """The rows of the Hub data set "org/name[@revision][:split]"; the split is train unless given.

    Raises:
        PunaError: it cannot be loaded.
    """
    for number, record in enumerate(load_hub(path), start=1):
        yield SourceRecord(path, number, {key: _without_nulls(value) for key, value in dict(record).items()})


def load_hub(path: str) -> Any:
    """The data set as the datasets library has it.

    Raises:
        PunaError: it cannot be loaded.
    """
    import datasets

    found = _HUB_ID.fullmatch(path)
    name, revision, split = found.groups() if found else (path, None, None)
    try:
        return datasets.load_dataset(name, revision=revision, split=split or "train")
    except Exception as error:  # the library raises errors of many kinds for what is missing, private or offline
        raise PunaError(f"the data set {path!r} could not be loaded from the Hub: {error}") from error


READERS: dict[str, Callable[[Path, Faults], Iterator[SourceRecord]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json_records,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".txt": read_txt,
}
