"""Merging adapters into a model on disk: in order, one weight in memory at a time, vocabularies growing on the way.

The sums are float32 and the result has the base's dtype, as peft's and Chinese-LLaMA-Alpaca's merges have it. Into a
quantized base the update is added to the dequantized weight, which is then quantized again.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from convert.bnb import quantize_rows
from convert.checkpoint import Checkpoint, StoredQuantized, copy_files, open_model
from convert.peft import Adapter, Factors, check_fits, is_untied_by, load_finite, read_adapter
from convert.save import MAX_SHARD_SIZE, write_model
from convert.stored import Bar, Index, Stored, silent
from model.errors import PunaError
from model.lora import LoraArray, dense
from model.quantize import QuantizedArray, dequantize
from model.tokenizer import TOKENIZER_FILES, load_tokenizer


def merge(
    base: str | Path,
    adapters: Sequence[str | Path],
    destination: Path,
    *,
    format: str = "hf",
    dtype: str | None = None,
    overwrite: bool = False,
    shards: int = 1,
    max_shard_size: int = MAX_SHARD_SIZE,
    bar: Bar = silent,
) -> dict[str, float]:
    """Writes `base` with every adapter merged, in order, and the last tokenizer that came with any of them.

    Returns, for weights quantized again, the relative error that cost (Frobenius norm), by name.
    Raises PunaError where an adapter does not fit what the ones before it made, or a tokenizer is smaller than its
    model; nothing is written then.
    """
    checkpoint = open_model(base)
    if format != "hf" or dtype is not None:
        checkpoint = replace(checkpoint, quantized={})
    errors: dict[str, float] = {}
    tokens = checkpoint.folder
    for folder in adapters:
        adapter = read_adapter(folder)
        tokens = _tokens(adapter, checkpoint) or tokens
        checkpoint = with_adapter(checkpoint, adapter, errors)
    if dtype is not None:
        kind = np.dtype(jnp.dtype(dtype))
        checkpoint = replace(checkpoint, tensors={name: t.cast(kind) for name, t in checkpoint.tensors.items()})
    target = replace(checkpoint, format=format)
    write_model(
        destination,
        target,
        overwrite,
        shards=shards,
        max_shard_size=max_shard_size,
        tokenizer=None if tokens == checkpoint.folder else _Files(tokens),
        bar=bar,
    )
    return errors


class _Files:
    """Tokenizer files, copied as they are."""

    def __init__(self, folder: Path):
        self.folder = folder

    def save(self, folder: Path) -> None:
        copy_files(TOKENIZER_FILES, self.folder, folder)


def _tokens(adapter: Adapter, checkpoint: Checkpoint) -> Path | None:
    """The adapter's folder, where it brings a tokenizer. Raises PunaError for one smaller than the model so far."""
    if not any((adapter.folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        return None
    size, rows = load_tokenizer(adapter.folder).vocab_size, checkpoint.config.vocab_size
    if size < rows and not adapter.saved:
        return None  # peft leaves the base's own tokenizer beside an adapter; padded tables have more rows than it
    if size < rows:
        raise PunaError(f"{adapter.folder}: its tokenizer has {size} tokens, fewer than the model's {rows} rows")
    return adapter.folder


def with_adapter(checkpoint: Checkpoint, adapter: Adapter, errors: dict[str, float] | None = None) -> Checkpoint:
    """The checkpoint whose tensors are merged with one adapter's when read.

    Weights quantized again note their relative error in `errors`. Raises PunaError where the adapter does not fit.
    """
    config = checkpoint.config
    check_fits(adapter, config)
    for name, factors in adapter.factors.items():
        for part in (factors.a, factors.b, *(() if factors.magnitude is None else (factors.magnitude,))):
            load_finite(part, f"the adapter of {name}")
    errors = {} if errors is None else errors
    tensors, quantized = dict(checkpoint.tensors), dict(checkpoint.quantized)
    for name, factors in adapter.factors.items():
        if name in quantized:
            quantized[name] = _merged_quantized(name, quantized[name], factors, errors)
        tensors[name] = _merged(tensors[name], factors)
    untied = is_untied_by(adapter, config)
    if untied:
        tensors["lm_head"] = tensors["embed"].transposed()
    dtype = tensors["embed"].dtype
    for name, tensor in adapter.saved.items():
        load_finite(tensor, name)
        if name in tensors:
            tensors[name] = (tensor if name == "embed" else tensor.transposed()).cast(dtype)
    config = replace(
        config,
        vocab_size=tensors["embed"].shape[0],
        tie_word_embeddings=config.tie_word_embeddings and not untied,
    )
    return replace(checkpoint, config=config, tensors=tensors, quantized=quantized)


def _merged(tensor: Stored, factors: Factors) -> Stored:
    """The weight [in, out] plus its update, computed whole when any part is read."""

    @cache
    def whole() -> np.ndarray:
        rows = tensor.transposed().load()
        return np.asarray(_add(rows, *_arrays(factors)))

    def read(index: Index) -> np.ndarray:
        part = whole().T[index]
        if part.shape == tensor.shape:
            whole.cache_clear()
        return part

    return replace(tensor, read=read)


def _merged_quantized(
    name: str, weight: StoredQuantized, factors: Factors, errors: dict[str, float]
) -> StoredQuantized:
    like = weight.like
    again = partial(quantize_rows, format=like.format, block=like.block, double=like.nested_absmax is not None)

    def load() -> QuantizedArray:
        rows = _add(np.asarray(dequantize(weight())).T, *_arrays(factors))
        result = again(rows)
        errors[name] = float(_relative_error(result, rows))
        return result

    return StoredQuantized(like, load)


def _arrays(factors: Factors) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, float]:
    magnitude = None if factors.magnitude is None else factors.magnitude.load().astype(np.float32)
    return factors.a.load().astype(np.float32), factors.b.load().astype(np.float32), magnitude, factors.scale


@jax.jit
def _add(rows: jax.Array, a: jax.Array, b: jax.Array, magnitude: jax.Array | None, scale: jax.Array) -> jax.Array:
    """rows [out, in] plus scale * b @ a, rescaled for DoRA, in their dtype."""
    w = LoraArray(rows.T, a.T, b.T, jnp.asarray(scale), magnitude)
    return dense(w).T.astype(rows.dtype)


@jax.jit
def _relative_error(q: QuantizedArray, rows: jax.Array) -> jax.Array:
    exact = rows.astype(jnp.float32)
    return jnp.linalg.norm(dequantize(q, jnp.float32).T - exact) / jnp.linalg.norm(exact)
