"""Many requests on one model at once: continuous batching over the rows of one cache.

The engine is a loop of steps. A step takes requests from the queue into free rows, writes one piece of one prompt,
starts one token for every live row, and only then reads the tokens that the step before started: the device computes
while the host looks at text.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from infer.generate import TextStream, check_room
from infer.proposals import Room, Speculation, Text, proposer
from infer.sample import Sampling, stack_sampling
from infer.slots import STOPS, Made, admit, copy_row, decode, empty_slots, extend
from infer.speculative import MOST_ROWS, single_steps, verify
from model.cache import init_cache
from model.config import LlamaConfig
from model.errors import PunaError
from model.params import Params
from model.tokenizer import Tokenizer

SHORTEST_REUSE = 16  # tokens of a common prefix that are worth copying from another row


@dataclass(frozen=True)
class TokenLogprobs:
    """The log-probability of one token, and those of the likeliest tokens in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Request:
    """What to continue, and how.

    Args:
        prompt: token ids, at least one.
        max_new_tokens: most tokens to make.
        sampling: how tokens are chosen.
        stop_ids: tokens that end the text; the one that did is its last. At most `STOPS`.
        stop: strings that end the text, which leaves them out.
        logprobs: log-probabilities of this many likeliest tokens beside each token's own; None for none at all.
        score_prompt: log-probabilities of the prompt's tokens too, from the second on.
        adapter: which of the engine's adapters to use; -1 is the model without any.
        deadline: seconds on `time.monotonic`'s clock after which it ends, done or not.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    stop_ids: Sequence[int] = ()
    stop: Sequence[str] = ()
    logprobs: int | None = None
    score_prompt: bool = False
    adapter: int = -1
    deadline: float | None = None


@dataclass
class Progress:
    """What has become of a request. `finish` is None until it ends: "stop", "length", "cancelled", "deadline" or
    "error" (then `error` says which). `text` and `tokens` grow; they are read while the engine works."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    reused: int = 0
    finish: str | None = None
    error: BaseException | None = None
    cancelled: bool = False
    changed: Callable[["Progress"], None] = lambda progress: None

    def cancel(self) -> None:
        """Asks the engine to end it at the next step."""
        self.cancelled = True


@dataclass
class _Row:
    """The host's side of one cache row. `cached` are the tokens whose keys are in it; `written` how many of the prompt
    are, while it is being read; `pending` steps are started and not read."""

    index: int
    cached: list[int] = field(default_factory=list)
    adapter: int = -1
    progress: Progress | None = None
    text: TextStream | None = None
    position: int = 0
    begun: bool = False
    reading: bool = False
    used: int = 0


