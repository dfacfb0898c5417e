"""Requests to a server, each answer kept as it comes, so that what follows from them can be made again at any time."""

import itertools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from infer.batch_output import Output
from model.errors import PunaError

Reply = dict[str, Any]  # what is kept of one request


class Maker(Protocol):
    """What is made out of the replies to numbered requests: replies in the same order make the same."""

    def next(self, number: int) -> Callable[[], Reply] | None:
        """Request `number`, from 1, to be sent from any thread; None where it needs the replies before it first."""
        ...

    def take(self, reply: Reply) -> None:
        """Takes the replies one by one, in the order of their requests."""
        ...

    @property
    def done(self) -> bool: ...


def run(
    maker: Maker,
    kept: Path,
    header: dict[str, Any],
    write: Callable[[], None],
    parallel: int,
    overwrite: bool,
    heard: Callable[[Reply], None] = lambda reply: None,
) -> None:
    """Sends requests until the maker is done.

    Args:
        maker: asks and takes.
        kept: a JSONL file of all replies; while requests are sent it is called KEPT.part.
        header: what the job is: replies to another are never taken for its own.
        write: writes what was made, when all is there and before `kept` gets its name.
        parallel: requests at once.
        overwrite: begin anew where there are replies to another job, or what was made is there.
        heard: hears of each reply when the maker has taken it.

    Raises:
        PunaError: there are replies to another job.
    """
    with (
        Output(kept, kept.with_suffix(".rejects.jsonl"), header, overwrite) as out,
        ThreadPoolExecutor(parallel) as pool,
    ):
        if out.complete:
            return
        sent = out.resume(itertools.count(1))
        with out.part.open(encoding="utf-8") as file:
            for line in itertools.islice(file, sent):
                reply = json.loads(line)
                maker.take(reply)
                heard(reply)
        while not maker.done:
            several: list[Callable[[], Reply]] = []
            while len(several) < parallel and (request := maker.next(sent + len(several) + 1)):
                several.append(request)
            for reply in pool.map(lambda request: request(), several):
                if maker.done:  # what is sent beyond that depends on how many go at once: the result must not
                    break
                out.answer(reply)
                maker.take(reply)
                heard(reply)
            sent += len(several)
        write()
        out.finish()


def check_free(out: Path, kept: Path, overwrite: bool) -> None:
    """Raises PunaError where `out` is there and is not what an interrupted job of the same name would write again."""
    if out.exists() and not overwrite and not kept.with_name(f"{kept.name}.part").exists():
        raise PunaError(f"{out} exists: give another destination, or overwrite=True to replace it")
