"""How examples become rows of one length: spans of the token stream, placed into rows.

A row is a list of spans, a span is a run of one example's tokens, and no token is copied to make them.
"""

import bisect
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class PackedRows:
    """R rows of S spans; a span is `length[s]` tokens from `start[s]` on.

    Attributes:
        offsets: [R + 1]; row r holds spans `offsets[r]` to `offsets[r + 1]`.
        start: [S].
        length: [S].
        joined: whether the spans of a row are one segment: each goes on from the one before.
    """

    offsets: NDArray[np.int64]
    start: NDArray[np.int64]
    length: NDArray[np.int64]
    joined: bool = False

    def __len__(self) -> int:
        return len(self.offsets) - 1


def split_spans(
    start: NDArray[np.int64], lengths: NDArray[np.int64], max_length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The spans that cover examples, none longer than a row.

    A longer example becomes several spans, each starting with the last token of the one before: that token is context
    there and target here, so every token but an example's first is a target exactly once.

    Args:
        start: [E], where each example begins.
        lengths: [E], its tokens.
        max_length: tokens in a row.

    Returns:
        Start and length of each span, [S] each.
    """
    parts = np.maximum(1, -(-(lengths - 1) // (max_length - 1)))
    example = np.repeat(np.arange(len(lengths)), parts)
    part = np.arange(len(example)) - np.repeat(np.cumsum(parts) - parts, parts)
    inside = part * (max_length - 1)
    return start[example] + inside, np.minimum(max_length, lengths[example] - inside)


def padded(start: NDArray[np.int64], length: NDArray[np.int64]) -> PackedRows:
    """One span a row.

    Args:
        start: [S], the first token of each span.
        length: [S], its tokens.
    """
    return PackedRows(np.arange(len(start) + 1), start, length)


def wrapped(start: NDArray[np.int64], length: NDArray[np.int64], max_length: int) -> PackedRows:
    """Examples joined and cut every `max_length` tokens, whatever they hold; the last incomplete row is left out.

    This is transformers' run_clm grouping (and Chinese-LLaMA's pre-training): a row attends across its documents.

    Args:
        start: [E], the first token of each example.
        length: [E], its tokens.
        max_length: tokens in a row.
    """
    begins = np.cumsum(length) - length  # of each example in what they make joined
    goes_on = np.zeros(len(start), bool)  # whether it lies behind the one before already
    goes_on[1:] = start[1:] == start[:-1] + length[:-1]
    start, begins = start[~goes_on], begins[~goes_on]
    rows = int(length.sum()) // max_length
    cuts = np.union1d(begins, np.arange(rows) * max_length)
    cuts = cuts[cuts < rows * max_length]
    run = np.searchsorted(begins, cuts, side="right") - 1
    offsets = np.searchsorted(cuts, np.arange(rows + 1) * max_length)
    return PackedRows(offsets, start[run] + cuts - begins[run], np.diff(cuts, append=rows * max_length), joined=True)


def in_pairs(rows: PackedRows, start: NDArray[np.int64], chosen: NDArray[np.int64]) -> PackedRows:
    """Rows of preferences with each span in two: the chosen answer, and behind it the rejected one.

    Args:
        rows: with a whole preference in each span.
        start: [E], where each preference begins, rising.
        chosen: [E], how many of its tokens are the chosen answer with its prompt.
    """
    first = chosen[np.searchsorted(start, rows.start)]
    starts = np.stack([rows.start, rows.start + first], axis=1).reshape(-1)
    lengths = np.stack([first, rows.length - first], axis=1).reshape(-1)
    return PackedRows(2 * rows.offsets, starts, lengths)


def best_fit_decreasing(start: NDArray[np.int64], length: NDArray[np.int64], max_length: int) -> PackedRows:
    """Spans from the longest to the shortest, each into the fullest row that has room (arXiv:2404.10830).

    Deterministic: spans of one length keep their order, and of equally full rows the last opened is filled.

    Args:
        start: [S], the first token of each span.
        length: [S], its tokens, `max_length` at most.
        max_length: tokens in a row.
    """
    order = np.argsort(-length, kind="stable")
    members: list[list[int]] = []
    rows_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of rows_by_room, sorted
    for span in order.tolist():
        size = int(length[span])
        place = bisect.bisect_left(rooms, size)
        if place == len(rooms):
            row, room = len(members), max_length
            members.append([])
        else:
            room = rooms[place]
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                del rows_by_room[room], rooms[place]
        members[row].append(span)
        left = room - size
        if left > 1:  # no example is shorter than two tokens
            if left not in rows_by_room:
                rows_by_room[left] = []
                bisect.insort(rooms, left)
            rows_by_room[left].append(row)
    spans = np.array([span for row in members for span in row], np.int64)
    return PackedRows(np.cumsum([0, *map(len, members)]), start[spans], length[spans])


def select(rows: PackedRows, chosen: NDArray[np.int64]) -> PackedRows:
    """Some of the rows.

    Args:
        rows: all of them.
        chosen: [N], their numbers, in the order wanted.
    """
    counts = np.diff(rows.offsets)[chosen]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    spans = np.repeat(rows.offsets[:-1][chosen] - offsets[:-1], counts) + np.arange(offsets[-1])
    return PackedRows(offsets, rows.start[spans], rows.length[spans], rows.joined)
