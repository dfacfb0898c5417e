"""Tensors that stay in their files: shape and dtype known at once, numbers read when asked and only where asked.

Every format gives `LazyTensor` tensors, and transposing, permuting, joining and casting them is as lazy as they are;
so a conversion holds one tensor at a time, and a sharded load reads only the slices that its devices hold.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from jax.numpy import finfo

from model.errors import PunaError

Index = tuple[slice, ...]

_WIDER = {"float16": "bfloat16 or float32", "bfloat16": "float32"}
_ROWS = 16  # of a transposed array copied together: whole cache lines of the copy, few enough to stay in the cache
_THREADED_BYTES = 1 << 22


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of `shape` and `dtype` in the file or folder `where`.

    `read(index)` takes one slice with start, stop and step 1 for each dimension, and gives that part: often a view of
    the mapped file, to be copied (`contiguous`) or written before it is forgotten.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]
    where: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def load(self) -> np.ndarray:
        """The whole tensor."""
        return self.read(tuple(slice(0, size) for size in self.shape))

    def transposed(self) -> "LazyTensor":
        """With its dimensions in reverse order."""
        return replace(self, shape=self.shape[::-1], read=lambda index: self.read(index[::-1]).T)

    def cast(self, dtype: np.dtype, name: str, allow_overflow: bool = False) -> "LazyTensor":
        """In another dtype; `name` is what to call it where reading meets an overflow, as in `narrowed`."""
        if dtype == self.dtype:
            return self
        return replace(
            self, dtype=dtype, read=lambda index: narrowed(self.read(index), dtype, name, self.where, allow_overflow)
        )

    def take(self, axis: int, order: np.ndarray) -> "LazyTensor":
        """With the entries `order` of `axis`, as `np.take` has them."""

        def read(index: Index) -> np.ndarray:
            wanted = order[index[axis]]
            low, high = int(wanted.min()), int(wanted.max()) + 1
            part = self.read((*index[:axis], slice(low, high), *index[axis + 1 :]))
            return np.take(part, wanted - low, axis)

        return replace(self, shape=(*self.shape[:axis], len(order), *self.shape[axis + 1 :]), read=read)

    def narrow(self, axis: int, start: int, stop: int) -> "LazyTensor":
        """The entries `start` to `stop` of `axis`."""

        def read(index: Index) -> np.ndarray:
            inner = slice(start + index[axis].start, start + index[axis].stop)
            return self.read((*index[:axis], inner, *index[axis + 1 :]))

        return replace(self, shape=(*self.shape[:axis], stop - start, *self.shape[axis + 1 :]), read=read)


def from_array(array: np.ndarray, where: str) -> LazyTensor:
    """An array at hand, or a mapped one, as a `LazyTensor`."""
    return LazyTensor(array.shape, array.dtype, lambda index: array[index], where)


def concatenate(parts: Sequence[LazyTensor], axis: int) -> LazyTensor:
    """`parts` one after the other along `axis`; a slice reads from those that it touches."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(part.shape[axis] for part in parts)]).tolist()

    def read(index: Index) -> np.ndarray:
        start, stop = index[axis].start, index[axis].stop
        pieces = []
        for part, first in zip(parts, starts, strict=False):
            inner = slice(max(start - first, 0), min(stop - first, part.shape[axis]))
            if inner.start < inner.stop:
                pieces.append(part.read((*index[:axis], inner, *index[axis + 1 :])))
        return np.concatenate(pieces, axis)

    first = parts[0]
    return replace(first, shape=(*first.shape[:axis], starts[-1], *first.shape[axis + 1 :]), read=read)


def contiguous(array: np.ndarray) -> np.ndarray:
    """`array` in row-major order. A large transposed matrix is copied in stripes, on every core: about eight times
    as fast as NumPy's own walk, which misses the cache at each element."""
    if array.flags.c_contiguous:
        return array
    if array.ndim != 2 or not array.T.flags.c_contiguous or array.nbytes < _THREADED_BYTES:
        return np.ascontiguousarray(array)
    copy = np.empty(array.shape, array.dtype)
    bits = np.dtype(f"u{array.dtype.itemsize}")  # NumPy copies its own types without holding the interpreter's lock
    source, target = array.T.view(bits), copy.view(bits)

    def stripes(start: int, stop: int) -> None:
        for row in range(start, stop, _ROWS):
            rows = slice(row, min(row + _ROWS, stop))
            target[:, rows] = source[rows].T

    workers = os.cpu_count() or 1
    share = -(-len(source) // (workers * _ROWS)) * _ROWS
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda start: stripes(start, min(start + share, len(source))), range(0, len(source), share)))
    return copy


def loaded(tensors: Iterable[LazyTensor]) -> Iterator[np.ndarray]:
    """The tensors' numbers, row-major; while one is used, the next is read."""
    with ThreadPoolExecutor(1) as reader:
        waiting: Future[np.ndarray] | None = None
        for tensor in tensors:
            coming = reader.submit(lambda tensor=tensor: contiguous(tensor.load()))
            if waiting is not None:
                yield waiting.result()
            waiting = coming
        if waiting is not None:
            yield waiting.result()


def narrowed(array: np.ndarray, dtype: np.dtype, name: str, where: str, allow_overflow: bool = False) -> np.ndarray:
    """`array` in `dtype`.

    Args:
        array: floats.
        dtype: of the result.
        name: of the tensor.
        where: the file that it is from.
        allow_overflow: let numbers become infinite.

    Raises:
        PunaError: numbers that are finite in `array` are not in `dtype`, unless that is allowed.
    """
    if dtype == array.dtype:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if not allow_overflow and finfo(dtype).max < finfo(array.dtype).max and not all_finite(result):
        lost = np.isfinite(array) & ~np.isfinite(result)
        if count := int(lost.sum()):
            largest = np.abs(array[lost].astype(np.float64)).max()
            raise PunaError(
                f"{where}: {name} holds {count} numbers beyond {dtype.name}, whose largest is "
                f"{float(finfo(dtype).max):.6g}; the largest is {largest:.6g}. "
                f"Choose {_WIDER.get(dtype.name, 'a wider dtype')}, or allow_overflow=True to make them infinite"
            )
    return result


def all_finite(array: np.ndarray) -> bool:
    """Whether no number is NaN or infinite. Sixteen-bit floats are read as integers, which is faster."""
    if array.dtype.itemsize == 2 and array.dtype.kind != "i":
        bits = array.view(np.uint16)
        infinity = 0x7C00 if array.dtype == np.float16 else 0x7F80
        return not ((bits & 0x7FFF) >= infinity).any()
    return bool(np.isfinite(array).all())


def check_finite(array: np.ndarray, name: str, where: str) -> None:
    """Raises PunaError where the tensor `name` of the file `where` holds a NaN or an infinity."""
    if wrong := int(array.size - np.isfinite(array).sum()):
        raise PunaError(f"{where}: {name} holds {wrong} numbers that are NaN or infinite in {array.dtype.name}")


def same_bytes(a: LazyTensor, b: LazyTensor) -> bool:
    """Whether two tensors hold the same numbers, bit for bit."""
    return (a.shape, a.dtype) == (b.shape, b.dtype) and a.load().tobytes() == b.load().tobytes()


def shares_memory(a: LazyTensor, b: LazyTensor) -> bool:
    """Whether two mapped tensors are one and the same place of a file."""
    return (a.shape, a.dtype) == (b.shape, b.dtype) and a.load().ctypes.data == b.load().ctypes.data
