"""Numbers that are NaN or infinite already: carried wherever a model is written, and said once."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from convert.lazy import Index, LazyTensor, all_finite

AS_THEY_ARE = "which are written as they are"
BY_BLOCKS = "which make NaN of the block of 32 that each is quantized in"


@contextmanager
def not_finite_said(tensors: Mapping[str, LazyTensor], become: str = AS_THEY_ARE) -> Iterator[dict[str, LazyTensor]]:
    """The tensors; in the end a line on stderr says which of those read held NaN or infinities.

    Args:
        tensors: floats, by name.
        become: what is made of such numbers.
    """
    found: dict[str, str] = {}

    def watched(name: str, tensor: LazyTensor) -> LazyTensor:
        def read(index: Index) -> np.ndarray:
            part = tensor.read(index)
            if not all_finite(part):
                found[name] = tensor.where
            return part

        return replace(tensor, read=read)

    yield {name: watched(name, tensor) for name, tensor in tensors.items()}
    if found:
        first, where = next(iter(found.items()))
        more = f" and {len(found) - 1} more tensors hold" if len(found) > 1 else " holds"
        print(f"{where}: {first}{more} NaN or infinite numbers, {become}", file=sys.stderr)
