"""Meta's folders: params.json and `consolidated.NN.pth`, split over 1 to 8 model-parallel shards.

wq, wk, wv, w1, w3 and the output are split along their rows, wo and w2 along their columns, norms are copies in every
shard. Embeddings are split along columns by LLaMA 1 and 2, along rows by Llama 3; shapes tell. Key-value heads are
repeated where there are more shards than heads. Meta rotates adjacent pairs of a head's entries and we rotate its
halves, so that the rows of wq and wk are in another order within each head.
"""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from cli.files import write_json
from cli.said import say_once
from convert.checkpoint import Checkpoint, WriteOptions, write_generation_config
from convert.damage import malformed
from convert.lazy import LazyTensor, concatenate, shares_memory
from convert.names import Parameter, check_keys, pairs_to_halves, parameters
from convert.pickled import distinct, import_torch, read_pickled, write_pickled
from model.config import LlamaConfig
from model.errors import PunaError
from model.json_file import read_json

SIGNS = ("consolidated.*.pth",)

_COLUMNS = ("wo", "w_down")
_KEY_VALUE = ("wk", "wv")
_ROTATED = ("wq", "wk")
_LLAMA3_VOCABULARY = 128000


def _kind(param: Parameter) -> str:
    return param.name.rpartition(".")[2]


def read(folder: Path) -> Checkpoint:
    """The model in one of Meta's folders.

    `params.json` does not say whether embeddings are tied. They are where the output is absent, or shares the
    embedding's storage, as torch.save keeps what is one.
    """
    shards = [read_pickled(path) for path in _shard_files(folder)]
    params = read_json(folder / "params.json")
    embeddings = [shard["tok_embeddings.weight"] for shard in shards if "tok_embeddings.weight" in shard]
    if len(embeddings) < len(shards):
        raise PunaError(f"{folder}: a consolidated.*.pth lacks tok_embeddings.weight; these are no LLaMA shards")
    if any(len(part.shape) != 2 for part in embeddings):
        raise PunaError(f"{folder}: tok_embeddings.weight has shape {embeddings[0].shape}; it is a table of two axes")
    with malformed(folder / "params.json"):
        is_by_rows = embeddings[0].shape[1] == params.get("model", params).get("dim")
        vocab_size = sum(part.shape[0] for part in embeddings) if is_by_rows else embeddings[0].shape[0]
        config = LlamaConfig.from_meta(
            params, vocab_size=vocab_size, say=lambda line: say_once(f"{folder / 'params.json'}: {line}")
        )
    config = replace(config, tie_word_embeddings=all(_is_tied(shard) for shard in shards))
    table = parameters(config)
    for path, shard in zip(_shard_files(folder), shards, strict=True):
        tied = {"output.weight"} if config.tie_word_embeddings else set()
        check_keys((param.meta for param in table), shard.keys() - tied, str(path))
    tensors = {param.name: _joined(param, [shard[param.meta] for shard in shards], config) for param in table}
    return Checkpoint(config, tensors, folder, "meta")


def _is_tied(shard: dict[str, LazyTensor]) -> bool:
    return "output.weight" not in shard or shares_memory(shard["output.weight"], shard["tok_embeddings.weight"])


def _shard_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("consolidated.*.pth"))
    numbers = [int(match[1]) if (match := re.search(r"\.(\d+)\.pth$", file.name)) else -1 for file in files]
    if missing := set(range(max(numbers) + 1)) - set(numbers):
        names = ", ".join(f"consolidated.{number:02}.pth" for number in sorted(missing))
        raise PunaError(f"{folder} lacks {names}: fetch the missing shard")
    return files


