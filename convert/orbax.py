"""Orbax folders: config.json, the companion files, and one small Orbax tree per layer in params/.

Layers lie apart, so that neither writing nor reading needs more memory for a deeper model, and each is stacked on its
way into the accelerator. Orbax (its v0 API, in this module only) writes the trees; TensorStore, on which it stands,
reads slices of them.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tensorstore

from cli.files import write_json
from cli.said import say_once
from convert.checkpoint import Checkpoint, WriteOptions, main_dtype, write_generation_config
from convert.damage import malformed
from convert.lazy import Index, LazyTensor, contiguous
from convert.names import check_keys, check_shape, parameters
from model.config import LlamaConfig
from model.errors import PunaError
from model.json_file import read_json

SIGNS = ("params/",)

_CHUNK_BYTES = 16 << 20  # what a slice reads at least
_REST = "rest"


def read(folder: Path) -> Checkpoint:
    """The model in an Orbax folder that `write` made."""
    said = read_json(folder / "config.json")
    with malformed(folder / "config.json"):
        config = LlamaConfig.from_hf(said, lambda line: say_once(f"{folder / 'config.json'}: {line}"))
    table = parameters(config)
    trees: dict[str, dict[str, LazyTensor]] = {}
    for param in table:
        tree, _ = _place(param.name)
        if tree not in trees:
            trees[tree] = _read_tree(folder / "params" / tree)
    for tree, tensors in trees.items():
        check_keys(
            (name for t, name in (_place(param.name) for param in table) if t == tree),
            tensors,
            str(folder / tree),
        )
    if extra := {path.name for path in (folder / "params").iterdir()} - trees.keys():
        raise PunaError(f"{folder / 'params'} has unknown {', '.join(sorted(extra))}: is config.json this model's own?")
    tensors = {}
    for param in table:
        tree, name = _place(param.name)
        tensors[param.name] = trees[tree][name]
        check_shape(param.name, tensors[param.name], param.shape)
    return Checkpoint(config, tensors, folder, "orbax")


def _place(name: str) -> tuple[str, str]:
    """The Orbax tree and the key in it of one of our parameters."""
    if not name.startswith("layers."):
        return _REST, name
    _, number, key = name.split(".")
    return f"layer_{int(number):05}", key


def _read_tree(path: Path) -> dict[str, LazyTensor]:
    if not path.is_dir():
        raise PunaError(f"{path} is missing: the folder is incomplete, or config.json is another model's")
    kvstore = {"driver": "ocdbt", "base": f"file://{path.absolute()}/"}
    with _readable(path):
        keys = tensorstore.KvStore.open(kvstore).result().list().result()
        return {name: _tensor(path, kvstore, name) for name in sorted({key.split(b"/")[0].decode() for key in keys})}


def _tensor(path: Path, kvstore: dict[str, str], name: str) -> LazyTensor:
    array = tensorstore.open({"driver": "zarr3", "kvstore": kvstore | {"path": f"{name}/"}}).result()

    def read(index: Index) -> np.ndarray:
        with _readable(path):
            return array[index].read().result()

    return LazyTensor(tuple(array.shape), array.dtype.numpy_dtype, read, str(path))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PunaError(f"{path} is no complete Orbax tree: {reason}; copy it again") from None


def write(folder: Path, checkpoint: Checkpoint, options: WriteOptions) -> None:
    """Write config.json and the trees; while Orbax writes one layer, the next is read."""
    import orbax.checkpoint as ocp  # takes a second

    config, tensors = checkpoint.config, checkpoint.as_floats(options.dtype, options.allow_overflow).tensors
    write_json(folder / "config.json", config.to_hf(main_dtype(tensors)))
    write_generation_config(folder, config)
    trees: dict[str, dict[str, LazyTensor]] = {}
    for param in parameters(config):
        tree, name = _place(param.name)
        trees.setdefault(tree, {})[name] = tensors[param.name]
    total = sum(tensor.nbytes for tensor in tensors.values())
    checkpointer = ocp.PyTreeCheckpointer(use_zarr3=True, use_compression=False)
    with options.bar(total) as advance, ThreadPoolExecutor(1) as writer:  # Orbax's own asynchronous save copies first
        saving: Future[None] | None = None
        for tree, leaves in trees.items():
            arrays = {name: contiguous(leaf.load()) for name, leaf in leaves.items()}
            chunks = {name: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for name in arrays}
            if saving is not None:
                saving.result()
            path = (folder / "params" / tree).absolute()
            saving = writer.submit(checkpointer.save, path, arrays, save_args=chunks)
            advance(sum(leaf.nbytes for leaf in leaves.values()))
        if saving is not None:
            saving.result()
