"""What our programs reach on an NVIDIA GPU, in nine minutes: of what it can do, and beside what was predicted.

    python benchmarks/gpu.py                 on a machine with a GPU; needs no network and no data
    python benchmarks/gpu.py --dry-run       anywhere: compiles every program for an H100 (with the extra gpu-plan), and
                                             runs all of them in tiny shapes on the CPU
    python benchmarks/gpu.py --only decoding

Each group is a process with a limit of its own, so that one that hangs or fails costs no other. Every measurement is a
line of JSON as soon as it is made; the table at the end is the same numbers. Weights are random and born on the device.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # the root: this folder has names that packages have

from cli.gpu import ENVIRONMENT

TESTS = ("attention", "llama", "loss", "rope", "sample", "quantize")  # files of tests/ that one device can run
TEST_SECONDS = 55
RESULTS = Path(__file__).parent / "results"
NO_COMPILER = "the compiler for GPUs is not here: the extra gpu-plan, on Python 3.12"


def measure(group: str, tiny: bool, most: int | None = None) -> Iterator[dict[str, Any]]:
    """Runs the programs of a group on the device of this process.

    Args:
        group: a key of GROUPS.
        tiny: in shapes that run anywhere.
        most: so many cases at most.
    """
    import jax

    from benchmarks.gpu_cases import GROUPS

    device, wanted = jax.devices()[0], GROUPS[group]
    if group == "ceilings":
        kinds = [memory.kind for memory in device.addressable_memories()]
        versions = {"jax": jax.__version__, "device": device.device_kind, "memories": kinds}
        yield {"group": group, "name": "versions", **versions}
    for case in itertools.islice(wanted.cases(tiny, device), most):
        row: dict[str, Any] = {"group": group, "name": case.name, "predicted": case.predicted, "of": case.ceiling}
        if case.on_gpu and device.platform != "gpu":
            yield row | {"skipped": "needs hardware: cuDNN runs on NVIDIA GPUs"}
            continue
        try:
            yield row | timed(case, device, 0.0 if tiny else 4.0)
        except Exception as error:  # the next case may yet run
            yield row | {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    if wanted.checks is not None:
        for row in wanted.checks(tiny, device):
            yield {"group": group, **row}


def timed(case: Any, device: Any, seconds: float) -> dict[str, Any]:
    """The time of a case, the least of three calls or of those that fit into `seconds`, and what follows from it."""
    import jax

    from benchmarks.gpu_cases import born

    started = time.perf_counter()
    compiled = case.lower(device).compile()
    compiling = time.perf_counter() - started
    memory = compiled.memory_analysis()
    inputs, place = born(case, device), case.carried
    took = []
    until = time.perf_counter() + seconds
    while len(took) < 3 or (time.perf_counter() < until and len(took) < 20):
        started = time.perf_counter()
        results = jax.block_until_ready(compiled(*inputs))
        took.append(time.perf_counter() - started)
        if place is not None:
            inputs[place] = results[0]
    best = min(took[1:])
    row = {"ms": best * 1e3, "calls": len(took), "compile_s": round(compiling, 1)}
    row["planned_gib"] = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30
    stats = device.memory_stats() or {}
    row |= {"peak_gib": stats["peak_bytes_in_use"] / 2**30} if "peak_bytes_in_use" in stats else {}
    row |= {"GB/s": case.moved / best / 1e9} if case.moved else {}
    row |= {"TFLOP/s": case.flops / best / 1e12} if case.flops else {}
    return row | ({"tokens/s": case.tokens / best} if case.tokens else {})


def compile_all(group: str) -> Iterator[dict[str, Any]]:
    """Compiles the programs of a group, in their real shapes, for an H100 that is not there."""
    from benchmarks.gpu_cases import GROUPS
    from cli.gpu import devices_of, gpu_named, has_compiler
    from cli.hlo import Program
    from cli.roofline import estimate

    if not has_compiler():
        yield {"group": group, "name": f"compile {group}", "skipped": NO_COMPILER}
        return
    with devices_of("h100") as (device,):
        for case in GROUPS[group].cases(False, device):
            started = time.perf_counter()
            row: dict[str, Any] = {"group": group, "name": case.name, "compiled_for": "h100"}
            try:
                compiled = case.lower(device).compile()
            except Exception as error:  # the next case may yet compile
                yield row | {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
                continue
            memory = compiled.memory_analysis()
            made = estimate(Program(compiled.as_text()), gpu_named("h100"))
            yield row | {
                "compile_s": round(time.perf_counter() - started, 1),
                "gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30,
                "temporaries_gib": memory.temp_size_in_bytes / 2**30,
                "roofline_ms": made.seconds * 1e3,
                "predicted": case.predicted,
                "of": case.ceiling,
            }


def run_groups(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every group in a process of its own, until the time is over."""
    from benchmarks.gpu_cases import GROUPS

    rows, deadline = [], time.monotonic() + options.seconds
    modes = ["--compile", "--tiny"] if options.dry_run else ["--run"]
    for group in [options.only] if options.only else GROUPS:
        for mode in modes:
            limit = min(GROUPS[group].seconds if mode == "--run" else 3600, deadline - time.monotonic())
            if limit < 15:
                rows.append({"group": group, "name": group, "skipped": "no time left"})
                continue
            rows += list(child(group, mode, limit, GROUPS[group].environment))
        if group == "attention checks" and not options.dry_run and deadline - time.monotonic() > TEST_SECONDS:
            rows.append(run_tests())
    return rows


