"""Evidence that a checkpoint still holds what was saved: a hash of every file and a fingerprint of every array.

Orbax checks its indexes, not the bytes of arrays: a flipped bit would be trained on without a word. The manifest is
written inside the checkpoint before it is committed, so a checkpoint that exists has one. The hash (xxh3-128) says
which file changed; the fingerprint is a sum over positions that is the same on every mesh and says which array.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
import xxhash
from jax import lax

MANIFEST = "manifest.json"
T = TypeVar("T")
# The commit itself stamps these two with the time. Nothing is read from them: test_checkpoint.py shows it.
_COMMIT_FILES = {"_CHECKPOINT_METADATA", "commit_success.txt"}
_CHUNK_BYTES = 4 << 20
_SLICE_BYTES = 256 << 20


def fingerprint(x: jax.Array | np.ndarray, start: int = 0) -> jax.Array:
    """A uint32 that changes when any element of `x` [...] changes or moves; `jit` it over whole trees.

    Each element's bits are mixed with its position by a bijection (MurmurHash3's finalizer, A. Appleby), so that one
    changed element always shows; integer sums wrap and are associative, so that sharding does not show. `start` is
    the position of the first row: fingerprints of consecutive slices along the first axis add up to the whole's.
    """
    words = _words(jnp.asarray(x))
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        index = lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position = position * jnp.uint32(0x01000193) + index + jnp.uint32(start if axis == 0 else 0)
    return jnp.sum(_mix(words + position * jnp.uint32(0x9E3779B1)), dtype=jnp.uint32)


def _words(x: jax.Array) -> jax.Array:
    """The bits of `x` as uint32, with one more axis of two where an element has 64 bits."""
    if x.dtype.itemsize == 8:
        return lax.bitcast_convert_type(x, jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = lax.bitcast_convert_type(x, jnp.dtype(f"uint{jnp.finfo(x.dtype).bits}"))
    return x.astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def write(folder: Path, arrays: Mapping[str, Mapping[str, Any]]) -> None:
    """Write `folder`/manifest.json: the size and hash of every file below it, and what `arrays` says of each array.

    `arrays` maps a dotted name to its shape, dtype and fingerprint.
    """
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if name not in _COMMIT_FILES]
    files = _map(lambda name: {"bytes": (folder / name).stat().st_size, "xxh3": _hash(folder / name)}, names)
    body = {"files": dict(zip(names, files, strict=True)), "arrays": dict(arrays)}
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        json.dump({"xxh3": _hash_text(body), **body}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`: {"files": {name: {bytes, xxh3}}, "arrays": {name: {shape, dtype, fingerprint}}}.

    Raises ValueError where it is missing, cannot be read, or does not have the hash it gives for itself.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        expected = manifest.pop("xxh3")
    except (OSError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder / MANIFEST} cannot be read") from error
    if _hash_text(manifest) != expected:
        raise ValueError(f"{folder / MANIFEST} has changed since it was written")
    return manifest


def damaged_files(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What differs below `folder` from its manifest, a line a file; process `part` of `parts` looks at its share."""
    try:
        files = read(folder)["files"]
    except ValueError as error:
        return [str(error)]

    def damage(name: str) -> str | None:
        path, expected = folder / name, files[name]
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                return f"{path} has {size:,} bytes where {expected['bytes']:,} were written"
            return None if _hash(path) == expected["xxh3"] else f"{path} has changed since it was written"
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            return f"{path} cannot be read ({error.strerror})"

    return [line for line in _map(damage, sorted(files)[part::parts]) if line]


def damaged_arrays(folder: Path) -> list[str]:
    """Names of the arrays below `folder` that can no longer be read as they were saved, read in slices on the host."""
    try:
        arrays = read(folder)["arrays"]
    except ValueError:
        return []
    return [name for name, saved in arrays.items() if _read_fingerprint(folder / "state", name) != saved["fingerprint"]]


def _read_fingerprint(folder: Path, name: str) -> int | None:
    """The fingerprint of array `name` as TensorStore reads it from an Orbax item, or None where it cannot."""
    store = {"driver": "ocdbt", "base": f"file://{folder.absolute()}/", "path": f"{name}/"}
    try:
        array = tensorstore.open({"driver": "zarr", "kvstore": store}, read=True).result()
        if not array.shape:
            return int(_fingerprint(array.read().result()))
        row_bytes = max(1, array.dtype.numpy_dtype.itemsize * int(np.prod(array.shape[1:])))
        rows = max(1, _SLICE_BYTES // row_bytes)
        starts = range(0, array.shape[0], rows)
        parts = [int(_fingerprint(array[i : min(i + rows, array.shape[0])].read().result(), i)) for i in starts]
        return sum(parts) % 2**32
    except (ValueError, OSError):
        return None


_fingerprint = jax.jit(fingerprint)


def steps(checkpoints: Path) -> list[int]:
    """The committed steps in a folder of checkpoints, oldest first."""
    if not checkpoints.is_dir():
        return []
    return sorted(int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal())


def verify(run_dir: str | Path) -> dict[int, list[str]]:
    """What is wrong with each checkpoint of a run, step by step: an empty list where it is as it was written.

    A damaged file is followed by the names of the arrays that no longer read as they were saved.
    """
    checkpoints = Path(run_dir) / "checkpoints"
    folders = {step: checkpoints / str(step) for step in steps(checkpoints)}
    return {step: explain(folder, damaged_files(folder)) for step, folder in folders.items()}


def explain(folder: Path, damage: list[str]) -> list[str]:
    """`damage` to files of a checkpoint, followed by what it means for its arrays."""
    return [*damage, effect(folder)] if damage else []


def effect(folder: Path) -> str:
    """What damage to the files of a checkpoint did to its arrays, as a line."""
    arrays = damaged_arrays(folder)
    return f"arrays that changed: {', '.join(arrays)}" if arrays else "no array that can be checked has changed"


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _hash_text(value: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def _map(function: Callable[[str], T], names: Iterable[str]) -> list[T]:
    """`function` of every name, on a thread a core: hashing releases the interpreter lock."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(function, names))
