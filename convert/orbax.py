"""Orbax folders: config.json, the companion files, and one small Orbax tree per layer in params/.

Layers lie apart, so that neither writing nor reading needs more memory for a deeper model, and each is stacked on its
way into the accelerator. Orbax (its v0 API, in this module only) writes the trees and says what they hold; TensorStore,
on which it stands, reads slices of them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from convert.checkpoint import Checkpoint, main_dtype, read_json, write_generation_config, write_json
from convert.names import account, check_shape, rows
from convert.stored import Bar, Index, Stored, contiguous
from model.config import LlamaConfig
from model.errors import PunaError

_CHUNK_BYTES = 16 << 20  # what a slice reads at least
_REST = "rest"


def read_orbax(folder: Path) -> Checkpoint:
    """The model in an Orbax folder that `write_orbax` made."""
    config = LlamaConfig.from_hf(read_json(folder / "config.json"))
    table = rows(config)
    trees: dict[str, dict[str, Stored]] = {}
    for row in table:
        tree, _ = _place(row.name)
        if tree not in trees:
            trees[tree] = _read_tree(folder / "params" / tree)
    for tree, tensors in trees.items():
        account((name for t, name in (_place(row.name) for row in table) if t == tree), tensors, str(folder / tree))
    if extra := {path.name for path in (folder / "params").iterdir()} - trees.keys():
        raise PunaError(f"{folder / 'params'} has unknown {', '.join(sorted(extra))}: is config.json this model's own?")
    tensors = {}
    for row in table:
        tree, name = _place(row.name)
        tensors[row.name] = trees[tree][name]
        check_shape(row.name, tensors[row.name], row.shape)
    return Checkpoint(config, tensors, folder, "orbax")


def _place(name: str) -> tuple[str, str]:
    """The Orbax tree and the key in it of one of our parameters."""
    if not name.startswith("layers."):
        return _REST, name
    _, number, key = name.split(".")
    return f"layer_{int(number):05}", key


def _read_tree(path: Path) -> dict[str, Stored]:
    if not path.is_dir():
        raise PunaError(f"{path} is missing: the folder is incomplete, or config.json is another model's")
    try:
        metadata: Any = ocp.PyTreeCheckpointer().metadata(path)
        leaves: dict[str, Any] = dict(metadata.item_metadata.tree)
    except (OSError, ValueError, KeyError) as error:
        raise PunaError(f"{path} is no complete Orbax tree: {' '.join(str(error).split())[:200]}") from None
    return {name: _tensor(path, name, leaf.shape, np.dtype(leaf.dtype)) for name, leaf in leaves.items()}


def _tensor(path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Stored:
    kvstore = {"driver": "ocdbt", "base": f"file://{path.absolute()}/", "path": f"{name}/"}

    def read(index: Index) -> np.ndarray:
        try:
            return tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result()[index].read().result()
        except (ValueError, OSError) as error:
            raise PunaError(f"{path}: {name} cannot be read: {' '.join(str(error).split())[:200]}") from None

    return Stored(tuple(shape), dtype, read, str(path))


def write_orbax(folder: Path, config: LlamaConfig, tensors: Mapping[str, Stored], bar: Bar) -> None:
    """Write config.json and the trees; while Orbax writes one layer, the next is read."""
    write_json(folder / "config.json", config.to_hf(main_dtype(tensors)))
    write_generation_config(folder, config)
    trees: dict[str, dict[str, Stored]] = {}
    for row in rows(config):
        tree, name = _place(row.name)
        trees.setdefault(tree, {})[name] = tensors[row.name]
    handler = ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False)
    total = sum(tensor.nbytes for tensor in tensors.values())
    with bar(total) as advance, ocp.AsyncCheckpointer(handler) as checkpointer:
        for tree, leaves in trees.items():
            arrays = {name: contiguous(leaf.load()) for name, leaf in leaves.items()}
            chunks = {name: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for name in arrays}
            checkpointer.save((folder / "params" / tree).absolute(), arrays, save_args=chunks)
            advance(sum(leaf.nbytes for leaf in leaves.values()))
