"""Many requests on one model at once: continuous batching over the rows of one cache.

The engine is a loop of steps. A step takes requests from the queue into free rows, writes pieces of their prompts,
starts one token for every live row, and only then reads the tokens that the step before started: the device computes
while the host looks at text.
"""

import itertools
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cli.progress import ProgressBar, no_progress
from infer.device import PROGRAMS, Device, Step, compiled
from infer.generate import check_room
from infer.proposals import Proposer, Room, Speculation, proposer
from infer.request import Full, Progress, Request, TokenLogprobs
from infer.rows import Row, Rows
from infer.slots import STOPS, Made
from infer.speculative import MOST_ROWS, single_steps
from model.config import LlamaConfig
from model.errors import PunaError
from model.params import Params
from model.tokenizer import Tokenizer


@dataclass
class Counts:
    """What an engine has done since it was made.

    Attributes:
        steps: turns of the loop.
        prompt_tokens: tokens of all prompts begun.
        reused_tokens: those of them that were in the cache already.
        tokens: tokens made.
        finished: how many requests have ended, by `Progress.finish`.
    """

    steps: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)


class Started(NamedTuple):
    """A step that a device works on: what it makes for the rows from `first` on, and whose tokens these are."""

    made: Made
    first: int
    rows: list[Row]
    owners: list[Progress]


