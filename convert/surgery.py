"""Models made of others: some layers of one in another order, or averages of several, one tensor in memory at a time.

The averages are mergekit's: `linear` (model soups, arXiv:2203.05482), `slerp`, `ties` (arXiv:2306.01708), and
`dare_linear` and `dare_ties` (arXiv:2311.03099). They are computed in float32.
"""

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from cli.files import check_apart
from convert.checkpoint import Checkpoint, WriteOptions
from convert.formats import check_options
from convert.lazy import Index, LazyTensor, narrowed
from convert.merge import open_merged
from convert.save import write_model
from model.errors import PunaError

METHODS = ("linear", "slerp", "ties", "dare_linear", "dare_ties")
PARALLEL = 0.9995  # the cosine above which two tensors are interpolated along the line between them
SMALLEST = 1e-7  # the norm below which nothing is rescaled
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


# --- layers


def parse_layers(text: str, depth: int) -> list[int]:
    """The numbers of layers in "0-11,20-31"; both ends of a range are meant, and a layer may come again.

    Raises:
        PunaError: it is no such list, or names a layer that a model of `depth` layers does not have.
    """
    chosen: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if found is None or int(found[1]) > int(found[2] or found[1]):
            raise PunaError(f"--keep {text!r}: {part!r} is no layer and no range of layers; write them as 0-11,20-31")
        chosen += range(int(found[1]), int(found[2] or found[1]) + 1)
    if missing := [layer for layer in chosen if layer >= depth]:
        raise PunaError(f"--keep {text!r}: the model has no layer {missing[0]}; its layers are 0 to {depth - 1}")
    return chosen


def with_layers(checkpoint: Checkpoint, chosen: Sequence[int]) -> Checkpoint:
    """The model whose layers are `chosen` ones of another, in that order; the rest stays.

    Args:
        checkpoint: the other model; its tensors are shared, not read.
        chosen: numbers of its layers; one that comes twice is repeated.
    """
    rows: dict[int, list[str]] = {}
    for name in checkpoint.tensors:
        if found := _LAYER.fullmatch(name):
            rows.setdefault(int(found[1]), []).append(found[2])
    names = {name: name for name in checkpoint.tensors if not _LAYER.fullmatch(name)}
    for new, old in enumerate(chosen):
        names |= {f"layers.{new}.{rest}": f"layers.{old}.{rest}" for rest in rows[old]}
    quantized = {new: checkpoint.quantized[old] for new, old in names.items() if old in checkpoint.quantized}
    return replace(
        checkpoint,
        config=replace(checkpoint.config, num_hidden_layers=len(chosen)),
        tensors={new: checkpoint.tensors[old] for new, old in names.items()},
        quantized=quantized,
    )


# --- averages


@dataclass(frozen=True)
class Average:
    """How several tensors become one.

    Attributes:
        method: one of METHODS.
        weights: of the models, one each; for slerp, of the second, as the part of the way to it.
        density: with ties and dare, the part of each model's differences from the base that is kept.
        seed: with dare, chooses them.
    """

    method: str
    weights: tuple[float, ...]
    density: float = 1.0
    seed: int = 0


def average(
    models: Sequence[str | Path],
    destination: Path,
    how: Average,
    base: str | Path | None = None,
    format: str = "hf",
    options: WriteOptions = WriteOptions(),
    overwrite: bool = False,
) -> None:
    """Writes an average of models of one shape, with the config and the companions of the base, or else of the first.

    Args:
        models: folders of any format, or Hub ids; quantized ones count as what their numbers stand for.
        destination: the folder (or file) to write.
        how: the method and its settings.
        base: with ties and dare, what all of them were trained from.
        format: a key of `FORMATS`.
        options: how to write.
        overwrite: replace what stands at `destination`.

    Raises:
        PunaError: the models differ in shape, or a setting does not go with the method.
    """
    check(how, len(models), base is not None)
    check_options(format, options)
    check_apart(destination, *models, *([] if base is None else [base]))
    opened = [open_merged(path).as_floats() for path in models]
    under = None if base is None else open_merged(base).as_floats()
    first = under or opened[0]
    for other in opened:
        _check_alike(first, other)
    tensors = {
        name: _averaged(name, how, [each.tensors[name] for each in opened], under and under.tensors[name])
        for name in first.tensors
    }
    write_model(destination, replace(first, tensors=tensors, format=format), options, overwrite)


