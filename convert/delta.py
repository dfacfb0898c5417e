"""Weight deltas: what is added to a base model to give a fine-tuned one, where only the difference may be published.

FastChat (Vicuna) and Stanford Alpaca (WizardLM after it) publish target - base, rounded to the dtype of both, and
recover base + delta, rounded again. That loses small targets: in float16 the difference of 0.0001 and 1.0 is -1.0, and
the sum 0. So `make` writes their delta bit for bit and, in a file that they do not read, the elements that the sum
misses, by position. `apply` reads both: every target comes back bit for bit. A published delta, which has no such file,
gives bit for bit what FastChat makes of it.
"""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.numpy import dtype as as_dtype

from cli.files import atomic_path, check_apart, check_free_space, copy_files, write_json
from cli.progress import ProgressBar, no_progress
from convert.checkpoint import Checkpoint, main_dtype, write_generation_config
from convert.checksums import CHECKSUMS, check_checksums, read_checksums, write_checksums
from convert.damage import malformed
from convert.formats import open_model
from convert.hf import stem_of, write_weights
from convert.lazy import Index, LazyTensor, contiguous, from_array
from convert.names import Parameter, check_keys, parameters
from convert.not_finite import not_finite_said
from convert.safetensor import read_safetensors, write_safetensors
from convert.vocab import INITS, resized
from model.config import LlamaConfig
from model.errors import PunaError
from model.json_file import read_json
from model.rope import frequencies
from model.tokenizer import TOKENIZER_FILES

RECORD = "delta.json"
MISSED = "missed.safetensors"
KEPT = "which the delta keeps"
TOLERANCE = 0.01  # of the sum of all numbers, as Alpaca's script has it


@dataclass(frozen=True)
class Record:
    """delta.json: how the delta was made, and of every tensor under its Hugging Face name the SHA-256 of its bytes in
    the base and in the target. Published deltas have none; then nothing but shapes tells a wrong base."""

    dtype: str
    init: str
    base: dict[str, str] = field(default_factory=dict)
    target: dict[str, str] = field(default_factory=dict)


def make(
    base: str | Path,
    target: str | Path,
    dst: str | Path,
    dtype: str | None = None,
    init: str | None = None,
    overwrite: bool = False,
    bar: ProgressBar = no_progress,
    allow_overflow: bool = False,
) -> None:
    """Write target - base as a Hugging Face folder with the target's tokenizer, a Record and SHA256SUMS.

    Args:
        base: a model folder of any format, or a Hub id.
        target: the fine-tuned model.
        dst: the folder to write.
        dtype: of the subtraction and of the file; None is the target's. Vicuna's deltas are float16, Alpaca's and
            WizardLM's float32.
        init: of the rows by which the target's vocabulary is larger, zero (Vicuna v0) or mean (Alpaca, WizardLM);
            None goes by the dtype.
        overwrite: replace what stands at `dst`.
        bar: shows how many bytes are written.
        allow_overflow: numbers beyond the dtype's become infinite, where else they are an error.

    Raises:
        PunaError: the two are not of one shape, or a dtype cannot hold their numbers.
    """
    check_apart(dst, base, target)
    new = _opened(target)
    kind = dtype or main_dtype(new.tensors)
    init = _init(init, kind)
    new = _cast(new, kind, allow_overflow)
    old = _like(_cast(_opened(base), kind, allow_overflow), new, init)
    record = Record(kind, init)
    missed: dict[str, LazyTensor] = {}
    with (
        _folder(dst, overwrite, new, kind) as folder,
        not_finite_said(old.tensors, KEPT) as olds,
        not_finite_said(new.tensors, KEPT) as news,
    ):
        deltas = {
            param.hf: _subtracted(param, olds[param.name], news[param.name], record, missed)
            for param in parameters(new.config)
        }
        write_weights(folder, deltas, bar, stem=stem_of(new.config))
        if missed:
            write_safetensors(folder / MISSED, missed, lambda count: None)
        write_json(folder / RECORD, vars(record))
        write_checksums(folder)


