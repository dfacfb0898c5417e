"""Attention over rows whose tokens the mesh axis `context` splits: keys and values go round a ring (arXiv:2310.01889).

No device holds a whole row. Each keeps the queries of its own tokens and receives the keys and values of the others one
after another; the softmax is corrected with each (arXiv:2205.14135). The backward pass computes the scores again: keys
and values go round once more, and their gradients with them.

Tokens lie in zigzag: of the 2 C blocks of a row, device i of C holds blocks i and 2 C - 1 - i (arXiv:2407.21783,
section 3.3.2). With blocks in their order the last device would have all the keys to look at and the first nearly none;
in zigzag every device computes two whole blocks of scores at each step of the ring.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from model.attention import MASKED, Mask
from model.sharding import partition_spec, ways

AXIS = "context"
MOST_QUERIES = 512  # whose scores with a block of keys are in memory at a time

Attend = Callable[[Array, Array, Array, Mask], Array]


def zigzag(x: Array, count: int) -> Array:
    """Puts tokens where `count` devices need them: the first part of axis 1 is what the first device has.

    Args:
        x: [B, T, ...] in their order; 2 * count divides T.
    """
    B, T, *rest = x.shape
    first, second = jnp.split(x.reshape(B, 2 * count, T // (2 * count), *rest), 2, axis=1)
    return jnp.stack([first, second[:, ::-1]], axis=2).reshape(x.shape)


def unzigzag(x: Array, count: int) -> Array:
    """Puts tokens back into their order: the inverse of `zigzag`."""
    B, T, *rest = x.shape
    pairs = x.reshape(B, count, 2, T // (2 * count), *rest)
    return jnp.concatenate([pairs[:, :, 0], pairs[:, ::-1, 1]], axis=1).reshape(x.shape)


def make_ring(mesh: Mesh) -> Attend:
    """As `model.attention.attend`, for whole rows in zigzag over `mesh`; what a query sees are the tokens at its index
    or before of its own non-zero segment.

    Positions are not read: the index of a token follows from where it lies.

    Args:
        mesh: what the arrays lie on; its axis `context` is above 1.
    """

    @jax.custom_vjp
    def ring(q: Array, k: Array, v: Array, segments: Array | None) -> Array:
        return forward(q, k, v, segments)[0]

    def forward(q: Array, k: Array, v: Array, segments: Array | None) -> tuple[Array, Any]:
        queries, keys, rows, sums = _specs(mesh, q, k)
        own = None if segments is None else rows
        out, log_sums = jax.shard_map(
            partial(_forward, count=mesh.shape[AXIS]),
            mesh=mesh,
            in_specs=(queries, keys, keys, own),
            out_specs=(queries, sums),
            check_vma=False,  # differentiation does not pass through
        )(q, k, v, segments)
        return out, (q, k, v, segments, out, log_sums)

    def backward(kept: Any, slope: Array) -> tuple[Array, Array, Array, None]:
        q, k, v, segments, out, log_sums = kept
        queries, keys, rows, sums = _specs(mesh, q, k)
        own = None if segments is None else rows
        dq, dk, dv = jax.shard_map(
            partial(_backward, count=mesh.shape[AXIS]),
            mesh=mesh,
            in_specs=(queries, keys, keys, own, queries, sums, queries),
            out_specs=(queries, keys, keys),
            check_vma=False,
        )(q, k, v, segments, out, log_sums, slope)
        return dq, dk, dv, None

    ring.defvjp(forward, backward)
    return lambda q, k, v, mask: ring(q, k, v, mask.q_segments)


def _specs(mesh: Mesh, q: Array, k: Array) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec, PartitionSpec]:
    """Where queries [B, T, H, d], keys [B, K, T, d], segments [B, T] and sums of queries [B, K, G, T] lie."""
    heads = "kv_heads" if k.shape[1] % ways(mesh, "kv_heads") == 0 else None  # fewer than devices: each has all
    queries = partition_spec(mesh, ("batch", "tokens", heads, None), q.shape, "queries")
    batch, tokens, over, _ = queries
    return (
        queries,
        PartitionSpec(batch, over, tokens, None),
        PartitionSpec(batch, tokens),
        PartitionSpec(batch, over, None, tokens),
    )


# --- one device's part. Einsum letters as in llama.py; q, s: queries and keys of a block


class Queries(NamedTuple):
    """A block of queries, cut into n parts of which one at a time is computed with.

    Attributes:
        q: [n, B, K, G, q, d].
        segments: int32 [n, B, q], or None.
        start: int32 [n], the index in the block of each part's first query.
    """

    q: Array
    segments: Array | None
    start: Array


class Softmax(NamedTuple):
    """What queries have seen: float32, cut as they are.

    Attributes:
        out: [n, B, K, G, q, d], the weighted sum of values.
        top: [n, B, K, G, q], the highest score.
        total: [n, B, K, G, q], the sum of weights.
    """

    out: Array
    top: Array
    total: Array


class Results(NamedTuple):
    """What is known on the way back of the queries' attention, cut as they are.

    Attributes:
        slope: [n, B, K, G, q, d], the gradient of what they got.
        log_sum: float32 [n, B, K, G, q], the logarithm of the sum of their weights.
        inner: float32 [n, B, K, G, q], the inner product of what they got and its gradient.
    """

    slope: Array
    log_sum: Array
    inner: Array


class Keys(NamedTuple):
    """The keys of a block, [B, K, s, d], its values, and its segments int32 [B, s] or None."""

    k: Array
    v: Array
    segments: Array | None


def _forward(q: Array, k: Array, v: Array, segments: Array | None, *, count: int) -> tuple[Array, Array]:
    """One device's attention: [B, t, H, d], and the logarithms of its sums, float32 [B, K, G, t]."""
    early, late = _queries(q, k, segments)
    own = _keys(k, v, segments)
    state = (
        _see(_unseen(early), early, own[0], is_diagonal=True),
        _see(_see(_unseen(late), late, own[0]), late, own[1], is_diagonal=True),
    )

    def step(state: tuple[Softmax, Softmax], others: tuple[Keys, Keys], is_earlier: Array) -> tuple[Softmax, Softmax]:
        first, second = state
        second = _see(second, late, others[0])
        changed = _see(
            _either(is_earlier, first, second), _either(is_earlier, early, late), _either(is_earlier, *others)
        )
        return _either(is_earlier, changed, first), _either(is_earlier, second, changed)

    halves = _go_round(step, state, own, count)
    out = jnp.concatenate([_joined(half.out / half.total[..., None]) for half in halves], axis=3)
    sums = jnp.concatenate([_joined(half.top + jnp.log(half.total)) for half in halves], axis=3)
    return _unfolded(out).astype(q.dtype), sums