def check(how: Average, count: int, has_base: bool) -> None:
    """Raises PunaError where a setting does not go with the method, or with so many models."""
    if how.method not in METHODS:
        raise PunaError(f"--method {how.method!r} is not known; choose {', '.join(METHODS)}")
    needs_base = how.method in ("ties", "dare_linear", "dare_ties")
    if needs_base != has_base:
        raise PunaError(f"--method {how.method} {'needs' if needs_base else 'has no'} --base")
    if how.method == "slerp" and (count != 2 or len(how.weights) != 1):
        given = f"{count} models and {len(how.weights)} weights"
        raise PunaError(f"--method slerp goes from one model to a second by one --weight; {given} are given")
    if how.method != "slerp" and len(how.weights) != count:
        raise PunaError(f"{len(how.weights)} times --weight for {count} models: give one for each, or none")
    if how.method == "linear" and not sum(how.weights):
        raise PunaError(f"--weight: {', '.join(map(str, how.weights))} add up to 0, which nothing can be divided by")
    if not 0 < how.density <= 1:
        raise PunaError(f"--density is {how.density}; it must be above 0 and at most 1")
    if not needs_base and how.density != 1:
        raise PunaError(f"--density is {how.density}, which nothing reads with --method {how.method}: leave it out")


def _check_alike(first: Checkpoint, other: Checkpoint) -> None:
    """Refuses models whose numbers do not mean the same."""
    for field in fields(first.config):
        if field.name.endswith("_token_id"):
            continue
        own, theirs = getattr(first.config, field.name), getattr(other.config, field.name)
        if own != theirs:
            raise PunaError(
                f"{other.folder}: {field.name} is {theirs}, and {own} in {first.folder}: only models of one shape "
                "have an average (`convert vocab resize` makes vocabularies alike)"
            )


def _averaged(name: str, how: Average, tensors: list[LazyTensor], base: LazyTensor | None) -> LazyTensor:
    """One tensor, computed whole when a part of it is read; it has the base's dtype, or else the first one's."""
    first = base or tensors[0]

    def read(index: Index) -> np.ndarray:
        arrays = [tensor.load().astype(np.float32) for tensor in tensors]
        result = combine(name, how, arrays, None if base is None else base.load().astype(np.float32))
        return narrowed(result, first.dtype, name, first.where)[index]

    return replace(first, read=read)


def combine(name: str, how: Average, arrays: Sequence[np.ndarray], base: np.ndarray | None) -> np.ndarray:
    """The average of float32 arrays of one shape.

    Args:
        name: of the tensor, from which dare's choice comes.
        how: the method and its settings.
        arrays: one of each model.
        base: that of the base, where the method has one.
    """
    weights = np.array(how.weights, np.float32)
    if base is None:
        if how.method == "slerp":
            return slerp(arrays[0], arrays[1], how.weights[0])
        return sum((w * x for w, x in zip(weights, arrays, strict=True)), np.float32(0)) / weights.sum()
    updates = []
    for number, array in enumerate(arrays):
        if how.method == "ties":
            update = largest(array - base, how.density)
        else:
            key = (how.seed, zlib.crc32(name.encode()), number)
            update = dropped(array - base, how.density, np.random.default_rng(key))
        updates.append(weights[number] * update)
    if how.method == "dare_linear":
        return base + sum(updates, np.float32(0))
    agrees = _agrees(updates)
    total = sum((np.where(same, update, 0) for same, update in zip(agrees, updates, strict=True)), np.float32(0))
    if how.method == "dare_ties":
        return base + total
    share = sum((np.where(same, w, 0) for same, w in zip(agrees, weights, strict=True)), np.float32(0))
    return base + total / np.where(share == 0, np.float32(1), share)


def slerp(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    """From a to b along the arc between their directions; along the line where these are almost the same."""
    norms = [float(np.linalg.norm(x.astype(np.float64))) for x in (a, b)]
    dot = np.sum(a.astype(np.float64) * b) / np.prod([norm if norm > 1e-8 else 1.0 for norm in norms])
    dot = float(np.clip(dot, -1, 1))
    if abs(dot) > PARALLEL:
        return np.float32(1 - t) * a + np.float32(t) * b
    angle = np.arccos(dot)
    return np.float32(np.sin((1 - t) * angle) / np.sin(angle)) * a + np.float32(np.sin(t * angle) / np.sin(angle)) * b


def largest(update: np.ndarray, density: float) -> np.ndarray:
    """A part of an update, that of the largest magnitudes; of equal ones the first. The others are 0."""
    if density >= 1 or not update.size:
        return update
    size, kept = np.abs(update).reshape(-1), max(1, int(density * update.size))
    least = np.partition(size, -kept)[-kept]
    chosen = size > least
    chosen[np.flatnonzero(size == least)[: kept - int(chosen.sum())]] = True
    return np.where(chosen.reshape(update.shape), update, np.float32(0))


def dropped(update: np.ndarray, density: float, random: np.random.Generator) -> np.ndarray:
    """An update of which each number stays with the probability `density`; what stays is scaled so that the sum of
    magnitudes is that of the whole."""
    if density >= 1:
        return update
    kept = np.where(random.random(update.shape) < density, update, np.float32(0))
    before, after = (float(np.abs(x).sum(dtype=np.float64)) for x in (update, kept))
    return kept if min(before, after) < SMALLEST else kept * np.float32(before / after)


def _agrees(updates: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Where each update has the sign of the sum of all, which counts as positive where it is 0."""
    total: np.ndarray = sum(updates[1:], updates[0])
    sign = np.where(total >= 0, 1, -1)
    return [np.sign(update) == sign for update in updates]
