"""The lines of a file, none of them longer than memory allows."""

from collections.abc import Iterator
from pathlib import Path

from model.errors import PunaError

LONGEST_LINE = 64 * 2**20  # bytes: far more than any record, far less than a machine has


def read_raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their numbers, from 1, each with its end as it stands.

    Raises:
        PunaError: a line is longer than LONGEST_LINE, as in a file that holds no lines.
    """
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise PunaError(f"{path}:{number}: is longer than {LONGEST_LINE >> 20} MiB: this is no file of records")
            yield number, line
