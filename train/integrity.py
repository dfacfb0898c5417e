"""What a checkpoint records of a state, array by array: dotted names, shapes, dtypes and fingerprints.

A state is any tree of arrays. Its checkpoint knows only nested names, so that it outlives the classes of the tree.
"""

from pathlib import Path
from typing import Any

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, KeyPath, SequenceKey

from convert import manifest
from model.errors import JobFailed, PunaError


class CheckpointError(PunaError):
    """A checkpoint that cannot be written or trusted."""


class SaveFailed(CheckpointError, JobFailed):
    """A disk or a file system failed in the background; it may not another time."""


def shapes(tree: Any) -> dict[str, dict[str, Any]]:
    """The shape and dtype of every array in `tree`, by dotted name."""
    return {name: {"shape": list(x.shape), "dtype": str(x.dtype)} for name, x in _named(tree).items()}


def check_fit(folder: Path, tree: Any, complete: bool) -> None:
    """Check that a checkpoint has the arrays that are asked for, in their shapes and dtypes.

    Args:
        folder: the checkpoint's.
        tree: arrays or shapes.
        complete: the checkpoint may have no others.

    Raises:
        CheckpointError: naming the first arrays that differ.
    """
    saved = {name: (x["shape"], x["dtype"]) for name, x in manifest.read(folder)["arrays"].items()}
    asked = {name: (x["shape"], x["dtype"]) for name, x in shapes(tree).items()}
    names = [name for name in asked | (saved if complete else {}) if asked.get(name) != saved.get(name)]
    if names:
        differences = [
            f"{name} is {_words(saved.get(name))} there, {_words(asked.get(name))} here" for name in names[:3]
        ]
        more = f", and {len(names) - 3} more" if len(names) > 3 else ""
        raise CheckpointError(
            f"checkpoint {folder} does not fit this configuration: {'; '.join(differences)}{more}. "
            "Restore the settings of the run, or give another run.output_dir"
        )


def _words(array: tuple[list[int], str] | None) -> str:
    return f"{array[1]}{array[0]}" if array else "absent"


def changed_arrays(folder: Path, tree: Any) -> list[str]:
    """Names of the arrays that are not what was saved, whatever the meshes of then and now.

    Args:
        folder: the checkpoint's.
        tree: what was read from it.
    """
    saved = manifest.read(folder)["arrays"]
    now = jax.device_get(fingerprints(tree))
    return [name for name, value in now.items() if int(value) != saved[name]["fingerprint"]]


@jax.jit
def fingerprints(tree: Any) -> dict[str, jax.Array]:
    """`convert.manifest.fingerprint` of every array in `tree`, in one compiled program.

    Arrays that are kept in host memory are brought to the device for it.

    Returns:
        uint32 scalars, by dotted name.
    """
    on_device = jax.device_put(_named(tree), jax.memory.Space.Device)
    return {name: manifest.fingerprint(x) for name, x in on_device.items()}


def _named(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {".".join(map(_key, path)): leaf for path, leaf in leaves}


def to_nested_dict(tree: Any) -> dict[str, Any]:
    """`tree` as dicts of dicts of leaves, whatever its classes."""
    root: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        *parents, name = map(_key, path)
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return root


def from_nested_dict(tree: Any, arrays: dict[str, Any]) -> Any:
    """The inverse of `to_nested_dict`.

    Args:
        tree: the structure wanted; its leaves do not matter.
        arrays: dicts of dicts with a leaf for each of them.
    """

    def leaf(path: KeyPath, _: Any) -> Any:
        node = arrays
        for key in map(_key, path):
            node = node[key]
        return node

    return jax.tree_util.tree_map_with_path(leaf, tree)


def _key(entry: Any) -> str:
    match entry:
        case DictKey(key) | FlattenedIndexKey(key):
            return str(key)
        case GetAttrKey(name):
            return name
        case SequenceKey(index):
            return str(index)
    raise TypeError(f"no name for {entry!r}")
