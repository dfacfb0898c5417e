"""Writing a model: in any format, streamed, complete or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cli.files import atomic_path, check_apart, check_free_space, copy_files
from convert.checkpoint import Checkpoint, LazyQuantized, SavesItself, WriteOptions
from convert.formats import FORMATS, FileFormat, check_options, format_named
from convert.lazy import Index, LazyTensor
from convert.names import parameters
from convert.not_finite import AS_THEY_ARE, BY_BLOCKS, not_finite_said
from model.config import LlamaConfig
from model.errors import PunaError
from model.params import Params, param_specs
from model.quantize import QuantizedArray, dequantize
from model.tokenizer import TOKENIZER_FILES


def save_model(
    path: str | Path,
    config: LlamaConfig,
    params: Params,
    format: str = "hf",
    tokenizer: SavesItself | None = None,
    shards: int = 1,
    overwrite: bool = False,
) -> None:
    """Write `params`, stacked or not, in the format of that name, with the tokenizer's files where given.

    With several processes all call this, and the first one writes.

    Args:
        path: the folder (or file) to write.
        config: the model's numbers.
        params: its parameters. Quantized weights are written as they are.
        format: a key of `FORMATS`.
        tokenizer: what saves its files beside the weights.
        shards: the number of Meta's consolidated files.
        overwrite: replace what stands at `path`.

    Raises:
        PunaError: LoRA leaves, an existing `path` without `overwrite`, or a format that cannot hold these weights or
            be written by several processes.
    """
    row, options = format_named(format), WriteOptions(shards=shards, tokenizer=tokenizer)
    check_options(format, options)
    tensors = {param.name: _leaf(params, param.name, param.shape) for param in parameters(config)}
    layer = params["layers"][0] if isinstance(params["layers"], tuple) else params["layers"]
    if unsaid := layer.keys() - param_specs(config)["layers"].keys():
        raise PunaError(
            f"the parameters hold {', '.join(sorted(unsaid))}, and the config says none: merged biases need "
            "attention_bias or mlp_bias"
        )
    quantized = {name: weight for name in tensors if (weight := _quantized_leaf(params, name)) is not None}
    if quantized and not row.keeps_quantized:
        able = " or ".join(name for name, other in FORMATS.items() if other.keeps_quantized)
        raise PunaError(f"quantized weights are written as {able}, not as {format}; dequantize them, or save {able}")
    if jax.process_count() > 1 and not row.in_order:
        able = " or ".join(name for name, other in FORMATS.items() if other.in_order)
        raise PunaError(f"several processes write {able}, not {format}: convert it with `python -m convert model`")
    if jax.process_index() > 0:
        for tensor in tensors.values():  # the other half of each gathering read, in the writer's order
            tensor.load()
        return
    checkpoint = Checkpoint(config, tensors, Path(path), format, quantized)
    with _new(Path(path), checkpoint, options, overwrite) as place:
        if tokenizer is not None and not row.is_file:
            tokenizer.save(place)
        _write(row, place, checkpoint, options)


def write_model(
    path: Path, checkpoint: Checkpoint, options: WriteOptions = WriteOptions(), overwrite: bool = False
) -> None:
    """Write the checkpoint in its `format`, with the files beside it (or of the options' tokenizer), under a temporary
    name, renamed when complete.

    Raises:
        PunaError: `path` exists or holds what is read, the disk is too small, an option is not one of the format, or
            the format cannot hold the model.
    """
    row = format_named(checkpoint.format)
    check_options(checkpoint.format, options)
    check_apart(path, *(checkpoint.parts or [checkpoint.file or checkpoint.folder]))
    with _new(path, checkpoint, options, overwrite) as place:
        if not row.is_file:
            copy_files(["generation_config.json"], checkpoint.folder, place)
            if options.tokenizer is None:
                copy_files(TOKENIZER_FILES, checkpoint.folder, place)
            else:
                options.tokenizer.save(place)
        _write(row, place, checkpoint, options)


def _write(row: FileFormat, place: Path, checkpoint: Checkpoint, options: WriteOptions) -> None:
    with not_finite_said(checkpoint.tensors, BY_BLOCKS if options.quantize else AS_THEY_ARE) as tensors:
        row.write(place, replace(checkpoint, tensors=tensors), options)


@contextmanager
def _new(path: Path, checkpoint: Checkpoint, options: WriteOptions, overwrite: bool) -> Iterator[Path]:
    """A folder, or the name of a file, to write to, for which the disk has room."""
    row = FORMATS[checkpoint.format]
    if row.is_file and path.is_dir():
        raise PunaError(f"{path} is a folder: give the file to write, as {path / row.signs[0].replace('*', 'model')}")
    nbytes = row.nbytes(checkpoint, options)
    with atomic_path(path, overwrite) as place:
        check_free_space(path, nbytes)
        if not row.is_file:
            place.mkdir()
        yield place


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
