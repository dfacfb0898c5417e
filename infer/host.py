"""One thread that owns the engine, and the way to it from asyncio.

Only the engine's thread touches JAX. It loads the model, warms the engine up and runs it; an async caller submits
requests and hears of their progress through its event loop.
"""

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Callable

from infer.engine import Engine
from infer.request import Progress, Request


class Unavailable(Exception):
    """The model takes no requests now: it is being loaded, has failed, or is shutting down. They may be tried again."""


class Ended(Exception):
    """The host is to end, and what it began is given up."""


class Host:
    """An engine in a thread of its own.

    Args:
        make: gives the engine, ready; called in the thread with an event that is set when the thread is to end. It may
            then raise `Ended`.
    """

    def __init__(self, make: Callable[[threading.Event], Engine]):
        self._make = make
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._engine: Engine | None = None
        self._accepting = True
        self.error: BaseException | None = None
        self.ended: Callable[[], object] = lambda: None

    def start(self, ended: Callable[[], object] = lambda: None) -> None:
        """Starts loading; `ended` is called, in the thread, if that fails: see `error`."""
        self.ended = ended
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the step that it is in, or the program that it compiles."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def refuse(self) -> None:
        """Takes no more requests; those that were taken go on."""
        self._accepting = False

    @property
    def state(self) -> str:
        """ "loading", "ready", "recovering" (after an error) or "stopping"."""
        if not self._accepting:
            return "stopping"
        if self._engine is None:
            return "loading"
        return "recovering" if self._engine.failing else "ready"

    @property
    def engine(self) -> Engine:
        """The engine.

        Raises:
            Unavailable: there is none that takes requests.
        """
        if self.state != "ready" or self._engine is None:
            raise Unavailable(f"the model is {self.state}: try again later")
        return self._engine

    def submit(self, request: Request) -> "Reply":
        """Queues a request, from within an event loop.

        Raises:
            Unavailable: see `engine`.
            Full: the queue is.
            PunaError: the request can never be met.
        """
        return Reply(self.engine, request)

    def _work(self) -> None:
        try:
            engine = self._make(self._stopping)
        except Ended:
            return
        except BaseException as error:  # whatever it is, the main thread says it
            self.error = error
            self.ended()
            return
        self._engine = engine
        engine.run(self._stopping)


class Reply:
    """A request under way; `progress` is what has become of it so far."""

    def __init__(self, engine: Engine, request: Request):
        self._loop, self._news = asyncio.get_running_loop(), asyncio.Event()
        self.asked = time.monotonic()
        self.first = self.last = math.nan  # when the first and the last token came
        self.progress = engine.submit(request, self._changed)

    def _changed(self, progress: Progress) -> None:
        if progress.tokens:
            self.last = time.monotonic()
            self.first = self.last if math.isnan(self.first) else self.first
        try:
            self._loop.call_soon_threadsafe(self._news.set)
        except RuntimeError:  # the loop has closed: nobody listens
            progress.cancel()

    async def updates(self) -> AsyncIterator[Progress]:
        """The progress whenever there is more of it, and a last time when it has ended. A caller that stops listening
        early ends the request."""
        try:
            ended = False
            while not ended:
                await self._news.wait()
                self._news.clear()
                ended = self.progress.finish is not None
                yield self.progress
        finally:
            if self.progress.finish is None:
                self.progress.cancel()

    async def finished(self) -> Progress:
        """The progress when it has ended."""
        async for _ in self.updates():
            pass
        return self.progress
