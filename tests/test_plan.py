"""The plan against what it predicts: memory against a real run, collectives against theory, FLOPs by hand."""

import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from convert import save_model
from model import LlamaConfig, init_params
from train import cost, plan_gpu
from train.config import read_config
from train.plan import alternatives, differences, make_plan, report, suggest, use_virtual_devices
from train.sections import Config, QuantizeConfig
from train.start import base_of, mesh_of
from train.state import abstract_base, base_params, quantize_linears

ROOT = Path(__file__).parent.parent


def small(mesh: dict, accumulation: int = 1, sequence_parallel: bool = False, **model) -> Config:
    """A LLaMA of 4 layers and 6 million parameters on eight devices."""
    dims = {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 8, "max_position_embeddings": 128, "tokenizer": "unused"}
    return read_config(
        {
            "model": dims | heads | model,
            "data": {"path": "unused", "max_length": 128},
            "mesh": {"data": 1, "fsdp": 1, "tensor": 1, "sequence_parallel": sequence_parallel} | mesh,
            "run": {"batch_size": 16, "gradient_accumulation_steps": accumulation},
        }
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        small({"fsdp": 8}),
        small({"tensor": 8}),
        small({"fsdp": 4, "tensor": 2}),
        small({"data": 2, "fsdp": 4}, accumulation=2),
        small({"data": 8}, tie_word_embeddings=True),
        small({"fsdp": 4, "tensor": 2}, remat="full", sequence_parallel=True),
    ],
    ids=["fsdp", "tensor", "fsdp-tensor", "data-fsdp-accumulated", "data-tied", "sequence-parallel"],
)
def test_collectives_are_within_two_per_cent_of_theory(config):
    plan = make_plan(config)
    assert plan.gathered[0] == pytest.approx(plan.gathered[1], rel=0.02)
    assert plan.reduced[0] == pytest.approx(plan.reduced[1], rel=0.02)


@pytest.mark.slow
def test_state_is_counted_shard_by_shard():
    plan = make_plan(small({"fsdp": 8}))
    whole = make_plan(small({"data": 8}))
    matrices = whole.parameters - 9 * 256 * 4  # the norms stay whole everywhere
    assert plan.parameters == matrices / 8 + 9 * 256 * 4
    assert plan.optimizer == 2 * plan.parameters + 4  # AdamW's two moments and its count
    assert plan.total == plan.parameters + plan.optimizer + plan.gradients + plan.activations


