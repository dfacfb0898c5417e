"""SHA-256 of whole files, in the format of `sha256sum`, so that `sha256sum -c SHA256SUMS` checks a folder too."""

import re
from collections.abc import Mapping
from pathlib import Path

from cli.files import sha256_of
from model.errors import PunaError

CHECKSUMS = "SHA256SUMS"

_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")


def write_checksums(folder: Path) -> None:
    """Write SHA256SUMS: a line for every file of the folder."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != CHECKSUMS)
    (folder / CHECKSUMS).write_text(
        "".join(f"{sha256_of(folder / name)}  {name}\n" for name in names), encoding="utf-8"
    )


def read_checksums(path: Path) -> dict[str, str]:
    """The SHA-256 of each file that the list names. Raises PunaError where it is no such list, or an empty one."""
    sums = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise PunaError(f"{path} is no list of SHA-256 and file names, as sha256sum writes them") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if (entry := _LINE.fullmatch(line.strip())) is None:
            raise PunaError(f"{path}: line {number} is no SHA-256 and file name, as sha256sum writes them")
        name, found = entry[2].removeprefix("./"), entry[1].lower()
        if sums.setdefault(name, found) != found:
            raise PunaError(f"{path}: line {number} gives {name} another SHA-256 than a line before it")
    if not sums:
        raise PunaError(f"{path} lists no file: give a list as sha256sum writes it")
    return sums


def check_checksums(folder: Path, sums: Mapping[str, str], listed: str | Path, name: str | Path) -> None:
    """Raises PunaError naming the first file of `folder` that is missing or has another SHA-256 than `sums` says.

    `listed` and `name` are what the message calls the list and the folder.
    """
    for file, expected in sums.items():
        if not (folder / file).is_file():
            raise PunaError(f"{name} has no {file}, which {listed} lists")
        if (found := sha256_of(folder / file)) != expected:
            raise PunaError(f"{name}: {file} has SHA-256 {found}; {listed} says {expected}")
