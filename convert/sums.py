"""SHA-256 of whole files, in the format of `sha256sum`, so that `sha256sum -c SHA256SUMS` checks a folder too."""

import hashlib
import re
from pathlib import Path

from model.errors import PunaError

SUMS = "SHA256SUMS"

_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")


def digest(path: Path) -> str:
    """The SHA-256 of a file, in lower-case hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS: a line for every file of the folder."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != SUMS)
    (folder / SUMS).write_text("".join(f"{digest(folder / name)}  {name}\n" for name in names), encoding="utf-8")


def check_sums(folder: Path, sums: Path, name: str | Path) -> None:
    """Raises PunaError naming the first file of `folder` that lacks or differs from what the list `sums` says of it.

    `name` is what the message calls the folder.
    """
    for number, line in enumerate(sums.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        if (entry := _LINE.fullmatch(line.strip())) is None:
            raise PunaError(f"{sums}: line {number} is no SHA-256 and file name, as sha256sum writes them")
        expected, file = entry[1].lower(), folder / entry[2]
        if not file.is_file():
            raise PunaError(f"{name} has no {entry[2]}, which {sums} lists")
        if (found := digest(file)) != expected:
            raise PunaError(f"{name}: {entry[2]} has SHA-256 {found}; {sums} says {expected}")
