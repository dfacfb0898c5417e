"""What is asked of the engine, and what becomes of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from infer.sample import Sampling
from model.errors import PunaError


class Constraint(Protocol):
    """What a text may be: asked before each token, told of each. It stands for one text and is used once."""

    def allowed(self) -> np.ndarray:
        """The tokens that may come next, a bit each: uint32 [ceil(V / 32)], the lowest bit first."""
        ...

    def accept(self, token: int) -> None:
        """Moves on by the token that came."""
        ...


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
        max_new_tokens: most tokens to make; 0 where the prompt is only scored.
        sampling: how tokens are chosen.
        stop_ids: tokens that end the text; the one that did is its last. At most `STOPS`.
        stop: strings that end the text, which leaves them out.
        logprobs: log-probabilities of this many likeliest tokens beside each token's own; None for none at all.
        score_prompt: log-probabilities of the prompt's tokens too, from the second on. With no token to make, the
            prompt may have one more than there is room for: its last is scored and not read.
        embed: no text is made; the prompt's last hidden state is wanted (max_new_tokens is not used).
        constraint: what the text may be, as a grammar; None for anything.
        adapter: which of the engine's adapters to use; -1 is the model without any.
        deadline: seconds on `time.monotonic`'s clock after which it ends, done or not.

    Raises:
        PunaError: a stop string is empty.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    stop_ids: Sequence[int] = ()
    stop: Sequence[str] = ()
    logprobs: int | None = None
    score_prompt: bool = False
    embed: bool = False
    constraint: Constraint | None = None
    adapter: int = -1
    deadline: float | None = None

    def __post_init__(self):
        if "" in self.stop:
            raise PunaError("stop is an empty string, which would end every text before it begins: leave it out")


@dataclass
class Progress:
    """What has become of a request. `finish` is None until it ends: "stop", "length", "cancelled", "deadline" or
    "error" (then `error` says which). `text` and `tokens` grow; they are read while the engine works.

    Attributes:
        tokens: the ids so far; a stop token that ended the text is the last.
        text: what they spell, as far as it is certain; without stop strings.
        logprobs: one for each of `tokens`, where asked for.
        prompt_logprobs: one for each of the prompt's tokens but the first, where asked for.
        embedding: float32 [D], where asked for.
        reused: tokens of the prompt that were in the cache already.
    """

    request: Request
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    embedding: np.ndarray | None = None
    reused: int = 0
    finish: str | None = None
    error: BaseException | None = None
    cancelled: bool = False
    changed: Callable[["Progress"], None] = lambda progress: None

    def cancel(self) -> None:
        """Asks the engine to end it at the next step."""
        self.cancelled = True


class Full(Exception):
    """The queue is full: the request may be tried again later."""
