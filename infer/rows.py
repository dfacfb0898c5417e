"""Which request is in which row of an engine's cache, and how much of its prompt is in the cache already.

This is the host's bookkeeping: nothing here touches a device.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from infer.generate import TextStream
from infer.proposals import Text
from infer.request import Progress, Request
from model.tokenizer import Tokenizer

SHORTEST_REUSE = 16  # tokens of a common prefix that are worth copying from another row


@dataclass
class Row:
    """One row of the cache.

    Attributes:
        index: its place in the cache.
        cached: the tokens whose keys and values are in it.
        adapter: under which they were computed.
        progress: the request that is worked on in it, if any.
        text: that request's text; None without a tokenizer.
        position: of the token that the next step reads.
        begun: whether it is decided where the prompt's cached part comes from.
        reading: whether the prompt is still being written to the cache.
        used: when it was worked on last: a number that grows.
    """

    index: int
    cached: list[int] = field(default_factory=list)
    adapter: int = -1
    progress: Progress | None = None
    text: TextStream | None = None
    position: int = 0
    begun: bool = False
    reading: bool = False
    used: int = 0

    @property
    def request(self) -> Request:
        """Of the row's progress, which must be there."""
        assert self.progress is not None
        return self.progress.request

    @property
    def live(self) -> bool:
        """Whether each step makes a token for it."""
        return self.progress is not None and not self.reading

    def shared(self, request: Request) -> int:
        """How many tokens of the request's prompt it has in its cache, under the same adapter."""
        return _common(self.cached, request.prompt) if self.adapter == request.adapter else 0

    def last_tokens(self) -> Text:
        """What proposals for the row's next tokens are made from."""
        return Text(self.index, self.cached, (self.progress and self.progress.tokens or self.request.prompt)[-1])


class Rows:
    """All rows of an engine's cache.

    Args:
        count: how many there are.
    """

    def __init__(self, count: int):
        self._rows = [Row(i) for i in range(count)]
        self._clock = itertools.count(1)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]

    def free(self) -> list[Row]:
        """Those without a request."""
        return [row for row in self._rows if row.progress is None]

    def taken(self) -> list[Row]:
        """Those with a request."""
        return [row for row in self._rows if row.progress is not None]

    def live(self) -> list[Row]:
        """Those for which each step makes a token."""
        return [row for row in self._rows if row.live]

    def range_of(self, rows: Sequence[Row]) -> tuple[int, int]:
        """The rows that a step computes so that all of `rows` are among them: the first, and how many.

        Their number is a power of two, or all there are: each is a program of its own.
        """
        low, high = min(row.index for row in rows), max(row.index for row in rows)
        count = 1 << (low ^ high).bit_length()
        if count >= len(self):
            return 0, len(self)
        return min(low // count * count, len(self) - count), count

    def place(self, progress: Progress, tokenizer: Tokenizer | None) -> None:
        """Puts a request into a free row; there must be one.

        It is one with which a step computes the fewest rows; of these the one that has most of the prompt already, or
        else has not been used for longest. What another row has of the prompt is copied.
        """
        request, taken = progress.request, self.taken()
        row = max(
            self.free(),
            key=lambda row: (-self.range_of([*taken, row])[1], row.shared(request), -row.used, -row.index),
        )
        row.progress, row.begun, row.reading, row.used = progress, False, True, next(self._clock)
        row.text = TextStream(tokenizer, request.prompt, request.stop) if tokenizer else None

    def release(self, row: Row) -> None:
        """Frees a row; what is in its cache stays, for prompts that begin alike."""
        row.progress, row.text, row.reading, row.used = None, None, False, next(self._clock)

    def next_to_read(self) -> Row | None:
        """The row whose prompt is to be read on: each in its turn."""
        reading = [row for row in self._rows if row.reading and not self._awaits_another(row)]
        if not reading:
            return None
        row = min(reading, key=lambda row: row.used)
        row.used = next(self._clock)
        return row

    def begin(self, row: Row) -> tuple[Row, int]:
        """Decides what of a row's prompt need not be read, and notes it as cached.

        Returns:
            The row whose cache has it, often `row` itself, and how many tokens it is.
        """
        request = row.request
        # Each token that is scored is computed, and so is the last.
        most = 0 if request.score_prompt else len(request.prompt) - 1
        best = max(self._rows, key=lambda other: other.shared(request))
        own, shared = (min(one.shared(request), most) for one in (row, best))
        source, count = (best, shared) if shared >= own + SHORTEST_REUSE else (row, own)
        row.begun, row.cached, row.adapter = True, list(request.prompt[:count]), request.adapter
        return source, count

    def _awaits_another(self, row: Row) -> bool:
        """Whether a prompt not begun will share more with one that is being read now than with what is cached."""
        if row.begun or row.request.score_prompt:
            return False
        request = row.request
        cached = max(other.shared(request) for other in self._rows)
        read = [other.request for other in self.taken() if other.reading and other.begun]
        same = [other.prompt for other in read if other.adapter == request.adapter]
        coming = max((_common(prompt[:-1], request.prompt[:-1]) for prompt in same), default=0)
        return coming > cached and coming >= row.shared(request) + SHORTEST_REUSE


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