class Engine:
    """Runs requests in the rows of one cache.

    `submit` and `Progress.cancel` may be called from any thread; `step` from one.

    Args:
        params: as `load_model(layout="per_layer")` gives them, or with adapters as `side_by_side` makes them.
        config: the shape of the model.
        tokenizer: the model's; None where only tokens are wanted, and no text.
        rows: requests that are worked on at once.
        length: tokens of the longest request, prompt and text; None for the model's context, which is the most.
        chunk: prompt tokens written in one step, at most; bounds how long others wait for their next token.
        queue: requests that may wait.
        speculate: where proposals for the next tokens come from while few rows are live; the texts stay the same.

    Raises:
        PunaError: what proposes does not fit the model.
    """

    def __init__(
        self,
        params: Params,
        config: LlamaConfig,
        tokenizer: Tokenizer | None = None,
        *,
        rows: int = 8,
        length: int | None = None,
        chunk: int = 512,
        queue: int = 1024,
        mesh: Mesh | None = None,
        cache_dtype: Any = jnp.float32,
        least_window: int = 128,
        speculate: Speculation | None = None,
    ):
        self.params, self.config, self.tokenizer = params, config, tokenizer
        self.length = min(length or config.max_position_embeddings, config.max_position_embeddings)
        self.chunk, self.queue, self.least_window = chunk, queue, least_window
        self._rows = Rows(rows)
        self._waiting: deque[Progress] = deque()
        self._lock = threading.Lock()
        self._arrived = threading.Event()
        self._started: Started | None = None
        known = min(config.vocab_size, tokenizer.vocab_size if tokenizer else config.vocab_size)
        self._device = Device(params, config, rows, self.length, known, mesh, cache_dtype)
        self.counts = Counts()
        self.failing = False
        room = Room(rows, self.length, chunk, np.int32(known), self._window, mesh, cache_dtype)
        self._proposer = proposer(speculate, config, tokenizer, room) if speculate else None

    # --- from any thread

    def submit(self, request: Request, changed: Callable[[Progress], None] = lambda progress: None) -> Progress:
        """Queues a request.

        Args:
            request: what to continue.
            changed: called in the engine's thread whenever there is more of it, and when it ends.

        Raises:
            PunaError: the request can never be met: no prompt, no room for it, too many stop tokens.
            Full: the queue is.
        """
        check_room("the prompt", request.prompt, request.max_new_tokens, self.config, request.score_prompt)
        if len(request.prompt) + request.max_new_tokens > self.length + (request.max_new_tokens == 0):
            raise PunaError(
                f"the prompt has {len(request.prompt)} tokens and max_new_tokens is {request.max_new_tokens}, together "
                f"more than the {self.length} that the engine has room for"
            )
        if len(request.stop_ids) > STOPS:
            raise PunaError(f"{len(request.stop_ids)} stop tokens are given; at most {STOPS} are taken")
        progress = Progress(request, changed=changed)
        with self._lock:
            if len(self._waiting) >= self.queue:
                raise Full(f"{self.queue} requests are waiting already")
            self._waiting.append(progress)
        self._arrived.set()
        return progress

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._waiting) or self._started is not None or bool(self._rows.taken())

    @property
    def rows(self) -> int:
        """How many requests are worked on at once, at most."""
        return len(self._rows)

    @property
    def running(self) -> int:
        """How many are now."""
        return len(self._rows.taken())

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def run(self, stopping: threading.Event) -> None:
        """Steps until `stopping` is set; sleeps while there is nothing to do.

        An error of a step ends the requests that were worked on, and the engine goes on with an empty cache; `failing`
        says that it has not come so far yet.
        """
        while not stopping.is_set():
            if not self.busy:
                self._arrived.wait(0.05)
                self._arrived.clear()
                continue
            try:
                self.step()
            except BaseException as error:  # whatever a device or a compiler may raise; a panic in Rust is no Exception
                traceback.print_exc()
                self.failing = True
                self._recover(error, stopping)

    def _recover(self, error: BaseException, stopping: threading.Event) -> None:
        """Resets until that works: a device may need time."""
        while not stopping.is_set():
            try:
                self.reset(error)
                self.failing = False
                return
            except BaseException:  # as above
                traceback.print_exc()
                stopping.wait(1.0)

    def reset(self, error: BaseException) -> None:
        """Ends every request that is worked on with `error`, and starts from an empty cache."""
        self._started = None
        for row in self._rows.taken():
            self._fail(row, error)
        for row in self._rows:
            row.cached = []
        self._device.reset()
        if self._proposer:
            self._proposer.reset()

    def warm_up(self, scored: bool = False, bar: ProgressBar = no_progress) -> int:
        """Compiles everything that requests will need. To be called before the first of them.

        Args:
            scored: whether requests will ask for log-probabilities.
            bar: shows how many programs are compiled; what it raises ends the work.

        Returns:
            How many programs this process has compiled for engines.
        """
        rows = {min(1 << i, len(self._rows)) for i in range(len(self._rows).bit_length() + 1)}
        windows = {self._window(1 << i) for i in range(self.length.bit_length() + 1)}
        widths = {self._width(n): n for n in range(self.chunk, 0, -1)}  # and the shortest piece that is as wide
        device, proposer = self._device, self._proposer
        work: list[Callable[[], object]] = [lambda: device.copy(0, 0), lambda: device.admit(0, Request([0], 0))]
        for window, with_scores in itertools.product(sorted(windows), {False, scored}):
            for width, shortest in sorted(widths.items()):
                if window >= self._window(shortest):
                    work.append(partial(device.read, 0, -1, [], 0, [], width, window, with_scores))
            for count in sorted(rows):
                step = Step(np.zeros(len(self._rows), bool), 0, count, window, with_scores)
                work.append(partial(device.decode, step))
                if proposer:
                    work.append(partial(self._warm_up_proposals, proposer, step))
        with bar(len(work)) as advance:
            for compile in work:
                compile()
                advance(1)
        device.reset()
        return self.programs

    def _warm_up_proposals(self, proposer: Proposer, step: Step) -> None:
        self._device.verify(step, proposer.warm_up(self._device.slots, step.rows, step.window))

    @property
    def programs(self) -> int:
        """How many programs this process has compiled for engines."""
        own = self._proposer.programs() if self._proposer else ()
        return compiled(*PROGRAMS, *own)

    # --- the loop

    def step(self) -> None:
        """One turn: see the module's first lines."""
        self._drop_ended()
        self._take_waiting()
        self._read_prompts()
        if self._must_read_first():
            self._finish_tokens()
        started = self._start_tokens()
        self._finish_tokens()
        self._started = started
        self.counts.steps += 1

    def _drop_ended(self) -> None:
        now = time.monotonic()
        for row in self._rows.taken():
            if row.progress and (why := _over(row.progress, now)):
                self._end(row, why)
        with self._lock:
            ended = [progress for progress in self._waiting if _over(progress, now)]
            for progress in ended:
                self._waiting.remove(progress)
        for progress in ended:
            self._finished(progress, _over(progress, now))

    def _take_waiting(self) -> None:
        """The oldest requests into free rows."""
        while self._rows.free():
            with self._lock:
                if not self._waiting:
                    return
                progress = self._waiting.popleft()
            self._rows.place(progress, self.tokenizer)

    def _read_prompts(self) -> None:
        """Pieces of prompts, each row in its turn, as long as another may fit into `chunk`."""
        room = self.chunk
        while room > 0 and (row := self._rows.next_to_read()):
            before = len(row.cached) if row.begun else 0
            self._read_prompt(row)
            room -= max(len(row.cached) - before, 1)

    def _read_prompt(self, row: Row) -> None:
        """One piece of a prompt; the last makes its row live."""
        assert row.progress is not None
        if not row.begun:
            source, row.progress.reused = self._rows.begin(row)
            if source is not row:
                self._device.copy(source.index, row.index)
            self.counts.prompt_tokens += len(row.request.prompt)
            self.counts.reused_tokens += row.progress.reused
        request = row.request
        prompt, first = request.prompt, len(row.cached)
        end = len(prompt) if request.embed else len(prompt) - 1
        stop = min(first + self.chunk, end)
        if stop > first:
            width, window = self._width(stop - first), self._window(stop)
            scored = prompt[first + 1 : stop + 1]
            made, state = self._device.read(
                row.index, row.adapter, prompt[first:stop], first, scored, width, window, request.score_prompt
            )
            row.cached = list(prompt[:stop])
            if made is not None:
                scores = jax.device_get(made)
                row.progress.prompt_logprobs += [_logprobs(scores, i, request.logprobs) for i in range(len(scored))]
            if request.embed and stop == end:
                row.progress.embedding = jax.device_get(state)
                self._end(row, "stop")
                return
        if len(row.cached) < end:
            return
        if request.max_new_tokens == 0:
            self._end(row, "length")
        else:
            row.cached, row.position, row.reading = list(prompt[:-1]), len(prompt) - 1, False
            self._device.admit(row.index, request)

    def _must_read_first(self) -> bool:
        """Whether what comes next depends on the tokens that are being made: for a constraint, or for proposals."""
        live = self._rows.live()
        bound = any(row.request.constraint for row in live)
        return bound or (self._proposer is not None and len(live) <= MOST_ROWS)

    def _start_tokens(self) -> Started | None:
        live = self._meet_constraints(self._rows.live())
        if not live:
            return None
        kept = np.zeros(len(self._rows), bool)
        kept[[row.index for row in live]] = True
        scored = any(row.request.logprobs is not None for row in live)
        first, rows = self._rows.range_of(live)
        proposals = self._propose(live, first, rows)
        for row in live:
            row.position += 1
        step = Step(kept, first, rows, self._window(max(row.position for row in live)), scored)
        made = self._device.decode(step) if proposals is None else self._device.verify(step, proposals)
        return Started(made, first, live, [row.progress for row in live if row.progress])

    def _propose(self, live: list[Row], first: int, rows: int) -> Any:
        """Proposals for what follows, where few rows are live and all that was made is read."""
        if not self._proposer or self._started is not None or len(live) > MOST_ROWS:
            return None
        for row in live:
            row.position = len(row.cached)
        free = [row for row in live if row.request.constraint is None]
        proposals = self._proposer.propose([row.last_tokens() for row in free], self._device.slots, first, rows)
        if proposals is not None:
            for row in live:
                row.position += self._proposer.tokens  # at most: proposals may be refused
        return proposals

    def _meet_constraints(self, live: list[Row]) -> list[Row]:
        """Tells the device what each row may choose; the rows that can go on."""
        allowed: dict[int, np.ndarray] = {}
        able = []
        for row in live:
            constraint = row.request.constraint
            if constraint is not None:
                try:
                    allowed[row.index] = constraint.allowed()
                except PunaError as error:
                    self._fail(row, error)
                    continue
            able.append(row)
        self._device.allow(allowed)
        return able

    def _finish_tokens(self) -> None:
        """Reads the tokens that the step before started."""
        if self._started is None:
            return
        started, self._started = self._started, None
        for made in single_steps(jax.device_get(started.made)):
            for row, progress in zip(started.rows, started.owners, strict=True):
                if row.progress is progress and made.token[row.index - started.first] >= 0:
                    self._add(row, progress, made, row.index - started.first)

    def _add(self, row: Row, progress: Progress, made: Made, i: int) -> None:
        """Token `i` of those that a step made."""
        request, token = progress.request, int(made.token[i])
        before = progress.tokens[-1] if progress.tokens else request.prompt[-1]
        row.cached.append(before)
        progress.tokens.append(token)
        self.counts.tokens += 1
        if request.constraint is not None:
            try:
                request.constraint.accept(token)
            except PunaError as error:
                self._fail(row, error)
                return
        if request.logprobs is not None:
            progress.logprobs.append(_logprobs(made, i, request.logprobs))
        stopped = token in request.stop_ids
        if row.text is not None and not stopped:
            progress.text += row.text.push([token])
            stopped = row.text.stopped
        if stopped:
            self._end(row, "stop")
        elif len(progress.tokens) >= request.max_new_tokens:
            self._end(row, "length")
        else:
            progress.changed(progress)

    def _end(self, row: Row, why: str) -> None:
        progress = row.progress
        assert progress is not None
        if row.text is not None:
            progress.text += row.text.flush()
        self._rows.release(row)
        self._finished(progress, why)

    def _fail(self, row: Row, error: BaseException) -> None:
        assert row.progress is not None
        row.progress.error = error
        self._end(row, "error")

    def _finished(self, progress: Progress, why: str | None) -> None:
        progress.finish = why
        self.counts.finished[str(why)] += 1
        progress.changed(progress)

    def _width(self, count: int) -> int:
        """The width of a piece of `count` tokens: few widths, since each is compiled."""
        return next((width for width in (16, 32, 64, 256) if count <= width < self.chunk), self.chunk)

    def _window(self, length: int) -> int:
        return min(_power_of_two(length, self.least_window), self.length)


def run_all(engine: Engine, requests: Sequence[Request]) -> Iterator[list[Progress]]:
    """Submits all requests and steps until all have ended.

    Returns:
        An iterator that gives the progress of each, in order, after each step.

    Raises:
        PunaError: a request can never be met.
        Full: there are more requests than the engine's queue holds.
    """
    progress = [engine.submit(request) for request in requests]
    while engine.busy:
        engine.step()
        yield progress


def _logprobs(made: Made, i: int, count: int | None) -> TokenLogprobs:
    assert made.logprob is not None and made.top_ids is not None and made.top_logprobs is not None
    top = zip(made.top_ids[i, :count].tolist(), made.top_logprobs[i, :count].tolist(), strict=True)
    able = tuple((token, logprob) for token, logprob in top if logprob > -np.inf)  # what a grammar left open
    return TokenLogprobs(int(made.token[i]), float(made.logprob[i]), able)


def _over(progress: Progress, now: float) -> str | None:
    if progress.cancelled:
        return "cancelled"
    return "deadline" if progress.request.deadline is not None and now > progress.request.deadline else None


def _power_of_two(size: int, least: int) -> int:
    return max(least, 1 << (size - 1).bit_length())
