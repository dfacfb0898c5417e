"""What a run writes beside its state: each of them may fail, as on a full disk, and costs itself alone."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from model.errors import JobFailed


class Outputs:
    """Remembers what could not be written, says each once, and lets the run go on.

    Args:
        say: shows a line.
    """

    def __init__(self, say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)) -> None:
        self._say = say
        self.failed: dict[str, str] = {}

    @contextmanager
    def spared(
        self, what: str | Path, nbytes: int | None = None, kinds: tuple[type[Exception], ...] = (OSError, JobFailed)
    ) -> Iterator[None]:
        """A block that writes one output, whose failure ends here.

        Args:
            what: the path, or whatever the output is called.
            nbytes: how many bytes were to be written.
            kinds: the errors that count as such a failure.
        """
        try:
            yield
        except kinds as error:
            size = "" if nbytes is None else f" ({nbytes:,} bytes)"
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            line = f"{what}{size} was not written: {' '.join(reason.split())[:300]}; training goes on"
            if str(what) not in self.failed:
                self._say(line)
            self.failed[str(what)] = reason

    def check(self) -> None:
        """Raises JobFailed naming what was not written, if anything was not."""
        if self.failed:
            said = "; ".join(f"{what} ({reason})" for what, reason in self.failed.items())
            raise JobFailed(f"the run is done, and not all of its outputs were written: {said}")
