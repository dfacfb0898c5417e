"""What is only about CPUs: the forms in which XLA's CPU backend computes fast, and the processor's own abilities.

Programs for other platforms contain none of this. Where a program is lowered decides (`jax.lax.platform_dependent`), or
the platform of the mesh where that is at hand. Every form gives the numbers of the plain one, summed in another order.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from model.quantize import NF4, QuantizedArray, chunk_rows, decode_codes

PLATFORM = "cpu"
FEW_ROWS = 64  # rows of x up to which the weight comes first in a product: XLA packs the second operand anew each time
MIN_BLOCK, MAX_BLOCKS = 128, 4  # of queries: four blocks save 3/8 of the work, eight would save 7/16

# What keys and values are kept in: XLA would widen a 16-bit cache at every token, for its scatter and for attention.
CACHE_DTYPE = jnp.float32

# Without it XLA would copy both moments of every weight, for fear that the new ones overwrite the old while these are
# still read: 0.5 GiB at 110M parameters, by the compiler's own account of temporaries.
COMPILER_OPTIONS: dict[str, str | bool] = {"xla_cpu_copy_insertion_use_region_analysis": True}

_ROWS = (((1,), (1,)), ((), ()))  # contracts the inputs of both, x [M, in] and rows [out, in]


def _reads_avx512() -> bool:
    try:
        return " avx512vl " in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False


_HAS_AVX512 = _reads_avx512()


def times_rows(x: Array, rows: Array, out_dtype: DTypeLike | None = None) -> Array:
    """A product with a weight of one row per output; with a few x each row is read once.

    XLA would first write a float32 copy of a whole 16-bit weight, which takes ten times as long. It does not for
    bfloat16 where the product gives float32 and has two rows or more; float16 is converted a chunk at a time.

    Args:
        x: [M, in].
        rows: [out, in], in any float dtype; converted to x's.
        out_dtype: of the result; None for x's.

    Returns:
        [M, out].
    """
    rows = rows.astype(x.dtype)
    if len(x) > FEW_ROWS:
        return lax.dot_general(x, rows, _ROWS, preferred_element_type=out_dtype)
    out_dtype = out_dtype or x.dtype
    if x.dtype == jnp.float32:
        # Without the barrier XLA folds both transposes away, and packs the weight instead of x.
        return lax.optimization_barrier(jnp.matmul(rows, x.T, preferred_element_type=out_dtype)).T
    if x.dtype == jnp.bfloat16:
        two = jnp.pad(x, ((0, max(0, 2 - len(x))), (0, 0)))
        return lax.dot_general(two, rows, _ROWS, preferred_element_type=jnp.float32)[: len(x)].astype(out_dtype)
    chunks = rows.reshape(-1, chunk_rows(rows.shape[0], rows.shape[1], chunk_weights(rows.size)), rows.shape[1])
    y = lax.map(lambda chunk: lax.dot_general(chunk.astype(jnp.float32), x.astype(jnp.float32), _ROWS), chunks)
    return y.reshape(-1, len(x)).T.astype(out_dtype)


def in_query_blocks(attend: Callable[..., Array], q: Array, k: Array, v: Array, seen: Array) -> Array:
    """`attend(q, k, v, seen)` where query i sees keys 0 to i at most, a block of queries at a time.

    A block attends to the keys up to its end: half of the work of long rows is in scores that nobody sees.

    Args:
        attend: the attention of one block.
        q: [B, T, H, d].
        k: [B, K, T, d].
        v: [B, K, T, d].
        seen: bool [B or 1, T, T], which keys each query may see.

    Returns:
        [B, T, H, d].
    """
    T = q.shape[1]
    count = max(1, min(MAX_BLOCKS, T // MIN_BLOCK))
    if count == 1:
        return attend(q, k, v, seen)
    ends = [T * (i + 1) // count for i in range(count)]
    blocks = zip([0, *ends], ends, strict=False)
    parts = [attend(q[:, i:j], k[:, :, :j], v[:, :, :j], seen[:, i:j, :j]) for i, j in blocks]
    return jnp.concatenate(parts, axis=1)


def sums_vocabulary_first(platform: str) -> bool:
    """Whether the head's gradient is summed as [V, D], which XLA multiplies half as fast again as [D, V] on CPU."""
    return platform == PLATFORM


def platform_of(tree: Any) -> str:
    """The platform of the devices on which the arrays of a tree lie."""
    return next(iter(jax.tree.leaves(tree)[0].devices())).platform


# ------------------------------------------------------------------------------------ products with weights of few bits
# A decoded chunk is one matrix [rows, in], or two of half the inputs each: of the high nibbles, and of the low ones.


def widened(x: Array) -> Array:
    """x as products with decoded weights take it: float32.

    XLA would widen a narrower x to it again, and with it every chunk that was narrowed to match.
    """
    return x.astype(jnp.float32)


def chunk_weights(size: int) -> int:
    """How many weights of a matrix of `size` weights are decoded at a time.

    At most an eighth, in bounds between which decoded weights stay in a cache and chunks are large enough to share
    among cores; never more than a half.
    """
    return min(max(size // 8, 2**20), 2**21, size // 2)


def _in_halves(q: QuantizedArray) -> bool:
    """Whether nibbles are decoded by arithmetic, which leaves halves, and not by the table of `decode_codes`.

    XLA vectorizes arithmetic, and not the table. int4's is short. nf4's 15 selects pay where AVX-512 has masks for
    them, and where the table's code is slower than AVX2's (`benchmarks/quantized.py` times what is chosen).
    """
    return q.format == "int4" or (q.format == "nf4" and _HAS_AVX512)


def columns(x: Array, q: QuantizedArray) -> list[Array]:
    """The columns of x that each matrix of `decoded` is multiplied with: inputs 0, 2, ... and the others.

    Args:
        x: [M, in].
        q: the weight, whose format decides.

    Returns:
        x itself, or two arrays [M, in / 2].
    """
    if not _in_halves(q):
        return [x]
    pairs = x.reshape(len(x), -1, 2)  # a strided slice would cross the shards of a mesh
    return [pairs[:, :, 0], pairs[:, :, 1]]


def decoded(piece: QuantizedArray) -> list[Array]:
    """The rows of a chunk, decoded; int8 ones without their scale.

    Args:
        piece: the weight of one chunk; `absmax` of a 4-bit one is the factor on each block, as `block_scales` gives it.

    Returns:
        One matrix [rows, in]; or two float32 [rows, in / 2], of the high and of the low nibbles.
    """
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
