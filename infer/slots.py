"""The device's side of the engine: rows of one cache that requests come to and leave, each with its own settings.

Three jitted functions and their shapes are all that is ever compiled: `extend` writes a piece of a prompt into one row,
`admit` gives a row its settings, `decode` makes one token for every live row. Settings are arrays, so nothing that a
request says compiles anything.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from infer.sample import SamplingRows, sample
from model.cache import KVCache
from model.config import LlamaConfig
from model.llama import hidden, logits
from model.params import Params
from model.selected import select
from model.sharding import constrain

STOPS = 8  # token ids that may end a row, at most
TOP = 20  # log-probabilities of the likeliest tokens that a request may ask for, at most


class Slots(NamedTuple):
    """N rows of one cache.

    Attributes:
        cache: of N rows, unstacked.
        token: int32 [N], the last token of each row, not in the cache yet.
        position: int32 [N], where it stands.
        last: int32 [N]; a row ends when its token stands there.
        live: bool [N]; a row that is not live rests.
        stops: int32 [N, STOPS], the tokens after which a row ends; -1 is none.
        adapter: int32 [N], which adapter it uses; -1 is none.
        in_prompt: bool [N, V], the tokens of the prompt.
        counts: int32 [N, V], how often each token was made.
        settings: how each row is sampled.
    """

    cache: KVCache
    token: Array
    position: Array
    last: Array
    live: Array
    stops: Array
    adapter: Array
    in_prompt: Array
    counts: Array
    settings: SamplingRows


class Made(NamedTuple):
    """What one pass made, N tokens.

    Log-probabilities are there where asked for. They are the model's own: no temperature and no filter, but tokens that
    `decode` does not allow have none.

    Attributes:
        token: int32 [N], -1 where the row rested.
        logprob: float32 [N], of the token.
        top_ids: int32 [N, TOP], the likeliest tokens in its place.
        top_logprobs: float32 [N, TOP], theirs.
    """

    token: Array
    logprob: Array | None = None
    top_ids: Array | None = None
    top_logprobs: Array | None = None


def empty_slots(cache: KVCache, settings: SamplingRows, vocab_size: int) -> Slots:
    """Rows that all rest.

    Args:
        cache: of N rows.
        settings: any N; `admit` replaces a row's.
        vocab_size: V.
    """
    n = len(cache.lengths)

    def zeros() -> Array:  # each its own buffer, or donating one would take the others
        return jnp.zeros(n, jnp.int32)

    return Slots(
        cache=cache,
        token=zeros(),
        position=zeros(),
        last=zeros(),
        live=jnp.zeros(n, bool),
        stops=jnp.full((n, STOPS), -1, jnp.int32),
        adapter=jnp.full(n, -1, jnp.int32),
        in_prompt=jnp.zeros((n, vocab_size), bool),
        counts=jnp.zeros((n, vocab_size), jnp.int32),
        settings=settings,
    )


@partial(jax.jit, donate_argnames="slots")
def admit(
    slots: Slots,
    row: Array,
    token: Array,
    position: Array,
    last: Array,
    stops: Array,
    adapter: Array,
    in_prompt: Array,
    own: SamplingRows,
) -> Slots:
    """Gives a row whose prompt is in the cache its settings; it lives from here on.

    Args:
        slots: donated.
        row: int32 [], which row.
        token: int32 [], the prompt's last.
        position: int32 [], where it stands.
        last: int32 [], where the last token may stand.
        stops: int32 [STOPS], the tokens that end it; -1 is none.
        adapter: int32 [], which one it uses; -1 is none.
        in_prompt: bool [V], the tokens of its prompt.
        own: the settings of this one row, [1] each.
    """

    def put(all: Array, one: Array) -> Array:
        return all.at[row].set(one)

    admitted = Slots(
        cache=slots.cache,
        token=put(slots.token, token),
        position=put(slots.position, position),
        last=put(slots.last, last),
        live=put(slots.live, jnp.array(True)),
        stops=put(slots.stops, stops),
        adapter=put(slots.adapter, adapter),
        in_prompt=put(slots.in_prompt, in_prompt),
        counts=put(slots.counts, jnp.zeros_like(slots.counts[0])),
        settings=jax.tree.map(lambda all, one: all.at[row].set(one[0]), slots.settings, own),
    )
    return laid_out(admitted)


@partial(jax.jit, static_argnames=("config", "window", "scored"), donate_argnames="slots")
def extend(
    params: Params,
    slots: Slots,
    tokens: Array,
    positions: Array,
    following: Array,
    count: Array,
    row: Array,
    adapter: Array,
    config: LlamaConfig,
    window: int,
    scored: bool,
) -> tuple[Slots, Made | None, Array]:
    """Writes a piece of a prompt into one row.

    Args:
        params: unstacked; with adapters as `side_by_side` makes them.
        slots: donated.
        tokens: int32 [1, T], of which the first `count` are; the rest is padding.
        positions: int32 [1, T], where each goes; padding stands at the cache's capacity.
        following: int32 [T], the tokens that are scored, each after its own.
        count: int32 [].
        row: int32 [], which row.
        adapter: int32 [], which adapter it uses; -1 is none.
        config: the shape of the model.
        window: how many positions attention reads; above every token's.
        scored: whether the tokens in `following` are.

    Returns:
        The slots, the scores (N being T; None where not asked for), and the last token's hidden state after the final
        norm, float32 [D].
    """
    params = select(params, adapter[None])
    x, cache = hidden(params, tokens, config, positions=positions, cache=slots.cache, slots=row, window=window)
    assert cache is not None
    slots = laid_out(slots._replace(cache=cache))
    state = x[0, count - 1].astype(jnp.float32)
    return slots, score(logits(params, x[0], config), following) if scored else None, state


@partial(jax.jit, donate_argnames="slots")
def copy_row(slots: Slots, source: Array, target: Array) -> Slots:
    """The cached keys and values of row `source` in row `target` too; the slots are donated."""

    def copy(x: Array) -> Array:
        return x.at[target].set(x[source])

    cache = slots.cache
    cache = cache.replace(k=jax.tree.map(copy, cache.k), v=jax.tree.map(copy, cache.v), lengths=copy(cache.lengths))
    return laid_out(slots._replace(cache=cache))


@partial(jax.jit, static_argnames=("config", "rows", "window", "scored"), donate_argnames="slots")
def decode(
    params: Params,
    slots: Slots,
    kept: Array,
    allowed: Array,
    first: Array,
    config: LlamaConfig,
    rows: int,
    window: int,
    scored: bool,
) -> tuple[Slots, Made]:
    """One token for every live row of some that follow each other.

    Args:
        params: unstacked; with adapters as `side_by_side` makes them.
        slots: donated.
        kept: bool [N]; a row that is not ends first.
        allowed: uint32 [N, ceil(V / 32)], the tokens that may be chosen: a bit each, the lowest first.
        first: int32 [], the first of these rows.
        config: the shape of the model.
        rows: how many they are; each number is a program of its own.
        window: how many positions attention reads; above every live row's.
        scored: whether log-probabilities are wanted.

    Returns:
        The slots, and what was made, N being `rows`.
    """
    own = slice_rows(slots, first, rows)
    params = select(params, own.adapter)
    live = own.live & lax.dynamic_slice_in_dim(kept, first, rows)
    position = jnp.where(live, own.position, slots.cache.capacity)
    x, cache = hidden(
        params, own.token[:, None], config, positions=position[:, None], cache=slots.cache, slots=first, window=window
    )
    assert cache is not None
    may = bits(lax.dynamic_slice_in_dim(allowed, first, rows), config.vocab_size)
    raw = jnp.where(may, logits(params, x[:, 0], config), -jnp.inf)
    new = sample(raw, own.settings, own.in_prompt | (own.counts > 0), position + 1, own.counts)
    new = jnp.where(live, new, own.token)
    moved = jnp.where(live, own.position + 1, own.position)
    ended = jnp.any(new[:, None] == own.stops, axis=1) | (moved >= own.last)
    made = score(raw, new) if scored else Made(new)
    made = made._replace(token=jnp.where(live, new, -1))
    slots = put_rows(slots._replace(cache=cache), first, kept, new, moved, live & ~ended)
    counts = slots.counts.at[first + jnp.arange(rows), new].add(live.astype(jnp.int32))
    return laid_out(slots._replace(counts=counts)), made


def slice_rows(slots: Slots, first: Array, rows: int) -> Slots:
    """What is known of `rows` rows from row `first` on; the cache, which is read in `hidden`, is left out."""
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, first, rows), slots._replace(cache=None))


def put_rows(slots: Slots, first: Array, kept: Array, token: Array, position: Array, live: Array) -> Slots:
    """The slots after a pass over the rows from `first` on; rows that are not `kept` [N] have ended."""

    def put(all: Array, new: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(all, new, first, axis=0)

    return slots._replace(
        token=put(slots.token, token), position=put(slots.position, position), live=put(slots.live & kept, live)
    )


def laid_out(slots: Slots) -> Slots:
    """Over a mesh, every array where the engine first put it: else the result of one program would compile the next."""

    def lay_out(x: Array, *axes: str | None) -> Array:
        return constrain(x, (None, *axes, *[None] * (x.ndim - 1 - len(axes))))

    cache = slots.cache
    keys, values = (jax.tree.map(lambda x: lay_out(x, "kv_heads"), side) for side in (cache.k, cache.v))
    rest = jax.tree.map(lay_out, slots._replace(cache=None))
    return rest._replace(
        cache=cache.replace(k=keys, v=values, lengths=lay_out(cache.lengths)),
        in_prompt=lay_out(slots.in_prompt, "vocab"),
        counts=lay_out(slots.counts, "vocab"),
    )


def bits(words: Array, count: int) -> Array:
    """The first `count` bits of uint32 [N, W], the lowest of a word first, as bool [N, count]."""
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return bits.reshape(len(words), -1)[:, :count] == 1


def score(raw: Array, tokens: Array) -> Made:
    """The log-probabilities of tokens [N] under logits [N, V]."""
    logprobs = jax.nn.log_softmax(raw, axis=-1)
    own = jnp.take_along_axis(logprobs, tokens[:, None].clip(0), axis=1)[:, 0]
    top, ids = lax.top_k(logprobs, min(TOP, raw.shape[-1]))
    return Made(tokens, own, ids, top)
