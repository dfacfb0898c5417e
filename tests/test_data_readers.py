"""Strict readers: what is wrong is named as `path:line: reason`, what is harmless is read, and nothing becomes None."""

import codecs
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from model.errors import PunaError
from train.data.readers import Faults, read_rows


def read(path):
    """The records of a path, which must be without fault."""
    faults = Faults()
    rows = list(read_rows(str(path), faults))
    faults.check()
    return rows


def records(path):
    return [row.record for row in read(path)]


def faults_of(path):
    faults = Faults()
    list(read_rows(str(path), faults))
    with pytest.raises(PunaError) as raised:
        faults.check()
    return str(raised.value)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


GOOD = b'{"text": "a"}\n'


# --- what is wrong


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"text": "a"', "is not valid JSON: Expecting ',' delimiter at column 13"),
        (b'{"text": "a', "is not valid JSON: Unterminated string starting at at column 10"),
        (b"[1, 2]", "expected an object, got a list"),
        (b"null", "expected an object, got null"),
        (b'{"text": "a", "text": "b"}', "key 'text' appears twice in one object"),
        (b'{"text": NaN}', "NaN is not JSON"),
        (b'{"text": -Infinity}', "-Infinity is not JSON"),
        (rb'{"text": "\ud800"}', r"holds the lone surrogate '\ud800', which is no text"),
        (rb'{"deep": [{"er": "\udfff x"}]}', r"holds the lone surrogate '\udfff', which is no text"),
        (b'{"text": "\xff"}', "is not UTF-8: byte 0xff at byte 10"),
        (b"[" * 100_000, "is nested too deeply"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path, line, reason):
    path = write(tmp_path / "mix.jsonl", GOOD * 3210 + line + b"\n" + GOOD)
    assert faults_of(path) == f"{path}:3211: {reason}"


def test_twenty_faults_are_named_and_the_rest_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", b"x\n" * 50)
    said = faults_of(path).split("\n")
    assert said[0].startswith(f"{path}:1: is not valid JSON") and said[19].startswith(f"{path}:20: ")
    assert said[20:] == ["and 30 more"]


def test_the_line_is_right_in_a_large_file(tmp_path):
    path = write(tmp_path / "big.jsonl", GOOD * 99_999 + b"{\n" + GOOD)
    assert faults_of(path).startswith(f"{path}:100000: ")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_empty_and_utf16_files_are_named(tmp_path, name):
    path = write(tmp_path / name, b"")
    assert faults_of(path) == f"{path}: holds no records"
    write(path, codecs.BOM_UTF16_LE + "text\n".encode("utf-16-le"))
    assert faults_of(path) == f"{path}:1: is UTF-16: save the file as UTF-8"


@pytest.mark.parametrize(
    "content, reason",
    [
        ('[{"a": 1},\n{"a": 2}\n', ":3: is not valid JSON: Expecting ',' or ']' at column 1"),
        ('[{"a": 1}\n{"a": 2}]', ":2: is not valid JSON: Expecting ',' or ']' at column 1"),
        ('[{"a": 1},\n', ":2: is not valid JSON: the list is not closed at column 1"),
        ('[{"a": 1}]\n]', ":1: is not valid JSON: Extra data at column 11"),
        ('[{"a": 1},\n\n {"a": NaN}]', ":3: NaN is not JSON"),
        ('[{"a": 1},\n 7]', ":2: expected an object, got the number 7"),
        ('[\n{"a": 1, "a": 2}]', ":2: key 'a' appears twice in one object"),
        ("[]", ": holds no records"),
        ('[{"a": 1},\n{"a": ' + "1" * 5000 + "}]", ":2: holds an integer of more than 4300 digits"),
    ],
)
def test_a_bad_json_list_is_placed_by_line(tmp_path, content, reason):
    path = write(tmp_path / "a.json", content)
    assert faults_of(path) == f"{path}{reason}"


@pytest.mark.parametrize(
    "content, reason",
    [
        ("a,b\n1,2\n3\n", ":3: has 1 fields where the header has 2"),
        ('a,b\n"1\n1",2\n3,4,5\n', ":4: has 3 fields where the header has 2"),
        ("a,a\n1,2\n", ":1: column 'a' appears twice"),
        ('a,b\n1,"2\n', ":2: is not valid CSV: unexpected end of data"),
        ("a,b\n", ": holds no records"),
    ],
)
def test_a_bad_csv_is_placed_by_line(tmp_path, content, reason):
    path = write(tmp_path / "a.csv", content)
    assert faults_of(path) == f"{path}{reason}"


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_damaged_tables_are_named(tmp_path, name):
    path = write(tmp_path / name, b"PAR1 and nothing more")
    assert faults_of(path).startswith(f"{path}:0: cannot be read: ")


