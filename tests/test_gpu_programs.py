"""Our programs as XLA compiles them for an H100: kernels, copies, memory and collectives. No GPU is needed.

`make gpu-check` runs this in an environment of its own and keeps what was found, with the commit, in
benchmarks/results/gpu_check.json.
"""

import json
import os
import re
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import pytest

from cli.gpu import devices_of
from cli.hlo import collective, dimensions
from cli.roofline import is_attention
from infer.load import Quantization
from infer.plan import Compiled, abstract_weights, compile_decode, compile_prefill
from model.config import PRESETS
from model.params import LINEARS, param_specs
from model.quantize import quantizer
from train.config import read_config
from train.plan import Plan, make_plan

pytestmark = [pytest.mark.gpu_program, pytest.mark.slow]

ROOT = Path(__file__).parent.parent
MIB, GIB = 2**20, 2**30
FORMATS = {"bf16": None, "int8": quantizer("int8"), "int4": quantizer("int4"), "nf4": quantizer("nf4")}


@pytest.fixture(scope="module", autouse=True)
def gpus():
    """Eight H100s that are not there."""
    jax.config.update("jax_enable_compilation_cache", False)
    with devices_of("h100", 8) as devices:
        yield devices


@pytest.fixture(scope="module")
def found():
    """`found(what, value, bound)` keeps a row of the table, and fails where a value is above its bound."""
    rows = []

    def keep(what: str, value: float, bound: float | None = None, unit: str = ""):
        rows.append({"what": what, "found": round(value, 4), "bound": bound, "unit": unit})
        if bound is not None:
            assert value <= bound, f"{what}: {value} is above {bound} {unit}"

    yield keep
    if place := os.environ.get("PUNA_GPU_CHECK"):
        run = partial_run("git", "rev-parse", "--short", "HEAD"), partial_run("git", "status", "--porcelain", "-uno")
        setting = {"command": "make gpu-check", "commit": run[0] + ("+" if run[1] else ""), "gpu": "h100"}
        versions = {name: __import__(name).__version__ for name in ("jax", "jaxlib")}
        text = json.dumps({"setting": setting | {"versions": versions}, "rows": rows}, indent=1)
        Path(place).write_text(text + "\n", encoding="utf-8")


