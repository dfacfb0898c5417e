"""Products with weights of few bits, never whole in float: a chunk of rows is decoded at a time, small enough for the
cache.

What is fast differs: with few rows of x decoding is all the work, XLA on CPU packs the second operand of a product
anew, and how well it decodes depends on the processor.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache, reduce
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array, lax

from model.quantize import INT8_UNIT, NF4, QuantizedArray, block_scales, decode_codes, inverse

FEW = 64  # rows of x up to which the weight comes first in a product


@jax.custom_vjp
def quantized_matmul(x: Array, q: QuantizedArray) -> Array:
    """x [M, in] times the weight of one matrix q -> float32 [M, out]. Differentiable in x, never in q."""
    if q.activations == "int8":
        return _int8_product(x, q)
    x = _as_multiplied(x)
    # With few x the rows of the weight come first: XLA on CPU packs the second operand of a product anew each time,
    # and the smaller one costs less.
    rows_first = len(x) <= FEW
    chunks = _Chunks(q)
    columns = _columns(x, q)

    def product(i: Array) -> Array:
        pairs = zip(columns, _decoded(chunks.take(i)), strict=True)
        if rows_first:
            return _sum(_dot(rows.astype(x.dtype), x, 1) for x, rows in pairs).reshape(chunks.shards, -1, len(x))
        return _sum(_dot(x, rows, 1) for x, rows in pairs).reshape(len(x), chunks.shards, -1)

    parts = chunks.map(product)
    y = jnp.moveaxis(parts, 0, 1).reshape(-1, len(x)).T if rows_first else jnp.moveaxis(parts, 0, 2)
    y = y.reshape(len(x), -1)[:, : q.out_features]
    return y * (q.absmax * INT8_UNIT) if q.format == "int8" else y


def _multiply_forward(x: Array, q: QuantizedArray) -> tuple[Array, tuple[QuantizedArray, Array]]:
    return quantized_matmul(x, q), (q, jnp.zeros(0, x.dtype))


def _multiply_backward(saved: tuple[QuantizedArray, Array], dy: Array) -> tuple[Array, None]:
    """dx = dy Wᵀ, decoding again: nothing float of the weight outlives the forward pass."""
    q, like = saved
    chunks = _Chunks(q)
    dy = dy * (q.absmax * INT8_UNIT) if q.format == "int8" else dy
    dy = _as_multiplied(dy.astype(like.dtype))
    dy = jnp.pad(dy, ((0, 0), (0, q.codes.shape[0] * q.joined - q.out_features)))
    dy = dy.reshape(len(dy), chunks.shards, chunks.count, -1)

    def add(dx: list[Array], i: Array) -> tuple[list[Array], None]:
        piece = dy[:, :, i].reshape(len(dy), -1)
        return [dx + _dot(piece, rows, 0) for dx, rows in zip(dx, _decoded(chunks.take(i)), strict=True)], None

    zeros = _columns(jnp.zeros((len(dy), q.in_features), jnp.float32), q)
    dx, _ = lax.scan(add, zeros, jnp.arange(chunks.count))
    return jnp.stack(dx, axis=-1).reshape(len(dy), -1).astype(like.dtype), None


quantized_matmul.defvjp(_multiply_forward, _multiply_backward)


def _dot(x: Array, rows: Array, contract: int) -> Array:
    """x times the axis `contract` of decoded rows, in x's dtype, accumulated in float32."""
    dimensions = (((1,), (contract,)), ((), ()))
    return lax.dot_general(x, rows.astype(x.dtype), dimensions, preferred_element_type=jnp.float32)


def _as_multiplied(x: Array) -> Array:
    """x in the dtype that products are computed in: its own, but float32 on CPU, where XLA would widen it again, and
    with it every chunk that was narrowed to match."""
    return x.astype(jnp.float32) if jax.default_backend() == "cpu" else x


def _sum(products: Iterable[Array]) -> Array:
    return reduce(jnp.add, products)


# A decoded chunk is one matrix [rows, in], or two of half the inputs each: of the high nibbles, and of the low ones.


def _in_halves(q: QuantizedArray) -> bool:
    """Whether nibbles are decoded by arithmetic, which leaves halves, and not by the table of `decode_codes`.

    XLA on CPU vectorizes arithmetic, and not the table. int4's is short. nf4's 15 selects pay where AVX-512 has masks
    for them, and where the table's code is slower than AVX2's (`benchmarks/quantized.py` times what is chosen).
    """
    if jax.default_backend() != "cpu" or q.format == "int8":
        return False
    return q.format == "int4" or _has_avx512()


