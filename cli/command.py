"""How every command ends: errors in one line, and an exit code for each outcome.

0 done; 1 a check found a difference, or the work failed (`JobFailed`, a full or failing disk); 2 the request was wrong
(`PunaError`, a path that is not there or may not be used); 130 and 143 interrupted by SIGINT and SIGTERM, as a shell
has it (128 and the signal's number). `--debug` anywhere on the command line shows the traceback instead. An error of
any other kind is a fault of our own, and keeps its traceback.
"""

import errno
import io
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from model.errors import JobFailed, PunaError

# What the system says of a path that the request should not have named. All else (no space, I/O errors) is a failure.
_WRONG_PATH = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
}
_ARGUMENT = re.compile(r"""(?<![\w./'"-])(\w+)=('[^']*'|"[^"]*"|[\w.+/-]*\w)""")


class Interrupted(BaseException):
    """SIGINT or SIGTERM, raised where the program stands so that unfinished output is removed on the way out.

    `outcome` is what is said of the output; a command that keeps it says something else.
    """

    outcome = "unfinished output was removed"


def main(app: typer.Typer) -> None:
    """Run `app` on the command line's arguments and exit with the code the house gives each outcome.

    A library's message speaks of arguments (`overwrite=True`); where the command has an option of that name, the
    message printed speaks of the flag (`--overwrite`).
    """
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    command = typer.main.get_command(app)
    _never_fail_to_print()
    try:
        _run(command, arguments)
    except (PunaError, OSError, Interrupted) as error:
        if debug:
            raise
        print(_line(error, dict(_flags(command))), file=sys.stderr)
        sys.exit(_exit_code(error))


def _never_fail_to_print() -> None:
    """What the terminal's or the pipe's encoding cannot spell is shown by a replacement, not by an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")


def _run(command: Any, arguments: list[str]) -> None:
    try:
        command(args=arguments, prog_name=_program_name())
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:  # the reader has left, as `| head` does; nothing is wrong
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _program_name() -> str:
    return f"python -m {Path(sys.argv[0]).parent.name}"


def _interrupt(number: int, frame: object) -> None:
    raise Interrupted(signal.Signals(number).name)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, Interrupted):
        return 128 + signal.Signals[str(error)]
    failed = isinstance(error, JobFailed) or (isinstance(error, OSError) and error.errno not in _WRONG_PATH)
    return 1 if failed else 2


def _line(error: BaseException, flags: Mapping[str, tuple[str, str | None]]) -> str:
    """What a person reads about `error`: one line, or one for each of several faults in data."""
    if isinstance(error, Interrupted):
        return f"interrupted by {error}: {error.outcome}"
    if isinstance(error, OSError) and error.strerror:
        return f"error: {error.strerror}" + (f": {error.filename}" if error.filename else "")
    return f"error: {as_flags(str(error), flags)}"


def _flags(command: Any) -> Iterator[tuple[str, tuple[str, str | None]]]:
    """Of every option of a command, or of the commands below it: the argument, its flag, and the one that denies it."""
    for option in command.params:
        if option.opts[0].startswith("--"):
            yield option.name, (option.opts[0], next(iter(option.secondary_opts), None))
    for below in getattr(command, "commands", {}).values():
        yield from _flags(below)


def as_flags(message: str, flags: Mapping[str, tuple[str, str | None]]) -> str:
    """`message` with each argument that is an option said as its flag.

    Args:
        message: what the library says, with arguments as in `overwrite=True` or `format='hf'`.
        flags: of each argument, its flag, and the flag that denies it where there is one.
    """

    def flag(match: re.Match[str]) -> str:
        name, value = match[1], match[2].strip("'\"")
        if name not in flags or (value == "False" and flags[name][1] is None):
            return match[0]
        yes, no = flags[name]
        return {"True": yes, "False": no or ""}.get(value, f"{yes} {value}")

    return _ARGUMENT.sub(flag, message)
