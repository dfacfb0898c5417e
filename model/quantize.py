"""Weights of few bits: int8 per output channel, int4 in groups, nf4 in blocks.

Codes are kept as bitsandbytes keeps them, over the flattened [out, in] of Hugging Face, so a conversion is a reshape.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial, reduce
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from model.errors import PunaError
from model.sharding import named_sharding, ways

Format = Literal["int8", "int4", "nf4"]
Activations = Literal["float", "int8"]
FORMATS: tuple[Format, ...] = ("int8", "int4", "nf4")

# The 16 values of NF4 (QLoRA, arXiv:2305.14314, appendix E): quantiles of a normal distribution, scaled to [-1, 1].
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NESTED_BLOCK = 256  # absmax values that share one scale under double quantization
INT8_UNIT = np.float32(1 / 127)
_GRID = np.float32(32767.5)


@struct.dataclass
class QuantizedArray:
    """A weight [..., in, out] of few bits. Its leaves stack along leading axes and slice like any others.

    Attributes:
        codes: int8 [..., out, in]; or uint8 [..., rows, width / 2], two 4-bit codes a byte, the first in the high half:
            a row is one output's inputs, or, where a block does not divide them, as many outputs' as make whole blocks.
        absmax: the largest magnitude per output (float32 [..., out]) or per block ([..., rows, width / block]: bfloat16
            for int4, float32 for nf4; under double quantization uint8 codes of `absmax - offset`).
        nested_absmax: of double quantization, the scale of each 256 codes of `absmax`, float32 [..., blocks / 256].
        offset: of double quantization, the mean that was taken away, float32 [...].
        block: weights that share one scale, at 4 bits.
        dtype: what the weight was before.
        activations: "int8" rounds activations to 8 bits before the product, for int8 weights row by row (LLM.int8,
            arXiv:2208.07339, without its outlier columns), for int4 ones in groups as long as the weight's where these
            divide the inputs; "float" keeps activations as they are.
    """

    codes: Array
    absmax: Array
    nested_absmax: Array | None = None
    offset: Array | None = None
    format: Format = struct.field(pytree_node=False, default="nf4")
    block: int = struct.field(pytree_node=False, default=64)
    in_features: int = struct.field(pytree_node=False, default=0)
    out_features: int = struct.field(pytree_node=False, default=0)
    dtype: str = struct.field(pytree_node=False, default="float32")
    activations: Activations = struct.field(pytree_node=False, default="float")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight it stands for: [..., in, out]."""
        return (*self.codes.shape[:-2], self.in_features, self.out_features)

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes held: codes as packed, and every scale."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def joined(self) -> int:
        """Output rows that share one row of `codes`: 1 where a block divides the inputs."""
        return 1 if self.format == "int8" else joined_rows(self.in_features, self.block)


def joined_rows(in_features: int, block: int) -> int:
    """The fewest output rows whose flattened inputs make whole blocks.

    Args:
        in_features: weights in one row.
        block: weights in one block.
    """
    return block // math.gcd(in_features, block)


# ----------------------------------------------------------------------------------------------------------- quantize


def quantizer(format: Format, block: int = 64, double: bool = False) -> Callable[[Array], QuantizedArray]:
    """The function from a weight to its quantized form.

    Args:
        block: int4's weights that share a scale, 32, 64 or 128.
        double: double quantization, for nf4.

    Raises:
        PunaError: for a setting that the format does not have.
    """
    known = check_format(format, block, double)
    return partial(quantize, format=known, block=block, double=double)


def check_format(format: str, block: int = 64, double: bool = False) -> Format:
    """The format of that name, which has these settings; they are as for `quantizer`.

    Raises:
        PunaError: for another name, and for a setting that it does not have.
    """
    for known in FORMATS:
        if format == known:
            break
    else:
        raise PunaError(f"quantize {format!r} is not known; choose {', '.join(FORMATS)}")
    if block not in ((32, 64, 128) if known == "int4" else (64,)):
        raise PunaError(f"quantize {known} has no blocks of {block}: give int4, and 32, 64 or 128")
    if double and known != "nf4":
        raise PunaError(f"quantize {known} has no double quantization: give nf4, or leave it out")
    return known


