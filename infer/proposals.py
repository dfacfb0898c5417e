"""Where speculative decoding has its proposals from: the text itself (prompt lookup), or a smaller model.

Proposals only cost or save time; which tokens are made is decided in `infer/speculative.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh

from infer.sample import sample
from infer.slots import Slots, slice_rows
from model.cache import KVCache, init_cache
from model.config import LlamaConfig
from model.errors import PunaError
from model.llama import hidden, logits
from model.params import Params
from model.tokenizer import Tokenizer


@dataclass(frozen=True)
class PromptLookup:
    """Proposes what followed the last tokens where they stood before, in the prompt or the text made so far.

    Args:
        tokens: how many are proposed at a time.
        longest: tokens of the longest n-gram that is looked for; shorter ones follow, down to one token.
    """

    tokens: int = 8
    longest: int = 3


@dataclass(frozen=True)
class Draft:
    """Proposes what a smaller model of the same vocabulary makes of the text.

    Args:
        params: as `load_model(layout="per_layer")` gives them.
        tokens: how many are proposed at a time.
        tokenizer: the draft's own, where it is to be compared with the engine's.
    """

    params: Params
    config: LlamaConfig
    tokens: int = 4
    tokenizer: Tokenizer | None = None


Speculation = PromptLookup | Draft


class Text(NamedTuple):
    """A row's text: the tokens `before` the one that stands next, a list that the engine appends to, and that `token`.
    Another request has another list."""

    row: int
    before: list[int]
    token: int


class Room(NamedTuple):
    """What a draft's cache needs to know of the engine's. `window` gives the window that covers so many positions."""

    rows: int
    length: int
    chunk: int
    vocab_limit: Any
    window: Callable[[int], int]
    mesh: Mesh | None
    cache_dtype: Any


# --- prompt lookup

LONGEST_PAUSE = 16  # steps without proposals where they are never right


class Index:
    """Where each n-gram of a growing text stood last. A new token costs one entry for each n."""

    def __init__(self, owner: list[int], longest: int):
        self.owner = owner
        self._text: list[int] = []
        self._ends: list[dict[tuple[int, ...], int]] = [{} for _ in range(longest)]
        self._asked = self._pause = self._wait = 0

    def follow(self, text: Text) -> None:
        for token in (*text.before[len(self._text) :], text.token):
            end = len(self._text)
            for n, ends in enumerate(self._ends[:end], 1):  # an n-gram is entered once something follows it
                ends[tuple(self._text[end - n :])] = end
            self._text.append(token)

    def next_proposals(self, count: int) -> list[int]:
        """As `proposals`, but after some that were all wrong none for a step, then two, four and so on: a wrong
        proposal costs time."""
        if self._asked:
            none_right = len(self._text) == self._asked + 1
            self._pause = min(max(1, 2 * self._pause), LONGEST_PAUSE) if none_right else 0
            self._wait = self._pause
        self._asked = 0
        if self._wait:
            self._wait -= 1
            return []
        found = self.proposals(count)
        self._asked = len(self._text) if found else 0
        return found

    def proposals(self, count: int) -> list[int]:
        """What followed the longest n-gram that the text ends in; a copy that reaches the end copies itself."""
        for n in range(min(len(self._ends), len(self._text)), 0, -1):
            if (start := self._ends[n - 1].get(tuple(self._text[-n:]))) is not None:
                period = len(self._text) - start
                return [self._text[start + i % period] for i in range(count)]
        return []


class _Lookups:
    """The n-grams of an engine's rows (LLMA, Yang et al., arXiv:2304.04487, and Saxena's prompt lookup decoding)."""

    def __init__(self, speculation: PromptLookup, room: Room):
        self.tokens, self._longest, self._rows = speculation.tokens, speculation.longest, room.rows
        self._indices: dict[int, Index] = {}

    def reset(self) -> None:
        self._indices = {}

    def warm_up(self, slots: Slots, rows: int, window: int) -> np.ndarray:
        return np.full((self._rows, self.tokens), -1, np.int32)

    def programs(self) -> tuple[Any, ...]:
        return ()

    def propose(self, texts: Sequence[Text], slots: Slots, first: int, rows: int) -> np.ndarray | None:
        proposals = np.full((self._rows, self.tokens), -1, np.int32)
        for text in texts:
            index = self._indices.get(text.row)
            if index is None or index.owner is not text.before:
                index = self._indices[text.row] = Index(text.before, self._longest)
            index.follow(text)
            found = index.next_proposals(self.tokens)
            proposals[text.row, : len(found)] = found
        return proposals if (proposals >= 0).any() else None


# --- a draft model

_Carry = tuple[KVCache, Array, Array, Array]  # the cache, the last two tokens of each row, and counts as in `Slots`


@partial(jax.jit, static_argnames=("config", "window"), donate_argnames="cache")
def follow(
    params: Params, cache: KVCache, tokens: Array, positions: Array, row: Array, config: LlamaConfig, window: int
) -> KVCache:
    """Writes tokens [1, T] into row `row` of the draft's cache at positions [1, T]."""
    _, new = hidden(params, tokens, config, positions=positions, cache=cache, slots=row, window=window)
    assert new is not None
    return new


