"""The cost of a run before it: the real step is compiled for as many devices as asked, and no weight is allocated.

Devices are virtual CPU devices of this process, so no accelerator is needed. What the compiler says of memory and
collectives is exact for this backend; for a GPU it is an estimate, and it is labelled as one. plan_gpu.py compiles the
same step for a GPU.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from cli import hlo
from cli.gpu import GIB, USABLE
from convert.source import Source
from model.config import LlamaConfig
from model.errors import PunaError
from model.params import param_count
from model.sharding import MESH_AXES, described
from train import cost
from train.master import describe_master
from train.metrics import flops_per_token
from train.optim import make_schedule
from train.sections import Config
from train.start import base_of, mesh_of, model_of, tokenizer_of, with_adapter_settings
from train.state import abstract_batch, abstract_state, abstract_teacher, shardings_of
from train.step import make_step

TEXTS_A_ROW = 16  # under data.packing: how many a row is taken to hold, for the data is not read
GPUS_GIB = {"24 GB": 24.0, "40 GB": 40.0, "80 GB": 80.0, "141 GB": 140.0}
# No program is run here, so LLVM need not take care; what is read off it was decided before, by XLA's own passes.
_UNOPTIMIZED: dict[str, str | bool] = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": True,
}


@dataclass(frozen=True)
class Plan:
    """What one step costs. Memory is in bytes of one device.

    Attributes:
        config: the run's.
        model: the model's shape.
        mesh: the size of each axis.
        parameters: those that train.
        frozen: the base under adapters, and a teacher.
        optimizer: the optimizer's state, what is offloaded left out, and the weights' moving average.
        gradients: as large as the parameters that train.
        activations: everything alive during the step that is neither state nor gradients.
        total: the program's arguments, results and temporaries.
        host: the optimizer's state in host memory.
        flops: of all devices together.
        traffic: the collectives of one device, by kind.
        gathered: bytes of a device's gathers: as compiled, and in theory (which is for full training).
        reduced: the same of its reductions.
        passed: the same of what it passes on to its neighbour, as keys and values that go round a ring.
        temporaries: bytes that the program takes beside its arguments and results.
        program: what was compiled.
    """

    config: Config
    model: LlamaConfig
    mesh: dict[str, int]
    parameters: int
    frozen: int
    optimizer: int
    gradients: int
    activations: int
    total: int
    host: int
    flops: float
    traffic: dict[str, hlo.Traffic]
    gathered: tuple[float, float]
    reduced: tuple[float, float]
    passed: tuple[float, float]
    temporaries: int
    program: hlo.Program

    def fits(self, gib: float) -> bool:
        """Whether the step fits a GPU of `gib` GiB."""
        return self.total <= USABLE * gib * GIB


def fewest_devices(config: Config) -> int:
    """The fewest devices that [mesh] can be laid over: a size of -1 takes those that the others leave."""
    return math.prod(max(getattr(config.mesh, axis), 1) for axis in MESH_AXES)


def use_virtual_devices(config: Config, devices: int | None) -> None:
    """Make this process one with CPU devices only, before any device is used.

    Args:
        config: the run's.
        devices: how many; None for the fewest that [mesh] can be laid over.
    """
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", fewest_devices(config) if devices is None else devices)


def make_plan(
    config: Config, devices: Sequence[Any] | None = None, options: Mapping[str, str | bool] | None = _UNOPTIMIZED
) -> Plan:
    """Compile the step that `config` describes and read its cost off the program.

    Args:
        config: the run's.
        devices: what it is compiled for; None for those of this process.
        options: of the compiler.

    Raises:
        PunaError: a size does not divide over the mesh, [model] is wrong, or the backend does not say how
            much memory a program takes.
    """
    base = base_of(config)
    config = with_adapter_settings(config, base)
    model, mesh = _model_of(config, base), mesh_of(config, devices)
    state, batch = abstract_state(config, model, mesh, base), abstract_batch(config, mesh)
    state = replace(state, teacher=abstract_teacher(config, mesh))
    step: Any = make_step(config, model, mesh, make_schedule(config.optim, 1000), shardings_of(state), TEXTS_A_ROW)
    traced = step.trace(state, batch)
    compiled = traced.lower().compile(options)
    memory = compiled.memory_analysis()
    if memory is None:
        raise PunaError("this backend does not say how much memory a compiled step takes")
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    total += memory.output_size_in_bytes - memory.alias_size_in_bytes
    parameters, frozen = cost.shard_bytes(state.params), cost.shard_bytes((state.frozen, state.teacher))
    host = cost.shard_bytes(state.opt_state, "pinned_host")
    optimizer = cost.shard_bytes((state.opt_state, state.ema)) - host
    gradients = parameters
    program = hlo.Program(compiled.as_text())
    traffic = hlo.collectives(program)
    theory = cost.theory(model, mesh.shape, config, width=4)  # the width of whatever is computed here
    moved = {kind: amount.bytes for kind, amount in traffic.items()}
    return Plan(
        config,
        model,
        dict(mesh.shape),
        parameters,
        frozen,
        optimizer,
        gradients,
        max(0, total - parameters - frozen - optimizer - gradients),
        total,
        host,
        cost.flops(traced.jaxpr, mesh.devices.flat[0].platform),
        traffic,
        (moved.get("all-gather", 0.0), theory["gathered"]),
        (moved.get("all-reduce", 0.0) + moved.get("reduce-scatter", 0.0), theory["reduced"]),
        (moved.get("collective-permute", 0.0), theory["passed"]),
        memory.temp_size_in_bytes,
        program,
    )


def _model_of(config: Config, base: Source | None) -> LlamaConfig:
    """The model's shape, from the tokenizer only where [model] leaves the vocabulary to it."""
    said = config.model
    leaves_it_open = said.path is None and said.preset is None and said.vocab_size is None
    return model_of(config, tokenizer_of(config) if leaves_it_open else None, base)