class Engine:
    """Runs requests over `params` (as `load_model(layout="per_layer")` gives them) in `rows` rows of `length` tokens.

    `submit` and `Progress.cancel` may be called from any thread; `step` from one.

    Args:
        rows: requests that are worked on at once.
        length: tokens of the longest request, prompt and text; the model's context at most.
        chunk: prompt tokens written in one step; bounds how long others wait for their next token.
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
        self._mesh, self._cache_dtype = mesh, cache_dtype
        self._rows = [_Row(i) for i in range(rows)]
        self._waiting: deque[Progress] = deque()
        self._lock = threading.Lock()
        self._arrived = threading.Event()
        self._started: tuple[Made, list[_Row], list[Progress]] | None = None
        self._clock = itertools.count(1)
        self._limit = np.int32(min(config.vocab_size, tokenizer.vocab_size if tokenizer else config.vocab_size))
        self._slots = self._fresh()
        room = Room(rows, self.length, chunk, self._limit, self._window, mesh, cache_dtype)
        self._proposer = proposer(speculate, config, tokenizer, room) if speculate else None

    def _fresh(self) -> Any:
        cache = init_cache(self.config, len(self._rows), self.length, self._cache_dtype, self._mesh).unstack()
        return empty_slots(cache, stack_sampling([Sampling()] * len(self._rows)), self.config.vocab_size)

    # --- from any thread

    def submit(self, request: Request, changed: Callable[[Progress], None] = lambda progress: None) -> Progress:
        """Queues a request; `changed` is called in the engine's thread whenever there is more of it.

        Raises:
            PunaError: the request can never be met: no prompt, no room for it, too many stop tokens.
            Full: the queue is.
        """
        check_room("the prompt", request.prompt, request.max_new_tokens, self.config)
        if len(request.prompt) + request.max_new_tokens > self.length:
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
        return bool(self._waiting) or self._started is not None or any(row.progress for row in self._rows)

    def run(self, stopping: threading.Event) -> None:
        """Steps until `stopping` is set; sleeps while there is nothing to do. An error of a step ends the requests
        that were worked on, and the engine goes on with an empty cache."""
        while not stopping.is_set():
            if not self.busy:
                self._arrived.wait(0.05)
                self._arrived.clear()
                continue
            try:
                self.step()
            except Exception as error:  # whatever a device or a compiler may raise
                self.reset(error)

    def reset(self, error: BaseException) -> None:
        """Ends every request that is worked on with `error`, and starts from an empty cache."""
        self._started = None
        for row in self._rows:
            if row.progress is not None:
                row.progress.error = error
                self._end(row, "error")
            row.cached = []
        self._slots = self._fresh()
        if self._proposer:
            self._proposer.reset()

    def warm_up(self, scored: bool = False) -> int:
        """Compiles everything that requests will need (log-probabilities with `scored`); returns how many programs."""
        rows = {min(1 << i, len(self._rows)) for i in range(len(self._rows).bit_length() + 1)}
        windows = {self._window(1 << i) for i in range(self.length.bit_length() + 1)}
        widths = {_power_of_two(n, 16) for n in range(1, self.chunk + 1)}
        resting = np.zeros(len(self._rows), bool)
        for window in sorted(windows):
            for width in sorted(widths):
                nowhere = np.full((1, width), self.length, np.int32)
                tokens = np.zeros((1, width), np.int32)
                self._extend(tokens, nowhere, tokens[0], self._rows[0], window, False)
            for count in sorted(rows):
                for with_scores in {False, scored}:
                    self._slots, _ = decode(
                        self.params, self._slots, resting, self._limit, self.config, count, window, with_scores
                    )
                    if self._proposer:
                        proposals = self._proposer.warm_up(self._slots, count, window)
                        self._slots, _ = verify(
                            self.params, self._slots, resting, proposals, self._limit, self.config, count, window,
                            with_scores,
                        )  # fmt: skip
        self._slots = copy_row(self._slots, np.int32(0), np.int32(0))
        self._place(0, 0, 0, 0, (), -1, (), Sampling())
        self._slots = self._fresh()
        programs: tuple[Any, ...] = (decode, extend, copy_row, admit)
        if self._proposer:
            programs += (verify, *self._proposer.programs())
        return sum(program._cache_size() for program in programs)

    # --- the loop

    def step(self) -> None:
        """One turn: see the module's first lines."""
        self._drop_ended()
        self._take_waiting()
        self._read_prompt()
        if self._proposer and len(self._live()) <= MOST_ROWS:
            self._finish_tokens()  # proposals follow on what it made
        started = self._start_tokens()
        self._finish_tokens()
        self._started = started

    def _drop_ended(self) -> None:
        now = time.monotonic()
        for row in self._rows:
            progress = row.progress
            if progress is not None and (why := _over(progress, now)):
                self._end(row, why)
        with self._lock:
            ended = [progress for progress in self._waiting if _over(progress, now)]
            for progress in ended:
                self._waiting.remove(progress)
        for progress in ended:
            progress.finish = _over(progress, now)
            progress.changed(progress)

    def _take_waiting(self) -> None:
        """The oldest requests into free rows, each into the one that has most of its prompt already."""
        while free := [row for row in self._rows if row.progress is None]:
            with self._lock:
                if not self._waiting:
                    return
                progress = self._waiting.popleft()
            prompt = progress.request.prompt
            row = max(free, key=lambda row: (_shared(row, progress.request), -row.used, -row.index))
            row.progress, row.begun, row.reading, row.used = progress, False, True, next(self._clock)
            row.text = TextStream(self.tokenizer, prompt, progress.request.stop) if self.tokenizer else None

    def _begin(self, row: _Row, progress: Progress) -> None:
        """Keeps what the row's cache has of the prompt, or copies what another row has."""
        prompt = progress.request.prompt
        most = 0 if progress.request.score_prompt else len(prompt) - 1  # each token that is scored is computed
        best = max(self._rows, key=lambda row: _shared(row, progress.request))
        own, shared = (min(_shared(row, progress.request), most) for row in (row, best))
        if shared >= own + SHORTEST_REUSE:
            self._slots = copy_row(self._slots, np.int32(best.index), np.int32(row.index))
            own = shared
        row.begun, row.cached, progress.reused = True, list(prompt[:own]), own
        row.adapter = progress.request.adapter

    def _read_prompt(self) -> None:
        """One piece of the prompt of the request that came first; the last piece makes its row live."""
        reading = [row for row in self._rows if row.reading]
        if not reading:
            return
        row = min(reading, key=lambda row: row.used)
        assert row.progress is not None
        if not row.begun:
            self._begin(row, row.progress)
        request = row.progress.request
        prompt, first = request.prompt, len(row.cached)
        stop = min(first + self.chunk, len(prompt) - 1)
        if stop > first:
            width = _power_of_two(stop - first, 16)
            tokens = np.zeros((1, width), np.int32)
            positions = np.full((1, width), self.length, np.int32)
            following = np.zeros(width, np.int32)
            tokens[0, : stop - first], positions[0, : stop - first] = prompt[first:stop], range(first, stop)
            following[: stop - first] = prompt[first + 1 : stop + 1]
            made = self._extend(tokens, positions, following, row, self._window(stop), request.score_prompt)
            row.cached = list(prompt[:stop])
            if made is not None:
                scores = jax.device_get(made)
                row.progress.prompt_logprobs += [_logprobs(scores, i, request.logprobs) for i in range(stop - first)]
        if len(row.cached) >= len(prompt) - 1:
            self._admit(row, request)

    def _extend(
        self, tokens: np.ndarray, positions: np.ndarray, following: np.ndarray, row: _Row, window: int, scored: bool
    ) -> Made | None:
        self._slots, made = extend(
            self.params,
            self._slots,
            tokens,
            positions,
            following,
            np.int32(row.index),
            np.int32(row.adapter),
            self.config,
            window,
            scored,
        )
        return made

    def _admit(self, row: _Row, request: Request) -> None:
        position = len(request.prompt) - 1
        row.cached, row.position, row.reading = list(request.prompt[:position]), position, False
        self._place(
            row.index, request.prompt[-1], position, position + request.max_new_tokens, request.stop_ids,
            request.adapter, request.prompt, request.sampling,
        )  # fmt: skip

    def _place(
        self, row: int, token: int, position: int, last: int, stop_ids: Sequence[int], adapter: int,
        prompt: Sequence[int], sampling: Sampling,
    ) -> None:  # fmt: skip
        stops = np.full(STOPS, -1, np.int32)
        stops[: len(stop_ids)] = stop_ids
        in_prompt = np.zeros(self.config.vocab_size, bool)
        in_prompt[list(prompt)] = True
        numbers = (np.int32(number) for number in (row, token, position, last))
        self._slots = admit(self._slots, *numbers, stops, np.int32(adapter), in_prompt, stack_sampling([sampling]))

    def _live(self) -> list[_Row]:
        return [row for row in self._rows if row.progress is not None and not row.reading]

    def _start_tokens(self) -> tuple[Made, list[_Row], list[Progress]] | None:
        live = self._live()
        if not live:
            return None
        kept = np.zeros(len(self._rows), bool)
        kept[[row.index for row in live]] = True
        scored = any(row.progress.request.logprobs is not None for row in live if row.progress)
        rows = min(_power_of_two(max(row.index for row in live) + 1, 1), len(self._rows))
        proposals = self._propose(live, rows)
        for row in live:
            row.position += 1
        window = self._window(max(row.position for row in live))
        settings = (self._limit, self.config, rows, window, scored)
        if proposals is None:
            self._slots, made = decode(self.params, self._slots, kept, *settings)
        else:
            self._slots, made = verify(self.params, self._slots, kept, proposals, *settings)
        return made, live, [row.progress for row in live if row.progress]

    def _propose(self, live: list[_Row], rows: int) -> Any:
        """Proposals for what follows, where few rows are live and all that was made is read."""
        if not self._proposer or self._started is not None or len(live) > MOST_ROWS:
            return None
        for row in live:
            row.position = len(row.cached)
        proposals = self._proposer.propose([_text(row) for row in live], self._slots, rows)
        if proposals is not None:
            for row in live:
                row.position += self._proposer.tokens  # at most: proposals may be refused
        return proposals

    def _finish_tokens(self) -> None:
        """Reads the tokens that the step before started."""
        if self._started is None:
            return
        made, rows, owners = self._started
        self._started = None
        for one in single_steps(jax.device_get(made)):
            for row, progress in zip(rows, owners, strict=True):
                token = int(one.token[row.index])
                if row.progress is not progress or token < 0:
                    continue
                self._add(row, progress, token, one)

    def _add(self, row: _Row, progress: Progress, token: int, made: Made) -> None:
        request = progress.request
        before = progress.tokens[-1] if progress.tokens else request.prompt[-1]
        row.cached.append(before)
        progress.tokens.append(token)
        if request.logprobs is not None:
            progress.logprobs.append(_logprobs(made, row.index, request.logprobs))
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

    def _end(self, row: _Row, why: str) -> None:
        progress = row.progress
        assert progress is not None
        if row.text is not None:
            progress.text += row.text.flush()
        row.progress, row.text, row.reading, row.used = None, None, False, next(self._clock)
        progress.finish = why
        progress.changed(progress)

    def _window(self, length: int) -> int:
        return min(_power_of_two(length, self.least_window), self.length)


