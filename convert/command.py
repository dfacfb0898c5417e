"""What the commands share: one-line errors, progress on stderr, and outputs that appear only when complete.

A wrong request (`PunaError`), a failing disk or file (`OSError`) and an interruption each end the command with one line
on stderr and exit code 2. `--debug` anywhere on the command line shows the traceback instead.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from model.errors import JobFailed, PunaError


class Interrupted(BaseException):
    """SIGINT or SIGTERM, raised where the program stands so that unfinished output is removed on the way out."""


def main(app: typer.Typer) -> None:
    """Run `app` on the command line's arguments and exit with the code the house gives each outcome.

    Exit codes: 0 done, 1 a check found a difference (the command raises `typer.Exit(1)`) or the work failed
    (`JobFailed`), 2 the request was wrong.
    """
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        _run(app, arguments)
    except (PunaError, OSError, Interrupted) as error:
        if debug:
            raise
        print(_line(error), file=sys.stderr)
        sys.exit(1 if isinstance(error, JobFailed) else 2)


def _run(app: typer.Typer, arguments: list[str]) -> None:
    try:
        typer.main.get_command(app)(args=arguments, prog_name=_program_name())
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:  # the reader has left, as `| head` does; nothing is wrong
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _program_name() -> str:
    return f"python -m {Path(sys.argv[0]).parent.name}"


def _interrupt(number: int, frame: object) -> None:
    raise Interrupted(signal.Signals(number).name)


def _line(error: BaseException) -> str:
    """What a person reads about `error`: one line, or one for each of several faults in data."""
    if isinstance(error, Interrupted):
        return f"interrupted by {error}: unfinished output was removed"
    if isinstance(error, OSError) and error.strerror:
        return f"error: {error.strerror}" + (f": {error.filename}" if error.filename else "")
    return f"error: {error}"


@contextmanager
def progress(description: str, total: int, unit: str = "bytes") -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr with rate and time left; yields `advance(count)`.

    `total` and `count` are in `unit`: "bytes" shows sizes and bytes a second, anything else counts whole items.
    """
    amount = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(), TextColumn(unit))
    columns = (TextColumn("{task.description}"), BarColumn(), *amount, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total)

        def advance(count: int) -> None:
            bar.advance(task, count)

        yield advance


@contextmanager
def atomic_path(destination: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `destination` to write (a file or a folder); rename it when the block completes.

    When the block fails or is interrupted the temporary is removed and an existing destination stays as it was.

    Raises:
        PunaError: `destination` exists and `overwrite` is false, or its folder cannot be written.
    """
    destination = Path(destination).absolute()
    if os.path.lexists(destination) and not overwrite:
        raise PunaError(f"{destination} exists: give another destination, or --overwrite to replace it")
    if Path.cwd().is_relative_to(destination):
        raise PunaError(f"{destination} holds the current directory and cannot be replaced: give another destination")
    parent = destination.parent
    parent.mkdir(parents=True, exist_ok=True)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PunaError(f"{parent} cannot be written: give a destination in a folder you may write")
    temporary = parent / f".{destination.name}.tmp-{os.getpid()}"
    _remove(temporary)
    try:
        yield temporary
        _replace(temporary, destination)
    except OSError as error:
        if error.filename is None:  # a failed write, as on a full disk, does not say which file
            error.filename = str(destination)
        raise
    finally:
        _remove(temporary)


def check_apart(destination: str | Path, *inputs: str | Path) -> None:
    """Raise PunaError where `destination` is or holds one of the inputs: replacing it would delete what is read."""
    place = Path(destination).absolute()
    place = place.parent.resolve() / place.name  # of a link, the link itself is replaced
    for given in inputs:
        if os.path.lexists(given) and Path(given).resolve().is_relative_to(place):
            raise PunaError(f"{destination} is or holds {given}, which is read: give another destination")


def _replace(temporary: Path, destination: Path) -> None:
    """Move `temporary` to `destination`; what stood there is moved aside first, so that it is never half gone."""
    if not os.path.lexists(destination):
        temporary.rename(destination)
        return
    old = destination.parent / f".{destination.name}.old-{os.getpid()}"
    destination.rename(old)
    try:
        temporary.rename(destination)
    except BaseException:
        old.rename(destination)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_free_space(path: str | Path, size: int) -> None:
    """Raise PunaError unless the disk that holds, or will hold, `path` has `size` bytes free."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size:
        raise PunaError(f"{path} needs {size:,} bytes and its disk has {free:,} free: free some, or write elsewhere")
