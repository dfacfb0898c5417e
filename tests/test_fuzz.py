"""Every reader on damaged files: it reads them, or says in a line what is wrong, in little memory and time."""

import json
import os
import queue
import random
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fuzzing
import pyarrow
import pytest
from fuzzing import KINDS, SECONDS
from small_tokenizer import CHATML, small_tokenizer

from cli import lines
from cli.files import atomic_path
from convert.formats import open_model
from convert.generation import asked, read_generation
from infer.batch_output import Output
from model import json_file
from model.chat import encode_prompt, get_template
from model.errors import PunaError
from model.tokenizer import load_tokenizer
from train import config as train_config
from train.config import load_config
from train.data.readers import Faults, read_rows
from train.metrics import read_metrics
from train.plot import plot

ROOT = Path(__file__).parent.parent
GRACE = 60  # seconds that a process may be silent: what holds the interpreter is not interrupted after SECONDS


def run(root, first, count):
    """What became of the cases, one after another; a process that dies or hangs is a fault of the case it was in, and
    the next one begins after that."""
    found, number = [], first
    while number < first + count:
        command = [sys.executable, "-m", "tests.fuzzing", str(root), str(number), str(first + count - number)]
        with subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        ) as process:  # fmt: skip
            said: queue.Queue[str | None] = queue.Queue()

            def read(stream=process.stdout, said=said):
                for line in stream:
                    said.put(line)
                said.put(None)

            reader = threading.Thread(target=read)
            reader.start()
            began = None
            try:
                while line := said.get(timeout=GRACE + SECONDS):
                    case = json.loads(line)
                    if "end" in case:
                        found.append(case)
                        began, number = None, case["case"] + 1
                    else:
                        began = case["case"]
            except queue.Empty:
                process.kill()
            reader.join()
        if number < first + count:
            assert began is not None, "the process ended between two cases"
            found.append({"case": began, "end": "fault", "said": f"the process hung or died ({process.returncode})"})
            number = began + 1
    return found


def check(found):
    faults = [case for case in found if case["end"] == "fault"]
    assert not faults, f"{len(faults)} of {len(found)}: {json.dumps(faults[:5], indent=1)}"
    assert {case["kind"] for case in found} == set(KINDS)
    assert {end for end, count in Counter(case["end"] for case in found).items() if count > len(found) / 10} == {
        "read",
        "refused",
    }


@pytest.mark.slow
def test_damage_is_said_in_a_line(tmp_path):
    check(run(tmp_path / "whole", 0, 250))


@pytest.mark.soak
def test_much_damage_is_said_in_a_line(tmp_path):
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # a process for each core
        parts = [pool.submit(run, tmp_path / str(first), first, 5_000) for first in range(10_000, 30_000, 5_000)]
    found = [case for part in parts for case in part.result()]
    assert len(found) == 20_000
    check(found)


def test_a_damage_has_a_number_that_makes_it_again(tmp_path):
    data = json.dumps({"a": [1, {"b": None}], "c": "d"}).encode()
    for damaged in (fuzzing.with_wrong_value, fuzzing.with_wrong_bytes):
        made = [damaged(data, random.Random(seed)) for seed in range(50)]
        assert made == [damaged(data, random.Random(seed)) for seed in range(50)] and len(set(made)) > 20


# -------------------------------------------------------------------------------------------------------- what it found


def test_tables_whose_offsets_point_nowhere_are_refused(tmp_path):
    """pyarrow itself reads past the end of its buffers, or dies."""
    offsets = pyarrow.py_buffer(b"".join(n.to_bytes(4, "little", signed=True) for n in (0, 5, -3, 5)))
    column = pyarrow.StringArray.from_buffers(3, offsets, pyarrow.py_buffer(b"llama"))
    batch = pyarrow.RecordBatch.from_arrays([column], names=["text"])
    with (
        pyarrow.OSFile(str(tmp_path / "train.arrow"), "wb") as sink,
        pyarrow.ipc.new_stream(sink, batch.schema) as writer,
    ):
        writer.write_batch(batch)
    faults = Faults()
    assert list(read_rows(str(tmp_path), faults)) == []
    with pytest.raises(PunaError, match=r"train.arrow:0: cannot be read: .*offset"):
        faults.check()


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_table_that_is_none_is_a_fault_of_its_file(tmp_path, suffix):
    (tmp_path / f"train.{suffix}").write_bytes(b"PAR1" + b"\x0e" * 64 + b"\x20\x00\x00\x00PAR1")
    faults = Faults()
    assert list(read_rows(str(tmp_path), faults)) == []
    with pytest.raises(PunaError, match=rf"train.{suffix}:0: cannot be read: [^\n]+$"):
        faults.check()


