"""Products with weights of few bits.

On CPUs a chunk of rows is decoded at a time (cpu.py says how), so that a weight is never whole in float. Elsewhere the
compiler is given forms that it makes one kernel of: int8 codes are widened inside the product; 4-bit ones, for few rows
of x, are decoded inside a sum, so that a weight is read as it is stored and nothing else is written. For many rows,
whose product takes longer than that, they are decoded whole.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import reduce

import jax
import jax.numpy as jnp
from jax import Array, lax

from model import cpu
from model.quantize import INT8_UNIT, NF4, QuantizedArray, block_scales, chunk_rows, decode_codes, rounded_groups

FEW_ROWS = 8  # rows of x up to which 4-bit weights are decoded inside a sum, off CPUs


@jax.custom_vjp
def quantized_matmul(x: Array, q: QuantizedArray) -> Array:
    """x times a weight of few bits. Differentiable in x, never in q.

    Args:
        x: [M, in].
        q: one matrix [in, out].

    Returns:
        Float32 [M, out].
    """
    if q.activations == "int8" and q.format == "int8":
        return _int8_product(x, q)
    if q.activations == "int8":
        codes, scale = rounded_groups(x, q.block if q.joined == 1 else q.in_features)
        x = (codes.astype(jnp.float32) * scale[..., None]).reshape(x.shape)
    return lax.platform_dependent(x, q, cpu=_product_in_chunks, default=fused_product)


def _multiply_forward(x: Array, q: QuantizedArray) -> tuple[Array, tuple[QuantizedArray, Array]]:
    return quantized_matmul(x, q), (q, jnp.zeros(0, x.dtype))


def _multiply_backward(saved: tuple[QuantizedArray, Array], dy: Array) -> tuple[Array, None]:
    """dx = dy Wᵀ, decoding again: nothing float of the weight outlives the forward pass."""
    q, like = saved
    dy = dy * (q.absmax * INT8_UNIT) if q.format == "int8" else dy
    dy = dy.astype(like.dtype)
    dx = lax.platform_dependent(dy, q, cpu=_transposed_in_chunks, default=fused_transposed_product)
    return dx.astype(like.dtype), None


quantized_matmul.defvjp(_multiply_forward, _multiply_backward)


def fused_product(x: Array, q: QuantizedArray) -> Array:
    """x [M, in] times q -> float32 [M, out], in as few kernels as the compiler needs off CPUs."""
    if q.format == "int8":
        return _dot(x, q.codes, 1) * (q.absmax * INT8_UNIT)
    if len(x) <= FEW_ROWS and q.joined == 1:
        return _decoded_in_sum(x, q)
    return _dot(x, _rows(q), 1)


def fused_transposed_product(dy: Array, q: QuantizedArray) -> Array:
    """dy [M, out], with int8's scales in it, times the transpose of q's codes -> float32 [M, in], off CPUs."""
    return _dot(dy, q.codes if q.format == "int8" else _rows(q), 0)


def _rows(q: QuantizedArray) -> Array:
    """A 4-bit weight, decoded: float32 [out, in], which the compiler narrows as it writes it."""
    return decode_codes(q.codes, block_scales(q), q)[: q.out_features]


def _decoded_in_sum(x: Array, q: QuantizedArray) -> Array:
    """A few x [M, in] times a 4-bit weight: sums over products of x with what is decoded, each weight for all of x."""
    table = jnp.asarray(NF4 if q.format == "nf4" else range(-8, 8), jnp.float32)
    scales = block_scales(q)
    scale = jnp.broadcast_to(scales[..., None], (*scales.shape, q.block // 2)).reshape(q.codes.shape)
    first, second = (
        (table.at[nibbles.astype(jnp.int32)].get(mode="promise_in_bounds") if q.format == "nf4" else
         nibbles.astype(jnp.float32) - 8) * scale
        for nibbles in (q.codes >> 4, q.codes & 15)
    )  # fmt: skip
    pairs = x.astype(jnp.float32).reshape(len(x), -1, 2)
    return jnp.stack([jnp.sum(first * pair[:, 0] + second * pair[:, 1], axis=1) for pair in pairs])


def _product_in_chunks(x: Array, q: QuantizedArray) -> Array:
    """x [M, in] times q -> float32 [M, out], on CPUs."""
    x = cpu.widened(x)
    rows_first = len(x) <= cpu.FEW_ROWS
    chunks = _Chunks(q)
    columns = cpu.columns(x, q)

    def product(i: Array) -> Array:
        pairs = zip(columns, cpu.decoded(chunks.take(i)), strict=True)
        if rows_first:
            return _sum(_dot(rows.astype(x.dtype), x, 1) for x, rows in pairs).reshape(chunks.shards, -1, len(x))
        return _sum(_dot(x, rows, 1) for x, rows in pairs).reshape(len(x), chunks.shards, -1)

    parts = lax.map(product, jnp.arange(chunks.count))
    y = jnp.moveaxis(parts, 0, 1).reshape(-1, len(x)).T if rows_first else jnp.moveaxis(parts, 0, 2)
    y = y.reshape(len(x), -1)[:, : q.out_features]
    return y * (q.absmax * INT8_UNIT) if q.format == "int8" else y


def _transposed_in_chunks(dy: Array, q: QuantizedArray) -> Array:
    """dy [M, out], with int8's scales in it, times the transpose of q's codes -> float32 [M, in], on CPUs."""
    chunks = _Chunks(q)
    dy = cpu.widened(dy)
    dy = jnp.pad(dy, ((0, 0), (0, q.codes.shape[0] * q.joined - q.out_features)))
    dy = dy.reshape(len(dy), chunks.shards, chunks.count, -1)

    def add(dx: list[Array], i: Array) -> tuple[list[Array], None]:
        piece = dy[:, :, i].reshape(len(dy), -1)
        return [dx + _dot(piece, rows, 0) for dx, rows in zip(dx, cpu.decoded(chunks.take(i)), strict=True)], None

    zeros = cpu.columns(jnp.zeros((len(dy), q.in_features), jnp.float32), q)
    dx, _ = lax.scan(add, zeros, jnp.arange(chunks.count))
    return jnp.stack(dx, axis=-1).reshape(len(dy), -1)


def _dot(x: Array, rows: Array, contract: int) -> Array:
    """x times the axis `contract` of decoded rows, in x's dtype, accumulated in float32."""
    dimensions = (((1,), (contract,)), ((), ()))
    return lax.dot_general(x, rows.astype(x.dtype), dimensions, preferred_element_type=jnp.float32)


