"""Cross-entropy over a large vocabulary without its logits: chunks of rows, gradients made on the way forward.

Logits of all rows would be the largest array of a training step. Here a scan makes those of `chunk` rows, takes their
loss and their gradients at once (three products instead of the four of a checkpointed chunk), and keeps only the
gradients. Under a mesh it is one `shard_map`: the head is gathered over fsdp and context once, the vocabulary stays
split over tensor, and its gradient is scattered once at the end.

Where the tokens' losses are wanted one by one, what each of them weighs in the gradient is known on the way back only:
a gradient of the rows is scaled there, and one of the head is made there, of logits that are made again.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.sharding import Mesh, PartitionSpec

from model import cpu
from model.sharding import RULES, partition_spec, ways
from train.data.encode import IGNORE_INDEX

Loss = Callable[..., Array]
Teacher = tuple[Array, Array] | None
Slopes = Callable[[Array, Array | None, Array, Array], tuple[Array, Array]]


def default_chunk(mesh: Mesh) -> int:
    """Rows of logits alive at a time where no one says how many.

    Each chunk reads and writes the sum of the head's gradient, float32 [D, V]: on a GPU 512 rows would take longer for
    that than for their products.
    """
    return 512 if mesh.devices.flat[0].platform == cpu.PLATFORM else 2048


def make_loss(mesh: Mesh, chunk: int | None = None, z_loss: float = 0.0, of: Slopes | None = None) -> Loss:
    """The loss of a batch: the cross-entropies of its trained tokens, summed.

    The head's gradient is not computed where nobody asks for it (a frozen head, or evaluation).

    Args:
        mesh: what the arrays lie on: x by rows, the head as model.sharding.RULES say.
        chunk: rows of logits alive at a time on every device; None for `default_chunk`.
        z_loss: the weight of log(Z)^2, added for each trained token (PaLM, arXiv:2204.02311, section 5).
        of: another loss of a token in place of the cross-entropy.

    Returns:
        `loss(x [B, T, D], head [D, V], targets int32 [B, T], teacher)` -> float32 scalar. Targets of -100 are not
        trained on. The teacher is None, or for an `of` that reads one, rows [B, T, D'] and the head [D', V] that they
        are multiplied by, which have no gradient.
    """
    slopes = of or partial(cross_entropy, z_loss=z_loss)

    @jax.custom_vjp
    def loss(x: Array, head: Array, targets: Array, teacher: Teacher = None) -> Array:
        return run(x, head, targets, teacher, want_x=False, want_head=False)[0]

    def forward(x: Any, head: Any, targets: Any, teacher: Any) -> tuple[Array, tuple[Array | None, Array | None]]:
        teacher = None if teacher is None else (teacher[0].value, teacher[1].value)
        wanted = {"want_x": x.perturbed, "want_head": head.perturbed}
        total, dx, dhead = run(x.value, head.value, targets.value, teacher, **wanted)
        return total, (dx, dhead)

    def backward(residuals: tuple[Array | None, Array | None], g: Any) -> tuple[Array | None, ...]:
        if isinstance(g, SymbolicZero):
            return None, None, None, None
        return *(None if d is None else (d * g).astype(d.dtype) for d in residuals), None, None

    loss.defvjp(forward, backward, symbolic_zeros=True)

    def run(x: Array, head: Array, targets: Array, teacher: Teacher, want_x: bool, want_head: bool) -> Any:
        local = partial(
            _local, of=slopes, chunk=chunk or default_chunk(mesh), mesh=mesh, want_x=want_x, want_head=want_head
        )
        return _sharded(local, mesh, x, head, targets, None, teacher, PartitionSpec(), want_x, want_head)

    return lambda x, head, targets, teacher=None: loss(x, head, targets, teacher)


def make_token_losses(mesh: Mesh, chunk: int | None = None) -> Loss:
    """The losses of a batch token by token: each trained token's cross-entropy.

    Args:
        mesh: what the arrays lie on, as for `make_loss`.
        chunk: rows of logits alive at a time on every device; None for `default_chunk`.

    Returns:
        `losses(x [B, T, D], head [D, V], targets int32 [B, T])` -> float32 [B, T], 0 where the target is -100.
    """

    @jax.custom_vjp
    def losses(x: Array, head: Array, targets: Array) -> Array:
        return run(x, head, targets, None, want_x=False, want_head=False)[0]

    def forward(x: Any, head: Any, targets: Any) -> tuple[Array, tuple[Any, ...]]:
        if head.perturbed:  # its gradient is a sum over tokens, each with a weight that is not known yet
            kept = x.value, head.value, targets.value
            return losses(*kept), (*kept, None)
        values, dx, _ = run(x.value, head.value, targets.value, None, want_x=x.perturbed, want_head=False)
        return values, (None, None, None, dx)

    def backward(residuals: tuple[Any, ...], g: Any) -> tuple[Array | None, ...]:
        x, head, targets, dx = residuals
        if isinstance(g, SymbolicZero):
            return None, None, None
        if head is None:
            return None if dx is None else (dx * g[..., None]).astype(dx.dtype), None, None
        return *run(x, head, targets, g, want_x=True, want_head=True)[1:], None

    losses.defvjp(forward, backward, symbolic_zeros=True)

    def run(x: Array, head: Array, targets: Array, weights: Array | None, want_x: bool, want_head: bool) -> Any:
        wanted = {"want_x": want_x, "want_head": want_head}
        local = partial(
            _local, of=cross_entropy, chunk=chunk or default_chunk(mesh), mesh=mesh, by_token=True, **wanted
        )
        return _sharded(local, mesh, x, head, targets, weights, None, None, want_x, want_head)

    return losses


def cross_entropy(
    logits: Array, theirs: Array | None, target: Array, first: Array, z_loss: float = 0.0
) -> tuple[Array, Array]:
    """The cross-entropy of n tokens, within a `shard_map` whose axis `tensor` splits the vocabulary.

    Args:
        logits: float32 [n, V / tensor].
        theirs: a teacher's, which are not read.
        target: int32 [n].
        first: the token that this shard begins with.
        z_loss: the weight of log(Z)^2.

    Returns:
        The losses, float32 [n], and their slopes in the logits, float32 [n, V / tensor]; 0 where the target is -100.
    """
    top = jax.lax.pmax(logits.max(axis=-1), "tensor")
    powers = jnp.exp(logits - top[:, None])
    denominator = jax.lax.psum(powers.sum(axis=-1), "tensor")
    log_z = top + jnp.log(denominator)
    own = (target - first)[:, None]  # the column of each row's target, which one shard of the vocabulary has
    chosen = jnp.take_along_axis(logits, own.clip(0, logits.shape[1] - 1), axis=1, mode="promise_in_bounds")
    is_here = (own >= 0) & (own < logits.shape[1])
    chosen = jax.lax.psum(jnp.where(is_here, chosen, 0.0)[:, 0], "tensor")
    trained = target != IGNORE_INDEX
    loss = jnp.where(trained, log_z - chosen + z_loss * jnp.square(log_z), 0.0)
    # d loss / d logits = softmax * (1 + 2 z_loss log Z) - onehot
    hit = jnp.arange(logits.shape[1]) == own
    slope = jnp.where(trained, (1 + 2 * z_loss * log_z) / denominator, 0.0)
    return loss, powers * slope[:, None] - (hit & trained[:, None])


def _sharded(
    local: Callable[..., Any],
    mesh: Mesh,
    x: Array,
    head: Array,
    targets: Array,
    weights: Array | None,
    teacher: Teacher,
    result: PartitionSpec | None,
    want_x: bool,
    want_head: bool,
) -> Any:
    """`local` on every device; its result lies as `result` says, or as the targets where that is None."""
    rows = partition_spec(mesh, ("batch", "tokens", None), x.shape, "hidden")
    weight = partition_spec(mesh, ("embed", "vocab"), head.shape, "lm_head")
    each = PartitionSpec(*rows[:2])
    theirs = None
    if teacher is not None:
        theirs = (rows, partition_spec(mesh, ("embed", "vocab"), teacher[1].shape, "the teacher's lm_head"))
    # No differentiation passes through the shard_map, so its replication checks would add nothing.
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(rows, weight, each, None if weights is None else each, theirs),
        out_specs=(each if result is None else result, rows if want_x else None, weight if want_head else None),
        check_vma=False,
    )(x, head, targets, weights, teacher)


def _local(
    x: Array,
    head: Array,
    targets: Array,
    weights: Array | None,
    teacher: Teacher,
    *,
    of: Slopes,
    chunk: int,
    want_x: bool,
    want_head: bool,
    mesh: Mesh,
    by_token: bool = False,
) -> tuple[Array, Array | None, Array | None]:
    """One device's part: x [b, t, D], head [D / (fsdp * context), V / tensor], targets and their weights [b, t]; the
    losses are summed, or come as [b, t] where they are wanted `by_token`. See `make_loss`."""
    B, T, D = x.shape
    dtype = head.dtype
    vocab_first = cpu.sums_vocabulary_first(mesh.devices.flat[0].platform)
    head = _whole(head, x.dtype, mesh)
    first = jax.lax.axis_index("tensor") * head.shape[1]
    size = min(chunk, B * T)
    flat, wanted = _chunks(x.reshape(B * T, D), size, 0), _chunks(targets.reshape(B * T), size, IGNORE_INDEX)
    weighed = None if weights is None else _chunks(weights.reshape(B * T), size, 0)
    shown = their_head = None
    if teacher is not None:
        shown = _chunks(teacher[0].reshape(B * T, -1), size, 0)
        their_head = _whole(teacher[1], shown.dtype, mesh)

    def step(carry: tuple[Array | None, Array | None], rows: tuple[Any, ...]) -> tuple[Any, Any]:
        (total, dhead), (h, target, weight, y) = carry, rows
        logits = jnp.matmul(h, head, preferred_element_type=jnp.float32)
        theirs = None
        if y is not None and their_head is not None:
            theirs = jnp.matmul(y, their_head, preferred_element_type=jnp.float32)
        each, dlogits = of(logits, theirs, target, first)
        if total is not None:
            total, each = total + each.sum(), None
        if not (want_x or want_head):
            return (total, None), (each, None)
        dlogits = (dlogits if weight is None else dlogits * weight[:, None]).astype(x.dtype)
        if dhead is not None:
            left, right = (dlogits, h) if vocab_first else (h, dlogits)
            dhead += jnp.matmul(left.T, right, preferred_element_type=jnp.float32)
        dh = jnp.matmul(dlogits, head.T, preferred_element_type=jnp.float32).astype(x.dtype) if want_x else None
        return (total, dhead), (each, dh)

    shape = head.shape[::-1] if vocab_first else head.shape
    start = None if by_token else jnp.zeros((), jnp.float32), jnp.zeros(shape, jnp.float32) if want_head else None
    (total, dhead), (each, dx) = jax.lax.scan(step, start, (flat, wanted, weighed, shown))
    everywhere = (*RULES["batch"], *RULES["tokens"])
    result = each.reshape(-1)[: B * T].reshape(B, T) if by_token else jax.lax.psum(total, everywhere)
    if dx is not None:
        dx = jax.lax.psum(dx.reshape(-1, D)[: B * T].reshape(x.shape), "tensor")
    if dhead is not None:
        if ways(mesh, "embed") > 1:
            dhead = jax.lax.psum_scatter(dhead, RULES["embed"], scatter_dimension=int(vocab_first), tiled=True)
        dhead = jax.lax.psum(dhead, "data")
        dhead = (dhead.T if vocab_first else dhead).astype(dtype)
    return result, dx, dhead


def _whole(head: Array, dtype: Any, mesh: Mesh) -> Array:
    """A device's part of a head, [D / (fsdp * context), V / tensor], with all of its rows."""
    head = head.astype(dtype)
    return jax.lax.all_gather(head, RULES["embed"], axis=0, tiled=True) if ways(mesh, "embed") > 1 else head


def _chunks(x: Array, size: int, fill: int) -> Array:
    """x [n, ...] -> [chunks, size, ...], the last one filled up."""
    missing = -len(x) % size
    if missing:
        x = jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1)), constant_values=fill)
    return x.reshape(-1, size, *x.shape[1:])
