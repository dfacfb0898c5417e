"""Writing a model: in any format, streamed, complete or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from cli.files import atomic_path, check_apart, check_free_space, copy_files
from cli.progress import ProgressBar, no_progress
from convert.checkpoint import Checkpoint, LazyQuantized
from convert.hf import write_hf
from convert.lazy import Index, LazyTensor
from convert.meta import write_meta
from convert.names import parameters
from model.config import LlamaConfig
from model.errors import PunaError
from model.params import Params
from model.quantize import QuantizedArray, dequantize
from model.tokenizer import TOKENIZER_FILES

MAX_SHARD_SIZE = 5 * 10**9  # bytes of a safetensors file, as transformers has it


class SavesItself(Protocol):
    """What a tokenizer is here."""

    def save(self, folder: Path) -> None: ...


def save_model(
    path: str | Path,
    config: LlamaConfig,
    params: Params,
    format: str = "hf",
    tokenizer: SavesItself | None = None,
    shards: int = 1,
    overwrite: bool = False,
) -> None:
    """Write `params`, stacked or not, as an `hf`, `orbax` or `meta` folder, with the tokenizer's files where given.

    `shards` is the number of Meta's consolidated files. With several processes all call this, and the first one
    writes, and hf only: Meta's format reads in another order. Quantized weights are written as they are, to hf only.
    Raises PunaError for LoRA leaves, and for an existing `path` unless `overwrite`.
    """
    tensors = {param.name: _leaf(params, param.name, param.shape) for param in parameters(config)}
    quantized = {name: weight for name in tensors if (weight := _quantized_leaf(params, name)) is not None}
    if quantized and format != "hf":
        raise PunaError(f"quantized weights are written as hf, not as {format}; dequantize them, or save hf")
    if jax.process_count() > 1 and format != "hf":
        raise PunaError(f"several processes write hf, not {format}: convert it with `python -m convert model`")
    if jax.process_index() > 0:
        for tensor in tensors.values():  # the other half of each gathering read, in the writer's order
            tensor.load()
        return
    checkpoint = Checkpoint(config, tensors, Path(path), format, quantized)
    with _new_folder(Path(path), checkpoint.nbytes, overwrite) as folder:
        if tokenizer is not None:
            tokenizer.save(folder)
        _write(folder, checkpoint, shards, MAX_SHARD_SIZE, no_progress)


def write_model(
    path: Path,
    checkpoint: Checkpoint,
    overwrite: bool = False,
    *,
    shards: int = 1,
    max_shard_size: int = MAX_SHARD_SIZE,
    tokenizer: SavesItself | None = None,
    bar: ProgressBar = no_progress,
) -> None:
    """Write the checkpoint in its `format`, with the files beside it (of another `tokenizer` where given), under a
    temporary name, renamed when complete.

    Raises PunaError where `path` exists or holds what is read, the disk is too small, or the format cannot hold the
    model.
    """
    check_apart(path, checkpoint.file or checkpoint.folder)
    with _new_folder(path, checkpoint.nbytes, overwrite) as folder:
        copy_files(["generation_config.json"], checkpoint.folder, folder)
        if tokenizer is None:
            copy_files(TOKENIZER_FILES, checkpoint.folder, folder)
        else:
            tokenizer.save(folder)
        _write(folder, checkpoint, shards, max_shard_size, bar)


@contextmanager
def _new_folder(path: Path, nbytes: int, overwrite: bool) -> Iterator[Path]:
    with atomic_path(path, overwrite) as folder:
        check_free_space(path, nbytes)
        folder.mkdir()
        yield folder


def _write(folder: Path, checkpoint: Checkpoint, shards: int, max_shard_size: int, bar: ProgressBar) -> None:
    config, tensors = checkpoint.config, checkpoint.tensors
    match checkpoint.format:
        case "hf":
            write_hf(folder, checkpoint, bar, max_shard_size)
        case "meta":
            write_meta(folder, config, tensors, bar, shards)
        case "orbax":
            from convert.orbax import write_orbax  # Orbax takes a second to import

            write_orbax(folder, config, tensors, bar)
        case unknown:
            raise PunaError(f"format {unknown!r} is not known; choose hf, orbax or meta")


def _find(params: Params, name: str) -> tuple[Any, Any]:
    """The leaf that holds a parameter, and the index of its layer in a stacked one."""
    first, _, rest = name.partition(".")
    if first != "layers":
        return params[first], ()
    number, key = rest.split(".")
    if isinstance(params["layers"], tuple):
        return params["layers"][int(number)][key], ()
    return params["layers"][key], int(number)


def _quantized_leaf(params: Params, name: str) -> LazyQuantized | None:
    leaf, select = _find(params, name)
    if not isinstance(leaf, QuantizedArray):
        return None
    like = jax.eval_shape(lambda w: jax.tree.map(lambda x: x[select], w), leaf)
    return LazyQuantized(like, lambda: jax.tree.map(lambda x: jnp.asarray(gathered(x[select])), leaf))


def _dequantized(leaf: QuantizedArray, select: Any) -> np.ndarray:
    return np.asarray(dequantize(jax.tree.map(lambda x: jnp.asarray(gathered(x[select])), leaf)))


def _leaf(params: Params, name: str, shape: tuple[int, ...]) -> LazyTensor:
    """One unstacked parameter of a tree in memory; on several processes its reading gathers it."""
    leaf, select = _find(params, name)
    if isinstance(leaf, QuantizedArray):
        return LazyTensor(shape, np.dtype(jnp.dtype(leaf.dtype)), lambda index: _dequantized(leaf, select)[index], name)
    if not isinstance(leaf, jax.Array):
        raise PunaError(f"{name} is a {type(leaf).__name__}: merge adapters before saving the model")

    def read(index: Index) -> np.ndarray:
        return gathered(leaf[select])[index]

    tensor = LazyTensor(shape, np.dtype(leaf.dtype), read, "the parameters")
    if leaf[select].shape != shape:
        raise PunaError(f"{name} has shape {leaf[select].shape}; the config says {shape}")
    return tensor


def gathered(array: jax.Array) -> np.ndarray:
    """The whole array in this process's memory; where several processes hold its parts, all must call."""
    if array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental.multihost_utils import process_allgather

    return np.asarray(process_allgather(array, tiled=True))
