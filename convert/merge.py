"""Merging adapters into a model on disk: in order, one weight in memory at a time, vocabularies growing on the way.

The sums are float32 and each result has the base's dtype, as peft's and Chinese-LLaMA-Alpaca's merges have it, or the
wider one that is asked for. Into a quantized base all updates are added to the dequantized weight, which is then
quantized again, once.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cli.files import check_apart, copy_files
from convert.adapter_fit import Rows, adapted_config, new_tables, say_left_out
from convert.bnb import quantize_rows
from convert.checkpoint import Checkpoint, LazyQuantized, WriteOptions
from convert.formats import check_options, format_named, open_model
from convert.lazy import Index, LazyTensor, from_array, narrowed
from convert.names import parameters
from convert.peft import Adapter, Factors, load_finite, read_adapter
from convert.save import write_model
from convert.source import find_source
from convert.tokenizer_files import has_tokenizer, tokenizer_folder
from convert.vocab import resized
from model.errors import PunaError
from model.lora import LoraArray, dense
from model.merge import BIAS_GROUPS, BIASES, HEAD_BIAS
from model.quantize import QuantizedArray, dequantize
from model.tokenizer import TOKENIZER_FILES, load_tokenizer


def merge_adapters(
    base: str | Path,
    adapters: Sequence[str | Path | Adapter],
    destination: Path,
    format: str = "hf",
    options: WriteOptions = WriteOptions(),
    overwrite: bool = False,
) -> dict[str, float]:
    """Writes `base` with every adapter merged, in order, and the last tokenizer that came with any of them. A tokenizer
    with more tokens than the model has rows gives it new ones, the mean of the old.

    Args:
        base: a model folder of any format, or a Hub id.
        adapters: PEFT folders, Hub ids, or what `read_adapter` gave for them.
        destination: the folder (or file) to write.
        format: a key of `FORMATS`.
        options: how to write; the tokenizer is chosen here. With a dtype, sums are in it where it is wider.
        overwrite: replace what stands at `destination`.

    Returns:
        Of each weight quantized again, the relative error that cost (Frobenius norm), by name.

    Raises:
        PunaError: an adapter does not fit what the ones before it made, or the tokenizer of a grown vocabulary is
            smaller than the one before it; nothing is written then.
    """
    row, dtype = format_named(format), options.dtype
    check_options(format, options)
    if (destination / "adapter_config.json").is_file():
        raise PunaError(f"{destination} holds an adapter: give the folder to write as the last of BASE ADAPTER... DST")
    read = [each if isinstance(each, Adapter) else read_adapter(each) for each in adapters]
    check_apart(destination, *(adapter.folder for adapter in read))
    checkpoint = open_model(base)
    if dtype is not None or not row.keeps_quantized:
        checkpoint = checkpoint.as_floats()
    if dtype is not None:
        tensors = {
            name: tensor.cast(np.dtype(jnp.promote_types(tensor.dtype, dtype)), name)
            for name, tensor in checkpoint.tensors.items()
        }
        checkpoint = replace(checkpoint, tensors=tensors)
    tokens, seen = checkpoint.folder, []
    touched: set[str] = set()
    for adapter in read:
        folder, rows = adapter.folder, checkpoint.config.vocab_size
        checkpoint = with_adapter(checkpoint, adapter, options.allow_overflow)
        touched |= adapter.factors.keys() | adapter.saved.keys()
        seen.append(adapter.folder)
        before, tokens = tokens, tokenizer_folder(checkpoint.folder, seen)
        if checkpoint.config.vocab_size > rows and has_tokenizer(adapter.folder) and tokens != adapter.folder:
            raise PunaError(f"{folder} grew the vocabulary, and its tokenizer has fewer tokens than that of {before}")
    if tokens != checkpoint.folder:
        size = load_tokenizer(tokens).vocab_size
        checkpoint = resized(checkpoint, max(size, checkpoint.config.vocab_size))
    errors: dict[str, float] = {}
    again = {
        name: _requantized(name, checkpoint.tensors[name], weight.like, errors)
        for name, weight in checkpoint.quantized.items()
        if name in touched
    }
    target = replace(checkpoint, format=format, quantized={**checkpoint.quantized, **again})
    own = None if tokens == checkpoint.folder else _Files(tokens)
    write_model(destination, target, replace(options, tokenizer=own), overwrite)
    return errors


def open_merged(path: str | Path) -> Checkpoint:
    """The model that `path` names, with its own adapters merged where it is an adapter or a run that trained one. Its
    weights are unread, and each is summed when it is read.

    Raises:
        PunaError: as `find_source` does, and where an adapter does not fit.
    """
    found = find_source(path)
    if not found.adapters:
        return found.checkpoint
    checkpoint = found.checkpoint.as_floats()
    for adapter in found.adapters:
        checkpoint = with_adapter(checkpoint, adapter)
    return replace(
        checkpoint, folder=tokenizer_folder(checkpoint.folder, [adapter.folder for adapter in found.adapters])
    )


class _Files:
    """Tokenizer files, copied as they are, and what the adapter says of generation."""

    def __init__(self, folder: Path):
        self.folder = folder

    def save(self, folder: Path) -> None:
        copy_files((*TOKENIZER_FILES, "generation_config.json"), self.folder, folder)


def with_adapter(checkpoint: Checkpoint, adapter: Adapter, allow_overflow: bool = False) -> Checkpoint:
    """The checkpoint whose `tensors` are merged with one adapter's when read; `quantized` stays as it is.

    Raises PunaError where the adapter does not fit; reading raises it where sums overflow, unless that is allowed.
    """
    before, config = checkpoint.config, adapted_config(adapter, checkpoint.config)
    say_left_out(adapter, before)
    for name, factors in adapter.factors.items():
        for part in factors.parts:
            load_finite(part, f"the adapter of {name}")
    for name, tensor in adapter.saved.items():
        load_finite(tensor, name)
    tensors = dict(checkpoint.tensors)
    tables = new_tables(adapter, before)
    if before.tie_word_embeddings and not tables.is_tied:
        tensors["lm_head"] = tensors["embed"].transposed()
    for name, table in tables.whole.items():
        tensors[name] = _laid(name, table).cast(tensors["embed"].dtype, name, allow_overflow)
    for name, rows in tables.rows.items():
        tensors[name] = _laid(name, _with_rows(name, _laid(name, tensors[name]), rows, allow_overflow))
    for param in parameters(before):
        if param.name in adapter.saved and param.name not in ("embed", "lm_head"):
            new = param.swap_layout(adapter.saved[param.name])
            tensors[param.name] = new.cast(tensors[param.name].dtype, param.name, allow_overflow)
    for name, factors in adapter.factors.items():
        tensors[name] = _merged(name, tensors[name], factors, allow_overflow)
    return _with_biases(replace(checkpoint, config=config, tensors=tensors), adapter, allow_overflow)


def _laid(name: str, table: LazyTensor) -> LazyTensor:
    """The embedding as [V, D] and the head as [D, V], and back."""
    return table if name == "embed" else table.transposed()


def _with_rows(name: str, table: LazyTensor, rows: Rows, allow_overflow: bool) -> LazyTensor:
    """The table [V, D] with some rows replaced."""
    new = load_finite(rows.tensor, f"the token rows of {name}")
    new = narrowed(new, table.dtype, name, rows.tensor.where, allow_overflow)

    def read(index: Index) -> np.ndarray:
        whole = np.array(table.load())
        whole[rows.indices] = new
        return whole[index]

    return replace(table, read=read)


def _with_biases(checkpoint: Checkpoint, adapter: Adapter, allow_overflow: bool) -> Checkpoint:
    """The checkpoint with the biases that the adapter adds, and zeros where a LLaMA with those has others too."""
    added = {name: factors for name, factors in adapter.factors.items() if factors.bias is not None}
    if "lm_head" in added:
        raise PunaError(f"{adapter.folder}: {HEAD_BIAS}")
    keys = {name.split(".")[2] for name in added}
    groups = {field for field, weights in BIAS_GROUPS.items() if keys & set(weights)}
    config = replace(checkpoint.config, **dict.fromkeys(groups, True))
    tensors = dict(checkpoint.tensors)
    for param in parameters(config):
        if param.name not in tensors:
            zeros = np.zeros(param.shape, tensors["final_norm"].dtype)
            tensors[param.name] = from_array(zeros, "zeros beside the adapter's biases")
    for name, factors in added.items():
        _, number, key = name.split(".")
        bias = f"layers.{number}.{BIASES[key]}"
        tensors[bias] = _plus(bias, tensors[bias], factors, allow_overflow)
    return replace(checkpoint, config=config, tensors=tensors)


def _plus(name: str, tensor: LazyTensor, factors: Factors, allow_overflow: bool) -> LazyTensor:
    """A bias [out] plus what the adapter adds to it."""
    assert factors.bias is not None
    own = factors.scale * factors.bias.load().astype(np.float32)
    total = tensor.load().astype(np.float32) + own
    return from_array(narrowed(total, tensor.dtype, name, tensor.where, allow_overflow), tensor.where)


def _merged(name: str, tensor: LazyTensor, factors: Factors, allow_overflow: bool) -> LazyTensor:
    """The weight [in, out] plus its update, computed whole for every part that is read: once for each of Meta's
    shards, and nothing is kept."""

    def read(index: Index) -> np.ndarray:
        total = np.asarray(_add(tensor.transposed().load(), *_arrays(factors)))
        return narrowed(total, tensor.dtype, name, tensor.where, allow_overflow).T[index]

    return replace(tensor, read=read)


def _requantized(name: str, tensor: LazyTensor, like: QuantizedArray, errors: dict[str, float]) -> LazyQuantized:
    """A merged weight [in, out] quantized as `like` was, which notes its relative error in `errors`."""

    def load() -> QuantizedArray:
        rows = jnp.asarray(tensor.transposed().load())
        result = quantize_rows(rows, like.format, like.block, like.nested_absmax is not None)
        errors[name] = float(_relative_error(result, rows))
        return result

    return LazyQuantized(like, load)


def _arrays(factors: Factors) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, float]:
    magnitude = None if factors.magnitude is None else factors.magnitude.load().astype(np.float32)
    return factors.a.load().astype(np.float32), factors.b.load().astype(np.float32), magnitude, factors.scale


@jax.jit
def _add(rows: jax.Array, a: jax.Array, b: jax.Array, magnitude: jax.Array | None, scale: jax.Array) -> jax.Array:
    """rows [out, in] plus scale * b @ a, rescaled for DoRA, in float32."""
    w = LoraArray(rows.T, a.T, b.T, jnp.asarray(scale), magnitude)
    return dense(w).T


@jax.jit
def _relative_error(q: QuantizedArray, rows: jax.Array) -> jax.Array:
    exact = rows.astype(jnp.float32)
    return jnp.linalg.norm(dequantize(q, jnp.float32).T - exact) / jnp.linalg.norm(exact)
