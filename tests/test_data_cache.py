"""Tokenized data: written once by one process, under a name that says what it depends on; faults are named by line."""

import ast
import fcntl
import json
import multiprocessing
import os
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from small_tokenizer import small_tokenizer

from model.errors import PunaError
from model.tokenizer import load_tokenizer
from train.data import DataConfig, load_dataset
from train.data.cache import CODE, cache_name, write_once
from train.data.config import sources

RECORDS = [{"instruction": f"Name {n} llamas.", "output": "llama " * n} for n in range(1, 200)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(small_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def config(tmp_path):
    def config(records=RECORDS, **settings):
        path = settings.pop("path", None) or write(tmp_path / "a.jsonl", records)
        return DataConfig(path=path, cache_dir=str(tmp_path / "cache"), **{"max_length": 256, **settings})

    return config


# --- the cache


def test_the_second_time_nothing_is_read(tokenizer, config, monkeypatch):
    first = load_dataset(config(), tokenizer).train[0]
    monkeypatch.setattr("train.data.cache.read_rows", None)
    again = load_dataset(config(), tokenizer).train[0]
    assert np.array_equal(first.tokens, again.tokens) and np.array_equal(first.origins, again.origins)
    assert first.counts == again.counts and first.tokens.dtype == np.uint16


def test_the_name_depends_on_the_code_that_makes_tokens_and_on_no_other(tokenizer, config, monkeypatch):
    """All that the tokenizing modules import of ours, but for settings, errors and files; not the cleaner of HTML."""
    code, waiting = set(), ["train.data.cache"]
    outside = {"model.errors", "train.data.config"}
    while waiting:
        name = waiting.pop()
        if name in code or name in outside or name.split(".")[0] not in ("model", "train"):
            continue
        code.add(name)
        tree = ast.parse(Path(sys.modules[name].__file__).read_text())
        waiting += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert code == set(CODE) and not {"train.data.markdown", "train.data.prepare", "train.data.toy"} & code
    (source,) = sources(config())
    before = cache_name(config(), source, tokenizer)
    for name in CODE:
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[name], "__file__", __file__)  # as if its text were another
            assert cache_name(config(), source, tokenizer) != before, name


def test_the_name_changes_with_everything_that_matters(tokenizer, config, tmp_path, tmp_path_factory):
    other_tokenizer = load_tokenizer(small_tokenizer(tmp_path_factory.mktemp("other"), vocab_size=400))
    same = config()
    changed = [
        config(template="chatml"),
        config(format="instruction"),
        config(columns={"output": "instruction"}),
        config(max_length=128),
        config(packing=True),
        config(packing=True, packing_strategy="wrapped"),
        config(path=write(tmp_path / "b.jsonl", RECORDS)),
    ]
    names = {cache_name(each, sources(each)[0], tokenizer) for each in (same, config(validation_split=0.5), *changed)}
    names.add(cache_name(same, sources(same)[0], other_tokenizer))
    assert len(names) == 2 + len(changed)
    before = cache_name(same, sources(same)[0], tokenizer)
    write(tmp_path / "a.jsonl", [*RECORDS[1:], RECORDS[0]])
    assert cache_name(same, sources(same)[0], tokenizer) != before


def _load(folder, config, ready, found):
    ready.wait()
    dataset = load_dataset(config, load_tokenizer(folder)).train[0]
    found.put((os.getpid(), len(dataset), int(dataset.tokens.astype(np.int64).sum())))


@pytest.mark.slow
@pytest.mark.slow
def test_processes_that_start_at_once_share_one_entry(config, tmp_path):
    small_tokenizer(tmp_path)
    spawn = multiprocessing.get_context("spawn")
    ready, found = spawn.Barrier(3), spawn.SimpleQueue()
    processes = [spawn.Process(target=_load, args=(tmp_path, config(), ready, found)) for _ in range(3)]
    for process in processes:
        process.start()
    results = [found.get() for _ in processes]
    for process in processes:
        process.join()
    assert len({result[1:] for result in results}) == 1
    entries = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert len(entries) == 1 and not list((tmp_path / "cache").glob(".*"))


def test_one_writes_and_the_others_wait(tmp_path):
    writers = []

    def write(folder):
        writers.append(threading.get_ident())
        (folder / "done").touch()

    threads = [threading.Thread(target=write_once, args=(tmp_path / "entry", write, 60.0)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(writers) == 1 and (tmp_path / "entry/done").exists()


def test_waiting_ends_with_an_error_that_names_the_lock(tmp_path):
    with (tmp_path / "entry.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(PunaError, match=r"waited 0 s for .*entry, .*still writing .*entry.lock.*data.cache_dir"):
            write_once(tmp_path / "entry", lambda folder: None, 0.0)


def test_a_writer_that_goes_on_is_waited_for(tmp_path, monkeypatch):
    """Longer than the patience for one that adds nothing."""
    monkeypatch.setattr("train.data.cache.POLL_SECONDS", 0.02)
    half = tmp_path / ".entry.tmp-1"
    half.mkdir()
    with (tmp_path / "entry.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = threading.Thread(target=write_once, args=(tmp_path / "entry", lambda folder: None, 0.5))
        waiting.start()
        for size in range(1, 9):
            (half / "tokens.bin").write_bytes(bytes(size))
            time.sleep(0.15)
            assert waiting.is_alive()
        half.rename(tmp_path / "entry")
        waiting.join()


def test_a_digest_tells_data_apart(tokenizer, config, tmp_path):
    alive = []
    first = load_dataset(config(), tokenizer, alive=lambda: alive.append(1)).train[0]
    assert alive
    copy = write(tmp_path / "copy.jsonl", RECORDS)
    again = load_dataset(config(path=copy), tokenizer).train[0]
    other = load_dataset(config([*RECORDS[:-1], RECORDS[-1] | {"output": "lama"}]), tokenizer).train[0]
    assert first.paths != again.paths and first.digest == again.digest != other.digest


def test_a_writer_that_died_is_replaced_and_leaves_nothing(tmp_path):
    (tmp_path / ".entry.tmp-1").mkdir()
    (tmp_path / ".entry.tmp-1/tokens.bin").write_bytes(b"half")
    (tmp_path / "entry.lock").touch()

    def fail(folder):
        raise PunaError("the data is bad")

    with pytest.raises(PunaError, match="the data is bad"):
        write_once(tmp_path / "entry", fail, 60.0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["entry.lock"]
    write_once(tmp_path / "entry", lambda folder: (folder / "done").touch(), 60.0)
    assert (tmp_path / "entry/done").exists()


def test_damage_is_said(tokenizer, config, tmp_path):
    load_dataset(config(), tokenizer)
    (entry,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    (entry / "tokens.bin").write_bytes(b"")
    with pytest.raises(PunaError, match=f"{entry} is damaged .*delete that folder"):
        load_dataset(config(), tokenizer)


# --- faults of the data


def fault(config, tokenizer):
    with pytest.raises(PunaError) as raised:
        load_dataset(config, tokenizer)
    return str(raised.value)


def test_mixed_schemas_nulls_and_wrong_types_are_named_by_line(tokenizer, config, tmp_path):
    bad = [{"text": None}, {"body": "x"}, {"text": 7}, {"text": ["x"]}, {"instruction": "x", "output": "y"}]
    said = fault(config([{"text": "a"}, *bad, {"text": "b"}]), tokenizer).split("\n")
    assert said == [
        f"{tmp_path}/a.jsonl:2: key 'text': expected text, got null",
        f"{tmp_path}/a.jsonl:3: key 'text' is missing; the record has 'body'",
        f"{tmp_path}/a.jsonl:4: key 'text': expected text, got the number 7",
        f"{tmp_path}/a.jsonl:5: key 'text': expected text, got a list",
        f"{tmp_path}/a.jsonl:6: key 'text' is missing; the record has 'instruction', 'output'",
    ]


def test_what_tables_hold_beside_json_is_named_by_its_type(tokenizer, config, tmp_path):
    rows = {"text": [b"x", b"y"], "when": [datetime(2026, 1, 1)] * 2}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")
    assert fault(config(path=path), tokenizer).startswith(f"{path}:1: key 'text': expected text, got bytes b'x'\n")
    said = fault(config(path=path, columns={"text": "when"}), tokenizer)
    assert "key 'text': expected text, got datetime datetime.datetime(2026, 1, 1, 0, 0)" in said


def test_files_of_another_schema_are_named(tokenizer, config, tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data/a.jsonl", [{"text": "x"}])
    write(tmp_path / "data/b.jsonl", [{"body": "x"}])
    said = fault(config(path=str(tmp_path / "data")), tokenizer)
    assert said == f"{tmp_path}/data/b.jsonl:1: key 'text' is missing; the record has 'body'"


def test_faults_of_reading_and_of_records_come_together(tokenizer, config, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": 1}\nnot json\n')
    said = fault(config(path=str(path)), tokenizer)
    assert sorted(part.split(": ")[0] for part in said.split("\n")) == [f"{path}:2", f"{path}:3"]


def test_examples_without_a_trained_token_are_named(tokenizer, config, tmp_path):
    asked = [{"role": "user", "content": "Hi"}]
    said = fault(config([{"messages": asked}] * 30, template="chatml"), tokenizer)
    assert said.startswith(f"{tmp_path}/a.jsonl:1: has no trained token: leave the record out\n")
    assert said.count("has no trained token") == 20 and said.endswith("and 10 more")


def test_the_first_record_is_placed_too(tokenizer, config, tmp_path):
    assert fault(config([{"body": "x"}]), tokenizer).startswith(f"{tmp_path}/a.jsonl:1: keys 'body' are those of no")
    said = fault(config([{"messages": [{"role": "user", "content": "x"}]}]), tokenizer)
    assert said == (
        f"{tmp_path}/a.jsonl:1: this tokenizer has no chat_template: name one of alpaca, vicuna_v1.1, vicuna_v0, "
        "wizardlm, llama2, llama3, chatml, chinese-alpaca, chinese-alpaca-inference, plain, qlora"
    )


def test_empty_texts_are_counted(tokenizer, config):
    dataset = load_dataset(config([{"text": "a"}, {"text": ""}, {"text": " \n"}, {"text": "b"}]), tokenizer).train[0]
    assert len(dataset) == 2 and dataset.counts.empty == 2 and dataset.counts.records == 4
    assert "2 empty ones dropped" in str(dataset.counts)


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"max_length": 1}, "data.max_length is 1; it must be 2 or more"),
        ({"validation_split": 1.0}, "data.validation_split is 1.0; it must be at least 0 and below 1"),
        ({"validation_split": 0.1, "eval_path": "x"}, "keep one"),
        ({"packing_strategy": "wrapped"}, "set data.packing = true"),
        ({"template": "alpacca"}, "template 'alpacca' is unknown"),
    ],
)
def test_wrong_settings_are_named(tokenizer, config, settings, reason):
    assert reason in fault(config(**settings), tokenizer)


def test_too_little_for_one_row_is_said(tokenizer, config):
    said = fault(config([{"text": "a"}], packing=True, packing_strategy="wrapped"), tokenizer)
    assert "gives no row" in said
