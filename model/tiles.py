"""int4 weights as CPUs multiply them with activations of 8 bits: what is only about CPUs, as cpu.py is.

XLA's products of 8-bit matrices pack the weight anew each time, which for one row of x takes longer than the product.
So with few rows this is arithmetic on whole vectors, one output a lane: a 4-bit code times an 8-bit activation, summed
in 16 bits over a piece of the inputs and in 32 bits over a group, which the group's scales then multiply.
"""

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from model.cpu import chunk_weights
from model.quantize import QuantizedArray, chunk_rows, rounded_groups

TILE = 64  # outputs that lie side by side, a vector or two of them
PIECE = 16  # inputs whose products are summed in 16 bits: 16 * 7 * 127 fits
FEW_ROWS = (
    8  # rows of x up to which each is multiplied for itself; for more, weights are decoded, a few tiles at a time
)


@struct.dataclass
class TiledArray:
    """An int4 weight [in, out], the codes of 64 outputs side by side.

    Attributes:
        codes: uint8 [out / TILE, in / PIECE, PIECE / 2, TILE], the outputs filled up to whole tiles: byte i of a piece
            has input i in its low half and input i + PIECE / 2 in its high half.
        absmax: bfloat16 [out / TILE, in / block, TILE].
        in_features: inputs.
        out_features: outputs.
    """

    codes: Array
    absmax: Array
    in_features: int = struct.field(pytree_node=False)
    out_features: int = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight it stands for: [in, out]."""
        return self.in_features, self.out_features

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def can_tile(q: QuantizedArray) -> bool:
    """Whether a weight can lie so: one int4 matrix whose groups divide its inputs."""
    return q.format == "int4" and q.joined == 1 and q.codes.ndim == 2


def tiled(q: QuantizedArray) -> TiledArray:
    """The same codes and scales as q, which `can_tile`."""
    filled = ((0, -q.out_features % TILE), (0, 0))
    pairs = jnp.pad(q.codes, filled)  # two neighbours a byte, the first high
    nibbles = jnp.stack([pairs >> 4, pairs & 15], axis=-1)
    halves = nibbles.reshape(-1, TILE, q.in_features // PIECE, 2, PIECE // 2)
    codes = (halves[..., 0, :] | halves[..., 1, :] << 4).transpose(0, 2, 3, 1)
    absmax = jnp.pad(q.absmax, filled).reshape(-1, TILE, q.in_features // q.block)
    return TiledArray(codes, absmax.transpose(0, 2, 1), q.in_features, q.out_features)


def tiled_product(x: Array, w: TiledArray) -> Array:
    """x times w, x rounded to 8 bits in w's groups.

    Args:
        x: [M, in].
        w: the weight.

    Returns:
        Float32 [M, out].
    """
    codes, scale = rounded_groups(x, w.in_features // w.absmax.shape[1])
    if len(x) <= FEW_ROWS:
        y = _codes_product(codes, scale, w)
    else:
        y = _floats_product((codes.astype(jnp.float32) * scale[..., None]).reshape(x.shape), w)
    return y.reshape(len(x), -1)[:, : w.out_features]


def _codes_product(codes: Array, scale: Array, w: TiledArray) -> Array:
    """Codes int8 [M, groups, block] and steps [M, groups] times w: [M, tiles, TILE]. Each step is one loop over
    vectors; what lies between two has a 16th of the weights' number or less for each row."""
    x = codes.astype(jnp.int16).reshape(len(codes), -1, 2, PIECE // 2, 1)
    excess = 8 * x.sum(axis=(2, 3), dtype=jnp.int16)  # codes stand for -7 to 7, and are 1 to 15

    def products(i: int) -> Array:
        byte = w.codes[:, None, :, i].astype(jnp.int16)
        return (byte & 15) * x[:, :, 0, i] + (byte >> 4) * x[:, :, 1, i]

    # Sums of 16 bits wrap, and wrap back where the excess is taken away.
    pieces = lax.optimization_barrier(_sum(products, PIECE // 2) - excess)  # [tiles, M, pieces, TILE]
    pieces = pieces.reshape(*pieces.shape[:2], w.absmax.shape[1], -1, TILE)
    exact = _sum(lambda i: pieces[:, :, :, i].astype(jnp.int32), pieces.shape[3])
    scales = w.absmax[:, None].astype(jnp.float32) * (scale / 7)[..., None]
    return _reduced(lax.optimization_barrier(exact.astype(jnp.float32) * scales)).swapaxes(0, 1)


def _floats_product(x: Array, w: TiledArray) -> Array:
    """Rounded x [M, in] times w, some tiles decoded at a time, as floats: [M, tiles, TILE]."""
    count, pieces, half, _ = w.codes.shape
    few = chunk_rows(count, w.in_features * TILE, chunk_weights(w.size))
    sides = [x.reshape(len(x), pieces, 2, half)[:, :, i].reshape(len(x), -1) for i in range(2)]

    def rows(a: Array, i: Array) -> Array:
        """Tiles of `a` one output a row: [few * TILE, ...]."""
        tiles = lax.dynamic_slice_in_dim(a, i * few, few).reshape(few, -1, TILE)
        return tiles.transpose(0, 2, 1).reshape(few * TILE, -1)

    def product(i: Array) -> Array:
        bytes = lax.optimization_barrier(rows(w.codes, i))
        scales = rows(w.absmax, i).astype(jnp.float32)[..., None] / 7

        def decoded(nibbles: Array) -> Array:
            values = nibbles.astype(jnp.int32).astype(jnp.float32) - 8
            return (values.reshape(*scales.shape[:2], -1) * scales).reshape(len(bytes), -1)

        weights = decoded(bytes & 15), decoded(bytes >> 4)
        return _sum(lambda half: lax.dot_general(sides[half], weights[half], (((1,), (1,)), ((), ()))), 2)

    return jnp.moveaxis(lax.map(product, jnp.arange(count // few)), 0, 1)


def _reduced(x: Array) -> Array:
    """The sum over the groups of [tiles, M, groups, TILE]; XLA's reduction would be a loop over single numbers."""
    while (n := x.shape[2]) > 1:
        ways = next((ways for ways in range(16, 1, -1) if n % ways == 0), n)
        parts = x.reshape(*x.shape[:2], n // ways, ways, TILE)
        x = lax.optimization_barrier(_sum(lambda i, parts=parts: parts[:, :, :, i], ways))
    return x[:, :, 0]


def _sum(term: Callable[[int], Array], count: int) -> Array:
    """The sum of `count` terms, in pairs."""
    terms: Sequence[Array] = [term(i) for i in range(count)]
    while len(terms) > 1:
        terms = [sum(terms[i + 1 : i + 2], start=terms[i]) for i in range(0, len(terms), 2)]
    return terms[0]