def _backward(
    q: Array, k: Array, v: Array, segments: Array | None, out: Array, sums: Array, slope: Array, *, count: int
) -> tuple[Array, Array, Array]:
    """One device's gradients of q, k and v. See `_forward`."""
    early, late = _queries(q, k, segments)
    own = _keys(k, v, segments)
    inner = _folded(jnp.sum(slope.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True), k)[..., 0]
    known = _results(_folded(slope, k).astype(v.dtype), sums, inner, len(early.q))
    dq_early, *d_first = _slopes(early, known[0], own[0], is_diagonal=True)
    dq_late, *d = _slopes(late, known[1], own[0])
    dq, *d_second = _slopes(late, known[1], own[1], is_diagonal=True)
    at_home = _added(d_first, d), d_second
    start = (dq_early, dq_late + dq), jax.tree.map(jnp.zeros_like, at_home)

    def step(carry: Any, others: tuple[Keys, Keys], is_earlier: Array) -> Any:
        (first, second), (d_first, d_second) = carry
        dq, *d = _slopes(late, known[1], others[0])
        second, d_first = second + dq, _added(d_first, d)
        either = partial(_either, is_earlier)
        dq, *d = _slopes(either(early, late), either(*known), either(*others))
        first, second = either((first + dq, second), (first, second + dq))
        gradients = either((_added(d_first, d), d_second), (d_first, _added(d_second, d)))
        return (first, second), _shifted(gradients, count)

    halves, returned = _go_round(step, start, own, count)
    dq = _unfolded(jnp.concatenate([_joined(half) for half in halves], axis=3))
    first, second = _added(at_home, returned)
    dk, dv = (jnp.concatenate(pair, axis=2) for pair in zip(first, second, strict=True))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _go_round(step: Callable[..., Any], carry: Any, own: tuple[Keys, Keys], count: int) -> Any:
    """`step(carry, keys, is_earlier)` with the keys of every other device, the device before this one first.

    The next keys are on their way while a step computes. What `step` itself shifts at each call is home after the last.
    """
    here = lax.axis_index(AXIS)

    def body(state: tuple[Any, Any], number: Array) -> tuple[Any, None]:
        carry, keys = state
        ahead = _shifted(keys, count)
        return (step(carry, keys, number <= here), ahead), None

    keys = _shifted(own, count)
    if count > 2:
        (carry, keys), _ = lax.scan(body, (carry, keys), jnp.arange(1, count - 1))
    return step(carry, keys, count - 1 <= here)


