"""Speculative decoding: several proposed tokens of a row are checked in one pass of the model.

Tokens are proposed from the text itself (prompt lookup) or by a smaller model. `verify` draws at each position what
plain decoding would draw there, with the same key and the same penalties, and accepts proposals while they equal it; the
first token that differs is itself the right one. So the text is that of plain decoding, sampled or greedy, whatever is
proposed (but for rounding: a pass over more tokens may sum floats in another order). Leviathan et al. (arXiv:2211.17192)
accept by the ratio of two probabilities instead, which keeps the distribution but not the tokens of a seed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from infer.sample import sample
from infer.slots import Made, Slots, score
from model.cache import KVCache, init_cache
from model.config import LlamaConfig
from model.errors import PunaError
from model.llama import hidden, logits
from model.params import Params
from model.selected import select
from model.tokenizer import Tokenizer

MOST_ROWS = 4  # live rows up to which checking proposals is cheaper than more plain steps


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


# --- checking proposals


@partial(jax.jit, static_argnames=("config", "rows", "window", "scored"), donate_argnames="slots")
def verify(
    params: Params,
    slots: Slots,
    kept: Array,
    proposals: Array,
    vocab_limit: Array,
    config: LlamaConfig,
    rows: int,
    window: int,
    scored: bool,
) -> tuple[Slots, Made]:
    """As `decode`, but up to K + 1 tokens for every live row of the first `rows`.

    Args:
        proposals: int32 [N, K], what may follow each row's token; -1 where there is no proposal.
        window: covers the positions of all proposals.

    Returns:
        The rows after their new tokens, and those tokens: a `Made` whose arrays have K + 1 entries a row, -1 after the
        last one that was made.
    """
    params = select(params, slots.adapter[:rows])
    live = (slots.live & kept)[:rows]
    proposals = proposals[:rows]
    width = proposals.shape[1] + 1
    tokens = jnp.concatenate([slots.token[:rows, None], proposals], axis=1)
    # Keys of refused proposals stay in the cache, where no query sees them before they are overwritten.
    places = slots.position[:rows, None] + jnp.arange(width)
    asked = live[:, None] & (tokens >= 0) & (places < slots.last[:rows, None])
    positions = jnp.where(asked, places, slots.cache.capacity)
    x, cache = hidden(params, tokens.clip(0), config, positions=positions, cache=slots.cache, window=window)
    assert cache is not None
    raw = jnp.where(jnp.arange(config.vocab_size) < vocab_limit, logits(params, x, config), -jnp.inf)

    def flat(x: Array) -> Array:
        return x.reshape(rows * width, *x.shape[2:])

    def apart(x: Array) -> Array:
        return x.reshape(rows, width, *x.shape[1:])

    index = jnp.arange(rows)
    counts = [slots.counts[:rows]]  # of tokens made, as they will be if the proposals before are accepted
    for i in range(width - 1):
        counts.append(counts[-1].at[index, proposals[:, i]].add(1))
    counts = flat(jnp.stack(counts, axis=1))
    settings, in_prompt = jax.tree.map(lambda a: jnp.repeat(a[:rows], width, axis=0), (slots.settings, slots.in_prompt))
    new = apart(sample(flat(raw), settings, in_prompt | (counts > 0), flat(places + 1), counts))

    ends = jnp.any(new[..., None] == slots.stops[:rows, None], axis=-1) | (places + 1 >= slots.last[:rows, None])
    goes_on = (new[:, :-1] == proposals) & ~ends[:, :-1]
    made = live[:, None] & jnp.cumprod(jnp.pad(goes_on, ((0, 0), (1, 0)), constant_values=True), axis=1).astype(bool)
    count = made.sum(axis=1)
    final = (index, (count - 1).clip(0))
    moved = slots.position[:rows] + count
    result = jax.tree.map(apart, score(flat(raw), flat(new))) if scored else Made(new)
    lengths = slots.cache.lengths.at[:rows].max(jnp.where(live, moved, 0))
    slots = slots._replace(
        cache=cache.replace(lengths=lengths),
        token=slots.token.at[:rows].set(jnp.where(live, new[final], slots.token[:rows])),
        position=slots.position.at[:rows].set(moved),
        live=(slots.live & kept).at[:rows].set(live & ~ends[final]),
        counts=slots.counts.at[index[:, None], new].add(made.astype(jnp.int32)),
    )
    return slots, result._replace(token=jnp.where(made, new, -1))


def single_steps(made: Made) -> list[Made]:
    """What `verify` made, one token of every row at a time; what `decode` made is one such step."""
    if made.token.ndim == 1:
        return [made]
    return [jax.tree.map(lambda a, i=i: a[:, i], made) for i in range(made.token.shape[1])]


# --- prompt lookup


class _Index:
    """Where each n-gram of a growing text stood last. A new token costs one entry for each n."""

    def __init__(self, owner: list[int], longest: int):
        self.owner = owner
        self._text: list[int] = []
        self._ends: list[dict[tuple[int, ...], int]] = [{} for _ in range(longest)]

    def follow(self, text: Text) -> None:
        for token in (*text.before[len(self._text) :], text.token):
            end = len(self._text)
            for n, ends in enumerate(self._ends[:end], 1):  # an n-gram is entered once something follows it
                ends[tuple(self._text[end - n :])] = end
            self._text.append(token)

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
        self._indices: dict[int, _Index] = {}

    def reset(self) -> None:
        self._indices = {}

    def warm_up(self, slots: Slots, rows: int, window: int) -> np.ndarray:
        return np.full((self._rows, self.tokens), -1, np.int32)

    def programs(self) -> tuple[Any, ...]:
        return ()

    def propose(self, texts: Sequence[Text], slots: Slots, rows: int) -> np.ndarray | None:
        proposals = np.full((self._rows, self.tokens), -1, np.int32)
        for text in texts:
            index = self._indices.get(text.row)
            if index is None or index.owner is not text.before:
                index = self._indices[text.row] = _Index(text.before, self._longest)
            index.follow(text)
            found = index.proposals(self.tokens)
            proposals[text.row, : len(found)] = found
        return proposals if (proposals >= 0).any() else None


# --- a draft model


@partial(jax.jit, static_argnames=("config", "window"), donate_argnames="cache")
def follow(
    params: Params, cache: KVCache, tokens: Array, positions: Array, row: Array, config: LlamaConfig, window: int
) -> KVCache:
    """Writes tokens [1, T] into row `row` of the draft's cache at positions [1, T]."""
    _, new = hidden(params, tokens, config, positions=positions, cache=cache, slots=row[None], window=window)
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
    config: LlamaConfig,
    count: int,
    rows: int,
    window: int,
) -> tuple[KVCache, Array]:
    """`count` tokens of the draft after each row's token, drawn with the row's own settings and keys: common random
    numbers, with which two models that are alike draw the same token more often than not.

    Args:
        cache: the draft's, which has each row's text up to two tokens before the row's own at least.
        before: int32 [N], the token before each row's own, which is written here (again).
        ready: bool [N], the rows that want proposals.

    Returns:
        The cache, and the proposals, int32 [N, count], -1 in other rows.
    """
    ready = ready[:rows]
    start = slots.position[:rows]
    settings = jax.tree.map(lambda a: a[:rows], slots.settings)
    index = jnp.arange(rows)

    def next_token(cache: KVCache, tokens: Array, places: Array, counts: Array) -> tuple[KVCache, Array]:
        positions = jnp.where(ready[:, None] & (places >= 0), places, cache.capacity)
        x, new = hidden(params, tokens, config, positions=positions, cache=cache, window=window)
        assert new is not None
        raw = logits(params, x[:, -1], config)
        raw = jnp.where(jnp.arange(config.vocab_size) < vocab_limit, raw, -jnp.inf)
        return new, sample(raw, settings, slots.in_prompt[:rows] | (counts > 0), places[:, -1] + 1, counts)

    def step(carry: tuple[KVCache, Array, Array], i: Array) -> tuple[tuple[KVCache, Array, Array], Array]:
        cache, token, counts = carry
        counts = counts.at[index, token].add(1)
        cache, new = next_token(cache, token[:, None], (start + i)[:, None], counts)
        return (cache, new, counts), new

    both = jnp.stack([before[:rows], slots.token[:rows]], axis=1)
    cache, first = next_token(cache, both, start[:, None] + jnp.array([-1, 0]), slots.counts[:rows])
    (cache, _, _), others = jax.lax.scan(step, (cache, first, slots.counts[:rows]), jnp.arange(1, count))
    drawn = jnp.concatenate([first[None], others]).T
    proposals = jnp.full((len(slots.token), count), -1, jnp.int32)
    return cache, proposals.at[:rows].set(jnp.where(ready[:, None], drawn, -1))


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
        self._cache = init_cache(self._config, room.rows, self._length, room.cache_dtype, room.mesh).unstack()
        self._followed = [_Followed() for _ in range(room.rows)]
        self._drawn: tuple[Array, list[Text]] | None = None

    def warm_up(self, slots: Slots, rows: int, window: int) -> Any:
        resting, nothing = np.zeros(self._room.rows, bool), np.zeros(self._room.rows, np.int32)
        for width in sorted({_width(n) for n in range(1, self._room.chunk + 1)}):
            self._follow(0, [], 0, width, window)
        return self._draw(slots, nothing, resting, rows, window)

    def programs(self) -> tuple[Any, ...]:
        return follow, draw

    def propose(self, texts: Sequence[Text], slots: Slots, rows: int) -> Array | None:
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
                first = len(row.known)
                piece = text.before[first : first + self._room.chunk]
                self._follow(text.row, piece, first, _width(len(piece)), self._room.window(first + len(piece)))
                row.known += piece
            if size - len(row.known) <= 1:
                ready[text.row] = True
                if text.before:
                    before[text.row] = text.before[-1]
                    row.known[size - 1 :] = [text.before[-1]]
        if not ready.any():
            return None
        window = self._room.window(max(len(text.before) for text in texts) + self.tokens)
        proposals = self._draw(slots, before, ready, rows, window)
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

    def _draw(self, slots: Slots, before: np.ndarray, ready: np.ndarray, rows: int, window: int) -> Array:
        self._cache, proposals = draw(
            self._params, self._cache, slots, before, ready, self._room.vocab_limit, self._config, self.tokens, rows,
            min(window, self._length),
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
