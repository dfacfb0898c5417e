"""Files that commands write: complete or not at all, never over what is read, never on a disk too small."""

import errno
import glob
import hashlib
import json
import logging
import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from model.errors import JobFailed, PunaError

_LOG = logging.getLogger(__name__)


def at_home(path: str | Path) -> Path:
    """`path`, with `~` or `~user` at its start as that home folder.

    Raises:
        PunaError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise PunaError(f"{path}: no user of that name; write ./{path} for a folder that is named so") from None


@contextmanager
def atomic_path(destination: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `destination` to write (a file or a folder); rename it when the block completes.

    When the block fails or is interrupted the temporary is removed and an existing destination stays as it was. What a
    process that was killed left of an earlier try is removed first, with a warning.

    Raises:
        PunaError: `destination` exists, at the start or when the block completes, and `overwrite` is false; or its
            folder cannot be written.
    """
    destination = Path(destination).absolute()
    _remove_leavings(destination)
    if os.path.lexists(destination) and not overwrite:
        raise PunaError(f"{destination} exists: give another destination, or overwrite=True to replace it")
    if Path.cwd().is_relative_to(destination):
        raise PunaError(f"{destination} holds the current directory and cannot be replaced: give another destination")
    parent = destination.parent
    parent.mkdir(parents=True, exist_ok=True)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PunaError(f"{parent} cannot be written: give a destination in a folder you may write")
    temporary = parent / f".{destination.name}.tmp-{_process()}"
    remove(temporary)
    try:
        yield temporary
        if overwrite:
            _replace(temporary, destination)
        else:
            _place(temporary, destination)
    except OSError as error:
        if (
            error.errno is not None and error.filename is None
        ):  # a failed write, as on a full disk, does not say which file
            error.filename = str(destination)
        raise
    finally:
        remove(temporary)


def check_apart(destination: str | Path, *inputs: str | Path) -> None:
    """Refuse a `destination` that is or holds one of the inputs: replacing it would delete what is read.

    Raises:
        PunaError: naming the input.
    """
    place = Path(destination).absolute()
    place = place.parent.resolve() / place.name  # of a link, the link itself is replaced
    for given in inputs:
        if os.path.lexists(given) and Path(given).resolve().is_relative_to(place):
            raise PunaError(f"{destination} is or holds {given}, which is read: give another destination")


def _process() -> str:
    """This process, among all that may write to one folder."""
    return f"{platform.node()}-{os.getpid()}"


def _remove_leavings(destination: Path) -> None:
    """Takes away what processes of this machine that are gone left beside `destination`. What stood there before, and
    was moved aside when such a process was killed, is put back."""
    for left in destination.parent.glob(f".{glob.escape(destination.name)}.*-{glob.escape(platform.node())}-*"):
        kind, pid = left.name.removeprefix(f".{destination.name}.").split("-")[0], left.name.rpartition("-")[2]
        if kind not in ("tmp", "old") or not pid.isdecimal() or _is_running(int(pid)):
            continue
        if kind == "old" and not os.path.lexists(destination):
            left.rename(destination)
            _LOG.warning("%s is put back: process %s was killed while it replaced it", destination, pid)
        else:
            remove(left)
            _LOG.warning("%s is removed: process %s was killed while it wrote it", left, pid)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _place(temporary: Path, destination: Path) -> None:
    """Move `temporary` to `destination`, where nothing may have come in the meantime.

    Raises:
        PunaError: something has.
    """
    try:
        if temporary.is_dir():
            if os.path.lexists(destination):  # a rename would replace an empty folder
                raise FileExistsError
            temporary.rename(destination)
        else:
            os.link(temporary, destination)  # which a rename is not: it would replace what is there
            temporary.unlink()
    except OSError as error:
        if error.errno in (None, errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise PunaError(f"{destination} exists now: another process has written it in the meantime") from None
        if temporary.is_dir() or os.path.lexists(destination):
            raise
        temporary.rename(destination)  # a file system without links


def _replace(temporary: Path, destination: Path) -> None:
    """Move `temporary` to `destination`; what stood there is moved aside first, so that it is never half gone."""
    if not os.path.lexists(destination):
        temporary.rename(destination)
        return
    old = destination.parent / f".{destination.name}.old-{_process()}"
    destination.rename(old)
    try:
        temporary.rename(destination)
    except BaseException:
        old.rename(destination)
        raise
    remove(old)


def remove(path: Path) -> None:
    """Takes away a file, a link or a folder with all that is in it; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_free_space(path: str | Path, size: int) -> None:
    """Check that the disk that holds, or will hold, `path` has `size` bytes free.

    Raises:
        JobFailed: it has less.
    """
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size:
        raise JobFailed(f"{path} needs {size:,} bytes and its disk has {free:,} free: free some, or write elsewhere")


def copy_files(names: Iterable[str], source: Path, target: Path) -> None:
    """Copy those files of the folder `source` that are there to the folder `target`."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` to `path` as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in lower-case hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