def apply(
    base: str | Path,
    delta: str | Path,
    dst: str | Path,
    init: str | None = None,
    total: float | None = None,
    sums: str | Path | None = None,
    overwrite: bool = False,
    bar: ProgressBar = no_progress,
    allow_overflow: bool = False,
) -> None:
    """Write base + delta, in the delta's dtype, as a Hugging Face folder with the delta's tokenizer and SHA256SUMS.

    A SHA256SUMS in the folder of the base or of the delta is checked first.

    Args:
        base: a model folder of any format, or a Hub id.
        delta: the folder of a delta.
        dst: the folder to write.
        init: as for `make`, where the delta does not say.
        total: what all numbers of the result add up to, within TOLERANCE (Alpaca's check; see `_check_total`).
        sums: a list as sha256sum writes it, which the files written must match and which names all weights.
        overwrite: replace what stands at `dst`.
        bar: shows how many bytes are written.
        allow_overflow: sums beyond the dtype's range become infinite, where else they are an error.

    Raises:
        PunaError: the base is not the one that the delta was made from, as far as the delta tells (by names, shapes
            and dtypes, and by SHA-256 where it has a Record), a sum overflows, or a check fails.
    """
    if total is not None and not math.isfinite(total):
        raise PunaError(f"sum {total}: give the finite number that all numbers of the result add up to")
    check_apart(dst, base, delta)
    expected = None if sums is None else read_checksums(Path(sums))
    difference, old = _opened(delta), _opened(base)
    for checkpoint in (old, difference):
        if (checkpoint.folder / CHECKSUMS).is_file():
            listed = checkpoint.folder / CHECKSUMS
            check_checksums(checkpoint.folder, read_checksums(listed), listed, checkpoint.folder)
    record = _read_record(difference)
    if record.base and init not in (None, record.init):
        raise PunaError(f"init {init}: {difference.folder} was made with init {record.init}; leave init out")
    old = _like(_cast(old, record.dtype, allow_overflow), difference, _init(init or record.init, record.dtype))
    missed = _read_missed(difference.folder)
    totals: list[float] = []
    sums_of = partial(_added, record=record, missed=missed, totals=totals, allow_overflow=allow_overflow)
    added = {
        param.hf: sums_of(param, old.tensors[param.name], difference.tensors[param.name])
        for param in parameters(difference.config)
    }
    with _folder(dst, overwrite, difference, record.dtype) as folder, not_finite_said(added) as tensors:
        write_weights(folder, tensors, bar, stem=stem_of(difference.config))
        if total is not None:
            _check_total(math.fsum(totals), total, difference.config)
        write_checksums(folder)
        if sums is not None and expected is not None:
            check_checksums(folder, expected, sums, "the result")
            if unlisted := sorted({file.name for file in folder.glob("*.safetensors")} - expected.keys()):
                raise PunaError(f"{sums} does not list {', '.join(unlisted)} of the result: give a list of all weights")


def _opened(path: str | Path) -> Checkpoint:
    checkpoint = open_model(path)
    if checkpoint.quantized:
        raise PunaError(f"{checkpoint.folder} is quantized: a delta is between the unquantized models")
    return checkpoint


def _init(init: str | None, dtype: str) -> str:
    """How new rows start: as said, else as those who publish in this dtype have it."""
    if init is None:
        return "mean" if dtype == "float32" else "zero"
    if init not in INITS:
        raise PunaError(f"init {init!r} is not known; choose {' or '.join(INITS)}")
    return init


def _cast(checkpoint: Checkpoint, dtype: str, allow_overflow: bool) -> Checkpoint:
    """In another dtype, one of which holds all numbers of the other. Raises PunaError for float16 and bfloat16."""
    kind = np.dtype(as_dtype(dtype))
    for name, tensor in checkpoint.tensors.items():
        if jnp.promote_types(tensor.dtype, kind) not in (tensor.dtype, kind):
            raise PunaError(
                f"{tensor.where}: {name} is {tensor.dtype.name} and the delta {dtype}, neither of which holds the "
                f"other's numbers: give the model in {dtype} or float32"
            )
    tensors = {name: tensor.cast(kind, name, allow_overflow) for name, tensor in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=tensors)


def _like(base: Checkpoint, other: Checkpoint, init: str) -> Checkpoint:
    """The base with rows for the other's vocabulary. Raises PunaError where they still differ in names or shapes."""
    said = f"{base.folder} (as the base of {other.folder})"
    check_keys(
        (param.hf for param in parameters(other.config)),
        (param.hf for param in parameters(base.config)),
        said,
    )
    if other.config.vocab_size < base.config.vocab_size:
        raise PunaError(f"{said} has {base.config.vocab_size} rows for {other.config.vocab_size} tokens: a wrong base")
    grown = resized(base, other.config.vocab_size, init)
    for ours, theirs in zip(parameters(grown.config), parameters(other.config), strict=True):
        if ours.foreign_shape != theirs.foreign_shape:
            shapes = f"{ours.foreign_shape}; the other has {theirs.foreign_shape}"
            raise PunaError(f"{said}: {ours.hf} has shape {shapes}: a wrong base")
    return grown


def _subtracted(
    param: Parameter, base: LazyTensor, target: LazyTensor, record: Record, missed: dict[str, LazyTensor]
) -> LazyTensor:
    """target - base, computed when read; the hashes of both and what their sum misses are noted on the way."""

    def read(index: Index) -> np.ndarray:
        old, new = _numbers(param, base), _numbers(param, target)
        record.base[param.hf], record.target[param.hf] = _digest(old), _digest(new)
        with np.errstate(over="ignore", invalid="ignore"):  # the sum will miss those, too
            delta = new - old
            positions = np.flatnonzero(_bits(old + delta) != _bits(new))
        if positions.size:
            missed[f"{param.hf}.positions"] = from_array(positions.astype(np.int64), param.hf)
            missed[f"{param.hf}.values"] = from_array(new.reshape(-1)[positions], param.hf)
        return delta[index]

    return replace(target, shape=param.foreign_shape, read=read)


