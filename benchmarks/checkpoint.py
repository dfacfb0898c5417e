"""Checkpoints against a raw write of the same bytes: how long a save blocks, writes and verifies, and a restore takes.

A float32 training state (weights and two moments) lies on eight virtual CPU devices, `fsdp=8`. Each save is timed twice
over: until `save` returns, which is what training waits for, and until it is on disk with its manifest. The raw write
is one file of the same bytes, with fsync, in the same folder; the raw read is the same file. Files are read from the
page cache. Restores verify every file and every array; "other mesh" is `fsdp=2, tensor=4`.

    python benchmarks/checkpoint.py [--gigabytes 0.5 5] [--folder /tmp]

prints a table and writes benchmarks/results/checkpoint.json. It needs three times the bytes on disk.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parent.parent)  # the root: this folder has names that packages have

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from convert import manifest
from model.sharding import make_mesh
from train.checkpoint import Checkpoints

RESULT = Path(__file__).parent / "results" / "checkpoint.json"
SAVES = 3
LAYERS, WIDTH = 8, 2048


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def make_state(size: float, mesh: Any) -> Any:
    """About `size` bytes: weights [layers, WIDTH, columns] and their two moments."""
    columns = max(8, round(size / 3 / 4 / LAYERS / WIDTH / 64) * 64)
    sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))

    def born(seed: int) -> jax.Array:
        values = jax.random.normal(jax.random.key(seed), (LAYERS, WIDTH, columns), jnp.float32)
        return jax.lax.with_sharding_constraint(values, sharding)

    make = jax.jit(lambda: {"params": {"w": born(0)}, "mu": {"w": born(1)}, "nu": {"w": born(2)}})
    return jax.block_until_ready(make())


def abstract(state: Any, mesh: Any) -> Any:
    sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def write_raw(path: Path, state: Any) -> None:
    with open(path, "wb", buffering=0) as file:
        for array in jax.tree.leaves(state):
            for shard in array.addressable_shards:
                file.write(np.asarray(shard.data).data)
        os.fsync(file.fileno())


def read_raw(path: Path) -> None:
    buffer = bytearray(64 << 20)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def measure(folder: Path, gigabytes: float) -> dict[str, Any]:
    mesh, other = make_mesh(fsdp=8), make_mesh(fsdp=2, tensor=4)
    state = make_state(gigabytes * 1e9, mesh)
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    raw_write, raw_read, blocked, written = [], [], [], []
    checkpoints = Checkpoints(folder / "checkpoints", keep_last=1)
    for step in range(1, SAVES + 1):  # raw writes and saves take turns
        raw_write.append(seconds(lambda: write_raw(folder / "raw", state)))
        raw_read.append(seconds(lambda: read_raw(folder / "raw")))
        (folder / "raw").unlink()
        start = time.perf_counter()
        checkpoints.save(step, state, {"step": step}, {})
        blocked.append(time.perf_counter() - start)
        checkpoints.wait()
        written.append(time.perf_counter() - start)
    newest = checkpoints.directory / str(SAVES)
    verified = min(seconds(lambda: manifest.damaged_files(newest)) for _ in range(SAVES))
    restored = {}
    for name, on in (("same mesh", mesh), ("other mesh", other)):
        target = abstract(state, on)
        times = [seconds(lambda target=target: restore(folder, target)) for _ in range(SAVES)]
        restored[name] = statistics.median(times)
    shutil.rmtree(folder / "checkpoints")
    return {
        "gigabytes": round(size / 1e9, 2),
        "raw_write_s": round(statistics.median(raw_write), 3),
        "raw_read_s": round(statistics.median(raw_read), 3),
        "save_first_blocks_s": round(blocked[0], 3),
        "save_blocks_s": round(statistics.median(blocked[1:]), 3),
        "save_s": round(statistics.median(written), 3),
        "save_in_raw_writes": round(statistics.median(written) / statistics.median(raw_write), 2),
        "verify_s": round(verified, 3),
        **{f"restore_{name.replace(' ', '_')}_s": round(value, 3) for name, value in restored.items()},
    }


def restore(folder: Path, target: Any) -> None:
    """What a run that starts again does: a new manager, every file hashed, every array read and checked."""
    state, _, _ = Checkpoints(folder / "checkpoints").restore(target)
    jax.block_until_ready(state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.5, 5.0])
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    rows = []
    for gigabytes in arguments.gigabytes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            rows.append(measure(Path(name), gigabytes))
    result = {
        "command": " ".join(["python", "benchmarks/checkpoint.py", *sys.argv[1:]]),
        "setting": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "devices": 8},
        "checkpoints": rows,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    table = Table("", *(f"{row['gigabytes']} GB" for row in rows))
    for name in list(rows[0])[1:]:
        table.add_row(name, *(str(row[name]) for row in rows))
    Console().print(table)


if __name__ == "__main__":
    main()
