"""Which rows a step sees, as a pure function of seed and step: nothing to save, nothing to replay on resuming."""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from model.errors import PunaError
from train.data.dataset import Datasets, HostBatch, PackedDataset
from train.data.permute import mix_key, permute

PERIOD = 1024  # rows in which a mixture has each source exactly at its share


class Sampler:
    """Global batches, each a function of its step.

    Without weights an epoch is every row of all data sets once, in a random order of its own, cut into batches. Its
    last batch is filled up with empty rows, which hold no token and no target: it has the shape of the others, and
    loss and metrics are those of its rows. With weights the rows are one endless sequence: each run of PERIOD of them
    has every data set at its share, in random order, and each data set is gone through in epochs of its own.

    Args:
        datasets: what to draw from; the held-out rows are not.
        batch_size: rows of a batch, B.
        seed: of all random orders.

    Raises:
        PunaError: a weight is so small a part of their sum that its data set would not be drawn.
    """

    def __init__(self, datasets: Datasets, batch_size: int, seed: int = 0):
        self.datasets, self.batch_size, self.seed = datasets.train, batch_size, seed
        self.sizes = [len(dataset) for dataset in self.datasets]
        self.begins = np.concatenate([[0], np.cumsum(self.sizes)])
        self.shares = None if datasets.weights is None else _shares(datasets.weights)

    @property
    def num_rows(self) -> int:
        """Rows in an epoch."""
        return int(self.begins[-1])

    @property
    def steps_in_epoch(self) -> int:
        """Batches in an epoch."""
        return -(-self.num_rows // self.batch_size)

    def steps(self, epochs: float) -> int:
        """How many steps so many epochs take; a part of an epoch is rounded up to whole batches."""
        one = self.steps_in_epoch if self.shares is None else self.num_rows / self.batch_size
        return math.ceil(epochs * one)

    def epoch(self, step: int) -> float:
        """Epochs gone through before `step`; in a mixture, as if all rows were drawn alike."""
        if self.shares is not None:
            return step * self.batch_size / self.num_rows
        epoch, steps = divmod(step, self.steps_in_epoch)
        return epoch + steps * self.batch_size / self.num_rows

    def rows(self, step: int, start: int = 0, stop: int | None = None) -> NDArray[np.int64]:
        """The numbers, over all data sets, of rows of a global batch.

        Args:
            step: whose batch, from 0.
            start: the first row of it.
            stop: the row after the last; None for the end.

        Returns:
            int64 [stop - start], or fewer in the last batch of an epoch.
        """
        places = np.arange(start, self.batch_size if stop is None else stop)
        if self.shares is None:
            epoch, number = divmod(step, self.steps_in_epoch)
            index = number * self.batch_size + places
            return self._shuffle(index[index < self.num_rows] + epoch * self.num_rows, 0, self.num_rows)
        samples = step * self.batch_size + places
        blocks, slots = np.divmod(samples, PERIOD)
        source, drawn = np.empty((2, len(samples)), np.int64)
        for block in np.unique(blocks):
            mine = blocks == block
            chosen, ranks = _deal(self.shares, mix_key(self.seed, 3, int(block)))
            source[mine] = chosen[slots[mine]]
            drawn[mine] = block * self.shares[source[mine]] + ranks[slots[mine]]
        rows = self.begins[source]
        for number in np.unique(source):
            mine = source == number
            rows[mine] += self._shuffle(drawn[mine], int(number) + 1, self.sizes[number])
        return rows

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> HostBatch:
        """Rows `start` to `stop` of the global batch of `step`, as in `rows`.

        What a row holds does not depend on how the batch is divided among processes.

        Returns:
            What `PackedDataset.batch` documents, and "rows", int32 [stop - start], the numbers that `where` takes, -1
            for an empty row.
        """
        rows = np.full((self.batch_size if stop is None else stop) - start, -1)
        found = self.rows(step, start, stop)
        rows[: len(found)] = found
        source = np.where(rows < 0, -1, self._source(rows))
        batch = self.datasets[0].batch(np.full(len(rows), -1))
        for number in np.unique(source[rows >= 0]):
            mine = source == number
            for name, values in self.datasets[number].batch(rows[mine] - self.begins[number]).items():
                batch[name][mine] = values
        return batch | {"rows": rows.astype(np.int32)}

    def _source(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self.begins, rows, side="right") - 1

    def where(self, row: int) -> list[str]:
        """`path:line` of every example in the row with this number."""
        source = int(self._source(np.array([row]))[0])
        return self.datasets[source].where(row - int(self.begins[source]))

    def _shuffle(self, samples: NDArray[np.int64], stream: int, size: int) -> NDArray[np.int64]:
        epochs, index = np.divmod(samples, size)
        keys = {epoch: mix_key(self.seed, 2, stream, epoch)[0] for epoch in set(epochs.tolist())}
        return permute(index, size, np.array([keys[epoch] for epoch in epochs.tolist()], np.uint64))


def _deal(shares: NDArray[np.int64], keys: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each slot of a block of PERIOD samples: its data set, and how many of that set's slots come before."""
    chosen = np.repeat(np.arange(len(shares)), shares)[permute(np.arange(PERIOD), PERIOD, keys)]
    ranks = np.empty(PERIOD, np.int64)
    for number, share in enumerate(shares):
        ranks[chosen == number] = np.arange(share)
    return chosen, ranks


def _shares(weights: tuple[float, ...]) -> NDArray[np.int64]:
    """Slots of PERIOD in proportion to `weights`, by largest remainder. Raises PunaError where one gets none."""
    exact = np.array(weights) / sum(weights) * PERIOD
    shares = np.floor(exact).astype(np.int64)
    for number in np.argsort(shares - exact, kind="stable")[: PERIOD - shares.sum()]:
        shares[number] += 1
    if not shares.all():
        raise PunaError(f"data.path: a weight is under {1 / PERIOD:.4f} of their sum, too little to be drawn: raise it")
    return shares


def in_order(dataset: PackedDataset, batch_size: int) -> Iterator[HostBatch]:
    """Every row once, as evaluation reads them.

    Yields:
        Batches of `batch_size` rows, as of `Sampler.batch`; empty rows, with -1 in "rows", fill the last one.
    """
    for start in range(0, len(dataset), batch_size):
        rows = np.arange(start, start + batch_size)
        rows[rows >= len(dataset)] = -1
        yield dataset.batch(rows) | {"rows": rows.astype(np.int32)}
