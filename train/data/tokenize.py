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


@dataclass
class Chunk:
    """Some records as one run of N tokens. A list has an entry for each example, in order.

    Attributes:
        tokens: [N], the examples' ids end to end.
        trained: [N], whether loss is taken on a token.
        lengths: tokens of each example.
        paths: where each was read.
        lines: its line there.
        records: how many were read, those left out too.
        empty: texts left out because they are blank.
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
    cut: int = 0
    cut_tokens: int = 0
    faults: list[tuple[str, int, str]] = field(default_factory=list)


def tokenize(rows: Iterable[SourceRecord], encoder: Encoder, cut_at: int | None, faults: Faults) -> Iterator[Chunk]:
    """Encode records in chunks, which come in the order of the records.

    Args:
        rows: the records.
        encoder: makes tokens of one.
        cut_at: the most tokens of an example; None cuts none.
        faults: gets what is wrong with a record.
    """
    remaining = iter(rows)
    workers = min(8, os.cpu_count() or 1)
    pending: deque[Future[Chunk]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        while True:
            while len(pending) < 2 * workers and (batch := list(islice(remaining, CHUNK))):
                pending.append(pool.submit(_encode_chunk, batch, encoder, cut_at))
            if not pending:
                return
            chunk = pending.popleft().result()
            for path, line, reason in chunk.faults:
                faults.add(path, line, reason)
            yield chunk


def _encode_chunk(rows: list[SourceRecord], encoder: Encoder, cut_at: int | None) -> Chunk:
    ids: list[int] = []
    trained: list[bool] = []
    chunk = Chunk(np.empty(0, np.uint32), np.empty(0, bool), [], [], [], len(rows))
    for path, line, record in rows:
        try:
            new_ids, new_trained = encoder(record)
        except PunaError as error:
            chunk.faults.append((path, line, str(error)))
            continue
        if encoder.splits and not record[encoder.columns.get("text", "text")].strip():
            chunk.empty += 1
            continue
        if cut_at is not None and len(new_ids) > cut_at:
            chunk.cut += 1
            chunk.cut_tokens += len(new_ids) - cut_at
            new_ids, new_trained = new_ids[:cut_at], new_trained[:cut_at]
        if not any(new_trained[1:]):  # the first token has nothing before it to be predicted from
            where = "has no trained token" if cut_at is None else f"has no trained token within max_length {cut_at}"
            chunk.faults.append((path, line, f"{where}: raise data.max_length, or leave the record out"))
            continue
        ids += new_ids
        trained += new_trained
        chunk.lengths.append(len(new_ids))
        chunk.paths.append(path)
        chunk.lines.append(line)
    chunk.tokens, chunk.trained = np.array(ids, np.uint32), np.array(trained, bool)
    return chunk
