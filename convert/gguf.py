"""GGUF files, with which llama.cpp runs a model on small devices: metadata, tokenizer and tensors in one file.

Keys and tensors are as llama.cpp's own converter (conversion/llama.py) writes them for the architecture "llama".
Matrices lie `[out, in]`; llama.cpp rotates adjacent pairs, so that the rows of q and k are in Meta's order. Matrices
have the type asked for, or F16 where it cannot cut their rows into blocks; vectors are always F32. Written through the
`gguf` library, one tensor at a time.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ml_dtypes
import numpy as np

from convert.checkpoint import Checkpoint, WriteOptions, main_dtype
from convert.damage import malformed
from convert.gguf_config import ROPE_FREQS, add_config, read_config, rope_factors
from convert.gguf_tokenizer import add_tokenizer
from convert.lazy import Index, LazyTensor, contiguous, from_array, narrowed
from convert.names import Parameter, check_keys, check_shape, pairs_to_halves, parameters
from model.config import LlamaConfig
from model.errors import PunaError
from model.params import param_count

TYPES = {  # our names: GGUF's of the tensor type, and of the file
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
    "q4_0": ("Q4_0", "MOSTLY_Q4_0"),
}
QUANTIZATIONS = {"int8": "q8_0", "int4": "q4_0"}
SIGNS = ("*.gguf",)

_ARRAYS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_PERMUTED = ("wq", "wk", "bq", "bk")


def import_gguf(purpose: str) -> Any:
    """The gguf library. Raises PunaError naming the extra that installs it."""
    try:
        import gguf
    except ImportError:
        raise PunaError(f"{purpose} needs the gguf library: pip install 'puna[gguf]'") from None
    return gguf


@dataclass(frozen=True)
class _Entry:
    """One tensor to write, in llama.cpp's layout, and its GGUF type."""

    tensor: LazyTensor
    type: str


def write(path: Path, checkpoint: Checkpoint, options: WriteOptions) -> None:
    """Write the model, with the tokenizer that lies in its folder or that the options give, as one file.

    Raises:
        PunaError: a config or a tokenizer that llama.cpp could not run as it is, or numbers beyond the type's range.
    """
    gguf = import_gguf("writing GGUF")
    config, type = checkpoint.config, _main_type(checkpoint, options)
    entries = _entries(gguf, checkpoint, type)
    writer = gguf.GGUFWriter(path, "llama")
    try:
        writer.add_type("model")
        writer.add_name(checkpoint.folder.name)
        writer.add_size_label(gguf.size_label(param_count(config), param_count(config), 0, 0))
        writer.add_file_type(gguf.LlamaFileType[TYPES[type][1]])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_config(gguf, writer, config)
        with _tokenizer(checkpoint, options) as folder:
            add_tokenizer(writer, folder, config.vocab_size)
        _write_tensors(gguf, writer, entries, options)
    finally:
        writer.close()


def nbytes(checkpoint: Checkpoint, options: WriteOptions) -> int:
    """Bytes of the tensors that `write` will write."""
    gguf = import_gguf("writing GGUF")
    entries = _entries(gguf, checkpoint, _main_type(checkpoint, options))
    return sum(_nbytes(gguf, entry) for entry in entries.values())


def _main_type(checkpoint: Checkpoint, options: WriteOptions) -> str:
    """The key of TYPES that matrices are written in; vectors stay exact."""
    if options.dtype is not None and options.quantize is not None:
        raise PunaError(
            f"dtype={options.dtype!r} and quantize={options.quantize!r} are each a type of GGUF's matrices: give one "
            "of them"
        )
    type = QUANTIZATIONS[options.quantize] if options.quantize else options.dtype or main_dtype(checkpoint.tensors)
    if type not in TYPES:
        raise PunaError(f"{checkpoint.folder}: weights in {type} have no type of GGUF's; give dtype='float32'")
    return type


