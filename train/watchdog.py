"""A step that makes no progress ends its processes, so that whoever started them starts them again: run.step_timeout.

One process that is alive and stuck holds all others in a collective, for ever: heartbeats go on, and no library gives
up. So every process has a thread that looks on. Where no step was finished for too long it asks all others, by a file
in the run directory, for the stacks of their threads, says who lags, and ends its process with 86.
"""

import faulthandler
import json
import os
import secrets
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import jax

from train.distributed import EXIT_PEER_LOST, RANKS, leave

LEAST_SECONDS, MEDIANS = 300.0, 10
_REQUEST, _REMEMBERED, _TICK_SECONDS, _TICKS_TO_ANSWER = "stuck", 100, 5.0, 6
_CALLBACKS = ("jax._src.callback", "jax._src.debugging")  # whose functions run on the host while a step runs


class Watchdog:
    """Looks on while steps are made; a context.

    The first step of a start compiles, and is not watched.

    Args:
        run_dir: the folder of the run, which all processes see.
        timeout: seconds without a finished step; None for MEDIANS times the median step and LEAST_SECONDS at least,
            0 for no end.
        done: the steps that were done before.
        rank: which process this is; JAX's index where it is not given.
        ranks: how many there are, likewise.
        leave: ends the process, with a code.
    """

    def __init__(
        self,
        run_dir: str | Path,
        timeout: float | None,
        done: int,
        rank: int | None = None,
        ranks: int | None = None,
        leave: Callable[[int], Any] = leave,
    ) -> None:
        self._folder, self._timeout, self._leave = Path(run_dir) / RANKS, timeout, leave
        self._rank = jax.process_index() if rank is None else rank
        self._ranks = jax.process_count() if ranks is None else ranks
        self._tick = min(_TICK_SECONDS, (timeout or LEAST_SECONDS) / 10)
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)
        self._started, self._finished, self._done = done, done, done
        self._since: float | None = None  # the time from which the next step is awaited; None while none is
        self._written: Mapping[str, Any] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._timeout != 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._rank == 0:
                (self._folder / _REQUEST).unlink(missing_ok=True)  # of an earlier start
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the watch: what follows is no step."""
        self._since = None
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def begins(self, step: int) -> None:
        """Tells that the rows of a step are there."""
        self._started = step

    def finished(self, step: int) -> None:
        """Tells the last step that is known to be done. It may have been told before."""
        if step <= self._finished:
            return
        now = time.monotonic()
        if self._since is not None:
            self._seconds.append(now - self._since)
        self._finished, self._since = step, now

    @contextmanager
    def paused(self, step: int | None = None) -> Iterator[None]:
        """For work between two steps, which is not watched; `step` is done."""
        if step is not None:
            self.finished(step)
        self._since = None
        try:
            yield
        finally:
            self._since = time.monotonic() if self._finished > self._done else None

    def limit(self) -> float | None:
        """After how many seconds without a finished step the process ends; None where that is not known yet."""
        if self._timeout is not None:
            return self._timeout
        return max(LEAST_SECONDS, MEDIANS * statistics.median(self._seconds)) if self._seconds else None

    # --- the thread

    def _look_on(self) -> None:
        answered = None
        while not self._closed.wait(self._tick):
            try:
                self._tell()
                asked = self._asked()
                if asked not in (None, answered):
                    self._answer(str(asked))
                    answered = asked
            except OSError:  # a full disk, or storage that went away: the next round may write again
                pass
            since, limit = self._since, self.limit()
            if since is None or limit is None or time.monotonic() - since <= limit:
                continue
            if self._gives_up(since, limit):
                return

    def _tell(self, answers: str = "", where: str = "") -> None:
        """Writes what this process was last seen doing, where that has changed."""
        state = {"started": self._started, "finished": self._finished, "answers": answers, "where": where}
        if state == self._written:
            return
        place = self._folder / f"rank-{self._rank}.json"
        temporary = place.with_suffix(".tmp")
        temporary.write_text(
            json.dumps(state | {"host": socket.gethostname(), "process": os.getpid()}), encoding="utf-8"
        )
        temporary.replace(place)
        self._written = state

    def _asked(self) -> str | None:
        """The name of the request for stacks, if there is one."""
        request = self._folder / _REQUEST
        return request.read_text(encoding="utf-8") if request.exists() else None

    def _answer(self, request: str) -> None:
        with open(self._folder / f"rank-{self._rank}-stacks.txt", "w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        self._tell(request, _in_callback(sys._current_frames().values()))

    def _gives_up(self, since: float, limit: float) -> bool:
        """Says who lags, and ends the process, but where a step was finished meanwhile."""
        try:
            said = self._findings()
        except OSError as error:
            said = f"and {self._folder} cannot be used: {error}"
        if self._since != since:  # it has gone on meanwhile
            (self._folder / _REQUEST).unlink(missing_ok=True)
            return False
        median = f", and the median step takes {statistics.median(self._seconds):.3g} s" if self._seconds else ""
        print(
            f"error: no step was finished for {limit:.3g} s (run.step_timeout{median}): {said}. Started again, the run "
            "goes on from its last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        self._leave(EXIT_PEER_LOST)
        return True

    def _findings(self) -> str:
        """Asks all processes, waits for their answers, and says who lags and where the stacks are."""
        request, is_first = self._folder / _REQUEST, True
        own = secrets.token_hex(8)
        try:
            with open(request, "x", encoding="utf-8") as file:
                file.write(own)
        except FileExistsError:  # another process was faster: it says so first
            is_first = False
        asked = self._asked() or own
        self._answer(asked)
        deadline = time.monotonic() + self._tick * _TICKS_TO_ANSWER * (1 if is_first else 2)
        while len(states := self._answers(asked)) < self._ranks and time.monotonic() < deadline:
            time.sleep(self._tick / 2)
        return f"{lagging(states, self._states(), self._ranks)}. Stacks of {_ranks(states)} are in {self._folder}"

    def _answers(self, request: str) -> dict[int, Mapping[str, Any]]:
        return {rank: state for rank, state in self._states().items() if state["answers"] == request}

    def _states(self) -> dict[int, Mapping[str, Any]]:
        places = {rank: self._folder / f"rank-{rank}.json" for rank in range(self._ranks)}
        return {rank: json.loads(place.read_text(encoding="utf-8")) for rank, place in places.items() if place.exists()}


def lagging(answers: Mapping[int, Mapping[str, Any]], seen: Mapping[int, Mapping[str, Any]], ranks: int) -> str:
    """Who holds up a run, in words.

    Args:
        answers: by their ranks, what those processes say of themselves that could.
        seen: the same of all that were ever seen, maybe earlier.
        ranks: how many there are.
    """
    if silent := [rank for rank in range(ranks) if rank not in answers]:
        last = [_named(rank, seen) for rank in silent]
        return f"{'; '.join(last)} does not answer: it is stopped, or its host is gone"
    if called := [rank for rank, state in answers.items() if state["where"]]:
        return "; ".join(f"{_named(rank, seen)} is in a host callback, {answers[rank]['where']}" for rank in called)
    begun = {rank: state["started"] for rank, state in answers.items()}
    if min(begun.values()) < max(begun.values()):
        late = [_named(rank, seen) for rank in begun if begun[rank] == min(begun.values())]
        return f"{'; '.join(late)} waits for the rows of step {min(begun.values()) + 1}"
    return f"no process lags: all wait for step {min(state['finished'] for state in answers.values()) + 1}"


def _named(rank: int, seen: Mapping[int, Mapping[str, Any]]) -> str:
    if rank not in seen:
        return f"rank {rank}"
    state = seen[rank]
    return f"rank {rank} (process {state['process']} on {state['host']}, which has finished step {state['finished']})"


def _ranks(states: Mapping[int, Any]) -> str:
    return ("rank " if len(states) == 1 else "ranks ") + ", ".join(map(str, sorted(states)))


def _in_callback(frames: Any) -> str:
    """Where a thread is whose Python was called by a running step; "" where there is none."""
    for innermost in frames:
        frame: FrameType | None = innermost
        while frame is not None:
            if frame.f_globals.get("__name__", "").startswith(_CALLBACKS):
                code = innermost.f_code
                return f"at {code.co_filename}:{innermost.f_lineno} ({code.co_name})"
            frame = frame.f_back
    return ""