def _shifted(tree: Any, count: int) -> Any:
    """What the device before this one has."""
    return lax.ppermute(tree, AXIS, [(i, (i + 1) % count) for i in range(count)])


def _added(one: Any, other: Any) -> Any:
    return jax.tree.map(jnp.add, one, other)


def _either(condition: Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(partial(jnp.where, condition), yes, no)


# --- a block of queries with a block of keys


def _seen(part: Queries, keys: Keys, is_diagonal: bool) -> Array | None:
    """Which keys a part of the queries may see: [B or 1, q, s]; None for all."""
    seen = None
    if is_diagonal:
        seen = (part.start + jnp.arange(part.q.shape[3]))[:, None] >= jnp.arange(keys.k.shape[2])
        seen = seen[None]
    if part.segments is None or keys.segments is None:
        return seen
    same = (part.segments[:, :, None] == keys.segments[:, None]) & (keys.segments[:, None] != 0)
    return same if seen is None else same & seen


def _scores(part: Queries, keys: Keys, is_diagonal: bool) -> Array:
    """Float32 [B, K, G, q, s]."""
    scores = jnp.einsum("BKGqd,BKsd->BKGqs", part.q, keys.k, preferred_element_type=jnp.float32)
    scores = scores * part.q.shape[-1] ** -0.5
    seen = _seen(part, keys, is_diagonal)
    return scores if seen is None else scores + jnp.where(seen, 0, MASKED)[:, None, None]


def _see(state: Softmax, queries: Queries, keys: Keys, is_diagonal: bool = False) -> Softmax:
    """The softmax of queries that have seen a block of keys too."""

    def one(given: tuple[Softmax, Queries]) -> Softmax:
        before, part = given
        scores = _scores(part, keys, is_diagonal)
        top = jnp.maximum(before.top, scores.max(axis=-1))
        weights, kept = jnp.exp(scores - top[..., None]), jnp.exp(before.top - top)
        out = jnp.einsum("BKGqs,BKsd->BKGqd", weights.astype(keys.v.dtype), keys.v, preferred_element_type=jnp.float32)
        return Softmax(before.out * kept[..., None] + out, top, before.total * kept + weights.sum(axis=-1))

    return lax.map(one, (state, queries))


def _slopes(queries: Queries, known: Results, keys: Keys, is_diagonal: bool = False) -> tuple[Array, Array, Array]:
    """What a block of scores adds to the gradients of its queries, cut as they are, of its keys and of its values;
    float32."""

    def one(sums: tuple[Array, Array], given: tuple[Queries, Results]) -> tuple[tuple[Array, Array], Array]:
        (dk, dv), (part, (slope, log_sum, inner)) = sums, given
        weights = jnp.exp(_scores(part, keys, is_diagonal) - log_sum[..., None])
        like, wide = keys.k.dtype, {"preferred_element_type": jnp.float32}
        dv += jnp.einsum("BKGqs,BKGqd->BKsd", weights.astype(like), slope, **wide)
        dweights = jnp.einsum("BKGqd,BKsd->BKGqs", slope, keys.v, **wide)
        dscores = (weights * (dweights - inner[..., None]) * part.q.shape[-1] ** -0.5).astype(like)
        dk += jnp.einsum("BKGqs,BKGqd->BKsd", dscores, part.q, **wide)
        return (dk, dv), jnp.einsum("BKGqs,BKsd->BKGqd", dscores, keys.k, **wide)

    zeros = jnp.zeros(keys.k.shape, jnp.float32)
    (dk, dv), dq = lax.scan(one, (zeros, zeros), (queries, known))
    return dq, dk, dv


# --- how a device's arrays are cut


def _queries(q: Array, k: Array, segments: Array | None) -> tuple[Queries, Queries]:
    """The two blocks of a device's queries [B, t, H, d]."""
    t = q.shape[1] // 2
    least = -(-t // MOST_QUERIES)
    parts = next(n for n in range(least, t + 1) if t % n == 0)
    early, late = (_cut(half, parts) for half in jnp.split(_folded(q, k).astype(k.dtype), 2, axis=3))
    start = jnp.arange(parts) * (t // parts)
    if segments is None:
        return Queries(early, None, start), Queries(late, None, start)
    first, second = (half.reshape(len(q), parts, -1).swapaxes(0, 1) for half in jnp.split(segments, 2, axis=1))
    return Queries(early, first, start), Queries(late, second, start)


def _results(slope: Array, sums: Array, inner: Array, parts: int) -> tuple[Results, Results]:
    """What is known of the two blocks of a device's queries, of arrays [B, K, G, t, ...]."""
    first, second = zip(*(jnp.split(x, 2, axis=3) for x in (slope, sums, inner)), strict=True)
    return Results(*(_cut(x, parts) for x in first)), Results(*(_cut(x, parts) for x in second))


def _keys(k: Array, v: Array, segments: Array | None) -> tuple[Keys, Keys]:
    """The two blocks of a device's keys and values [B, K, t, d]."""
    halves = (None, None) if segments is None else jnp.split(segments, 2, axis=1)
    first, second = zip(jnp.split(k, 2, axis=2), jnp.split(v, 2, axis=2), halves, strict=True)
    return Keys(*first), Keys(*second)


def _unseen(queries: Queries) -> Softmax:
    """The softmax of queries that have seen nothing."""
    zeros = jnp.zeros(queries.q.shape, jnp.float32)
    return Softmax(zeros, jnp.full(zeros.shape[:-1], -jnp.inf), zeros[..., 0])


def _folded(x: Array, k: Array) -> Array:
    """[B, t, H, d] -> [B, K, G, t, d]: the heads that share a key head beside one another."""
    B, t, _, d = x.shape
    return x.reshape(B, t, k.shape[1], -1, d).transpose(0, 2, 3, 1, 4)


def _unfolded(x: Array) -> Array:
    """[B, K, G, t, d] -> [B, t, H, d]."""
    B, _, _, t, d = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(B, t, -1, d)


def _cut(x: Array, parts: int) -> Array:
    """[B, K, G, t, ...] -> [n, B, K, G, q, ...]."""
    B, K, G, t, *rest = x.shape
    return jnp.moveaxis(x.reshape(B, K, G, parts, t // parts, *rest), 3, 0)


def _joined(x: Array) -> Array:
    """[n, B, K, G, q, ...] -> [B, K, G, t, ...]."""
    n, B, K, G, q, *rest = x.shape
    return jnp.moveaxis(x, 0, 3).reshape(B, K, G, n * q, *rest)
