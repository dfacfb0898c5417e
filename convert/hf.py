"""Hugging Face folders: config.json, and safetensors or pickled weights, in one file or sharded with an index."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from cli.files import write_json
from cli.progress import ProgressBar
from cli.said import say_once
from convert.bnb import as_tensors, quantization_config, quantized_checkpoint, read_quantized
from convert.checkpoint import Checkpoint, WriteOptions, main_dtype, write_generation_config
from convert.damage import malformed
from convert.lazy import LazyTensor, same_bytes
from convert.names import from_foreign, is_buffer, parameters
from convert.safetensor import write_safetensors
from convert.weight_files import PUNA_STEM, read_weights
from model.config import LlamaConfig
from model.errors import PunaError
from model.json_file import read_json
from model.params import LINEARS
from model.quantize import check_format

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SIGNS = ("model*.safetensors", f"{PUNA_STEM}*.safetensors", "pytorch_model*.bin", "*.index.json")
MAX_SHARD_SIZE = 5 * 10**9  # bytes of a safetensors file, as transformers has it

_FLOATS = ("float32", "bfloat16", "float16", "float64")


def read(folder: Path) -> Checkpoint:
    """The model in an HF folder. Safetensors win over pickled weights where both are there, as in transformers."""
    said = read_json(folder / "config.json")
    quantization = said.pop("quantization_config", None)
    with malformed(folder / "config.json"):
        config = LlamaConfig.from_hf(said, lambda line: say_once(f"{folder / 'config.json'}: {line}"))
    tensors = read_weights(folder, config.tie_word_embeddings)
    quantized = {}
    if quantization is not None:
        dtype = said.get("dtype") or said.get("torch_dtype") or "float16"
        tensors, quantized = read_quantized(quantization, tensors, config, dtype, folder)
    config = _settle_tied(config, tensors, folder)
    for name, tensor in tensors.items():
        if tensor.dtype.name not in _FLOATS and not is_buffer(name):
            raise PunaError(f"{tensor.where}: {name} has dtype {tensor.dtype.name}; weights are {', '.join(_FLOATS)}")
    return Checkpoint(config, from_foreign(config, tensors, str(folder)), folder, "hf", quantized)


def _settle_tied(config: LlamaConfig, tensors: dict[str, LazyTensor], folder: Path) -> LlamaConfig:
    """Some tied models store the head too, or it alone. Where it is no copy, transformers does not tie the two."""
    if not config.tie_word_embeddings or HEAD not in tensors:
        return config
    if EMBED not in tensors:
        tensors[EMBED] = tensors.pop(HEAD)
    elif same_bytes(tensors[HEAD], tensors[EMBED]):
        del tensors[HEAD]
    else:
        say_once(
            f"{folder}: tie_word_embeddings is true and {HEAD} is not {EMBED}: both are kept, untied, as transformers "
            "does"
        )
        return replace(config, tie_word_embeddings=False)
    return config


def write(folder: Path, checkpoint: Checkpoint, options: WriteOptions) -> None:
    """Write config.json, generation_config.json and safetensors: one file, or shards of at most `max_shard_size`
    bytes (a tensor larger than that has a file of its own) with their index. Quantized weights stay so."""
    checkpoint = _prepared(checkpoint, options)
    config, quantized = checkpoint.config, checkpoint.quantized
    said = config.to_hf(main_dtype(checkpoint.tensors))
    if quantized:
        linears = [param for param in parameters(config) if param.name.split(".")[-1] in LINEARS]
        floats = [param.hf.removesuffix(".weight") for param in linears if param.name not in quantized]
        said["quantization_config"] = quantization_config(next(iter(quantized.values())).like, floats)
    write_json(folder / "config.json", said)
    write_generation_config(folder, config)
    tensors: dict[str, LazyTensor] = {}
    for param in parameters(config):
        if param.name in quantized:
            tensors |= as_tensors(param.hf, quantized[param.name])
        else:
            tensors[param.hf] = param.swap_layout(checkpoint.tensors[param.name])
    write_weights(folder, tensors, options.bar, options.max_shard_size or MAX_SHARD_SIZE, stem_of(config))


def stem_of(config: LlamaConfig) -> str:
    """How the names of the files of weights begin."""
    return PUNA_STEM if config.pieces else "model"


def nbytes(checkpoint: Checkpoint, options: WriteOptions) -> int:
    """Bytes of the weights that `write` will write."""
    return _prepared(checkpoint, options).nbytes


def _prepared(checkpoint: Checkpoint, options: WriteOptions) -> Checkpoint:
    """The checkpoint as it will be written: in another dtype, or with its layers' linear weights quantized."""
    if options.quantize is None and (options.block is not None or options.double_quant):
        said = f"block={options.block}" if options.block is not None else "double_quant=True"
        raise PunaError(f"{said} says how to quantize: give quantize too, or leave it out")
    if options.dtype is not None:
        checkpoint = checkpoint.as_floats(options.dtype, options.allow_overflow)
    if options.quantize is None:
        return checkpoint
    double = options.quantize == "nf4" if options.double_quant is None else options.double_quant
    block = options.block or 64
    return quantized_checkpoint(checkpoint, check_format(options.quantize, block, double), block, double)


def write_weights(
    folder: Path,
    tensors: Mapping[str, LazyTensor],
    bar: ProgressBar,
    max_shard_size: int = MAX_SHARD_SIZE,
    stem: str = "model",
) -> None:
    """Write tensors under their own names as safetensors, with an index where they take several files."""
    shards: list[dict[str, LazyTensor]] = [{}]
    room = max_shard_size
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = max_shard_size
        shards[-1][name] = tensor
        room -= tensor.nbytes
    files = [f"{stem}-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    total = sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) == 1:
        files = [f"{stem}.safetensors"]
    else:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / f"{stem}.safetensors.index.json", index)
    with bar(total) as advance:
        for file, shard in zip(files, shards, strict=True):
            write_safetensors(folder / file, shard, advance)
