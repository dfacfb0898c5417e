"""The reference of preferences: what the model that a run starts from says of them, computed once and kept on disk."""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from cli.files import atomic_path, sha256_of
from model.config import LlamaConfig
from model.params import Params
from model.pieces import code_fingerprint
from train import integrity
from train.data import Datasets, PackedDataset, in_order
from train.data.dataset import cache_folder
from train.loader import prefetch, to_devices
from train.objective import make_log_probs
from train.preference import most_segments
from train.sections import Config
from train.state import abstract_batch

# The code that makes the numbers: what another version of it wrote is not taken for this one's.
CODE = (
    *("model.attention", "model.linear", "model.llama", "model.lora", "model.quantize", "model.ring", "model.rope"),
    *("train.loss", "train.objective", "train.reference"),
)


def with_reference(
    datasets: Datasets,
    config: Config,
    model: LlamaConfig,
    mesh: Mesh,
    params: Params,
    alive: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda line: None,
) -> Datasets:
    """Data sets of preferences with the log-probabilities of their answers under a reference model.

    They are read from the cache where all processes have them, and else computed by all of them together. The name in
    the cache is made of everything that they depend on: rows, weights, the model's config and the code.

    Args:
        datasets: what to go through.
        config: the run's.
        model: the config of `params`.
        mesh: the devices of `params`.
        params: the reference, adapters included; they stay.
        alive: called again and again meanwhile.
        say: shows a line.
    """
    weights = {name: int(value) for name, value in jax.device_get(integrity.fingerprints(params)).items()}
    pieces = {part: code_fingerprint(name, f"model.{part}") for part, name in model.pieces.names().items()}
    code = [sha256_of(Path(str(sys.modules[name].__file__))) for name in CODE]
    described = [weights, repr(model), pieces, config.model.dtype, code]
    log_probs: Any = None

    def one(dataset: PackedDataset) -> PackedDataset:
        nonlocal log_probs
        rows = dataset.rows
        spans = hashlib.sha256(b"".join(x.tobytes() for x in (rows.offsets, rows.start, rows.length))).hexdigest()
        key = hashlib.sha256(json.dumps([described, dataset.digest, spans]).encode()).hexdigest()[:32]
        file = cache_folder(config.data) / f"reference-{key}.npy"
        found = _read(file, (len(dataset), most_segments(config.data.max_length, config.data.packing)))
        if not np.all(multihost_utils.process_allgather(np.array(found is not None))):
            say(f"computing the reference's log-probabilities of {len(dataset):,} rows, once")
            if log_probs is None:
                out = NamedSharding(mesh, PartitionSpec())
                log_probs = jax.jit(make_log_probs(config, model, mesh), out_shardings=out)
            found = _compute(dataset, log_probs, config, mesh, params, alive)
            if jax.process_index() == 0:
                file.parent.mkdir(parents=True, exist_ok=True)
                with atomic_path(file, overwrite=True) as path, path.open("wb") as stream:
                    np.save(stream, found)
        return replace(dataset, reference=found)

    held_out = None if datasets.evaluation is None else one(datasets.evaluation)
    return replace(datasets, train=tuple(map(one, datasets.train)), evaluation=held_out)


def _read(file: Path, shape: tuple[int, int]) -> NDArray[np.float32] | None:
    """What a file of the cache holds; None where it is missing or damaged."""
    try:
        found = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return np.asarray(found) if found.shape == shape and found.dtype == np.float32 else None


def _compute(
    dataset: PackedDataset, log_probs: Any, config: Config, mesh: Mesh, params: Params, alive: Callable[[], None]
) -> NDArray[np.float32]:
    """The log-probabilities of all segments, [R, S], a microbatch at a time."""
    sharding = abstract_batch(config, mesh)["tokens"].sharding
    size = config.run.batch_size // config.run.gradient_accumulation_steps
    plain, shape = replace(dataset, reference=None), (size, config.data.max_length)
    batches = (
        to_devices(lambda start, stop, rows=rows: {k: v[start:stop] for k, v in rows.items()}, sharding, shape)
        for rows in in_order(plain, size)
    )
    parts = []
    with prefetch(batches) as ready:
        for batch in ready:
            parts.append(jax.device_get(log_probs(params, batch)))
            alive()
    return np.concatenate(parts)[: len(dataset)]