def test_wrong_paths_are_said(tmp_path):
    for path, reason in (
        (tmp_path / "nowhere.jsonl", "does not exist"),
        ("data/nowhere.jsonl", "does not exist, and is no Hub data set"),
        ("./nowhere", "does not exist"),
        (tmp_path, "holds no data files: looked for .jsonl, .json"),
        (write(tmp_path / "a.xlsx", b"x"), "is of no kind that can be read"),
    ):
        with pytest.raises(PunaError, match=reason):
            read(path)


# --- what is harmless


def test_bom_crlf_blank_lines_and_nul_are_read_with_their_lines(tmp_path):
    path = write(tmp_path / "a.jsonl", codecs.BOM_UTF8 + b'{"text": "a"}\r\n\r\n\n{"text": "b\\u0000"}')
    assert [(row.line, row.record["text"]) for row in read(path)] == [(1, "a"), (4, "b\0")]


def test_a_thirty_megabyte_line_and_long_fields_are_read(tmp_path):
    text = "llama " * 5_000_000
    assert records(write(tmp_path / "a.jsonl", json.dumps({"text": text}))) == [{"text": text}]
    text = text[:1_000_000]
    for name, content in (
        ("a.json", json.dumps([{"text": text}])),
        ("a.csv", f"text\n{text}\n"),
        ("a.txt", text),
    ):
        assert records(write(tmp_path / name, content)) == [{"text": text}]


ROWS = [{"text": "one"}, {"text": 'two, "quoted"\nlines'}, {"text": "¿tres? 三 🦙"}]


def test_every_kind_of_file_gives_the_same_records(tmp_path):
    table = pyarrow.table({"text": [row["text"] for row in ROWS]})
    write(tmp_path / "a.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))
    write(tmp_path / "lines.json", "".join(json.dumps(row) + "\n" for row in ROWS))
    write(tmp_path / "list.json", json.dumps(ROWS, indent=2))
    write(tmp_path / "a.csv", 'text\none\n"two, ""quoted""\nlines"\n¿tres? 三 🦙\n')
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_file(tmp_path / "file.arrow", table.schema) as file:
        file.write_table(table)
    with pyarrow.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as stream:
        stream.write_table(table)
    for path in tmp_path.iterdir():
        assert records(path) == ROWS, path
    assert [row.line for row in read(tmp_path / "list.json")] == [2, 5, 8]
    assert [row.line for row in read(tmp_path / "a.csv")] == [2, 3, 5]


def test_a_folder_is_its_files_in_order_and_lines_are_documents(tmp_path):
    (tmp_path / "deep").mkdir()
    write(tmp_path / "b.txt", "first\r\n\n  \nsecond line\n")
    write(tmp_path / "deep/a.jsonl", GOOD)
    write(tmp_path / "README.md", "not data")
    rows = read(tmp_path)
    assert [row.record["text"] for row in rows] == ["first", "second line", "a"]
    assert [row.line for row in rows] == [1, 4, 1]


def test_a_folder_that_the_datasets_library_saved_is_read(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert records(tmp_path / "saved") == ROWS


def test_a_hub_id_goes_to_the_datasets_library(monkeypatch):
    asked = []

    def load_dataset(name, revision, split):
        asked.append((name, revision, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = [{"a": {"b": 1, "c": 2}}, {"a": {"b": 1}}]  # the table says null for the second row's c
    assert list(map(dict, datasets.Dataset.from_list(rows))) != rows
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
        assert records("org/name") == rows
    assert [row[:2] for row in read("org/name@v1:test[:10%]")] == [("org/name@v1:test[:10%]", n) for n in (1, 2, 3)]
    assert records("org/name") == ROWS
    assert asked == [("org/name", "v1", "test[:10%]"), ("org/name", None, "train")]


def test_a_hub_data_set_that_cannot_be_loaded_is_said(monkeypatch):
    def load_dataset(*arguments, **options):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(PunaError, match="the data set 'org/none' could not be loaded from the Hub: offline"):
        read("org/none")
