"""Writing a model: in any format, streamed, complete or not at all."""

from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from convert.checkpoint import Checkpoint, copy_companions
from convert.command import atomic_path, check_free_space
from convert.names import rows
from convert.stored import Advance, Index, Stored
from model.config import LlamaConfig
from model.errors import PunaError
from model.params import Params

MAX_SHARD_SIZE = 5 * 10**9  # bytes of a safetensors file, as transformers has it
FORMATS = ("hf", "orbax", "meta")


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

    `shards` is the number of Meta's consolidated files. With several processes all call this; the first one writes.
    Raises PunaError for LoRA or quantized leaves, and for an existing `path` unless `overwrite`.
    """
    tensors = {row.name: _leaf(params, row.name, row.shape) for row in rows(config)}
    if jax.process_index() > 0:
        for tensor in tensors.values():  # the other half of each gathering read, in the writer's order
            tensor.load()
        return
    write_model(Path(path), Checkpoint(config, tensors, Path(), format), overwrite, shards=shards, tokenizer=tokenizer)


def write_model(
    path: Path,
    checkpoint: Checkpoint,
    overwrite: bool = False,
    *,
    shards: int = 1,
    max_shard_size: int = MAX_SHARD_SIZE,
    tokenizer: SavesItself | None = None,
    advance: Advance = lambda count: None,
) -> None:
    """Write the checkpoint, in its `format`, under a temporary name and rename it when complete.

    Raises PunaError where `path` exists, the disk is too small, or the format cannot hold the model.
    """
    if checkpoint.format not in FORMATS:
        raise PunaError(f"format {checkpoint.format!r} is not known; choose {', '.join(FORMATS)}")
    config, tensors = checkpoint.config, checkpoint.tensors
    with atomic_path(path, overwrite) as folder:
        check_free_space(path, checkpoint.nbytes)
        folder.mkdir()
        copy_companions(checkpoint.folder, folder)
        if tokenizer is not None:
            tokenizer.save(folder)
        match checkpoint.format:
            case "hf":
                from convert.hf import write_hf

                write_hf(folder, config, tensors, advance, max_shard_size)
            case "orbax":
                from convert.orbax import write_orbax

                write_orbax(folder, config, tensors, advance)
            case _:
                from convert.meta import write_meta

                write_meta(folder, config, tensors, advance, shards)


def _leaf(params: Params, name: str, shape: tuple[int, ...]) -> Stored:
    """One unstacked parameter of a tree in memory; on several processes its reading gathers it."""
    first, _, rest = name.partition(".")
    leaf = params[first]
    select: Any = ()
    if first == "layers":
        number, key = rest.split(".")
        stacked = not isinstance(leaf, tuple)
        leaf = leaf[key] if stacked else leaf[int(number)][key]
        select = int(number) if stacked else ()
    if not isinstance(leaf, jax.Array):
        raise PunaError(f"{name} is a {type(leaf).__name__}: merge adapters and dequantize before saving the model")

    def read(index: Index) -> np.ndarray:
        return _gathered(leaf[select])[index]

    tensor = Stored(shape, np.dtype(leaf.dtype), read, "the parameters")
    if leaf[select].shape != shape:
        raise PunaError(f"{name} has shape {leaf[select].shape}; the config says {shape}")
    return tensor


def _gathered(array: jax.Array) -> np.ndarray:
    if array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental.multihost_utils import process_allgather

    return np.asarray(process_allgather(array, tiled=True))