@partial(jax.jit, static_argnames=("config", "count", "rows", "window"), donate_argnames="cache")
def draw(
    params: Params,
    cache: KVCache,
    slots: Slots,
    before: Array,
    ready: Array,
    vocab_limit: Array,
    first: Array,
    config: LlamaConfig,
    count: int,
    rows: int,
    window: int,
) -> tuple[KVCache, Array]:
    """`count` tokens of the draft after each row's token, drawn with the row's own settings and keys: with
    common random numbers, two distributions that are alike mostly give the same token.

    Args:
        cache: the draft's, which has each row's text up to two tokens before the row's own at least.
        before: int32 [N], the token before each row's own, which is written here (again).
        ready: bool [N], the rows that want proposals.
        first: int32 [], the first of the `rows` rows among which they are.

    Returns:
        The cache, and the proposals, int32 [N, count], -1 in other rows.
    """
    own = slice_rows(slots, first, rows)
    ready, before = (lax.dynamic_slice_in_dim(x, first, rows) for x in (ready, before))
    index = jnp.arange(rows)

    def step(carry: _Carry, i: Array) -> tuple[_Carry, Array]:
        cache, last, token, counts = carry
        places = (own.position + i)[:, None] + jnp.array([-1, 0])
        positions = jnp.where(ready[:, None] & (places >= 0), places, cache.capacity)
        tokens = jnp.stack([last, token], axis=1)
        x, new_cache = hidden(params, tokens, config, positions=positions, cache=cache, slots=first, window=window)
        assert new_cache is not None
        raw = jnp.where(jnp.arange(config.vocab_size) < vocab_limit, logits(params, x[:, 1], config), -jnp.inf)
        new = sample(raw, own.settings, own.in_prompt | (counts > 0), own.position + i + 1, counts)
        return (new_cache, token, new, counts.at[index, new].add(1)), new

    # Each step writes two tokens: only the first needs both, but one shape is compiled in half the time of two.
    begin = (cache, before, own.token, own.counts)
    (cache, *_), drawn = lax.scan(step, begin, jnp.arange(count))
    proposals = jnp.full((len(slots.token), count), -1, jnp.int32)
    return cache, lax.dynamic_update_slice_in_dim(proposals, jnp.where(ready[:, None], drawn.T, -1), first, axis=0)


@dataclass
class _Followed:
    """A row of the draft's cache: the tokens in it, of which the first `sure` are known to be those of `owner`."""

    known: list[int] = field(default_factory=list)
    owner: list[int] | None = None
    sure: int = 0

    def agree(self, before: list[int]) -> None:
        """Forgets what is not of the text `before`."""
        same = self.sure if self.owner is before else 0
        while same < min(len(self.known), len(before)) and self.known[same] == before[same]:
            same += 1
        del self.known[same:]
        self.owner, self.sure = before, same