@partial(jax.jit, static_argnames=("format", "block", "double"))
def quantize(w: Array, format: Format, block: int = 64, double: bool = False) -> QuantizedArray:
    """Rounds float weights to `format`.

    int8 and nf4 give the bits that bitsandbytes gives (which takes float16 for int8), on every matrix [in, out] alone.
    The error of one weight is at most, in units of its block's absmax: int8 1/254 (and float16's rounding); int4
    (1 + 2**-8) / 14; nf4 half the widest gap of its table, (1 - 0.6962) / 2; double quantization adds the error of
    absmax itself.

    Args:
        w: [..., in, out].
        block: int4's weights that share a scale, 32, 64 or 128; nf4's are 64.
        double: quantize nf4's absmax too (QLoRA, arXiv:2305.14314, section 3).

    Raises:
        PunaError: for an unknown format, a block it does not have, or an odd number of inputs at 4 bits.
    """
    check_format(format, block, double)
    if format != "int8" and w.shape[-2] % 2:
        raise PunaError(f"{format} packs pairs of inputs; a weight with {w.shape[-2]} inputs cannot be quantized to it")
    if w.ndim > 2:
        return lax.map(lambda matrix: quantize(matrix, format, block, double), w)
    make = _int8 if format == "int8" else partial(_blocks, format=format, block=block, double=double)
    return replace(make(w.T), in_features=w.shape[0], out_features=w.shape[1], dtype=str(w.dtype))


def _int8(rows: Array) -> QuantizedArray:
    rows = rows.astype(jnp.float16).astype(jnp.float32)
    absmax = jnp.abs(rows).max(axis=1)
    codes = jnp.round(rows * (inverse(absmax) * 127)[:, None]).astype(jnp.int8)
    return QuantizedArray(codes=codes, absmax=absmax, format="int8")