class Full(Exception):
    """The queue is full: the request may be tried again later."""


def run_all(engine: Engine, requests: Sequence[Request]) -> Iterator[list[Progress]]:
    """Submits all requests and steps until all have ended, yielding their progress after each step."""
    progress = [engine.submit(request) for request in requests]
    while engine.busy:
        engine.step()
        yield progress


def _logprobs(made: Made, i: int, count: int | None) -> TokenLogprobs:
    assert made.logprob is not None and made.top_ids is not None and made.top_logprobs is not None
    top = zip(made.top_ids[i, :count].tolist(), made.top_logprobs[i, :count].tolist(), strict=True)
    return TokenLogprobs(int(made.token[i]), float(made.logprob[i]), tuple(top))


def _text(row: _Row) -> Text:
    assert row.progress is not None
    return Text(row.index, row.cached, (row.progress.tokens or row.progress.request.prompt)[-1])


def _over(progress: Progress, now: float) -> str | None:
    if progress.cancelled:
        return "cancelled"
    return "deadline" if progress.request.deadline is not None and now > progress.request.deadline else None


def _shared(row: _Row, request: Request) -> int:
    """How many tokens of the request's prompt the row has in its cache, under the same adapter."""
    return _common(row.cached, request.prompt) if row.adapter == request.adapter else 0


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _power_of_two(size: int, least: int) -> int:
    return max(least, 1 << (size - 1).bit_length())
