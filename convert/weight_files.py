"""Which files of a Hugging Face folder hold its weights: one source of several that may lie there, as transformers
takes it; the others are said."""

import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path, PurePath
from typing import NamedTuple

from cli.said import say_once
from convert.damage import malformed
from convert.lazy import LazyTensor
from convert.names import is_buffer
from convert.pickled import read_pickled
from convert.safetensor import read_safetensors
from model.errors import PunaError
from model.json_file import read_json

PUNA_STEM = "puna"  # of the weights of a model with replaced pieces: who would read model.safetensors finds none

Tensors = dict[str, LazyTensor]
Reader = Callable[[Path], Tensors]
# transformers' order: safetensors before pickles, one file before an index.
_KINDS: tuple[tuple[str, str, Reader], ...] = (
    ("model", "safetensors", read_safetensors),
    (PUNA_STEM, "safetensors", read_safetensors),
    ("pytorch_model", "bin", read_pickled),
)
_NEVER_READ = ("consolidated*.safetensors", "params.json")  # Mistral's layout of the same model


class WeightSource(NamedTuple):
    """A place of weights: the file that shows it, what it names, and how it is read."""

    shown: Path
    names: frozenset[str]
    read: Callable[[], Tensors]


def read_weights(folder: Path, tied: bool = False) -> Tensors:
    """Every tensor of the folder under its own name. Of several sources the one that transformers takes is read, and
    the others are said; precision variants (model.fp16.safetensors) are left alone.

    Args:
        folder: a Hugging Face folder.
        tied: whether the head is the embedding, so that an index may name it where no file holds it.

    Raises:
        PunaError: there are no weights, or an index and its files disagree.
    """
    sources = _sources(folder, tied)
    if not sources:
        raise PunaError(f"{folder} has no model.safetensors and no pytorch_model.bin{_variants(folder)}")
    first, *others = sources
    if (folder / "adapter_config.json").is_file() and any(folder.glob("adapter_model.*")):
        raise PunaError(
            f"{folder} holds a model ({first.shown.name}) and an adapter (adapter_config.json), which transformers "
            "would put over another base: move one of them to a folder of its own"
        )
    unread = [other.shown.name for other in others if not other.names <= first.names]
    unread += [path.name for pattern in _NEVER_READ for path in sorted(folder.glob(pattern))]
    if unread:
        said = f"{', '.join(unread)} beside it {'are' if len(unread) > 1 else 'is'} not"
        say_once(f"{folder}: {first.shown.name} is read, as transformers does; {said}")
    return first.read()


def _sources(folder: Path, tied: bool) -> list[WeightSource]:
    found = []
    for stem, suffix, read in _KINDS:
        file, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
        numbered = re.compile(rf"{stem}-(\d+)-of-(\d+)\.{suffix}")
        shards = sorted(path for path in folder.glob(f"{stem}-*.{suffix}") if numbered.fullmatch(path.name))
        if file.is_file():
            found.append(WeightSource(file, frozenset({file.name}), partial(read, file)))
        if index.is_file():
            found.append(WeightSource(index, _named_by(index), partial(_read_indexed, index, read, tied)))
        elif shards:
            found.append(
                WeightSource(shards[0], frozenset(path.name for path in shards), partial(_union, shards, read))
            )
    return found


def _weight_map(index: Path) -> dict[str, str]:
    said = read_json(index)
    with malformed(index):
        weight_map = dict(said.get("weight_map", {}))
        for name in weight_map.values():
            if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
                raise PunaError(f"{index} names {name}, outside its folder: fetch it again, from a source you trust")
    return weight_map


def _named_by(index: Path) -> frozenset[str]:
    return frozenset(_weight_map(index).values())


def _read_indexed(index: Path, read: Reader, tied: bool) -> Tensors:
    weight_map = _weight_map(index)
    names = sorted(set(weight_map.values()))
    if not names:
        raise PunaError(f"{index} names no file of weights: fetch it again")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise PunaError(f"{index.parent} lacks {', '.join(missing)}, which {index.name} names: fetch the missing shard")
    files = {name: read(index.parent / name) for name in names}

    def is_computed(tensor: str) -> bool:
        return is_buffer(tensor) or (tied and tensor == "lm_head.weight")

    for tensor, name in weight_map.items():
        if tensor not in files[name] and not is_computed(tensor):
            raise PunaError(f"{index} places {tensor} in {name}, which does not hold it")
    for name, tensors in files.items():
        if extra := sorted(t for t in tensors if weight_map.get(t, name if is_computed(t) else None) != name):
            raise PunaError(f"{index} does not list {', '.join(extra)}, which {name} holds")
    return {tensor: found for tensors in files.values() for tensor, found in tensors.items()}


def _union(files: Iterable[Path], read: Reader) -> Tensors:
    """The shards of a folder whose index is lost."""
    files = list(files)
    count = int(files[0].stem.rpartition("-")[2])
    if len(files) != count:
        raise PunaError(f"{files[0].parent} holds {len(files)} of {count} shards, as {files[0].name}: fetch the others")
    merged: Tensors = {}
    for path in files:
        tensors = read(path)
        if twice := merged.keys() & tensors.keys():
            raise PunaError(f"{path} repeats {', '.join(sorted(twice))} of another file in its folder")
        merged |= tensors
    return merged


def _variants(folder: Path) -> str:
    """What to say of files that transformers reads only when asked for that variant."""
    names = [path.name for stem, suffix, _ in _KINDS for path in sorted(folder.glob(f"{stem}*.{suffix}"))]
    return f": {names[0]} is a variant; give it the name without" if names else ": fetch the weights"