def partial_run(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


# --- decoding

TEMPORARIES = {1: 16, 8: 24}  # MiB by the rows: five arrays as large as their logits


@cache
def decoding(layers: int, form: str, rows: int, length: int = 128):
    """The engine's decode program of an 8B model of so many layers, and its weights' shapes."""
    config = replace(PRESETS["llama3-8b"], num_hidden_layers=layers)
    weights = abstract_weights(config, "bfloat16", Quantization(FORMATS[form]))
    with devices_of("h100") as (device,):
        return compile_decode(config, weights, "bfloat16", rows, length, device)


def linear_weights() -> float:
    """The weights of an 8B layer's products."""
    config = PRESETS["llama3-8b"]
    specs = param_specs(config)["layers"]
    sizes = [specs[name].shape for name in LINEARS]
    return sum(rows * columns for _, rows, columns in sizes)


def read_of_weights(made: Compiled) -> float:
    """Bytes read of what the program is given and is larger than 32 KiB: its weights, and a short cache."""
    entry = made.program.computations[made.program.entry]

    def is_given(name: str) -> bool:
        while entry[name].opcode in ("bitcast", "copy"):
            name = entry[name].operands[0]
        return entry[name].opcode == "parameter" and entry[name].bytes > 2**15

    total = 0.0
    for run in made.program.runs:
        if run.computation is entry:
            given = [number for number, name in enumerate(run.instruction.operands) if is_given(name)]
            total += sum(made.program.read(run, number) for number in given)
    return total


@pytest.mark.parametrize("rows", [1, 8])
def test_decoding_reads_weights_and_cache_in_place(found, rows):
    two, four = decoding(2, "bf16", rows, 4096), decoding(4, "bf16", rows, 4096)
    kernels = (len(four.program.runs) - len(two.program.runs)) / 2
    found(f"8B bf16 decode, batch {rows}: kernels a layer", kernels, 20)
    least = rows * PRESETS["llama3-8b"].vocab_size * 4  # logits; the smallest weight is as large as those of 16 rows
    copies = [run for run in four.program.runs if run.instruction.opcode == "copy" and run.instruction.bytes > least]
    found(f"8B bf16 decode, batch {rows}: copies of a weight or a cache", len(copies), 0)
    found(f"8B bf16 decode, batch {rows}: temporaries", four.temporaries / MIB, TEMPORARIES[rows], "MiB")


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize(("form", "bound"), [("int8", 1.05), ("int4", 0.6), ("nf4", 0.6)])
def test_quantized_weights_are_read_as_they_are_stored(found, form, bound, rows):
    """What a layer reads of its codes and scales, and of a short cache. Nothing as large as a weight is written."""
    two, four = decoding(2, form, rows), decoding(4, form, rows)
    a_layer = (read_of_weights(four) - read_of_weights(two)) / 2
    found(f"8B {form} decode, batch {rows}: bytes read for a weight", a_layer / linear_weights(), bound)
    found(f"8B {form} decode, batch {rows}: temporaries", four.temporaries / MIB, TEMPORARIES[rows], "MiB")
    grown = (four.temporaries - two.temporaries) / MIB
    found(f"8B {form} decode, batch {rows}: temporaries of two more layers", grown, 0.1, "MiB")


# --- training


@cache
def training(preset: str, devices: int = 1, rows: int = 1, length: int = 4096, **sections) -> Plan:
    given = {name: dict(section) for name, section in sections.items()}
    config = read_config(
        {
            "model": {"preset": preset, "dtype": "bfloat16"} | given.pop("model", {}),
            "data": {"path": "unread", "max_length": length} | given.pop("data", {}),
            "run": {"batch_size": rows},
            **given,
        }
    )
    with devices_of("h100", devices) as there:
        return make_plan(config, there, options=None)


def frozen(**section):
    """A section of a config as `cache` can take it."""
    return tuple(section.items())


def attention_calls(plan: Plan) -> tuple[int, int]:
    calls = [(run.times, run.instruction.target) for run in plan.program.runs if is_attention(run)]
    backward = sum(times for times, target in calls if "Backward" in target)
    return sum(times for times, _ in calls) - backward, backward


def squares(plan: Plan, length: int) -> set[str]:
    """The shapes of four dimensions of which the last two are a row's length."""
    shapes = {one.shape for computation in plan.program.computations.values() for one in computation.values()}
    every = {found for shape in shapes for found in re.findall(r"\w+\[[\d,]+\]", shape)}
    return {shape for shape in every if len(sizes := dimensions(shape)) == 4 and sizes[2:] == (length, length)}


STEPS = {
    "1B, 4 rows, remat dots": ("llama3.2-1b", {"rows": 4, "model": frozen(remat="dots")}, 18.5),
    "1B, 4 rows, remat full": ("llama3.2-1b", {"rows": 4, "model": frozen(remat="full")}, 14.8),
    "1B, 4 packed rows, remat full": (
        "llama3.2-1b",
        {"rows": 4, "model": frozen(remat="full"), "data": frozen(packing=True)},
        15.0,
    ),
    "8B LoRA": ("llama3-8b", {"model": frozen(remat="full", param_dtype="bfloat16"), "lora": frozen(rank=16)}, 4.3),
    "8B QLoRA nf4": (
        "llama3-8b",
        {"model": frozen(remat="full", param_dtype="bfloat16"), "lora": frozen(rank=16), "quantize": frozen()},
        4.5,
    ),
    "8B QLoRA int8": (
        "llama3-8b",
        {
            "model": frozen(remat="full", param_dtype="bfloat16"),
            "lora": frozen(rank=16),
            "quantize": frozen(method="int8"),
        },
        4.6,
    ),
    "8B full": ("llama3-8b", {"model": frozen(remat="full", param_dtype="bfloat16")}, 18.4),
}


def eight_bit_products(plan: Plan) -> int:
    """How many kernels of a step multiply two arrays of 8-bit floats."""
    total = 0
    for run in plan.program.runs:
        for name, computation in plan.program.computations_of(run):
            for one in computation.values() if name else (run.instruction,):
                if one.opcode == "dot" or one.target.startswith("__cublas"):
                    kinds = [computation[each].shape.split("[")[0] for each in one.operands[:2] if each in computation]
                    total += run.times * (len(kinds) == 2 and all(kind.startswith("f8") for kind in kinds))
    return total


def test_products_in_8_bit_floats_are_kernels_of_two_of_them(found):
    """Of seven weights a layer: forward, forward again under remat, and both gradients."""
    plan = training("llama3.2-1b", rows=4, model=frozen(remat="full", matmul="fp8"))
    a_layer = eight_bit_products(plan) / plan.model.num_hidden_layers
    found("1B fp8, 4 rows, remat full: products of two 8-bit floats a layer", a_layer, None)
    assert a_layer >= 3 * len(LINEARS)
    found("1B fp8, 4 rows, remat full: temporaries", plan.temporaries / GIB, None, "GiB")
    found("1B fp8, 4 rows, remat full: all that it takes", plan.total / GIB, None, "GiB")


@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_one_gpu(found, name):
    """4,096 tokens a row. The bounds of memory are what an earlier program of ours took."""
    preset, sections, bound = STEPS[name]
    plan = training(preset, **sections)
    layers = plan.model.num_hidden_layers
    forward, backward = attention_calls(plan)
    again = 2 if "full" in name or "8B" in name else 1
    found(f"{name}: cuDNN forward calls a layer", forward / layers, again)
    found(f"{name}: cuDNN backward calls a layer", backward / layers, 1)
    assert backward == layers
    if plan.model.hidden_size != 4096:  # 8B's weights are squares of that size
        found(f"{name}: arrays of queries by keys", len(squares(plan, 4096)), 0)
    found(f"{name}: temporaries", plan.temporaries / GIB, bound, "GiB")
    found(f"{name}: all that it takes", plan.total / GIB, None, "GiB")


def test_a_sharded_step_gathers_a_layer_at_a_time(found):
    model = frozen(remat="full", param_dtype="bfloat16")
    plan = training("llama3-8b", devices=8, rows=8, model=model, mesh=frozen(fsdp=8))
    name, traffic = "8B full on 8 GPUs", plan.traffic
    layer = linear_weights() * 2
    every = [collective(plan.program, run) for run in plan.program.runs if run.times > 1]  # in the loops over layers
    in_loops = [one for one in every if one is not None]
    largest = max(one.bytes for one in in_loops if one.kind == "all-gather")
    found(f"{name}: the largest gather over a layer's weights, but for embedding and head", largest / layer, 1)
    reduced = traffic["all-reduce"].bytes / (traffic["reduce-scatter"].bytes + traffic["all-reduce"].bytes)
    found(f"{name}: gradients reduced whole, not scattered", reduced, 0.01)
    waits = [one for one in in_loops if not one.is_asynchronous]
    found(f"{name}: collectives of a layer that are waited for", len(waits), 0)
    all_waits = sum(amount.count - amount.asynchronous for amount in traffic.values())
    found(f"{name}: collectives of a step that are waited for", all_waits, 1)
    found(f"{name}: all that it takes", plan.total / GIB, None, "GiB")


def test_a_prompt_is_read_without_a_copy_of_a_weight(found):
    config = replace(PRESETS["llama3-8b"], num_hidden_layers=2)
    with devices_of("h100") as (device,):
        made = compile_prefill(config, abstract_weights(config, "bfloat16"), "bfloat16", 1, 4096, device)
    copies = [run for run in made.program.runs if run.instruction.opcode == "copy" and run.instruction.bytes > 8 * MIB]
    found("8B bf16, a piece of a prompt: copies above 8 MiB", len(copies), 0)
    found("8B bf16, a piece of a prompt: temporaries", made.temporaries / MIB, None, "MiB")