def _entries(gguf: Any, checkpoint: Checkpoint, type: str) -> dict[str, _Entry]:
    """Every tensor to write by llama.cpp's name."""
    config, tensors = checkpoint.config, checkpoint.tensors
    if config.pieces:
        said = ", ".join(config.pieces.names().values())
        raise PunaError(f"{checkpoint.folder} computes with {said}, which llama.cpp does not have: choose hf or orbax")
    names = _names(gguf, config)
    entries = {
        names[param.name]: _Entry(_theirs(param, tensors[param.name], config), _type(gguf, param, TYPES[type][0]))
        for param in parameters(config)
    }
    if config.rope_scaling and config.rope_scaling.rope_type == "llama3":
        entries = {ROPE_FREQS: _Entry(from_array(rope_factors(config), "the config"), "F32"), **entries}
    return entries


@contextmanager
def _tokenizer(checkpoint: Checkpoint, options: WriteOptions) -> Iterator[Path]:
    """The folder with the tokenizer's files."""
    if options.tokenizer is None:
        yield checkpoint.folder
        return
    with TemporaryDirectory() as folder:
        options.tokenizer.save(Path(folder))
        yield Path(folder)


def _names(gguf: Any, config: LlamaConfig) -> dict[str, str]:
    """llama.cpp's name of each of our parameters."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    return {param.name: table.get_name(param.hf, try_suffixes=(".weight", ".bias")) for param in parameters(config)}


def _is_permuted(param: Parameter) -> bool:
    return param.name.rpartition(".")[2] in _PERMUTED


def _theirs(param: Parameter, tensor: LazyTensor, config: LlamaConfig) -> LazyTensor:
    tensor = param.swap_layout(tensor)
    if _is_permuted(param):
        tensor = tensor.take(0, np.argsort(pairs_to_halves(tensor.shape[0], config.head_dim)))
    return tensor


def _ours(param: Parameter, tensor: LazyTensor, config: LlamaConfig) -> LazyTensor:
    if _is_permuted(param):
        tensor = tensor.take(0, pairs_to_halves(tensor.shape[0], config.head_dim))
    return param.swap_layout(tensor)


def _type(gguf: Any, param: Parameter, wanted: str) -> str:
    """The GGUF type of one parameter: quantized types take rows of whole blocks only."""
    if len(param.shape) == 1:
        return "F32"
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[wanted]]
    return wanted if param.foreign_shape[-1] % block == 0 else "F16"


def _nbytes(gguf: Any, entry: _Entry) -> int:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[entry.type]]
    return math.prod(entry.tensor.shape) // block * size


def _write_tensors(gguf: Any, writer: Any, entries: dict[str, _Entry], options: WriteOptions) -> None:
    for name, entry in entries.items():
        kind = gguf.GGMLQuantizationType[entry.type]
        dtype, shape = _ARRAYS.get(entry.type), entry.tensor.shape
        if dtype is None:
            dtype, shape = np.dtype(np.uint8), gguf.quant_shape_to_byte_shape(shape, kind)
        writer.add_tensor_info(name, shape, dtype, _nbytes(gguf, entry), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with options.bar(sum(entry.tensor.nbytes for entry in entries.values())) as advance:
        for name, entry in entries.items():
            writer.write_tensor_data(_converted(gguf, name, entry, options.allow_overflow))
            advance(entry.tensor.nbytes)


def _converted(gguf: Any, name: str, entry: _Entry, allow_overflow: bool) -> np.ndarray:
    array, where = contiguous(entry.tensor.load()), entry.tensor.where
    if entry.type in _ARRAYS:
        return narrowed(array, _ARRAYS[entry.type], name, where, allow_overflow)
    with np.errstate(over="ignore", invalid="ignore"):  # NaN and infinities stay so, in the scale of their block
        blocks = gguf.quants.quantize(array.astype(np.float32), gguf.GGMLQuantizationType[entry.type])
    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[entry.type]]
    scales = np.ascontiguousarray(blocks.reshape(-1, size)[:, :2]).view(np.float16)[:, 0]
    lost = ~np.isfinite(scales) & np.isfinite(array.reshape(-1, weights)).all(axis=1)
    if lost.any() and not allow_overflow:
        raise PunaError(
            f"{where}: {name} has {int(lost.sum())} blocks of numbers beyond float16, which {entry.type}'s scales are "
            f"in; the largest is {np.abs(array.reshape(-1, weights)[lost]).max():.6g}. Choose a dtype, or "
            "allow_overflow=True to make their blocks infinite"
        )
    return blocks


def read(path: Path) -> Checkpoint:
    """The model in a GGUF file, in the one of a folder, or in the parts of a split one: quantized types read as their
    dequantized float32.

    The tokenizer inside is not read; files beside it are taken for the model's. Raises PunaError where the file is
    damaged, is of another architecture, or says what no LlamaConfig does.
    """
    files = _files(path)
    gguf = import_gguf(f"reading {files[0]}")
    readers = [_opened(gguf, file) for file in files]
    tensors: dict[str, LazyTensor] = {}
    for file, reader in zip(files, readers, strict=True):
        with malformed(file):
            _check_part(file, reader, len(files))
            for tensor in reader.tensors:
                if tensor.name in tensors:
                    raise PunaError(f"{file} repeats {tensor.name} of another part: fetch all parts again")
                tensors[tensor.name] = _read_tensor(gguf, tensor, file)
    with malformed(files[0]):
        config = read_config(gguf, readers[0], tensors, files[0])
    names = _names(gguf, config)
    check_keys(names.values(), tensors.keys() - {ROPE_FREQS}, str(files[0]))
    for param in parameters(config):
        check_shape(names[param.name], tensors[names[param.name]], param.foreign_shape)
    ours = {param.name: _ours(param, tensors[names[param.name]], config) for param in parameters(config)}
    return Checkpoint(config, ours, files[0].parent, "gguf", file=files[0], parts=tuple(files))


def _opened(gguf: Any, path: Path) -> Any:
    try:
        return gguf.GGUFReader(path)
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise PunaError(f"{path} is truncated or no GGUF file: {error}; fetch it again") from None


def _files(path: Path) -> list[Path]:
    """The file, or all parts of the split model that it, or the folder, holds."""
    if path.is_file():
        return _parts(path)
    files = sorted(path.glob("*.gguf"))
    models = {tuple(_parts(file)) for file in files}
    if len(models) != 1:
        raise PunaError(f"{path} holds {len(models)} GGUF files: give one of {', '.join(file.name for file in files)}")
    return list(*models)


def _parts(path: Path) -> list[Path]:
    """Every part of the model that `path` is one part of, as llama-gguf-split names them."""
    match = _PART.fullmatch(path.name)
    if match is None or int(match[3]) == 1:
        return [path]
    parts = [path.with_name(f"{match[1]}-{number:05}-of-{match[3]}.gguf") for number in range(1, int(match[3]) + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise PunaError(f"{path} is one part of {len(parts)}; {', '.join(missing)} is missing: fetch it")
    return parts


def _check_part(path: Path, reader: Any, found: int) -> None:
    field = reader.get_field("split.count")
    count = 0 if field is None else int(field.contents())
    if max(count, 1) != found:
        raise PunaError(
            f"{path} says that it is one of {count} parts, and {found} is there: name the parts as they were, "
            f"NAME-00001-of-{count:05}.gguf"
        )


def _read_tensor(gguf: Any, tensor: Any, path: Path) -> LazyTensor:
    name, kind, data = tensor.tensor_type.name, tensor.tensor_type, tensor.data
    if name in _ARRAYS:
        return from_array(data.view(_ARRAYS[name]), str(path))
    shape = tuple(int(size) for size in reversed(tensor.shape))

    def read(index: Index) -> np.ndarray:
        try:
            return gguf.quants.dequantize(np.asarray(data[index[0]]), kind)[:, index[1]]
        except NotImplementedError:
            raise PunaError(f"{path}: {tensor.name} has type {name}, which the gguf library cannot read") from None

    return LazyTensor(shape, np.dtype(np.float32), read, str(path))