def alternatives(config: Config, mesh: dict[str, int]) -> Iterator[Config]:
    """Configs that need less and less memory for the same numbers, the changes that cost least speed first.

    Args:
        config: what does not fit.
        mesh: the size of each axis, none of them -1.
    """
    if config.model.remat != "full":
        config = replace(config, model=replace(config.model, remat="full"))
        yield config
    ways = mesh["data"] * mesh["fsdp"]
    while config.run.batch_size // config.run.gradient_accumulation_steps >= 2 * ways:
        config = replace(
            config, run=replace(config.run, gradient_accumulation_steps=2 * config.run.gradient_accumulation_steps)
        )
        if config.run.batch_size % config.run.gradient_accumulation_steps:
            break
        yield config
    if mesh["tensor"] > 1 and not config.mesh.sequence_parallel:
        config = replace(config, mesh=replace(config.mesh, sequence_parallel=True))
        yield config
    if mesh["data"] > 1:
        mesh = {**mesh, "data": 1, "fsdp": ways}
        config = replace(config, mesh=replace(config.mesh, data=1, fsdp=ways, tensor=mesh["tensor"]))
        yield config
    while mesh["tensor"] < 8 and mesh["fsdp"] % 2 == 0:
        mesh = {**mesh, "fsdp": mesh["fsdp"] // 2, "tensor": 2 * mesh["tensor"]}
        config = replace(
            config,
            mesh=replace(config.mesh, data=1, fsdp=mesh["fsdp"], tensor=mesh["tensor"], sequence_parallel=True),
        )
        yield config


def suggest(
    plan: Plan,
    compilations: int = 4,
    sizes: Mapping[str, float] = GPUS_GIB,
    make: Callable[[Config], Plan] = make_plan,
) -> dict[str, Plan | None]:
    """For every GPU that `plan` does not fit, the first alternative that does, compiled too.

    Args:
        plan: what does not fit.
        compilations: how many alternatives are tried at most, evenly over the list with its last.
        sizes: the memory of each GPU in GiB, by its name.
        make: plans an alternative.

    Returns:
        By the name of the GPU; None where no alternative fits.
    """
    wanted = [name for name, gib in sizes.items() if not plan.fits(gib)]
    found: dict[str, Plan | None] = dict.fromkeys(wanted)
    every = list(alternatives(plan.config, plan.mesh))
    steps = range(min(compilations, len(every)))
    chosen = sorted({round(i * (len(every) - 1) / max(1, len(steps) - 1)) for i in steps})
    for config in (every[i] for i in chosen):
        if all(found.values()):
            break
        try:
            candidate = make(config)
        except PunaError:  # a size that does not divide over this mesh
            continue
        for name in wanted:
            if found[name] is None and candidate.fits(sizes[name]):
                found[name] = candidate
    return found


def differences(plan: Plan, other: Plan) -> str:
    """The settings that turn `plan` into `other`, as overrides."""
    changes = {"model.remat": (plan.config.model.remat, other.config.model.remat)}
    accumulation = "gradient_accumulation_steps"
    changes[f"run.{accumulation}"] = (getattr(plan.config.run, accumulation), getattr(other.config.run, accumulation))
    changes |= {f"mesh.{axis}": (plan.mesh[axis], other.mesh[axis]) for axis in plan.mesh}
    parallel = plan.config.mesh.sequence_parallel, other.config.mesh.sequence_parallel
    changes["mesh.sequence_parallel"] = (str(parallel[0]).lower(), str(parallel[1]).lower())
    return " ".join(f"{name}={new}" for name, (old, new) in changes.items() if old != new)


def headline(plan: Plan) -> str:
    """What is planned, in a line."""
    config = plan.config
    devices = math.prod(plan.mesh.values())
    mesh = described(plan.mesh)
    return (
        f"{param_count(plan.model):,} parameters on {devices} devices ({mesh}); {tokens_of(config):,} tokens a step in "
        f"{config.run.gradient_accumulation_steps} microbatches; {config.model.dtype}, remat {config.model.remat}"
    )


def tokens_of(config: Config) -> int:
    """The tokens of a step, padding too."""
    return config.run.batch_size * config.data.max_length


def report(plan: Plan, suggestions: dict[str, Plan | None], sizes: Mapping[str, float] = GPUS_GIB) -> str:
    """`plan` in words, for a person to decide by.

    Args:
        plan: what to report.
        suggestions: what `suggest` gave for it.
        sizes: the GPUs to judge by, GiB of each by its name.
    """
    devices = math.prod(plan.mesh.values())
    model_flops = tokens_of(plan.config) * flops_per_token(plan.model, plan.config.data.max_length)
    keeps = "" if plan.mesh["context"] > 1 else ", keeps the attention matrix"
    lines = [
        headline(plan),
        "",
        "memory of a device (estimate)",
        *_rows(plan),
        *of_master(plan),
        "",
        f"FLOPs a step: {plan.flops:.3g} in the program ({plan.flops / devices:.3g} a device), "
        f"{model_flops:.3g} of the model",
        "",
        "collectives of a device, a step",
        *(f"  {kind:<18} {x.count:>7,} times {x.bytes / 1e9:>10.3f} GB" for kind, x in sorted(plan.traffic.items())),
        *([] if plan.frozen else [_against_theory(plan)]),
        "",
        "GPUs",
        *verdicts(plan, suggestions, sizes),
        "",
        "An estimate: compiled for CPU devices, where runs of 154M parameters in float32 peaked within 5 % of it (a "
        f"process takes 40 to 90 MiB of its own beside). This backend computes bfloat16 in float32{keeps}, and reduces "
        "where a GPU scatters: activations and bytes are upper bounds. A GPU is taken to give "
        f"{USABLE:.0%} of its memory.",
    ]
    return "\n".join(lines)


def of_master(plan: Plan) -> list[str]:
    """A line on what weights in bfloat16 are kept with, and what another choice takes; none for other weights."""
    config = plan.config
    if config.model.param_dtype != "bfloat16" or config.lora is not None:
        return []
    averages = 2 * plan.parameters if config.run.ema else 0
    return [f"  {describe_master(config.optim.master, plan.parameters, plan.optimizer + plan.host - averages)}"]


def _against_theory(plan: Plan) -> str:
    amounts = {"gathered": plan.gathered, "reduced": plan.reduced}
    if plan.mesh["context"] > 1:
        amounts["passed round the ring"] = plan.passed
    said = (f"{what} {moved / 1e9:.3f} GB, in theory {should / 1e9:.3f}" for what, (moved, should) in amounts.items())
    return f"  {'; '.join(said)}"


def _rows(plan: Plan) -> list[str]:
    rows = {
        "parameters": plan.parameters,
        "frozen parameters": plan.frozen,
        "optimizer": plan.optimizer,
        "gradients": plan.gradients,
        "activations": plan.activations,
        "total": plan.total,
        "on the host": plan.host,
    }
    needed = ("parameters", "optimizer", "gradients", "activations", "total")
    return [f"  {name:<18} {size / GIB:>8.2f} GiB" for name, size in rows.items() if size or name in needed]


def verdicts(plan: Plan, suggestions: dict[str, Plan | None], sizes: Mapping[str, float]) -> list[str]:
    """A line for each GPU: whether the step fits it, and what makes it fit. The arguments are those of `report`."""
    lines = []
    for name, gib in sizes.items():
        other = suggestions.get(name)
        if plan.fits(gib):
            lines.append(f"  {name:<7} fits")
        elif other:
            lines.append(f"  {name:<7} fits with {differences(plan, other)} ({other.total / GIB:.1f} GiB)")
        else:
            lines.append(f"  {name:<7} does not fit: more devices, a shorter data.max_length, or [lora]")
    return lines


def plan(config: Config, devices: int | None = None) -> str:
    """The report on `config`. Call it in a process that has used no device yet.

    Args:
        config: the run's.
        devices: how many; None for the fewest that [mesh] can be laid over.

    Raises:
        PunaError: see `make_plan`.
    """
    use_virtual_devices(config, devices)
    made = make_plan(config)
    return report(made, suggest(made))
