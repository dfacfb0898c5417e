"""One safetensors file: eight bytes of header length, a JSON header, and the tensors' bytes.

Reading maps the file, so that a slice costs no more than its own pages; writing lays the header out first and then
streams, so that a file larger than memory is no trouble.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cli.progress import Advance
from convert.damage import malformed
from convert.lazy import LazyTensor, from_array, loaded
from model.errors import PunaError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
MOST_HEADER = 100_000_000  # bytes, as the library of the format has it
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of the file by name, unread.

    Raises PunaError where the header is not one, or where the file does not hold the bytes it promises.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MOST_HEADER):
            raise PunaError(f"{path} is truncated or not a safetensors file: {size:,} bytes; fetch it again")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            raise PunaError(f"{path} is not a safetensors file: its header is no JSON; fetch it again") from None
    data = np.memmap(path, np.uint8, "r", offset=8 + length) if size > 8 + length else np.empty(0, np.uint8)
    tensors = {}
    with malformed(path):
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            if stop > len(data):
                end = 8 + length + stop
                raise PunaError(f"{path} is truncated: {name} ends at byte {end:,} of {size:,}; fetch it again")
            if entry["dtype"] not in DTYPES:
                raise PunaError(f"{path}: {name} has dtype {entry['dtype']}; known: {', '.join(DTYPES)}")
            dtype = DTYPES[entry["dtype"]]
            if math.prod(entry["shape"]) * dtype.itemsize != stop - start:
                raise PunaError(f"{path}: {name} of shape {entry['shape']} does not fill its {stop - start:,} bytes")
            tensors[name] = from_array(data[start:stop].view(dtype).reshape(entry["shape"]), str(path))
        _check_layout(path, header, len(data))
    return tensors


def _check_layout(path: Path, header: Mapping[str, Any], size: int) -> None:
    """Raises PunaError unless the tensors fill the data one after the other, as the library of the format asks."""
    last = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        if start != last:
            place = f"lies at bytes {start:,} to {stop:,}, and those before it end at {last:,}"
            raise PunaError(f"{path} is damaged: {name} {place}; fetch it again")
        last = stop
    if last != size:
        raise PunaError(f"{path} is damaged: {size - last:,} bytes belong to no tensor; fetch it again")


def write_safetensors(path: Path, tensors: Mapping[str, LazyTensor], advance: Advance) -> None:
    """Write the tensors, read in order, each while the one before is written; `advance` hears of their bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks which framework's layout it is
    offset = 0
    for name, tensor in tensors.items():
        span = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors start aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in loaded(tensors.values()):
            file.write(array.reshape(-1).view(np.uint8).data)
            advance(array.nbytes)
