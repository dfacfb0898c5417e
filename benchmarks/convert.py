"""Conversion of a 7B-shaped model: peak memory, whatever the depth, and rates against a plain copy of the same bytes.

A synthetic bfloat16 LLaMA in Hugging Face's format goes to Orbax and back, and to Meta and back, each step a
`python -m convert model` of its own whose anonymous memory (RssAnon of /proc) is sampled. A quarter of the layers is
done first: the peaks must be the same. Then `load_model` of a 1B-shaped folder is timed, a 7B-shaped folder is loaded
as nf4 with double quantization, and 7B- and 13B-shaped ones are converted to nf4 and int8 folders for their sizes.
Loading eight 7B-shaped layers for decoding is held against what it keeps, read layer by layer and by way of the stack.
Copies and conversions alike are timed until their bytes are on disk.

    python benchmarks/convert.py [--layers 32] [--folder /tmp] [--parts conversions load layout quantize sizes]

prints a table and writes benchmarks/results/convert.json, where the parts not run stay as they were. It needs 42 GB of
disk; --layers 4 makes do with 7.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "convert.json"
GIB = 2**30
PARTS = ("conversions", "load", "layout", "quantize", "sizes")
STEPS = (("hf", "orbax"), ("orbax", "hf"), ("hf", "meta"), ("meta", "hf"))

# Children run from the root: there `convert` is the package and not this file.
MAKE = """
import sys
from dataclasses import replace
from pathlib import Path
import ml_dtypes, numpy as np
from convert.checkpoint import Checkpoint
from convert.names import parameters
from convert.save import write_model
from convert.lazy import LazyTensor
from model.config import PRESETS

folder, preset, layers = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
config = PRESETS[preset]
config = replace(config, num_hidden_layers=layers or config.num_hidden_layers)
numbers = np.random.default_rng(0).normal(0, 0.02, 2**24).astype(ml_dtypes.bfloat16)

def tensor(seed, shape):
    start = seed * 7919 % 2**23  # no two tensors alike
    return LazyTensor(shape, numbers.dtype, lambda index: np.resize(numbers[start:], shape)[index], "random numbers")

tensors = {
    param.name: param.swap_layout(tensor(seed, param.foreign_shape)) for seed, param in enumerate(parameters(config))
}
write_model(folder, Checkpoint(config, tensors, folder, "hf"))
"""
QUANTIZE = """
import sys, time
from functools import partial
import jax
from convert import load_model
from model.quantize import quantize

jax.config.update("jax_platforms", "cpu")
jax.numpy.zeros(())
start = time.perf_counter()
params = load_model(sys.argv[1], quantize=partial(quantize, format="nf4", double=True))[1]
jax.block_until_ready(params)
seconds = time.perf_counter() - start
print(seconds, sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)) / 2**30)
"""
LOAD = """
import sys, time
import jax
from convert import load_model

jax.config.update("jax_platforms", "cpu")
jax.numpy.zeros(())  # the backend starts before the clock
start = time.perf_counter()
jax.block_until_ready(load_model(sys.argv[1])[1])
print(time.perf_counter() - start)
"""


LAYOUT = """
import sys
from pathlib import Path
import jax
from convert import load_model
from model.layout import per_layer

def anonymous():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

jax.config.update("jax_platforms", "cpu")
jax.numpy.zeros(()).block_until_ready()
before = anonymous()
if sys.argv[2] == "per_layer":
    params = load_model(sys.argv[1], layout="per_layer")[1]
else:
    params = per_layer(load_model(sys.argv[1])[1])
leaves = jax.tree.leaves(jax.block_until_ready(params))
layer = sum(x.nbytes for x in jax.tree.leaves(params["layers"][0]))
print(before, sum({id(x): x.nbytes for x in leaves}.values()), max(layer, *(x.nbytes for x in leaves)))
"""


def child(*arguments: str) -> tuple[float, float, str]:
    """Run Python with these arguments: seconds until its output is on disk, peak GiB of anonymous memory, stdout."""
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    peaks = [0]
    watcher = threading.Thread(target=watch, args=(process, peaks))
    watcher.start()
    output = process.communicate()[0]
    watcher.join()
    if process.returncode:
        sys.exit(f"{' '.join(arguments)[-80:]} failed")
    os.sync()
    return time.perf_counter() - start, max(peaks) / GIB, output


def watch(process: subprocess.Popen[str], peaks: list[int]) -> None:
    """Note the process's anonymous resident memory every 10 ms."""
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        with suppress(ProcessLookupError):  # it has just ended
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
            peaks.append(int(fields.get("RssAnon", "0 kB").split()[0]) * 1024)
        time.sleep(0.01)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def copy_seconds(folder: Path) -> float:
    """A plain copy, until it is on disk."""
    os.sync()
    start = time.perf_counter()
    shutil.copytree(folder, folder.parent / "copy")
    os.sync()
    seconds = time.perf_counter() - start
    shutil.rmtree(folder.parent / "copy")
    return seconds


def round_trips(work: Path, layers: int) -> dict[str, Any]:
    """Convert a 7B-shaped model of so many layers there and back; the last step's bytes are checked."""
    source = work / "hf"
    child("-c", MAKE, str(source), "llama-7b", str(layers))
    copied = size(source) / copy_seconds(source)
    result: dict[str, Any] = {
        "layers": layers,
        "gigabytes": round(size(source) / 1e9, 2),
        "copy_gb_s": round(copied / 1e9, 3),
    }
    for here, there in STEPS:
        origin = source if here == "hf" else work / here
        target = work / ("back" if there == "hf" else there)
        seconds, peak, _ = child("-m", "convert", "model", str(origin), str(target), "--to", there)
        rate = size(target) / seconds
        result[f"{here} to {there}"] = {
            "gb_s": round(rate / 1e9, 3),
            "of_copy": round(rate / copied, 2),
            "peak_gib": round(peak, 2),
        }
        if there == "hf":
            child("-m", "convert", "verify", str(source), str(target), "--tokens", "0")
            shutil.rmtree(target)
            shutil.rmtree(origin)
    shutil.rmtree(source)
    return result