def _blocks(rows: Array, format: Format, block: int, double: bool) -> QuantizedArray:
    out, n_in = rows.shape
    joined = joined_rows(n_in, block)
    n_rows = -(-out // joined)
    flat = jnp.pad(rows.astype(jnp.float32), ((0, n_rows * joined - out), (0, 0)))
    values = flat.reshape(n_rows, -1, block)
    absmax = jnp.abs(values).max(axis=-1)
    if format == "int4":
        absmax = absmax.astype(jnp.bfloat16)
        scaled = values * (inverse(absmax.astype(jnp.float32)) * 7)[..., None]
        codes = (jnp.clip(jnp.round(scaled), -7, 7) + 8).astype(jnp.uint8)
    else:
        codes = _nearest(jnp.clip(values * inverse(absmax)[..., None], -1, 1), np.array(NF4, np.float32))
    codes = codes.reshape(n_rows, -1)
    packed = (codes[:, 0::2] << 4) | codes[:, 1::2]
    whole = QuantizedArray(codes=packed, absmax=absmax, format=format, block=block)
    return _nest(whole, -(-out * n_in // block)) if double else whole


def _nest(q: QuantizedArray, n: int) -> QuantizedArray:
    """Double quantization: the `n` absmax values of real blocks, less their mean, in 8-bit dynamic codes."""
    flat = q.absmax.reshape(-1)[:n]
    offset = _rounded(_mean(flat))
    groups = jnp.pad(flat - offset, (0, -n % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)
    nested = jnp.abs(groups).max(axis=1)
    steps = _rounded((_rounded(groups * inverse(nested)[:, None]) + 1) * _GRID)
    codes = _lookup(_grid_codes(), jnp.floor(steps + 0.5)).reshape(-1)[:n]
    codes = jnp.pad(codes, (0, q.absmax.size - n)).reshape(q.absmax.shape)
    return replace(q, absmax=codes, nested_absmax=nested, offset=offset)


@cache
def _grid_codes() -> np.ndarray:
    """The 8-bit code nearest to each of 65,536 points from -1 to 1: bitsandbytes on CPU rounds to them first."""
    table = dynamic_map()
    points = np.arange(65536, dtype=np.float32) / _GRID - np.float32(1)
    return np.searchsorted((table[:-1] + table[1:]) / np.float32(2), points).astype(np.uint8)


def inverse(absmax: Array) -> Array:
    """1 / absmax, finite where absmax is 0."""
    return 1 / jnp.maximum(absmax, 1e-38)


def rounded_groups(x: Array, block: int) -> tuple[Array, Array]:
    """x rounded to 127 steps of the largest magnitude in each group of `block` neighbours.

    Args:
        x: [M, K], K a multiple of `block`.

    Returns:
        Codes int8 [M, K / block, block], and what one step is, float32 [M, K / block].
    """
    groups = x.astype(jnp.float32).reshape(len(x), -1, block)
    absmax = jnp.abs(groups).max(axis=-1)
    return jnp.round(groups * (inverse(absmax) * 127)[..., None]).astype(jnp.int8), absmax * INT8_UNIT


def _nearest(x: Array, table: np.ndarray) -> Array:
    """The index in sorted `table` of the value nearest to each x, as uint8; halfway goes down. Comparisons vectorize,
    which a binary search does not."""
    return reduce(jnp.add, [(x > bound).astype(jnp.uint8) for bound in (table[:-1] + table[1:]) / np.float32(2)])


def _mean(x: Array) -> Array:
    """The mean of non-negative float32 [n], summed in the order of PyTorch's CPU kernel up to 32,768 values.

    An offset of double quantization is such a mean, and agrees to the bit only if the order does: 8 lanes, 4 streams,
    and a cascade of partial sums of 16. (Beyond that size PyTorch's order depends on its number of threads.)
    """
    lanes = x[: x.size // 8 * 8].reshape(-1, 8)
    streams = lanes[: len(lanes) // 4 * 4].reshape(-1, 4, 8)
    total = jnp.zeros((4, 8), jnp.float32)
    for level in range(4):
        whole = 0 if level == 3 else len(streams) // 16 * 16
        total = total + _in_order(streams[whole:])
        streams = _in_order(streams[:whole].reshape(-1, 16, 4, 8).swapaxes(0, 1))
    rest = _in_order(jnp.concatenate([total[:1], lanes[len(lanes) // 4 * 4 :]]))
    eight = _in_order(jnp.concatenate([rest[None], total[1:]]))
    count = (x >= 0).sum()  # by a number it knows, the compiler would divide through the reciprocal
    return _in_order(jnp.concatenate([x[x.size // 8 * 8 :], eight])) / count.astype(jnp.float32)


def _in_order(x: Array) -> Array:
    """The sum over the first axis, strictly from the first to the last."""
    return lax.scan(lambda total, row: (total + row, None), jnp.zeros(x.shape[1:], x.dtype), x)[0]


@cache
def dynamic_map() -> np.ndarray:
    """The 256 values of the signed 8-bit dynamic type (arXiv:1511.04561), ascending, float32."""
    values = [0.0, 1.0]
    for exponent in range(7):
        n = 2**exponent + 1
        i, step = np.arange(n), np.float64((np.float32(1) - np.float32(0.1)) / np.float32(n - 1))
        # Both halves are counted from their own end, as PyTorch's linspace does.
        bounds = np.where(i < n // 2, np.float32(0.1) + step * i, 1 - step * (n - 1 - i)).astype(np.float32)
        means = np.float32(10.0 ** (exponent - 6)) * ((bounds[:-1] + bounds[1:]) / np.float32(2))
        values += [*means, *-means]
    return np.sort(np.array(values, np.float32))


# ---------------------------------------------------------------------------------------------------------- dequantize


@partial(jax.jit, static_argnames="dtype")
def dequantize(q: QuantizedArray, dtype: DTypeLike | None = None) -> Array:
    """The float weight [..., in, out] that `q` stands for.

    Args:
        dtype: of the result; None for the one the weight had.
    """
    if q.codes.ndim > 2:
        return lax.map(lambda matrix: dequantize(matrix, dtype), q)
    if q.format == "int8":
        rows = q.codes.astype(jnp.float32) * q.absmax[:, None] * INT8_UNIT
    else:
        rows = decode_codes(q.codes, block_scales(q), q)[: q.out_features]
    return rows.astype(dtype or q.dtype).T


def block_scales(q: QuantizedArray) -> Array:
    """What the codes' values are multiplied by, for one 4-bit matrix: float32 [rows, blocks of a row]."""
    if q.format == "int4":
        return q.absmax.astype(jnp.float32) / 7
    if q.nested_absmax is None or q.offset is None:
        return q.absmax.astype(jnp.float32)
    scale = jnp.broadcast_to(q.nested_absmax[:, None], (q.nested_absmax.size, NESTED_BLOCK)).reshape(-1)
    scale = jnp.pad(scale, (0, max(0, q.absmax.size - scale.size)))[: q.absmax.size].reshape(q.absmax.shape)
    return _rounded(_lookup(dynamic_map(), q.absmax) * scale) + q.offset


def _rounded(x: Array) -> Array:
    """x, rounded to float32 here: a finite bound keeps the compiler from fusing a product into a multiply-add, which
    rounds once where PyTorch rounds twice. (It drops optimization_barrier and reduce_precision.)"""
    return jnp.minimum(x, np.finfo(np.float32).max)


def _lookup(table: np.ndarray, index: Array) -> Array:
    return jnp.asarray(table).at[index.astype(jnp.int32)].get(mode="promise_in_bounds")


def decode_codes(codes: Array, scales: Array, q: QuantizedArray) -> Array:
    """Rows of packed 4-bit codes as float32.

    A table over whole bytes gives both weights of a byte at once, in their order: taking nibbles apart by arithmetic
    leaves halves that are two products (quantized_matmul.py), or an interleaving that costs more than all else here.

    Args:
        codes: uint8 [rows, width / 2], any rows of `q.codes`.
        scales: float32 [rows, width / block], theirs of `block_scales`.
        q: says the format, the block and the number of inputs.

    Returns:
        One row for each output: [rows * joined, in].
    """
    values = np.arange(-8, 8, dtype=np.float32) if q.format == "int4" else np.array(NF4, np.float32)
    pairs = _lookup(np.stack([np.repeat(values, 16), np.tile(values, 16)], axis=-1), codes)
    blocks = pairs.reshape(*scales.shape, q.block)
    return (blocks * scales[..., None]).reshape(-1, q.in_features)


def chunk_rows(n: int, width: int, weights: int) -> int:
    """How many rows of a matrix make a chunk: a divisor of n, if possible a multiple of 8, which vectors hold.

    Args:
        n: rows of the matrix.
        width: weights in a row.
        weights: most weights in a chunk, which has one row at least.
    """
    limit = max(weights // width, 1)
    divisors = [d for d in range(1, n + 1) if n % d == 0 and d <= limit]
    return max(divisors, key=lambda d: (d % 8 == 0, d))


# ------------------------------------------------------------------------------------------------------------ sharding


def quantized_shardings(q: QuantizedArray, axes: Sequence[str | None], mesh: Mesh, name: str) -> QuantizedArray:
    """The `NamedSharding` of every leaf.

    An axis is split only where each device holds whole blocks; otherwise it is replicated, which is said once.

    Args:
        axes: the logical axis of each dimension of the weight (..., in, out); see sharding.RULES.
        name: what messages call the weight.
    """
    *lead, in_axis, out_axis = axes
    n_rows = q.codes.shape[-2]
    whole = q.in_features if q.format == "int8" else q.absmax.shape[-1]
    can_split_out = n_rows * q.joined == q.out_features and n_rows % ways(mesh, out_axis) == 0
    can_split_in = q.joined == 1 and whole % ways(mesh, in_axis) == 0
    for axis, can in ((in_axis, can_split_in), (out_axis, can_split_out)):
        if not can and ways(mesh, axis) > 1:
            _say_replicated(name, str(axis), q.format)
    rows, columns = out_axis if can_split_out else None, in_axis if can_split_in else None

    def place(a: Array | None, *last: str | None) -> object:
        return None if a is None else named_sharding(mesh, (*lead, *last), a.shape, name)

    return replace(
        q,
        codes=place(q.codes, rows, columns),
        absmax=place(q.absmax, rows) if q.format == "int8" else place(q.absmax, rows, columns),
        nested_absmax=place(q.nested_absmax, None),
        offset=place(q.offset),
    )


@cache
def _say_replicated(name: str, axis: str, format: str) -> None:
    said = "%s: blocks of %s do not divide over axis %s; it is replicated"
    logging.getLogger(__name__).warning(said, name, format, axis)
