"""Data: strict readers, one `encode`, rows tokenized and packed once, and a sampler that is a function of the step.

    datasets = load_dataset(config, tokenizer)      # DataConfig -> Datasets(train, weights, evaluation)
    for dataset in datasets.train:
        print(dataset.counts)                       # read, cut, split, masked ...
    sampler = Sampler(datasets, batch_size, seed)
    batch = sampler.batch(step)                     # tokens, labels (shifted targets), segments, rows
    mine = sampler.batch(step, start, stop)         # only these rows of the same global batch
    for batch in in_order(datasets.evaluation, batch_size): ...

`encode` is one record to ids and unshifted labels; `PackedDataset.batch` documents what a batch holds.
"""

from train.data.config import DataConfig, DataSource
from train.data.dataset import Datasets, PackedDataset, load_dataset
from train.data.encode import IGNORE_INDEX, encode
from train.data.sampler import Sampler, in_order

__all__ = [
    "IGNORE_INDEX",
    "DataConfig",
    "Datasets",
    "PackedDataset",
    "Sampler",
    "DataSource",
    "encode",
    "in_order",
    "load_dataset",
]