def _added(
    param: Parameter,
    base: LazyTensor,
    delta: LazyTensor,
    record: Record,
    missed: dict[str, LazyTensor],
    totals: list[float],
    allow_overflow: bool,
) -> LazyTensor:
    """base + delta, computed and checked when read; its sum is noted on the way."""

    def read(index: Index) -> np.ndarray:
        old = _numbers(param, base)
        if record.base and record.base.get(param.hf) != _digest(old):
            raise PunaError(
                f"{base.where}: {param.hf} is not that of the base that {delta.where} was made from: give it that"
            )
        by = contiguous(param.swap_layout(delta).load())
        with np.errstate(over="ignore", invalid="ignore"):
            new = old + by
        if f"{param.hf}.positions" in missed:
            with malformed(Path(missed[f"{param.hf}.positions"].where)):
                new.reshape(-1)[missed[f"{param.hf}.positions"].load()] = missed[f"{param.hf}.values"].load()
        lost = int((np.isfinite(old) & np.isfinite(by) & ~np.isfinite(new)).sum())
        if lost and not allow_overflow:
            raise PunaError(
                f"{delta.where}: {param.hf} holds {lost} numbers that added to the base's are beyond {new.dtype.name}: "
                "a wrong base; or allow_overflow=True to make them infinite"
            )
        if record.target and record.target.get(param.hf) != _digest(new):
            raise PunaError(f"{delta.where}: {param.hf} does not give the target it was made for: the file is damaged")
        totals.append(float(new.sum(dtype=np.float64)))
        return new[index]

    return replace(delta, shape=param.foreign_shape, read=read)


def _numbers(param: Parameter, tensor: LazyTensor) -> np.ndarray:
    """A whole tensor in Hugging Face's layout."""
    return contiguous(param.swap_layout(tensor).load())


def _bits(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(f"u{array.dtype.itemsize}")


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(_bits(array).data).hexdigest()


@contextmanager
def _folder(dst: str | Path, overwrite: bool, like: Checkpoint, dtype: str) -> Iterator[Path]:
    """A new folder with the tokenizer and configuration of `like`, renamed when all is written."""
    with atomic_path(dst, overwrite) as folder:
        check_free_space(dst, like.nbytes)
        folder.mkdir()
        copy_files((*TOKENIZER_FILES, "generation_config.json"), like.folder, folder)
        write_json(folder / "config.json", like.config.to_hf(dtype))
        write_generation_config(folder, like.config)
        yield folder


def _read_record(delta: Checkpoint) -> Record:
    """What delta.json says, or for a published delta what its files show. Raises PunaError for dtypes that disagree."""
    dtype = main_dtype(delta.tensors)
    for param in parameters(delta.config):
        if (found := delta.tensors[param.name].dtype.name) != dtype:
            raise PunaError(f"{delta.tensors[param.name].where}: {param.hf} is {found} and the other tensors {dtype}")
    path = delta.folder / RECORD
    if not path.is_file():
        return Record(dtype, _init(None, dtype))
    said: dict[str, Any] = read_json(path)
    fields_known = said.keys() <= {"dtype", "init", "base", "target"} and {"dtype", "init"} <= said.keys()
    if not fields_known or not all(isinstance(said.get(key, {}), dict) for key in ("base", "target")):
        raise PunaError(f"{path} is not as `convert delta make` writes it: fetch it again")
    record = Record(**said)
    if record.dtype != dtype:
        raise PunaError(f"{delta.folder} holds {dtype} weights; its {RECORD} says {record.dtype}")
    return record


def _read_missed(folder: Path) -> dict[str, LazyTensor]:
    return read_safetensors(folder / MISSED) if (folder / MISSED).is_file() else {}


def _check_total(found: float, expected: float, config: LlamaConfig) -> None:
    """Alpaca's check: the sum over its state dict, 50637.1836 for Alpaca 7B. In the transformers of its day each
    layer's rotary frequencies were part of that, so the sum may be given with them or without."""
    buffers = config.num_hidden_layers * float(np.asarray(frequencies(config)[0], np.float64).sum())
    if not min(abs(found - expected), abs(found + buffers - expected)) <= TOLERANCE:  # nor where a number is NaN
        raise PunaError(
            f"the numbers of the result add up to {found:.4f} ({found + buffers:.4f} with the rotary frequencies of "
            f"every layer), not {expected:.4f}: a wrong base, or a damaged delta"
        )