def _sum(products: Iterable[Array]) -> Array:
    return reduce(jnp.add, products)


def _int8_product(x: Array, q: QuantizedArray) -> Array:
    """int8 times int8: activations rounded to 127 steps of their row's largest. Two rows at least: XLA on CPU
    strength-reduces a product of one to a loop over a widened copy of the weight."""
    codes, scale = rounded_groups(jnp.pad(x, ((0, max(0, 2 - len(x))), (0, 0))), q.in_features)
    y = lax.dot_general(codes[:, 0], q.codes, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    return (y.astype(jnp.float32) * scale * (q.absmax * INT8_UNIT))[: len(x)]


class _Chunks:
    """The rows of a weight, a few at a time. Each shard of a mesh takes its own rows into every chunk, so that no
    device needs another's: rows [shards, count, few], of which chunk i is [:, i]."""

    def __init__(self, q: QuantizedArray):
        mesh = jax.typeof(q.codes).sharding.mesh
        n_rows = q.codes.shape[0]
        self.shards = 1 if mesh.empty else math.gcd(n_rows, mesh.size)
        few = chunk_rows(n_rows // self.shards, q.in_features * q.joined, cpu.chunk_weights(q.size))
        self.count = n_rows // self.shards // few
        self.q = q if q.format == "int8" else replace(q, absmax=block_scales(q), nested_absmax=None, offset=None)

    def take(self, i: Array) -> QuantizedArray:
        """The weight of chunk i alone."""

        def part(a: Array) -> Array:
            split = a.reshape(self.shards, self.count, -1, *a.shape[1:])
            return lax.dynamic_index_in_dim(split, i, axis=1, keepdims=False).reshape(-1, *a.shape[1:])

        return jax.tree.map(part, self.q)