def run_tests() -> dict[str, Any]:
    """Our tests of one device on this one, with products of float32 as float32."""
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in TESTS]
    env = os.environ | {"PUNA_TEST_PLATFORM": "cuda", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    command = [
        "timeout",
        "-k",
        "5",
        str(TEST_SECONDS),
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "--no-header",
        *files,
    ]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    row = {"group": "tests", "name": "tests of one device", "said": done.stdout.strip().splitlines()[-1:]}
    return row if done.returncode in (0, 124) else row | {"failed": done.stdout[-600:] + done.stderr[-300:]}


def child(group: str, mode: str, limit: float, environment: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """The rows that a process prints in `limit` seconds."""
    command = [sys.executable, __file__, mode, "--only", group]
    env = ENVIRONMENT | dict(os.environ)
    if mode == "--run":
        env |= environment
    else:
        env["JAX_PLATFORMS"] = "cpu"
    started = subprocess.Popen(["timeout", "-k", "5", f"{limit:.0f}", *command], stdout=subprocess.PIPE, env=env)
    assert started.stdout is not None
    for line in started.stdout:
        if line.startswith(b"{"):
            row = json.loads(line)
            print(json.dumps(row), flush=True)
            yield row
    if code := started.wait():
        yield {"group": group, "name": group, "failed": f"{mode} ended with {code} ({limit:.0f} s were given)"}


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The measurements beside the predictions."""
    best = {row["name"]: row for row in rows}
    read = best.get("read 8 GiB", {}).get("GB/s")
    bf16 = best.get("product 8192, bf16", {}).get("TFLOP/s")
    ceilings = {"read": (read, "GB/s"), "bf16": (bf16, "TFLOP/s")}
    yield f"{'':<34}{'ms':>10}{'GB/s':>9}{'TFLOP/s':>9}{'tok/s':>10}{'reached':>9}{'predicted':>10}"
    for row in rows:
        if note := row.get("skipped") or row.get("failed"):
            yield f"{row['name']:<34}  {note}"
        elif "ms" in row:
            whole, unit = ceilings.get(row["of"], (None, ""))
            if row["of"] == "sheet":
                whole, unit = (989.4, "TFLOP/s") if "TFLOP/s" in row else (3352.0, "GB/s")
            reached = f"{row[unit] / whole:.2f}" if whole and unit in row else ""
            numbers = (f"{row[key]:.1f}" if key in row else "" for key in ("GB/s", "TFLOP/s", "tokens/s"))
            moved, flops, tokens = numbers
            predicted = "" if row["predicted"] is None else f"{row['predicted']:.2f}"
            yield f"{row['name']:<34}{row['ms']:>10.3f}{moved:>9}{flops:>9}{tokens:>10}{reached:>9}{predicted:>10}"
        elif "roofline_ms" in row:
            yield f"{row['name']:<34}{row['roofline_ms']:>10.3f} by the roofline, {row['gib']:.1f} GiB, for an H100"
        elif "of the largest number" in row:
            errors = "  ".join(f"{what} {far:.1e}" for what, far in row["of the largest number"].items())
            yield f"{row['name']:<34}  {errors}  {'the same bits' if row['repeats'] else 'other bits'} three times"
        elif "said" in row:
            yield f"{row['name']:<34}  {' '.join(row['said'])}"


def main() -> None:
    from benchmarks.gpu_cases import GROUPS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--only", choices=GROUPS)
    parser.add_argument("--seconds", type=float)
    for mode in ("--run", "--tiny", "--compile"):  # what a process of a group does
        parser.add_argument(mode, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.seconds is None:
        options.seconds = 7200.0 if options.dry_run else 520.0
    if options.run or options.tiny or options.compile:
        for row in compile_all(options.only) if options.compile else measure(options.only, options.tiny):
            print(json.dumps(row), flush=True)
        return
    rows = run_groups(options)
    print("\n".join(table(rows)))
    is_whole = not options.only and not any(row.get("skipped") == NO_COMPILER for row in rows)
    if is_whole:
        name, command = ("gpu_dry_run", " --dry-run") if options.dry_run else ("gpu_h100", "")
        setting = {"command": f"python benchmarks/gpu.py{command}", "versions": versions()}
        (RESULTS / f"{name}.json").write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")
    if any("failed" in row for row in rows):
        sys.exit(1)


def versions() -> dict[str, str]:
    """Those of what was measured with."""
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}


if __name__ == "__main__":
    main()