class _Drafts:
    """A draft model beside an engine, with a cache of as many rows. A row whose text it has not read yet gets no
    proposals; it reads one piece of one row at a time, so that nobody waits long."""

    def __init__(self, speculation: Draft, room: Room):
        self.tokens, self._room = speculation.tokens, room
        self._params, self._config = speculation.params, speculation.config
        self._length = min(room.length, self._config.max_position_embeddings)
        self.reset()

    def reset(self) -> None:
        room = self._room
        self._cache = init_cache(self._config, room.rows, self._length, room.cache_dtype, room.mesh, layout="per_layer")
        if room.mesh is None:  # committed, as what the programs return is: else each would compile twice
            self._cache = jax.device_put(self._cache, jax.local_devices()[0])
        self._followed = [_Followed() for _ in range(room.rows)]
        self._drawn: tuple[Array, list[Text]] | None = None

    def warm_up(self, slots: Slots, rows: int, window: int) -> Any:
        resting, nothing = np.zeros(self._room.rows, bool), np.zeros(self._room.rows, np.int32)
        for width in sorted({_width(n) for n in range(1, self._room.chunk + 1)}):
            self._follow(0, [], 0, width, window)
        return self._draw(slots, nothing, resting, 0, rows, window)

    def programs(self) -> tuple[Any, ...]:
        return follow, draw

    def propose(self, texts: Sequence[Text], slots: Slots, first: int, rows: int) -> Array | None:
        self._note_drawn()
        ready, before = np.zeros(self._room.rows, bool), np.zeros(self._room.rows, np.int32)
        may_read = True
        for text in texts:
            row, size = self._followed[text.row], len(text.before)
            if size + self.tokens > self._length:
                continue
            row.agree(text.before)
            if size - len(row.known) > 1 and may_read:
                may_read = False
                start = len(row.known)
                piece = text.before[start : start + self._room.chunk]
                self._follow(text.row, piece, start, _width(len(piece)), self._room.window(start + len(piece)))
                row.known += piece
            if size - len(row.known) <= 1:
                ready[text.row] = True
                if text.before:
                    before[text.row] = text.before[-1]
                    row.known[size - 1 :] = [text.before[-1]]
        if not ready.any():
            return None
        window = self._room.window(max(len(text.before) for text in texts) + self.tokens)
        proposals = self._draw(slots, before, ready, first, rows, window)
        self._drawn = proposals, [text for text in texts if ready[text.row]]
        return proposals

    def _note_drawn(self) -> None:
        """The last proposals but one of each row are in the cache, accepted or not."""
        if self._drawn is None:
            return
        proposals, texts = self._drawn
        drawn = np.asarray(proposals)
        for text in texts:
            self._followed[text.row].known += [text.token, *drawn[text.row, :-1].tolist()]
        self._drawn = None

    def _follow(self, row: int, piece: Sequence[int], first: int, width: int, window: int) -> None:
        tokens, positions = np.zeros((1, width), np.int32), np.full((1, width), self._length, np.int32)
        tokens[0, : len(piece)], positions[0, : len(piece)] = piece, range(first, first + len(piece))
        self._cache = follow(
            self._params, self._cache, tokens, positions, np.int32(row), self._config, min(window, self._length)
        )

    def _draw(self, slots: Slots, before: np.ndarray, ready: np.ndarray, first: int, rows: int, window: int) -> Array:
        self._cache, proposals = draw(
            self._params, self._cache, slots, before, ready, self._room.vocab_limit, np.int32(first), self._config,
            self.tokens, rows, min(window, self._length),
        )  # fmt: skip
        return proposals


def _width(size: int) -> int:
    """What a piece is padded to: few widths, so that few programs are compiled."""
    return max(16, 1 << (size - 1).bit_length())


Proposer = _Lookups | _Drafts


def proposer(speculation: Speculation, config: LlamaConfig, tokenizer: Tokenizer | None, room: Room) -> Proposer:
    """What proposes tokens for an engine of the model `config`.

    Raises:
        PunaError: a count is not one, or the draft's vocabulary is not the model's.
    """
    for name in ("tokens", "longest"):
        if getattr(speculation, name, 1) < 1:
            raise PunaError(f"{name} is {getattr(speculation, name)}: give a whole number from 1 on")
    if isinstance(speculation, PromptLookup):
        return _Lookups(speculation, room)
    if speculation.config.vocab_size != config.vocab_size:
        raise PunaError(
            f"the draft's vocab_size is {speculation.config.vocab_size} and the model's {config.vocab_size}: "
            "a draft needs the model's own tokenizer"
        )
    if tokenizer is not None and speculation.tokenizer is not None:
        _check_same(speculation.tokenizer, tokenizer)
    return _Drafts(speculation, room)


def _check_same(draft: Tokenizer, own: Tokenizer) -> None:
    if draft.vocab_size != own.vocab_size:
        raise PunaError(
            f"the draft's tokenizer has {draft.vocab_size} tokens and the model's {own.vocab_size}: "
            "a draft needs the model's own tokenizer"
        )
    for id in range(own.vocab_size):
        if draft.token_bytes(id) != own.token_bytes(id):
            raise PunaError(
                f"token {id} is {draft.token_bytes(id)!r} to the draft and {own.token_bytes(id)!r} to the model: "
                "a draft needs the model's own tokenizer"
            )
