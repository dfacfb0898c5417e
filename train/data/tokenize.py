"""Records to tokens, several threads at once (tokenizers release the interpreter lock), in the order of the records."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from model.errors import PunaError
from train.data.encode import Encoder
from train.data.readers import Faults, SourceRecord

CHUNK = 64  # records a thread takes at once


@dataclass(frozen=True)
class Limit:
    """The most tokens of an example, and what becomes of longer ones: data.max_length and data.on_overlong."""

    max_length: int
    on_overlong: str


@dataclass
class Chunk:
    """Some records as one run of N tokens. A list has an entry for each example, in order.

    Attributes:
        tokens: [N], the examples' ids end to end.
        trained: [N], whether loss is taken on a token.
        lengths: tokens of each example.
        chosen: of preferences, how many of these are the chosen answer with its prompt, which come first; else empty.
        paths: where each was read.
        lines: its line there.
        records: how many were read, those left out too.
        empty: texts left out because they are blank.
        overlong: `path:line` of examples left out because they are too long.
        cut: examples cut to the most tokens allowed.
        cut_tokens: tokens lost by it.
        faults: path, line and reason of each record that could not be used.
    """

    tokens: NDArray[np.uint32]
    trained: NDArray[np.bool_]
    lengths: list[int]
    paths: list[str]
    lines: list[int]
    records: int
    empty: int = 0
    overlong: list[str] = field(default_factory=list)
    cut: int = 0
    cut_tokens: int = 0
    chosen: list[int] = field(default_factory=list)
    faults: list[tuple[str, int, str]] = field(default_factory=list)


def tokenize(rows: Iterable[SourceRecord], encoder: Encoder, limit: Limit | None, faults: Faults) -> Iterator[Chunk]:
    """Encode records in chunks, which come in the order of the records.

    Args:
        rows: the records.
        encoder: makes tokens of one.
        limit: of an example; None where any fits.
        faults: gets what is wrong with a record.
    """
    remaining = iter(rows)
    workers = min(8, os.cpu_count() or 1)
    pending: deque[Future[Chunk]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        while True:
            while len(pending) < 2 * workers and (batch := list(islice(remaining, CHUNK))):
                pending.append(pool.submit(_encode_chunk, batch, encoder, limit))
            if not pending:
                return
            chunk = pending.popleft().result()
            for path, line, reason in chunk.faults:
                faults.add(path, line, reason)
            yield chunk


def _encode_chunk(rows: list[SourceRecord], encoder: Encoder, limit: Limit | None) -> Chunk:
    ids: list[int] = []
    trained: list[bool] = []
    chunk = Chunk(np.empty(0, np.uint32), np.empty(0, bool), [], [], [], len(rows))
    for path, line, record in rows:
        try:
            parts = encoder(record)
        except PunaError as error:
            chunk.faults.append((path, line, str(error)))
            continue
        if encoder.splits and not record[encoder.columns.get("text", "text")].strip():
            chunk.empty += 1
            continue
        if not _is_trained(parts):
            chunk.faults.append((path, line, "has no trained token: leave the record out"))
            continue
        length = sum(len(ids) for ids, _ in parts)
        if limit is not None and length > limit.max_length:
            if limit.on_overlong == "error":
                reason = (
                    f"has {length:,} tokens, above data.max_length {limit.max_length}: raise that, or set "
                    'data.on_overlong = "drop" or "truncate"'
                )
                chunk.faults.append((path, line, reason))
                continue
            kept = slice(limit.max_length // len(parts))
            parts = [(new_ids[kept], new_trained[kept]) for new_ids, new_trained in parts]
            if limit.on_overlong == "drop" or not _is_trained(parts):
                chunk.overlong.append(f"{path}:{line}")
                continue
            chunk.cut += 1
            chunk.cut_tokens += length - sum(len(new_ids) for new_ids, _ in parts)
        for new_ids, new_trained in parts:
            ids += new_ids
            trained += new_trained
        chunk.lengths.append(sum(len(new_ids) for new_ids, _ in parts))
        chunk.chosen.extend(len(new_ids) for new_ids, _ in parts[:-1])
        chunk.paths.append(path)
        chunk.lines.append(line)
    chunk.tokens, chunk.trained = np.array(ids, np.uint32), np.array(trained, bool)
    return chunk


def _is_trained(parts: list[tuple[list[int], list[bool]]]) -> bool:
    """Whether every part has a token to train on; its first has nothing before it to be predicted from."""
    return all(any(trained[1:]) for _, trained in parts)
