"""Progress of long work: bars on stderr, and the type under which the rooms pass them on."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

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

Advance = Callable[[int], None]  # hears of bytes done
ProgressBar = Callable[[int], AbstractContextManager[Advance]]  # given all the bytes to come, shows how many are done


def no_progress(total: int) -> AbstractContextManager[Advance]:
    """The `ProgressBar` that shows nothing."""
    return nullcontext(lambda count: None)


@contextmanager
def progress(description: str, total: int, unit: str = "bytes") -> Iterator[Advance]:
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