def test_flops_count_loops_and_shards():
    @jax.jit
    def loop(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    x, w = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((5, 16, 16), jnp.float32)
    assert cost.flops(jax.make_jaxpr(loop)(x, w)) == 5 * 2 * 8 * 16 * 16
    mesh = Mesh(jax.devices(), ("a",), axis_types=(AxisType.Auto,))
    split = jax.shard_map(lambda x, y: x @ y, mesh=mesh, in_specs=(PartitionSpec("a"), PartitionSpec()),
                          out_specs=PartitionSpec("a"))  # fmt: skip
    y = jax.ShapeDtypeStruct((16, 4), jnp.float32)
    assert cost.flops(jax.make_jaxpr(split)(x, y)) == 2 * 8 * 16 * 4


@pytest.mark.slow
def test_flops_of_a_step_are_those_of_its_products():
    plan = make_plan(small({"fsdp": 8}))
    model, tokens = plan.model, 16 * 128
    layer = 4 * 256 * 256 + 3 * 256 * 768
    attention = 2 * 2 * 128 * 256  # scores and values, the whole square
    forward = tokens * (4 * (2 * layer + attention) + 2 * 256 * model.vocab_size)
    assert plan.flops == 3 * forward
    full = make_plan(small({"fsdp": 8}, remat="full"))
    again = 2 * layer + attention - 2 * 256 * 768  # all but the last product of a layer, which no gradient needs
    assert full.flops == plan.flops + tokens * 4 * again


@pytest.mark.slow
def test_alternatives_need_less_and_say_what_they_change():
    plan = make_plan(small({"data": 2, "fsdp": 4}))
    every = list(alternatives(plan.config, plan.mesh))
    assert [differences(plan, replace(plan, config=c, mesh=mesh_sizes(c))) for c in every[:3]] == [
        "model.remat=full",
        "model.remat=full run.gradient_accumulation_steps=2",
        "model.remat=full run.gradient_accumulation_steps=2 mesh.data=1 mesh.fsdp=8",
    ]
    smaller = make_plan(every[2])
    assert smaller.total < plan.total
    text = report(plan, suggest(plan))
    assert "24 GB   fits" in text and "An estimate" in text


def test_without_the_gpus_compiler_the_estimate_says_so(monkeypatch):
    monkeypatch.setattr(plan_gpu, "has_compiler", lambda: False)
    monkeypatch.setattr(plan_gpu, "use_virtual_devices", lambda config, devices: None)
    text = plan_gpu.plan_for(small({"fsdp": 8}), "h100")
    assert text.startswith("Not compiled for h100, whose compiler is not here: install it on Python 3.12 with `pip")
    assert "\n  h100    fits\n" in text and "An estimate: compiled for CPU devices" in text


def mesh_sizes(config: Config) -> dict[str, int]:
    return {axis: getattr(config.mesh, axis) for axis in ("data", "fsdp", "context", "tensor")}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_that_is_stored_quantized_is_counted_so(tmp_path, dtype):
    """And its other weights as [model] param_dtype has them, not as stored."""
    model = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    params = quantize_linears(init_params(model, jax.random.key(0), dtype), QuantizeConfig(double_quant=True))
    save_model(tmp_path / "q", model, params)
    config = read_config({"model": {"path": str(tmp_path / "q")}, "lora": {}, "data": {"path": "x", "max_length": 64}})
    base = base_of(config)
    planned = abstract_base(config, model, mesh_of(config), base)
    found = base_params(config, model, mesh_of(config), base)
    for x, y in zip(jax.tree.leaves(planned), jax.tree.leaves(found), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype) and x.sharding.is_equivalent_to(y.sharding, x.ndim)
    assert found["embed"].dtype == jnp.float32


@pytest.mark.parametrize("mesh, devices", [({"fsdp": -1}, 1), ({"fsdp": -1, "tensor": 2}, 2), ({"fsdp": 4}, 4)])
def test_without_a_number_a_plan_is_for_the_fewest_devices(mesh, devices, monkeypatch):
    asked = {}
    monkeypatch.setattr(jax.config, "update", asked.__setitem__)
    use_virtual_devices(small(mesh), None)
    assert asked["jax_num_cpu_devices"] == devices


MEASURE = """
import json, sys
import jax, jax.numpy as jnp
settings = json.loads(sys.argv[1])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", settings.pop("devices"))
from train.config import read_config
from train.optim import make_schedule
from train.plan import make_plan
from train.start import mesh_of, model_of
from train.state import abstract_batch, abstract_state, init_state, shardings_of
from train.step import make_step

def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

config = read_config(settings)
predicted = make_plan(config).total * jax.device_count()
model, mesh = model_of(config), mesh_of(config)
abstract, batch = abstract_state(config, model, mesh), abstract_batch(config, mesh)
step = make_step(config, model, mesh, make_schedule(config.optim, 1000), shardings_of(abstract))
compiled = step.lower(abstract, batch).compile()
before = status("VmRSS")
rows = {name: jax.device_put(jnp.ones(x.shape, x.dtype), x.sharding) for name, x in batch.items()}
zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract.params)
state = init_state(config, model, jax.jit(zeros, out_shardings=shardings_of(abstract.params))(), abstract)
open("/proc/self/clear_refs", "w").write("5")
jax.block_until_ready(compiled(state, rows))
print(json.dumps({"predicted": predicted, "measured": status("VmHWM") - before}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "devices, mesh, remat, rows",
    [
        (1, {}, "none", 2),
        pytest.param(4, {"fsdp": 4}, "full", 4, marks=pytest.mark.soak),
        (4, {"fsdp": 2, "tensor": 2}, "dots", 4),
    ],
)
def test_predicted_memory_is_within_five_per_cent_of_the_peak(devices, mesh, remat, rows, tmp_path):
    """Of a real run of 154 million parameters, whose process grows by what the plan says of all its devices.

    And by 40 to 90 MiB that no plan knows of, however large the run: the product library's scratch, and what malloc
    keeps in reserve. A run of a third of this size was between 2 and 8 % above its plan, as the machine was loaded.
    """
    dims = {"vocab_size": 2048, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 48}
    settings = {
        "devices": devices,
        "model": dims | {"num_attention_heads": 8, "tokenizer": "unused", "remat": remat},
        "data": {"path": "unused", "max_length": 256},
        "mesh": {"data": 1, "fsdp": 1, "tensor": 1} | mesh,
        "run": {"batch_size": rows},
    }
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    # Buffers are the same without LLVM's optimizations.
    env |= {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(settings)], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.05)


PEAK = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(usage.ru_maxrss, usage.ru_utime + usage.ru_stime, file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.slow
def test_seventy_billion_on_256_devices_without_one(tmp_path):
    """Under 60 seconds of processor time and 2 GiB, the state of every device exactly a 256th."""
    command = [sys.executable, "-m", "train", "plan", "configs/llama3-70b.toml", "--devices", "256"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", PEAK, *command], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    kilobytes, seconds = map(float, done.stderr.splitlines()[-1].split())
    assert kilobytes < 2 * 2**20 and seconds < 60, (kilobytes, seconds, time.monotonic() - started)
    assert done.stdout.startswith("70,553,706,496 parameters on 256 devices")
    gib = float(re.search(r"parameters +([\d.]+) GiB", done.stdout)[1])
    moved = re.search(r"gathered ([\d.]+) GB, in theory ([\d.]+); reduced ([\d.]+) GB, in theory ([\d.]+)", done.stdout)
    gathered, should_gather, reduced, should_reduce = map(float, moved.groups())
    assert gathered == pytest.approx(should_gather, rel=0.02) and reduced == pytest.approx(should_reduce, rel=0.02)
    assert math.isclose(gib, 70_553_706_496 * 4 / 256 / 2**30, rel_tol=0.01)
