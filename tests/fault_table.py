"""What becomes of reported faults: python -m tests.fault_table FOLDER [NAME ...]

Each folder in FOLDER that holds a run.sh and an expected.txt is one fault. Its run.sh runs here, for 5 minutes at most,
and what it prints stands in a table beside what is expected: whether the two agree is for a person to say.
"""

import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

SECONDS = 300
SHOWN = 12  # lines of what a fault prints, its last ones


def outcome(folder: Path) -> str:
    """The exit code of run.sh and the last lines that it prints."""
    environment = {**os.environ, "PY": sys.executable}
    command = ["timeout", "--kill-after=10", str(SECONDS), "bash", str(folder / "run.sh")]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    code = f"ended after {SECONDS} seconds" if done.returncode == 124 else f"exit {done.returncode}"
    return "\n".join([*done.stdout.strip().splitlines()[-SHOWN:], code])


def main(place: Path, names: list[str]) -> None:
    folders = sorted(path.parent for path in place.glob("*/run.sh") if not names or path.parent.name in names)
    console = Console(width=200)
    for folder in folders:
        table = Table("fault", "prints", "expected", show_header=False, expand=True)
        table.add_row(folder.name, outcome(folder), (folder / "expected.txt").read_text(encoding="utf-8").strip())
        console.print(table)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