def loading(work: Path) -> dict[str, float]:
    """`load_model` of a 1B-shaped folder, in a process that has started JAX, against a copy of the folder."""
    child("-c", MAKE, str(work / "hf"), "llama3.2-1b", "0")
    copied = copy_seconds(work / "hf")
    _, peak, output = child("-c", LOAD, str(work / "hf"))
    seconds, held = float(output), size(work / "hf")
    shutil.rmtree(work / "hf")
    return {
        "gigabytes": round(held / 1e9, 2),
        "copy_s": round(copied, 2),
        "load_s": round(seconds, 2),
        "copies": round(seconds / copied, 2),
        "peak_gib": round(peak, 2),
    }


def layouts(work: Path) -> dict[str, Any]:
    """Loading for decoding: GiB kept, GiB of the largest layer or table, and the peak beyond what the process had.

    `of_kept` is the peak, less the largest layer or table, over what is kept.
    """
    child("-c", MAKE, str(work / "hf"), "llama-7b", "8")
    found: dict[str, Any] = {}
    for way in ("per_layer", "by way of the stack"):
        _, peak, output = child("-c", LAYOUT, str(work / "hf"), way)
        before, kept, largest = (int(number) / GIB for number in output.split())
        found[way] = {
            "kept_gib": round(kept, 3),
            "largest_gib": round(largest, 3),
            "peak_gib": round(peak - before, 3),
            "of_kept": round((peak - before - largest) / kept, 3),
        }
    shutil.rmtree(work / "hf")
    return found


def quantizing(work: Path, layers: int) -> dict[str, float]:
    """`load_model` of a 7B-shaped folder as nf4: seconds, GiB of the result, and the peak of anonymous memory."""
    child("-c", MAKE, str(work / "hf"), "llama-7b", str(layers))
    _, peak, output = child("-c", QUANTIZE, str(work / "hf"))
    seconds, held = map(float, output.split())
    found = {"layers": layers, "gigabytes": round(size(work / "hf") / 1e9, 2), "seconds": round(seconds, 1)}
    shutil.rmtree(work / "hf")
    return found | {"held_gib": round(held, 2), "peak_gib": round(peak, 2)}


def sizes(work: Path, preset: str, layers: int) -> dict[str, Any]:
    """A folder of that shape (0: all its layers) converted to nf4 and int8: seconds, GiB on disk, and the peak."""
    found: dict[str, Any] = {}
    child("-c", MAKE, str(work / "hf"), preset, str(layers))
    for format in ("nf4", "int8"):
        target = work / format
        command = ("convert", "model", str(work / "hf"), str(target), "--to", "hf", "--quantize", format)
        seconds, peak, _ = child("-m", *command)
        found[format] = {
            "seconds": round(seconds, 1),
            "disk_gib": round(size(target) / GIB, 3),
            "peak_gib": round(peak, 2),
        }
        shutil.rmtree(target)
    shutil.rmtree(work / "hf")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=0, help="of every shape; by default its own")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args()
    layers = arguments.layers or 32
    result: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    result["setting"] = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        measures = {
            "conversions": lambda: [round_trips(Path(name), depth) for depth in (max(layers // 4, 1), layers)],
            "load": lambda: loading(Path(name)),
            "layout": lambda: layouts(Path(name)),
            "quantize": lambda: quantizing(Path(name), layers),
            "sizes": lambda: {p: sizes(Path(name), p, arguments.layers) for p in ("llama-7b", "llama-13b")},
        }
        for part in arguments.parts:
            result[part] = {"command": " ".join(["python", "benchmarks/convert.py", *sys.argv[1:]])}
            result[part]["figures"] = measures[part]()
            RESULT.parent.mkdir(exist_ok=True)
            RESULT.write_text(json.dumps(result, indent=2) + "\n")
    show(result)


def show(result: dict[str, Any]) -> None:
    table = Table("step", "layers", "GB/s", "of a copy", "peak GiB")
    for here, there in STEPS:
        for trip in result.get("conversions", {}).get("figures", ()):
            step = trip[f"{here} to {there}"]
            row = (f"{here} to {there}", trip["layers"], step["gb_s"], step["of_copy"], step["peak_gib"])
            table.add_row(*map(str, row))
    Console().print(table)
    if "load" in result:
        load = result["load"]["figures"]
        print(f"load_model of {load['gigabytes']} GB: {load['load_s']} s, {load['copies']} times a copy")
    for way, found in result.get("layout", {}).get("figures", {}).items():
        print(
            f"loaded for decoding, {way}: " + "keeps {kept_gib} GiB, peak {peak_gib}, {of_kept} of it".format(**found)
        )
    if "quantize" in result:
        print(
            "loaded as nf4: {seconds} s, {held_gib} GiB held, peak {peak_gib} GiB".format(
                **result["quantize"]["figures"]
            )
        )
    for preset, formats in result.get("sizes", {}).get("figures", {}).items():
        for format, found in formats.items():
            print(
                f"{preset} as {format}: " + "{seconds} s, {disk_gib} GiB on disk, peak {peak_gib} GiB".format(**found)
            )


if __name__ == "__main__":
    main()
