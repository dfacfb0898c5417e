"""PyTorch's pickled weights, `.bin` and `.pth`: a zip of one pickle that describes tensors and one file per storage.

torch itself (extra `torch`) reads and describes them, with nothing but weights allowed in the pickle. Reading maps the
file. Writing streams: the pickle first, then each tensor's bytes, where `torch.save` would want all in memory.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cli.progress import Advance
from convert.lazy import LazyTensor, from_array, loaded
from model.errors import PunaError

# What torch raises, and a pickle of anything but tensors makes us raise, while the file is parsed.
_DAMAGED = (
    *(RuntimeError, OSError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile),
    *(AttributeError, TypeError, ValueError, LookupError, ArithmeticError),
)
_ALIGNMENT = 64  # of the tensors inside the zip, as torch has it, so that they can be mapped
_STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
}
_READ = {*_STORAGES, "int8", "uint8", "int32", "int64", "int16", "bool"}  # of quantized weights and buffers, too


def import_torch(purpose: str) -> Any:
    """The torch module. Raises PunaError naming the extra that installs it."""
    try:
        import torch
    except ImportError:
        raise PunaError(f"{purpose} needs PyTorch: pip install 'puna[torch]'") from None
    return torch


def read_pickled(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a `.bin` or `.pth` file by name, mapped and unread (the format before PyTorch 1.6 is loaded).

    Raises PunaError where the file is damaged, or holds anything but weights.
    """
    torch = import_torch(f"reading {path}")
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    try:
        weights = torch.load(path, map_location="cpu", mmap=is_zip, weights_only=True)
        _check_tensors(path, torch, weights)
        return {name: from_array(_as_numpy(tensor), str(path)) for name, tensor in weights.items()}
    except PunaError:
        raise
    except _DAMAGED as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise PunaError(f"{path} is truncated or no file of PyTorch weights: {reason}; fetch it again") from None


def _check_tensors(path: Path, torch: Any, weights: Any) -> None:
    """Raises PunaError for a whole file that holds something else than tensors, or tensors of a type that none has."""
    if not isinstance(weights, dict):
        raise PunaError(f"{path} holds a {type(weights).__name__}, no dict of tensors by name: save model.state_dict()")
    for name, tensor in weights.items():
        if not isinstance(tensor, torch.Tensor):
            inner = isinstance(tensor, dict) and any(isinstance(value, torch.Tensor) for value in tensor.values())
            how = (
                f"take them out: torch.save(torch.load({path.name!r})[{name!r}], ...)" if inner else "save these alone"
            )
            raise PunaError(f"{path}: {name!r} is a {type(tensor).__name__}, no tensor; its weights lie deeper: {how}")
        if (kind := str(tensor.dtype).removeprefix("torch.")) not in _READ:
            raise PunaError(f"{path}: {name} has dtype {kind}; weights are {', '.join(_STORAGES)}")


def _as_numpy(tensor: Any) -> np.ndarray:
    tensor = tensor.detach()
    if str(tensor.dtype) == "torch.bfloat16":  # NumPy has no such type of its own
        return tensor.view(dtype=import_torch("bfloat16").int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def write_pickled(path: Path, tensors: Mapping[str, LazyTensor], advance: Advance) -> None:
    """Write the tensors as `torch.save` would, read one ahead; `advance` hears of each one's bytes.

    A tensor that has two names is stored once, and is one tensor again when read.
    """
    storages = distinct(tensors)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", _pickle(tensors, storages))
        archive.writestr("archive/byteorder", "little")
        for key, array in enumerate(loaded(storages)):
            with archive.open(_aligned_entry(archive, f"archive/data/{key}"), "w", force_zip64=True) as file:
                file.write(array.reshape(-1).view(np.uint8).data)
            advance(array.nbytes)
        archive.writestr("archive/version", "3\n")


def distinct(tensors: Mapping[str, LazyTensor]) -> list[LazyTensor]:
    """Each tensor once, whatever its names."""
    return list({id(tensor): tensor for tensor in tensors.values()}.values())


def _pickle(tensors: Mapping[str, LazyTensor], storages: Sequence[LazyTensor]) -> bytes:
    """The pickled state dict: per tensor a call that rebuilds it from a storage, which a persistent id names."""
    torch = import_torch("writing PyTorch weights")
    keys = {id(tensor): str(key) for key, tensor in enumerate(storages)}

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
            if not isinstance(obj, _Storage):
                return None
            numel = obj.tensor.nbytes // obj.tensor.dtype.itemsize
            return ("storage", getattr(torch, _STORAGES[obj.tensor.dtype.name]), keys[id(obj.tensor)], "cpu", numel)

        def reducer_override(self, obj: Any) -> Any:
            if not isinstance(obj, LazyTensor):
                return NotImplemented
            strides = np.cumprod((1, *obj.shape[:0:-1]))[::-1].tolist() if obj.shape else []
            arguments = (_Storage(obj), 0, obj.shape, tuple(strides), False, OrderedDict())
            return torch._utils._rebuild_tensor_v2, arguments

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(dict(tensors))
    return buffer.getvalue()


class _Storage:
    """Stands in the pickle for the bytes of `tensor`."""

    def __init__(self, tensor: LazyTensor) -> None:
        self.tensor = tensor


def _aligned_entry(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """The next entry of the zip, its header padded by an extra field so that its data start aligned."""
    entry = zipfile.ZipInfo(name)
    zip64 = 20  # bytes of the extra field that carries sizes of 4 GiB and more, which zipfile puts first
    start = archive.start_dir + 30 + len(name) + zip64 + 4
    padding = -start % _ALIGNMENT
    entry.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    return entry
