"""Speculative decoding: several proposed tokens of a row are checked in one pass of the model.

`verify` draws at each position what plain decoding would draw there, with the same key and the same penalties, and
accepts proposals while they equal it; the first token that differs is itself the right one. So the text is that of
plain decoding, sampled or greedy, whatever is proposed (but for rounding: a pass over more tokens may sum floats in
another order). Leviathan et al. (arXiv:2211.17192) accept by the ratio of two probabilities instead, which keeps the
distribution, but not the tokens that a seed gives.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from infer.sample import sample
from infer.slots import Made, Slots, bits, laid_out, put_rows, score, slice_rows
from model.config import LlamaConfig
from model.llama import hidden, logits
from model.params import Params
from model.selected import select

MOST_ROWS = 4  # live rows up to which checking proposals is cheaper than more plain steps


@partial(jax.jit, static_argnames=("config", "rows", "window", "scored"), donate_argnames="slots")
def verify(
    params: Params,
    slots: Slots,
    kept: Array,
    proposals: Array,
    allowed: Array,
    first: Array,
    config: LlamaConfig,
    rows: int,
    window: int,
    scored: bool,
) -> tuple[Slots, Made]:
    """As `decode`, but up to K + 1 tokens for every live row of the own.

    Args:
        proposals: int32 [N, K], what may follow each row's token; -1 where there is no proposal.
        allowed: as `decode` has it, for all positions of a row.
        window: covers the positions of all proposals.

    Returns:
        The rows after their new tokens, and those tokens: a `Made` whose arrays have K + 1 entries a row, -1 after the
        last one that was made.
    """
    own = slice_rows(slots, first, rows)
    params = select(params, own.adapter)
    kept_here, proposals, allowed = (lax.dynamic_slice_in_dim(x, first, rows) for x in (kept, proposals, allowed))
    live = own.live & kept_here
    width = proposals.shape[1] + 1
    tokens = jnp.concatenate([own.token[:, None], proposals], axis=1)
    # Keys of refused proposals stay in the cache, where no query sees them before they are overwritten.
    places = own.position[:, None] + jnp.arange(width)
    asked = live[:, None] & (tokens >= 0) & (places < own.last[:, None])
    positions = jnp.where(asked, places, slots.cache.capacity)
    x, cache = hidden(
        params, tokens.clip(0), config, positions=positions, cache=slots.cache, slots=first, window=window
    )
    assert cache is not None
    may = bits(allowed, config.vocab_size)[:, None]
    raw = jnp.where(may, logits(params, x, config), -jnp.inf)

    def flat(x: Array) -> Array:
        return x.reshape(rows * width, *x.shape[2:])

    def apart(x: Array) -> Array:
        return x.reshape(rows, width, *x.shape[1:])

    index = jnp.arange(rows)
    _, counts = lax.scan(  # of tokens made, as they will be if the proposals before are accepted
        lambda counts, token: (counts.at[index, token].add(1), counts),
        own.counts,
        jnp.pad(proposals, ((0, 0), (0, 1))).T,
    )
    counts = flat(counts.swapaxes(0, 1))
    settings, in_prompt = jax.tree.map(lambda a: jnp.repeat(a, width, axis=0), (own.settings, own.in_prompt))
    new = apart(sample(flat(raw), settings, in_prompt | (counts > 0), flat(places + 1), counts))

    ends = jnp.any(new[..., None] == own.stops[:, None], axis=-1) | (places + 1 >= own.last[:, None])
    goes_on = (new[:, :-1] == proposals) & ~ends[:, :-1]
    made = live[:, None] & jnp.cumprod(jnp.pad(goes_on, ((0, 0), (1, 0)), constant_values=True), axis=1).astype(bool)
    count = made.sum(axis=1)
    final = (index, (count - 1).clip(0))
    moved = own.position + count
    result = jax.tree.map(apart, score(flat(raw), flat(new))) if scored else Made(new)
    lengths = slots.cache.lengths.at[first + index].max(jnp.where(live, moved, 0))
    token = jnp.where(live, new[final], own.token)
    slots = slots._replace(cache=cache.replace(lengths=lengths))
    slots = put_rows(slots, first, kept, token, moved, live & ~ends[final])
    counts = slots.counts.at[first + index[:, None], new].add(made.astype(jnp.int32))
    return laid_out(slots._replace(counts=counts)), result._replace(token=jnp.where(made, new, -1))


def single_steps(made: Made) -> list[Made]:
    """What `verify` made, one token of every row at a time; what `decode` made is one such step."""
    if made.token.ndim == 1:
        return [made]
    return [jax.tree.map(lambda a, i=i: a[:, i], made) for i in range(made.token.shape[1])]
