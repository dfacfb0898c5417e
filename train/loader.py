"""Batches on their devices before they are asked for: each process makes its rows of the global batch in a thread."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Sharding

from train.data.dataset import HostBatch
from train.objective import Batch

T = TypeVar("T")


def local_rows(sharding: Sharding, shape: tuple[int, ...]) -> slice:
    """The rows of a global array from the first to the last that this process's devices hold.

    Args:
        sharding: the array's.
        shape: the array's, of which the first axis is rows.
    """
    held = [index[0].indices(shape[0]) for index in sharding.addressable_devices_indices_map(shape).values() if index]
    return slice(min(start for start, _, _ in held), max(stop for _, stop, _ in held))


def to_devices(rows: Callable[[int, int], HostBatch], sharding: Sharding, shape: tuple[int, int]) -> Batch:
    """The global batch, each device with its own rows; a process makes its `local_rows` only.

    Args:
        rows: `rows(start, stop)` -> these rows of the batch, [stop - start, ...] each.
        sharding: of each array.
        shape: (B, T).

    Returns:
        Global arrays, [B, ...], of all but the numbers of the rows.
    """
    mine = local_rows(sharding, shape)
    local = rows(mine.start, mine.stop)

    def place(values: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            start, stop, _ = (index or (slice(None),))[0].indices(shape[0])
            return values[start - mine.start : stop - mine.start]

        return jax.make_array_from_callback((shape[0], *values.shape[1:]), sharding, part)

    return {key: place(values) for key, values in local.items() if key != "rows"}


@contextmanager
def prefetch(items: Iterable[T], depth: int = 2) -> Iterator[Iterator[T]]:
    """Makes `items` in a thread, ahead of their use; a context, at whose end the thread is gone.

    Args:
        items: what to go through.
        depth: how many are kept ready.

    Yields:
        An iterator over the items, which raises what making them raised.
    """
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: T | None, error: BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                ready.put((item, error), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(item, None):
                    return
            put(None, StopIteration())
        except BaseException as error:
            put(None, error)

    def drain() -> Iterator[T]:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            assert item is not None
            yield item

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        yield drain()
    finally:
        stopped.set()
        thread.join()
