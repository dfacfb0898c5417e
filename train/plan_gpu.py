"""`train plan --gpu`: the real step, compiled by XLA for that GPU on a machine that has none."""

from functools import partial

from cli.gpu import GIB, REMEDY, USABLE, devices_of, gpu_named, has_compiler
from cli.roofline import estimate, is_attention, table
from model.ring import MOST_QUERIES
from train.metrics import flops_per_token
from train.plan import (
    Plan,
    fewest_devices,
    headline,
    make_plan,
    of_master,
    report,
    suggest,
    tokens_of,
    use_virtual_devices,
    verdicts,
)
from train.sections import Config


def plan_for(config: Config, name: str, devices: int | None = None) -> str:
    """The report on `config` for a GPU. Call it in a process that has used no device yet.

    Without the GPU's compiler it is the CPU compiler's estimate, and says so.

    Args:
        config: the run's.
        name: a key of cli.gpu.GPUS.
        devices: how many; None for the fewest that [mesh] can be laid over.

    Raises:
        PunaError: an unknown GPU, or see `make_plan`.
    """
    gpu = gpu_named(name)
    sizes = {name: gpu.memory / GIB}
    if not has_compiler():
        use_virtual_devices(config, devices)
        made = make_plan(config)
        return f"Not compiled for {name}, whose compiler is not here: {REMEDY}.\n\n" + report(
            made, suggest(made, sizes=sizes), sizes
        )
    with devices_of(name, devices or fewest_devices(config)) as there:
        make = partial(make_plan, devices=there, options=None)
        made = make(config)
        return gpu_report(made, name, suggest(made, 2, sizes, make))


def gpu_report(plan: Plan, name: str, suggestions: dict[str, Plan | None]) -> str:
    """A plan that was compiled for a GPU, in words.

    Args:
        plan: what to report.
        name: the GPU's.
        suggestions: what `suggest` gave for it.
    """
    gpu = gpu_named(name)
    made = estimate(plan.program, gpu)
    devices = 1
    for ways in plan.mesh.values():
        devices *= ways
    model_flops = tokens_of(plan.config) * flops_per_token(plan.model, plan.config.data.max_length)
    speed = tokens_of(plan.config) / made.seconds / devices
    memory = {
        "parameters": plan.parameters,
        "frozen parameters": plan.frozen,
        "optimizer": plan.optimizer,
        "temporaries": plan.temporaries,
        "total": plan.total,
    }
    rows = [f"  {what:<18} {size / GIB:>8.2f} GiB" for what, size in memory.items() if size]
    return "\n".join(
        [
            f"{headline(plan)}; compiled for {gpu.name}",
            "",
            "memory of a device, as the compiler has laid it out",
            *rows,
            *of_master(plan),
            "",
            "collectives of a device, a step",
            *(
                f"  {kind:<18} {x.count:>7,} times {x.bytes / 1e9:>10.3f} GB, {x.asynchronous:,} of them asynchronous"
                for kind, x in sorted(plan.traffic.items())
            ),
            "",
            f"attention: {_attention(plan)}",
            "",
            "time of a step, an estimate",
            *table(made, gpu),
            f"  {speed:,.0f} tokens a second and device, "
            f"{model_flops / devices / made.seconds / gpu.bf16:.0%} of the peak (MFU)",
            "",
            *verdicts(plan, suggestions, {name: gpu.memory / GIB}),
            f"  {USABLE:.0%} of {gpu.memory / GIB:.1f} GiB are taken to be free. Not autotuned: kernels may differ on "
            "the GPU, and their scratch memory with them.",
        ]
    )


def _attention(plan: Plan) -> str:
    """Which attention the program has, and how often it runs."""
    calls = [run for run in plan.program.runs if is_attention(run)]
    if plan.mesh["context"] > 1:
        return (
            f"a ring of XLA's blocks; the scores of {MOST_QUERIES} queries with a block of keys are in memory at a time"
        )
    if not calls:
        return "XLA's, which keeps the scores of all queries and keys in memory; cuDNN's needs model.dtype=bfloat16"
    backward = sum(run.times for run in calls if "Backward" in run.instruction.target)
    forward = sum(run.times for run in calls) - backward
    return f"cuDNN's, {forward:,} times forward and {backward:,} times backward"
