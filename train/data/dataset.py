"""A tokenized data set as rows on disk, and what a configuration's paths become: training sets and a held-out one."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.errors import PunaError
from model.tokenizer import Tokenizer
from train.data.cache import Counts, cache_name, pack, packed_counts, tokenize_into, write_once
from train.data.config import DataConfig, DataSource, check, complete, sources
from train.data.encode import IGNORE_INDEX
from train.data.packing import PackedRows, select
from train.data.permute import mix_key, permute
from train.data.readers import source_files

HostBatch = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class PackedDataset:
    """Rows of `max_length` tokens over memory-mapped examples: N tokens of E examples, end to end.

    Attributes:
        tokens: [N].
        trained: [N], whether loss is taken on a token.
        offsets: [E + 1], where each example begins.
        origins: [E, 2], the number of its path in `paths`, and its line.
        paths: the files that were read.
        rows: which tokens each row holds.
        max_length: tokens in a row, T.
        pad_id: what fills a row up.
        counts: what became of the records.
        digest: a SHA-256 over all of these numbers as they are stored.
        template: the name of the conversation template that examples are written with, as in [data]; None for texts and
            templates with placeholders.
        chosen: [E], of preferences, how many tokens of each are the chosen answer with its prompt; None of others.
        reference: float32 [R, S], the log-probability of each segment of each row under the reference model of
            preferences; None where a run does not compare with one.
    """

    tokens: NDArray[np.unsignedinteger]
    trained: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    origins: NDArray[np.int64]
    paths: tuple[str, ...]
    rows: PackedRows
    max_length: int
    pad_id: int
    counts: Counts
    digest: str
    template: str | None = None
    chosen: NDArray[np.int64] | None = None
    reference: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def row_segments(self) -> int:
        """How many segments a row has at most, padding left out."""
        return 1 if self.rows.joined or not len(self) else int(np.diff(self.rows.offsets).max())

    def batch(self, rows: Sequence[int] | NDArray[np.int64]) -> HostBatch:
        """The rows with these numbers; -1 is an empty row.

        Returns:
            int32 [B, T] arrays: tokens; labels, already shifted: `labels[:, t]` is what the model must say at t, namely
            token t + 1 of the same segment where that token is trained, else -100; segments, from 1 in each row, 0 is
            padding. Of preferences, segments 1, 3, 5 ... are chosen answers and the one after each is the rejected one;
            where there is a reference, float32 [B, S] too.
        """
        chosen = np.asarray(rows, np.int64)
        names = ("tokens", "labels", "segments")
        batch: HostBatch = {name: np.zeros((len(chosen), self.max_length), np.int32) for name in names}
        batch["tokens"][:] = self.pad_id
        batch["labels"][:] = IGNORE_INDEX
        kept = np.flatnonzero(chosen >= 0)
        if self.reference is not None:
            batch["reference"] = np.zeros((len(chosen), self.reference.shape[1]), np.float32)
            batch["reference"][kept] = self.reference[chosen[kept]]
        part = select(self.rows, chosen[kept])
        if not len(part.length):
            return batch
        counts = np.diff(part.offsets)
        before = np.cumsum(part.length) - part.length  # tokens of the batch before each span
        begins = before[part.offsets[:-1]] if part.joined else before  # where each segment does
        row_begins = np.repeat(before[part.offsets[:-1]], counts)
        place = np.repeat(np.repeat(kept * self.max_length, counts) + before - row_begins, part.length)
        positions = np.arange(part.length.sum()) - np.repeat(before, part.length)
        place += positions
        stored = np.repeat(part.start, part.length) + positions
        tokens, trained = self.tokens[stored].astype(np.int32), self.trained[stored]
        targets = np.where(np.append(trained[1:], False), np.append(tokens[1:], 0), IGNORE_INDEX)
        targets[begins[1:] - 1] = IGNORE_INDEX  # the last token of a segment has no target
        targets[-1] = IGNORE_INDEX
        numbers = (
            np.zeros_like(before) if part.joined else np.arange(len(before)) - np.repeat(part.offsets[:-1], counts)
        )
        segments = np.repeat(numbers + 1, part.length)
        for name, values in zip(names, (tokens, targets, segments), strict=True):
            batch[name].reshape(-1)[place] = values
        return batch

    def example(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """One example as it is kept (cut, not split).

        Returns:
            Its n token ids, int64 [n], and which of them are trained, bool [n].
        """
        stored = slice(self.offsets[number], self.offsets[number + 1])
        return np.asarray(self.tokens[stored], np.int64), np.asarray(self.trained[stored])

    def where(self, row: int) -> list[str]:
        """`path:line` of every example in a row."""
        spans = slice(self.rows.offsets[row], self.rows.offsets[row + 1])
        first = np.searchsorted(self.offsets, self.rows.start[spans], side="right") - 1
        last = np.searchsorted(self.offsets, self.rows.start[spans] + self.rows.length[spans], side="left")
        examples = {number for begin, end in zip(first, last, strict=True) for number in range(begin, end)}
        return [f"{self.paths[path]}:{line}" for path, line in self.origins[sorted(examples)].tolist()]


@dataclass(frozen=True)
class Datasets:
    """What a run reads.

    Attributes:
        train: the training sets, one for each source.
        weights: the share of each in the rows drawn, not normalized; None where all their rows are one set.
        evaluation: the held-out rows, if any.
    """

    train: tuple[PackedDataset, ...]
    weights: tuple[float, ...] | None = None
    evaluation: PackedDataset | None = None

    @property
    def row_segments(self) -> int:
        """How many segments a row has at most, padding left out."""
        return max(each.row_segments for each in (*self.train, self.evaluation) if each is not None)


def load_dataset(
    config: DataConfig,
    tokenizer: Tokenizer,
    wait_seconds: float = 3600.0,
    alive: Callable[[], None] = lambda: None,
) -> Datasets:
    """Read, tokenize and pack what [data] names, or take it from the cache. Every process may call this at once.

    Args:
        config: the settings.
        tokenizer: whose tokens the rows hold.
        wait_seconds: how long another process that writes the same cache entry may add nothing.
        alive: called again and again in the process that tokenizes.

    Raises:
        PunaError: a setting is wrong, or the data is (`path:line: reason`, up to 20 and then a count), or another
            process has added nothing for `wait_seconds`.
    """
    check(config)
    listed = sources(config)

    def open(source: DataSource) -> PackedDataset:
        folder = cache_folder(config) / cache_name(config, source, tokenizer)
        write_once(folder, lambda temporary: tokenize_into(temporary, config, source, tokenizer, alive), wait_seconds)
        return open_dataset(folder, 0 if tokenizer.pad_id is None else tokenizer.pad_id)

    if config.eval_path:
        _check_apart(config.eval_path, listed)
    train = tuple(open(source) for source in listed)
    weights = tuple(source.weight for source in listed if source.weight is not None) or None
    if config.eval_path:
        return Datasets(train, weights, open(complete(config, DataSource(config.eval_path))))
    if config.validation_split:
        if len(listed) > 1:
            raise PunaError("data.validation_split splits one source: give data.eval_path with several")
        kept, held_out = hold_out(train[0], config)
        return Datasets((kept,), weights, held_out)
    return Datasets(train, weights)


def _check_apart(path: str, trained: Sequence[DataSource]) -> None:
    """Refuses a data.eval_path of which a file, or the very Hub data set, is trained on."""
    for source in trained:
        files = {file.resolve() for file in source_files(source.path)}
        shared = sorted(files & {file.resolve() for file in source_files(path, "data.eval_path")})
        if shared or path == source.path:
            raise PunaError(
                f"data.eval_path {path!r} is trained on too ({shared[0] if shared else path}): name other data or "
                f"another split, as {path.partition(':')[0]}:test, or hold out data.validation_split of it"
            )


def hold_out(dataset: PackedDataset, config: DataConfig) -> tuple[PackedDataset, PackedDataset]:
    """Two disjoint parts of a data set: what stays, and what is held out, each packed by itself.

    Args:
        dataset: what to divide.
        config: its settings. validation_split of its documents, rounded up, are held out; seed chooses them.

    Raises:
        PunaError: one of the parts has no row.
    """
    size = len(dataset.offsets) - 1
    held = -int(-size * config.validation_split // 1)
    order = permute(np.arange(size), size, mix_key(config.seed, 1))

    def part(chosen: NDArray[np.int64], where: str, counts: Counts) -> PackedDataset:
        chosen = np.sort(chosen)
        start, length = dataset.offsets[chosen], np.diff(dataset.offsets)[chosen]
        halves = None if dataset.chosen is None else dataset.chosen[chosen]
        rows = pack(start, length, config, halves)
        if not len(rows):
            raise PunaError(
                f"data.validation_split {config.validation_split} leaves {len(chosen):,} of {size:,} documents to "
                f"{where}, which make no row: change it"
            )
        each = np.add.reduceat(dataset.trained, dataset.offsets[:-1], dtype=np.int64)[chosen]
        packed = packed_counts(counts, length, int(each.sum()), rows, config)
        return replace(dataset, rows=rows, counts=packed)

    stays = replace(dataset.counts, held_out=held)
    return part(order[held:], "train on", stays), part(order[:held], "evaluate", Counts(records=held))


def cache_folder(config: DataConfig) -> Path:
    """Where tokenized data sets are kept: data.cache_dir, or the user's cache."""
    if config.cache_dir:
        return Path(config.cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "puna"


def open_dataset(folder: Path, pad_id: int) -> PackedDataset:
    """Open what `tokenize_into` wrote.

    Args:
        folder: where.
        pad_id: what fills a row up.

    Raises:
        PunaError: it is damaged.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        index = np.load(folder / "index.npz")
        offsets = index["offsets"]
        tokens = np.asarray(np.memmap(folder / "tokens.bin", meta["dtype"], "r", shape=(int(offsets[-1]),)))
        trained = np.asarray(np.memmap(folder / "trained.bin", bool, "r", shape=(int(offsets[-1]),)))
        rows = PackedRows(index["row_offsets"], index["start"], index["length"], bool(index["joined"]))
        counts, paths = Counts(**meta["counts"]), tuple(meta["paths"])
        counts = replace(counts, overlong_at=tuple(counts.overlong_at))
        return PackedDataset(
            tokens,
            trained,
            offsets,
            index["origins"],
            paths,
            rows,
            counts.max_length,
            pad_id,
            counts,
            meta["digest"],
            meta["template"],
            index["chosen"] if len(index["chosen"]) else None,
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PunaError(f"the tokenized data in {folder} is damaged ({error}): delete that folder") from error
