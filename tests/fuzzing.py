"""Damaged files of every kind that is read here: python -m tests.fuzzing ROOT FIRST COUNT

Makes a whole input of each kind in ROOT where there is none yet. Case number N damages one file of one of them, as the
seed N says, and reads it; each prints a line of JSON before and after. A process of its own, with limits on its memory
and on the time of a case: what it does not survive is a finding, not the end of a test.
"""

import base64
import faulthandler
import json
import random
import resource
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

TEXTS = (".json", ".jsonl", ".csv", ".toml", ".jinja", ".txt")  # other files are mapped, not read: size costs nothing
ROOM = 1 << 30  # bytes that reading may take
SECONDS = 10  # and how long
VALUES = [
    None, True, False, 0, -1, 1.5, 1e308, float("nan"), 1 << 40, 1 << 70, "", "x", "5", "\ud800", [], {}, [[]], [None],
    {"a": None}, ["a", 1], "../../etc/passwd", {"__class__": "x"},
]  # fmt: skip


class Kind(NamedTuple):
    """One kind of input.

    Attributes:
        make: writes a whole one to a place that does not exist yet.
        read: reads it, and uses what it read.
        files: patterns of the files that are damaged.
        lines: whether an error may have several lines, each with its place.
        named: whether an error names the file; else a setting, or the chat template.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], object]
    files: tuple[str, ...]
    lines: bool = False
    named: bool = True


# ---------------------------------------------------------------------------------------------------------- the damage


def places(value: object, at: tuple = ()) -> list[tuple]:
    """Where every value of a JSON document lies; of long lists and objects the first and the last few."""
    entries = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    kept = entries if len(entries) < 30 else entries[:6] + entries[-6:]
    return [at, *(deeper for key, inner in kept for deeper in places(inner, (*at, key)))]


def with_wrong_value(data: bytes, chosen: random.Random) -> bytes:
    """JSON in which one value is missing, of another type, or under another key."""
    document = json.loads(data)
    at = chosen.choice(places(document))
    if not at:
        return json.dumps(chosen.choice(VALUES)).encode()
    holder = document
    for key in at[:-1]:
        holder = holder[key]
    change = chosen.random()
    if change < 0.2:
        del holder[at[-1]]
    elif change < 0.3 and isinstance(holder, dict):
        holder[chosen.choice(["x", "", "\ud800", f"{at[-1]}_"])] = holder.pop(at[-1])
    else:
        holder[at[-1]] = chosen.choice(VALUES)
    return json.dumps(document).encode()


def with_wrong_bytes(data: bytes, chosen: random.Random) -> bytes:
    """Bytes cut, put in, taken out, doubled or changed; half of the time near the beginning, where headers are."""
    reach = len(data) if chosen.random() < 0.5 else min(len(data), 4096)
    place, size = chosen.randrange(reach + 1), chosen.choice([1, 1, 4, 8, 64])
    inserted = chosen.choice(
        [b"\xff", b"\x00" * size, b"\xff" * size, b"[" * 100_000, b"9" * 400, data[place : place + size] * 3]
    )
    bit = bytes([data[place] ^ 1 << chosen.randrange(8)]) if place < len(data) else b"x"
    return chosen.choice(
        [
            b"",
            data[:place],
            data[:place] + data[place + size :],
            data[:place] + inserted + data[place:],
            data[:place] + inserted[: len(data)] + data[place + len(inserted) :],
            data[:place] + bit + data[place + 1 :],
            data + inserted,
        ]
    )


def damage(file: Path, chosen: random.Random) -> str:
    """Damages a file; returns how, in a word."""
    change = chosen.random()
    if change < 0.02:
        file.unlink()
        return "gone"
    if change < 0.04:
        file.unlink()
        file.mkdir()
        return "a folder"
    if change < 0.05:
        file.unlink()
        file.symlink_to(file.name)
        return "a link to itself"
    if change < 0.06 and file.suffix in TEXTS:
        with file.open("r+b") as stream:
            stream.truncate(1 << 40)
        return "sparse, of a tebibyte"
    data = file.read_bytes()
    if file.suffix == ".json" and chosen.random() < 0.6:
        file.write_bytes(with_wrong_value(data, chosen))
        return "a wrong value"
    if file.suffix == ".jsonl" and chosen.random() < 0.6 and data:
        lines = data.splitlines(keepends=True)
        number = chosen.randrange(len(lines))
        lines[number] = with_wrong_value(lines[number], chosen) + b"\n"
        file.write_bytes(b"".join(lines))
        return "a wrong value"
    if file.suffix == ".safetensors" and chosen.random() < 0.5:
        size = int.from_bytes(data[:8], "little")
        header = with_wrong_value(data[8 : 8 + size], chosen)
        file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
        return "a wrong value in the header"
    file.write_bytes(with_wrong_bytes(data, chosen))
    return "wrong bytes"


# ----------------------------------------------------------------------------------------------------------- the kinds


def small_checkpoint() -> Any:
    """A model of two layers with a tokenizer."""
    import jax

    from model import LlamaConfig, init_params

    config = LlamaConfig(
        vocab_size=480, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, rope_theta=10000.0,
    )  # fmt: skip
    return config, init_params(config, jax.random.key(0))


def write(place: Path, format: str, **options: Any) -> None:
    from dataclasses import replace

    from convert import save_model
    from convert.checkpoint import WriteOptions
    from convert.formats import open_model
    from convert.save import write_model

    source = place.parent / "source"
    if not source.exists():
        config, params = small_checkpoint()
        save_model(source, config, params)
        (source / "generation_config.json").write_text('{"eos_token_id": [2], "temperature": 0.5, "do_sample": true}')
    write_model(place, replace(open_model(source), format=format), WriteOptions(**options))
    if format == "gguf":
        return
    if not (place / "generation_config.json").exists() and format != "meta":
        shutil.copy(source / "generation_config.json", place)


def make_pickled(place: Path) -> None:
    import torch
    from safetensors.torch import load_file

    write(place, "hf")
    torch.save(load_file(place / "model.safetensors"), place / "pytorch_model.bin")
    (place / "model.safetensors").unlink()


def make_bnb(place: Path) -> None:
    write(place, "hf", quantize="nf4")


def make_adapter(place: Path) -> None:
    import jax

    from convert.peft import save_adapter
    from model.lora import add

    _, adapted = add(*reversed(small_checkpoint()), jax.random.key(1), rank=2, targets=("q_proj", "v_proj"), dora=True)
    save_adapter(place, adapted)


def read_model(place: Path) -> None:
    from convert.formats import open_model
    from convert.generation import asked

    model = open_model(place)
    for tensor in model.tensors.values():
        tensor.load()
    if place.is_dir():
        asked(place)


def read_adapted(place: Path) -> None:
    from convert.adapter_fit import adapted_config
    from convert.peft import read_adapter

    config, _ = small_checkpoint()
    adapter = read_adapter(place)
    adapted_config(adapter, config)
    for factors in adapter.factors.values():
        for part in factors.parts:
            part.load()


RECORDS = [
    {
        "messages": [
            {"role": "user", "content": f"Is {i} even?"},
            {"role": "assistant", "content": "yes" if i % 2 else "no"},
        ]
    }
    for i in range(20)
]


def make_lines(place: Path) -> None:
    place.mkdir()
    (place / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))


def make_list(place: Path) -> None:
    place.mkdir()
    (place / "train.json").write_text(json.dumps(RECORDS, indent=1))


def make_tables(place: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    place.mkdir()
    table = pyarrow.table({"instruction": [f"Say {i}" for i in range(50)], "output": [str(i) for i in range(50)]})
    pyarrow.parquet.write_table(table, place / "train.parquet")


def make_arrow(place: Path) -> None:
    import pyarrow

    place.mkdir()
    table = pyarrow.table({"instruction": [f"Say {i}" for i in range(50)], "output": [str(i) for i in range(50)]})
    with pyarrow.OSFile(str(place / "train.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def make_csv(place: Path) -> None:
    place.mkdir()
    (place / "train.csv").write_text("instruction,output\n" + "".join(f'"Say ""{i}""\n now",{i}\n' for i in range(50)))


def read_data(place: Path) -> None:
    from model.errors import PunaError
    from train.data.formats import detect_format
    from train.data.messages import conversation_of
    from train.data.readers import Faults, read_rows

    faults = Faults()
    for path, line, record in read_rows(str(place), faults):
        try:
            form = detect_format(record)
            if form != "text":
                conversation_of(record, form)
        except PunaError as error:
            faults.add(path, line, str(error))
    faults.check()


def make_toml(place: Path) -> None:
    place.mkdir()
    shutil.copy(Path(__file__).parent.parent / "configs" / "qlora-tiny.toml", place / "config.toml")


def read_toml(place: Path) -> None:
    from train.config import load_config

    load_config(place / "config.toml")


def make_questions(place: Path) -> None:
    place.mkdir()
    lines = [
        {
            "custom_id": f"a{i}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": f"Say {i}", "max_tokens": 3},
        }
        for i in range(20)
    ]
    (place / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_questions(place: Path) -> None:
    from infer.batch import decode, read_lines, survey
    from infer.batch_kinds import check_record, kind_of
    from model.errors import PunaError

    survey(place / "in.jsonl")
    for line in read_lines(place / "in.jsonl"):
        try:
            record = decode(line.raw)
            if (kind := kind_of(record)) is not None:
                check_record(record, kind)
        except PunaError as error:  # becomes a line of the rejects
            assert check_said(str(error))["end"] == "refused", error


def make_metrics(place: Path) -> None:
    place.mkdir()
    lines = [{"step": i, "loss": 2.0 / (i + 1), "learning_rate": 0.1} for i in range(20)]
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_metrics_file(place: Path) -> None:
    from train.metrics import read_metrics

    read_metrics(place)


def make_tokenizer(place: Path) -> None:
    from small_tokenizer import CHATML, small_tokenizer

    place.mkdir()
    small_tokenizer(place)
    (place / "chat_template.jinja").write_text(CHATML, encoding="utf-8")


def make_pieces(place: Path) -> None:
    from test_tokenizer import trained_sentencepiece

    place.mkdir()
    (place / "tokenizer.model").write_bytes(trained_sentencepiece())
    (place / "added_tokens.json").write_text(json.dumps({"[PAD]": 420}))
    (place / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "[PAD]"}, "sep_token": "|"}))
    added = {"420": {"content": "[PAD]", "special": True, "lstrip": False, "normalized": False}}
    config = {"added_tokens_decoder": added, "extra_special_tokens": ["<x>"], "bos_token": "<s>"}
    (place / "tokenizer_config.json").write_text(json.dumps(config))


def make_ranks(place: Path) -> None:
    from test_tokenizer import trained_ranks

    place.mkdir()
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in trained_ranks().items())
    (place / "tokenizer.model").write_bytes(b"".join(lines))


def read_tokenizer(place: Path) -> None:
    from model.chat import encode_prompt, get_template
    from model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(place)
    tokenizer.decode(tokenizer.encode("Hello <|im_end|> wörld\n"))
    if tokenizer.chat_template is not None:
        encode_prompt([{"role": "user", "content": "Hi"}], get_template("chat_template", tokenizer), tokenizer)


def make_run(place: Path) -> None:
    from train import loop
    from train.config import read_config

    source, data = place.parent / "adapted", place.parent / "records"
    if not source.exists():
        write(source, "hf")
        make_tokenizer(place.parent / "words")
        for file in (place.parent / "words").iterdir():
            shutil.copy(file, source)
        make_lines(data)
    loop.train(
        read_config(
            {
                "model": {"path": str(source)},
                "data": {"path": str(data), "max_length": 64, "template": "chatml", "cache_dir": str(place.parent)},
                "optim": {"learning_rate": 1e-3},
                "run": {"output_dir": str(place), "batch_size": 8, "max_steps": 1},
            }
        )
    )


def read_run(place: Path) -> None:
    from train.config import load_config
    from train.metrics import read_metrics

    load_config(place / "config.toml")
    read_metrics(place)
    read_model(place)
    read_model(place / "checkpoints" / "1")


CONFIGS = ("config.json", "generation_config.json")
KINDS: dict[str, Kind] = {
    "hf": Kind(lambda place: write(place, "hf", max_shard_size=40_000), read_model, (*CONFIGS, "*.safetensors*")),
    "pickled": Kind(make_pickled, read_model, (*CONFIGS, "*.bin")),
    "int8": Kind(lambda place: write(place, "hf", quantize="int8"), read_model, (*CONFIGS, "*.safetensors")),
    "nf4": Kind(make_bnb, read_model, (*CONFIGS, "*.safetensors")),
    "meta": Kind(lambda place: write(place, "meta"), read_model, ("params.json", "*.pth")),
    "orbax": Kind(lambda place: write(place, "orbax"), read_model, ("**/*",)),
    "model.gguf": Kind(lambda place: write(place, "gguf", dtype="float32"), read_model, ("",)),
    "adapter": Kind(make_adapter, read_adapted, ("adapter_config.json", "*.safetensors")),
    "tokenizer": Kind(make_tokenizer, read_tokenizer, ("*",), named=False),
    "pieces": Kind(make_pieces, read_tokenizer, ("*",), named=False),
    "ranks": Kind(make_ranks, read_tokenizer, ("*",), named=False),
    "run": Kind(
        make_run,
        read_run,
        ("config.toml", "metrics.jsonl", "model/*.json", "checkpoints/**/*", "final/*.json"),
        named=False,
    ),
    "lines": Kind(make_lines, read_data, ("*",), lines=True),
    "list": Kind(make_list, read_data, ("*",), lines=True),
    "csv": Kind(make_csv, read_data, ("*",), lines=True),
    "parquet": Kind(make_tables, read_data, ("*",), lines=True),
    "arrow": Kind(make_arrow, read_data, ("*",), lines=True),
    "toml": Kind(make_toml, read_toml, ("*",), lines=True, named=False),
    "questions": Kind(make_questions, read_questions, ("*",)),
    "metrics": Kind(make_metrics, read_metrics_file, ("*",)),
}


# ------------------------------------------------------------------------------------------------------------ one case


class TooSlow(BaseException):
    """A case took longer than SECONDS."""


def check_said(message: str, place: str = "", lines: bool = False) -> dict[str, str]:
    """How a case ended whose error says `message`: it is to be one line, or `lines` each with its place, and to name
    what is in `place`."""
    whole = all(place in line or line.startswith("and ") for line in message.split("\n")) and bool(message)
    fine = whole and (lines or "\n" not in message) and "Traceback" not in message
    return {"end": "refused" if fine else "fault", "said": message[:600]}


def case(root: Path, number: int) -> dict[str, Any]:
    """Runs one case: what was damaged, and how it ended."""
    from model.errors import PunaError

    chosen = random.Random(number)
    name = chosen.choice(sorted(KINDS))
    kind, scratch = KINDS[name], root / "damaged"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    place = scratch / name
    (shutil.copytree if (root / name).is_dir() else shutil.copy)(root / name, place)
    files = [place] if place.is_file() else sorted({f for each in kind.files for f in place.glob(each) if f.is_file()})
    file = chosen.choice(files)
    how = damage(file, chosen)
    found = {"case": number, "kind": name, "file": str(file.relative_to(scratch)), "damage": how}
    try:
        kind.read(place)
        return found | {"end": "read"}
    except PunaError as error:
        return found | check_said(str(error), str(scratch) if kind.named else "", kind.lines)
    except OSError as error:  # which the commands say in one line, with the path
        said = f"{error.strerror}: {error.filename}"
        return found | {
            "end": "refused" if error.filename else "fault",
            "said": said if error.filename else repr(error),
        }
    except BaseException as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"
        return found | {"end": "fault", "said": said[-600:]}


def main(root: Path, first: int, count: int) -> None:
    warnings.simplefilter("ignore")
    sys.path.append(str(Path(__file__).parent))
    root.mkdir(exist_ok=True)
    for name, kind in KINDS.items():
        if not (root / name).exists():
            kind.make(root / name)
        kind.read(root / name)  # loads the libraries, whose own size counts for nothing
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, resource.getrlimit(resource.RLIMIT_AS)[1]))

    def too_slow(*_: object) -> None:
        raise TooSlow

    signal.signal(signal.SIGALRM, too_slow)
    for number in range(first, first + count):
        print(json.dumps({"case": number}), flush=True)
        signal.alarm(SECONDS)
        found = case(root, number)
        signal.alarm(0)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    faulthandler.enable()
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
