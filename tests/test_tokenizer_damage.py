"""Damaged tokenizer folders: each is read, or refused in one line that names a file of it."""

import json
import random
import resource
import shutil
import signal
from pathlib import Path

import pytest
from small_tokenizer import CHATML, small_tokenizer

from model.errors import PunaError
from model.tokenizer import TOKENIZER_FILES, load_tokenizer

VALUES = [
    None,
    True,
    0,
    -1,
    1.5,
    1e308,
    1 << 40,
    1 << 70,
    "",
    "x",
    "\ud800",
    [],
    {},
    [[]],
    [None],
    {"a": None},
    ["a", 1],
]


def paths(value: object, at: tuple = ()) -> list[tuple]:
    """Where every value of a JSON document lies; of long lists and objects the first and the last few."""
    entries = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    kept = entries if len(entries) < 30 else entries[:6] + entries[-6:]
    return [at, *(deeper for key, inner in kept for deeper in paths(inner, (*at, key)))]


def with_wrong_value(data: bytes, chosen: random.Random) -> bytes:
    document = json.loads(data)
    at = chosen.choice(paths(document))
    if not at:
        return json.dumps(chosen.choice(VALUES)).encode()
    holder = document
    for key in at[:-1]:
        holder = holder[key]
    if chosen.random() < 0.2:
        del holder[at[-1]]
    else:
        holder[at[-1]] = chosen.choice(VALUES)
    return json.dumps(document).encode()


def with_wrong_bytes(data: bytes, chosen: random.Random) -> bytes:
    place, size = chosen.randrange(len(data)), chosen.choice([1, 1, 4, 64])
    inserted = chosen.choice([b"", b"\xff", b"\x00" * size, b"[" * 100_000, b"9" * 400, data[place : place + size] * 3])
    return chosen.choice(
        [
            data[:place],
            data[:place] + inserted + data[place:],
            data[:place] + inserted + data[place + size :],
            data[:place] + bytes([data[place] ^ 1 << chosen.randrange(8)]) + data[place + 1 :],
        ]
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    from test_tokenizer import trained_ranks, trained_sentencepiece

    root = tmp_path_factory.mktemp("whole")
    merges, pieces, ranks = root / "merges", root / "pieces", root / "ranks"
    for folder in (merges, pieces, ranks):
        folder.mkdir()
    small_tokenizer(merges)
    (merges / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    (pieces / "tokenizer.model").write_bytes(trained_sentencepiece())
    (pieces / "added_tokens.json").write_text(json.dumps({"[PAD]": 420}))
    (pieces / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "[PAD]"}, "sep_token": "|"}))
    added = {"420": {"content": "[PAD]", "special": True, "lstrip": False, "normalized": False}}
    config = {
        "added_tokens_decoder": added,
        "extra_special_tokens": ["<x>"],
        "bos_token": "<s>",
        "chat_template": CHATML,
    }
    (pieces / "tokenizer_config.json").write_text(json.dumps(config))
    import base64

    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in trained_ranks().items())
    (ranks / "tokenizer.model").write_bytes(b"".join(lines))
    return [merges, pieces, ranks]


def mutate_and_read(folders: list[Path], scratch: Path, seed: int) -> None:
    """Damage one file of one folder as `seed` says, and use what is read."""
    chosen = random.Random(seed)
    whole = chosen.choice(folders)
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(whole, scratch)
    name = chosen.choice([name for name in TOKENIZER_FILES if (whole / name).exists()])
    data = (whole / name).read_bytes()
    damage = with_wrong_value if name.endswith(".json") and chosen.random() < 0.7 else with_wrong_bytes
    (scratch / name).write_bytes(damage(data, chosen))
    try:
        tokenizer = load_tokenizer(scratch)
        tokenizer.decode(tokenizer.encode("Hello <|im_end|> wörld\n"))
    except PunaError as error:
        assert "\n" not in str(error) and str(scratch) in str(error), f"seed {seed}: {error}"
    except BaseException as error:
        raise AssertionError(f"seed {seed}, {name} of {whole.name}: {type(error).__name__}: {error}") from error


def test_damage_is_one_line(folders, tmp_path):
    for seed in range(200):
        mutate_and_read(folders, tmp_path / "damaged", seed)


@pytest.mark.soak
def test_much_damage_is_one_line_within_a_gibibyte_and_ten_seconds(folders, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 30), hard))
    try:
        for seed in range(1000, 21_000):
            signal.alarm(10)
            mutate_and_read(folders, tmp_path / "damaged", seed)
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("value", [None, "x", 3, [], {"1": None}, {"x": {"content": "a"}}, {"1": {"content": 2}}])
def test_a_table_of_added_tokens_of_the_wrong_type_is_named(folders, tmp_path, value):
    shutil.copytree(folders[0], tmp_path / "t")
    (tmp_path / "t/tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": value}))
    with pytest.raises(PunaError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path / "t")


def test_a_template_that_is_not_utf8_is_named(folders, tmp_path):
    shutil.copytree(folders[0], tmp_path / "t")
    (tmp_path / "t/chat_template.jinja").write_bytes("é".encode("latin-1"))
    with pytest.raises(PunaError, match=r"chat_template\.jinja"):
        load_tokenizer(tmp_path / "t")