def _joined(param: Parameter, shards: list[LazyTensor], config: LlamaConfig) -> LazyTensor:
    """One parameter in our layout from its pieces."""
    kind = _kind(param)
    if any(len(shard.shape) != len(param.shape) for shard in shards):
        raise PunaError(
            f"{shards[0].where}: {param.meta} has not {len(param.shape)} axes in every shard; is it LLaMA's?"
        )
    if len(param.shape) == 1:  # every shard has all of it
        first = shards[0].load()
        for other in shards[1:]:
            if other.load().tobytes() != first.tobytes():
                raise PunaError(
                    f"{other.where}: {param.meta} is not that of {shards[0].where}: shards of one model hold the same"
                )
        shards = shards[:1]
    if kind in _KEY_VALUE:
        copies = max(len(shards) // config.num_key_value_heads, 1)
        shards = shards[::copies]
    by_columns = kind == "embed" and shards[0].shape[1] != config.hidden_size
    tensor = concatenate(shards, 1 if kind in _COLUMNS or by_columns else 0)
    if tensor.shape != param.foreign_shape:
        raise PunaError(
            f"{shards[0].where}: {len(shards)} shards of {param.meta} make shape {tensor.shape}; params.json says "
            f"{param.foreign_shape}: is a consolidated.*.pth missing?"
        )
    if kind in _ROTATED:
        tensor = tensor.take(0, pairs_to_halves(tensor.shape[0], config.head_dim))
    return param.swap_layout(tensor)


def write(folder: Path, checkpoint: Checkpoint, options: WriteOptions) -> None:
    """Write params.json and `options.shards` files consolidated.NN.pth.

    Rows of the vocabulary that do not divide are the last shard's. Raises PunaError where another dimension does not
    divide over the shards, and where Meta's format cannot say what the config does.
    """
    import_torch("writing Meta's .pth files")
    config, shards = checkpoint.config, options.shards
    tensors = checkpoint.as_floats(options.dtype, options.allow_overflow).tensors
    if shards < 1:
        raise PunaError(f"shards={shards}: give 1 or more")
    write_json(folder / "params.json", config.to_meta())
    write_generation_config(folder, config)
    files: list[dict[str, LazyTensor]] = []
    for shard in range(shards):
        pieces = {param.meta: _piece(param, tensors[param.name], config, shard, shards) for param in parameters(config)}
        if config.tie_word_embeddings:  # Meta's code has an output in any case; here it is the same storage
            pieces["output.weight"] = pieces["tok_embeddings.weight"]
        files.append(pieces)
    with options.bar(sum(piece.nbytes for pieces in files for piece in distinct(pieces))) as advance:
        for shard, pieces in enumerate(files):
            write_pickled(folder / f"consolidated.{shard:02}.pth", pieces, advance)


def _piece(param: Parameter, tensor: LazyTensor, config: LlamaConfig, shard: int, shards: int) -> LazyTensor:
    """Shard number `shard` of one parameter, in Meta's layout."""
    kind = _kind(param)
    tensor = param.swap_layout(tensor)
    if len(param.shape) == 1:
        return tensor
    if kind in _ROTATED:
        tensor = tensor.take(0, np.argsort(pairs_to_halves(tensor.shape[0], config.head_dim)))
    by_columns = kind == "embed" and config.vocab_size < _LLAMA3_VOCABULARY and not config.tie_word_embeddings
    axis = 1 if kind in _COLUMNS or by_columns else 0
    units = {"wq": config.num_attention_heads, "wo": config.num_attention_heads}.get(kind, tensor.shape[axis])
    if kind in _KEY_VALUE:
        units = config.num_key_value_heads
        if shards % units == 0:  # several shards hold the same head
            shard, shards = shard * units // shards, units
    is_vocabulary = tensor.shape[axis] == config.vocab_size and kind in ("embed", "lm_head")
    if units % shards and not is_vocabulary:
        raise PunaError(f"shards={shards}: {param.meta} has {units} rows or heads to split, which do not divide by it")
    share = tensor.shape[axis] // shards
    stop = tensor.shape[axis] if shard == shards - 1 else (shard + 1) * share
    return tensor.narrow(axis, shard * share, stop)