def test_files_too_large_to_be_what_they_should_are_refused_unread(tmp_path, monkeypatch):
    for module, name in ((json_file, "LARGEST"), (train_config, "LARGEST"), (lines, "LONGEST_LINE")):
        monkeypatch.setattr(module, name, 100)
    (tmp_path / "config.json").write_text("{" + " " * 100 + "}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(PunaError, match=r"config.json has 102 bytes, more than any such file has: fetch it again"):
        open_model(tmp_path)
    (tmp_path / "a.toml").write_text("#" * 101)
    with pytest.raises(PunaError, match=r"a.toml has 101 bytes: this is no file of settings"):
        load_config(tmp_path / "a.toml")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + "x" * 101)
    rows = read_rows(str(tmp_path / "a.jsonl"), Faults())
    assert next(rows).record == {"text": "a"}
    with pytest.raises(PunaError, match=r"a.jsonl:2: is longer than 0 MiB: this is no file of records"):
        next(rows)


@pytest.mark.parametrize(
    "line, said",
    [(b"{", "is not valid JSON"), (b"\xff", "is not valid JSON"), (b"[1]", "no object"), (b"{}", "no obj")],
)
def test_a_line_of_metrics_that_is_none_is_named(tmp_path, line, said):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n{"st')
    with pytest.raises(PunaError, match=rf"metrics.jsonl:2: .*{said}"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("text", ["{%" + "(" * 5000, "{{" + "[" * 5000])
def test_a_template_nested_too_deeply_does_not_compile(text):
    from small_tokenizer import small_tokenizer

    from model.chat import jinja_template

    with pytest.raises(PunaError, match="the chat template does not compile: [^\n]*$"):
        jinja_template(text, small_tokenizer)


def test_a_failure_without_a_number_of_the_system_keeps_its_own_words(tmp_path):
    with pytest.raises(OSError, match=r"^page 3 is short$") as failed, atomic_path(tmp_path / "x"):
        raise OSError("page 3 is short")
    assert failed.value.filename is None


@pytest.mark.parametrize("line", ["{", "[]", '{"where": "a:x"}', '{"where": "a:-1"}', '{"where": 3}', "\xff"])
def test_rejects_that_no_batch_has_written_are_named(tmp_path, line):
    (tmp_path / "out.jsonl.part").write_text('{"id": 1}\n')
    (tmp_path / "rejects.jsonl.part").write_text(f"{line}\n", encoding="latin-1")
    (tmp_path / "out.jsonl.part.json").write_text('{"input": "x"}')
    with (
        Output(tmp_path / "out.jsonl", tmp_path / "rejects.jsonl", {"input": "x"}, overwrite=False) as output,
        pytest.raises(PunaError, match=r"rejects\.jsonl\.part holds a line that no batch has written"),
    ):
        output.resume(range(1, 4))


@pytest.mark.parametrize("value", ['"x"', "[]", "1" + "0" * 400])
def test_a_loss_that_is_no_number_is_not_drawn(tmp_path, value):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "loss": {value}}}\n')
    with pytest.raises(PunaError, match="a loss or its step is no number to draw"):
        plot([tmp_path], tmp_path / "p.png")


@pytest.mark.parametrize(
    ("key", "value"),
    [("eos_token_id", [[2]]), ("eos_token_id", "2"), ("pad_token_id", 1.5), ("top_k", [1]), ("temperature", "1"),
     ("do_sample", "no")],
)  # fmt: skip
def test_a_generation_config_of_wrong_types_is_named(tmp_path, key, value):
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({key: value}))
    with pytest.raises(PunaError, match=rf"generation_config\.json: {key} is "):
        read_generation(path)
    with pytest.raises(PunaError, match=rf"generation_config\.json: {key} is "):
        asked(tmp_path)


def test_a_special_token_of_a_hundred_thousand_characters_is_refused(tmp_path):
    config = json.loads((small_tokenizer(tmp_path, CHATML) / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "x" * 100_000}))
    tokenizer = load_tokenizer(tmp_path)
    with pytest.raises(PunaError, match="a special token has 100,000 characters"):
        encode_prompt([{"role": "user", "content": "Hi"}], get_template("chat_template", tokenizer), tokenizer)


@pytest.mark.parametrize("key", ["continuing_subword_prefix", "end_of_word_suffix"])
def test_marks_of_subwords_are_refused(tmp_path, key):
    """Of a prefix longer than the pieces the library of tokenizer.json dies by a panic, which is no Exception."""
    path = small_tokenizer(tmp_path) / "tokenizer.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"model": said["model"] | {key: "x" * 100}}))
    with pytest.raises(PunaError, match=rf"tokenizer\.json has {key} 'xxx.*set it to null"):
        load_tokenizer(tmp_path)
