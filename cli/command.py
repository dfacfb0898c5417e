"""How every command ends: errors in one line, and an exit code for each outcome.

A wrong request (`PunaError`), a failing disk or file (`OSError`) and an interruption each end the command with one line
on stderr and exit code 2. `--debug` anywhere on the command line shows the traceback instead.
"""

import os
import signal
import sys
from pathlib import Path

import typer

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