@cache
def _has_avx512() -> bool:
    try:
        return " avx512vl " in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False


def _columns(x: Array, q: QuantizedArray) -> list[Array]:
    """The columns of x [M, in] that each matrix of `_decoded` is multiplied with: inputs 0, 2, ... and the others."""
    if not _in_halves(q):
        return [x]
    pairs = x.reshape(len(x), -1, 2)  # a strided slice would cross the shards of a mesh
    return [pairs[:, :, 0], pairs[:, :, 1]]


def _decoded(piece: QuantizedArray) -> list[Array]:
    """The rows of a chunk, decoded; int8 ones without their scale."""
    if piece.format == "int8":
        return [piece.codes]
    if not _in_halves(piece):
        return [decode_codes(piece.codes, piece.absmax, piece)]

    def half(nibbles: Array) -> Array:
        values = _nf4_values(nibbles) if piece.format == "nf4" else nibbles.astype(jnp.int32).astype(jnp.float32) - 8
        blocks = values.reshape(*piece.absmax.shape, -1) * piece.absmax[..., None]
        return blocks.reshape(-1, piece.in_features // 2)

    return [half(piece.codes >> 4), half(piece.codes & 15)]


def _nf4_values(nibbles: Array) -> Array:
    """NF4 by a tree of selects, a level for each bit."""
    values = [jnp.float32(value) for value in NF4]
    for bit in range(4):
        is_set = (nibbles >> bit) & 1 != 0
        values = [jnp.where(is_set, odd, even) for even, odd in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _int8_product(x: Array, q: QuantizedArray) -> Array:
    """int8 times int8: activations rounded to 127 steps of their row's largest. Four rows at least: XLA on CPU
    strength-reduces a product of fewer to a loop over a widened copy of the weight."""
    wide = jnp.pad(x.astype(jnp.float32), ((0, max(0, 4 - len(x))), (0, 0)))
    scale = jnp.abs(wide).max(axis=1, keepdims=True)
    codes = jnp.round(wide * (inverse(scale) * 127)).astype(jnp.int8)
    y = lax.dot_general(codes, q.codes, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    return (y.astype(jnp.float32) * (scale * INT8_UNIT) * (q.absmax * INT8_UNIT))[: len(x)]


class _Chunks:
    """The rows of a weight, a few at a time. Each shard of a mesh takes its own rows into every chunk, so that no
    device needs another's: rows [shards, count, few], of which chunk i is [:, i]."""

    def __init__(self, q: QuantizedArray):
        mesh = jax.typeof(q.codes).sharding.mesh
        n_rows = q.codes.shape[0]
        self.shards = 1 if mesh.empty else math.gcd(n_rows, mesh.size)
        few = chunk_rows(n_rows // self.shards, q.in_features * q.joined, q.size)
        self.count = n_rows // self.shards // few
        self.q = q if q.format == "int8" else replace(q, absmax=block_scales(q), nested_absmax=None, offset=None)

    def take(self, i: Array) -> QuantizedArray:
        """The weight of chunk i alone."""

        def part(a: Array) -> Array:
            split = a.reshape(self.shards, self.count, -1, *a.shape[1:])
            return lax.dynamic_index_in_dim(split, i, axis=1, keepdims=False).reshape(-1, *a.shape[1:])

        return jax.tree.map(part, self.q)

    def map(self, function: Callable[[Array], Array]) -> Array:
        """The results of all chunks, stacked."""
        return lax.map(function, jnp.arange(self.count))


def chunk_rows(n: int, width: int, size: int | None = None) -> int:
    """How many of a matrix's n rows of `width` weights are decoded at a time: a divisor of n.

    size: weights of the whole matrix, where these are the rows of one device. On CPU at most an eighth of a matrix, in
    bounds between which decoded weights stay in a cache and chunks are large enough to share among cores; never more
    than a half. Elsewhere the compiler may fuse decoding into the product; where not, this bounds what it writes.
    """
    size = size or n * width
    weights = min(max(size // 8, 2**20), 2**21, size // 2) if jax.default_backend() == "cpu" else 2**24
    limit = max(weights // width, 1)
    divisors = [d for d in range(1, n + 1) if n % d == 0 and d <= limit]
    return max(divisors, key=lambda d: (d % 8 == 0, d))  # multiples of 8 if there are any: vectors hold 8
