"""The device's side of the engine: rows of one cache that requests come to and leave, each with its own settings.

Three jitted functions and their shapes are all that is ever compiled: `extend` writes a piece of a prompt into one row,
`admit` gives a row its settings, `decode` makes one token for every live row. Settings are arrays, so nothing that a
request says compiles anything.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

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
    """N rows. `token` [N] stands at `position` [N] and is not in the cache yet; a row that is not `live` [N] rests.

    A row ends after a token of its `stops` [N, STOPS] (-1 is none), or when its token stands at `last` [N].
    `adapter` [N] is the one that it uses, -1 none.
    `in_prompt` bool [N, V] and `counts` int32 [N, V] are the tokens of the prompt, and how often each was made.
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
    """What one step made, a row an entry: `token` [N], -1 where the row rested. Where asked for: its log-probability
    [N] under the model itself (no temperature, no filter), and the ids and log-probabilities [N, TOP] of the likeliest.
    """

    token: Array
    logprob: Array | None = None
    top_ids: Array | None = None
    top_logprobs: Array | None = None


def empty_slots(cache: KVCache, settings: SamplingRows, vocab_size: int) -> Slots:
    """Rows that all rest; `settings` is any batch of N."""
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
    """Row `row` goes on from `token` at `position`, with its own stops [STOPS], prompt mask [V] and settings [1]."""

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
    """Writes tokens [1, T] into row `row` at positions [1, T].

    Args:
        tokens: of which the first `count` are; padding stands at the cache's capacity.
        following: [T], the tokens that are scored, each after its own.
        scored: whether they are.

    Returns:
        The slots, the scores, and the last token's hidden state after the final norm, float32 [D].
    """
    params = select(params, adapter[None])
    x, cache = hidden(params, tokens, config, positions=positions, cache=slots.cache, slots=row[None], window=window)
    assert cache is not None
    slots = laid_out(slots._replace(cache=cache))
    state = x[0, count - 1].astype(jnp.float32)
    return slots, score(logits(params, x[0], config), following) if scored else None, state


@partial(jax.jit, donate_argnames="slots")
def copy_row(slots: Slots, source: Array, target: Array) -> Slots:
    """The cached keys and values of row `source` in row `target` too."""

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
    config: LlamaConfig,
    rows: int,
    window: int,
    scored: bool,
) -> tuple[Slots, Made]:
    """One token for every live row of the first `rows`.

    Args:
        kept: bool [N]; a row that is not ends first.
        allowed: uint32 [N, ceil(V / 32)], the tokens that may be chosen: a bit each, the lowest first.
        window: how many positions attention reads; above every live row's.
        scored: see `Made`.
    """
    params = select(params, slots.adapter[:rows])
    live = (slots.live & kept)[:rows]
    position = jnp.where(live, slots.position[:rows], slots.cache.capacity)
    x, cache = hidden(
        params, slots.token[:rows, None], config, positions=position[:, None], cache=slots.cache, window=window
    )
    assert cache is not None
    raw = jnp.where(bits(allowed[:rows], config.vocab_size), logits(params, x[:, 0], config), -jnp.inf)
    settings = jax.tree.map(lambda a: a[:rows], slots.settings)
    counts = slots.counts[:rows]
    new = sample(raw, settings, slots.in_prompt[:rows] | (counts > 0), position + 1, counts)
    new = jnp.where(live, new, slots.token[:rows])
    moved = jnp.where(live, slots.position[:rows] + 1, slots.position[:rows])
    ended = jnp.any(new[:, None] == slots.stops[:rows], axis=1) | (moved >= slots.last[:rows])
    made = score(raw, new) if scored else Made(new)
    made = made._replace(token=jnp.where(live, new, -1))
    slots = slots._replace(
        cache=cache,
        token=slots.token.at[:rows].set(new),
        position=slots.position.at[:rows].set(moved),
        live=(slots.live & kept).at[:rows].set(live & ~ended),
        counts=slots.counts.at[jnp.arange(rows), new].add(live.astype(jnp.int32)),
    )
    return laid_out(slots), made


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
    top, ids = jax.lax.top_k(logprobs, min(TOP, raw.shape[-1]))
    return Made(tokens, own, ids, top)
