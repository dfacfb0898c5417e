"""What training the published sizes on long rows takes, by `train plan`: the table of docs/multi-host.md.

python benchmarks/plans.py            some minutes on two cores; nothing is run, and no weight is made

Each is configs/llama3-70b-128k.toml with another preset, length and mesh: AdamW, float32 weights, remat full, one row
of tokens to each part of the batch.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[0] = str(ROOT)  # this folder has names that packages have

import jax

from cli.gpu import GIB
from train.config import load_config
from train.plan import make_plan

LARGEST = 1024
MESHES = (  # preset, tokens of a row, fsdp, context, tensor
    ("llama3.1-8b", 8, 4, 2, 1),
    ("llama3.1-8b", 32, 2, 4, 1),
    ("llama3.1-8b", 128, 1, 8, 1),
    ("llama3.1-8b", 128, 8, 8, 1),
    ("llama3.1-70b", 8, 32, 2, 1),
    ("llama3.1-70b", 32, 16, 4, 1),
    ("llama3.1-70b", 128, 1, 8, 8),
    ("llama3.1-70b", 128, 4, 8, 8),
    ("llama3.1-405b", 8, 32, 2, 8),
    ("llama3.1-405b", 32, 16, 4, 8),
    ("llama3.1-405b", 128, 16, 8, 8),
)
HEAD = ("model", "tokens a row", "GPUs", "fsdp", "context", "tensor", "state", "total", "gathered", "reduced", "ring")


def row(preset: str, thousands: int, fsdp: int, context: int, tensor: int) -> list[str]:
    """One line of the table: GiB of a device, and GB that it moves in a step of one microbatch."""
    parallel = str(tensor > 1).lower()
    sizes = [f"mesh.fsdp={fsdp}", f"mesh.context={context}", f"mesh.tensor={tensor}"]
    rest = [f"data.max_length={1024 * thousands}", f"run.batch_size={fsdp}", "run.gradient_accumulation_steps=1"]
    given = [f"model.preset={preset}", *sizes, f"mesh.sequence_parallel={parallel}", *rest]
    count = fsdp * context * tensor
    plan = make_plan(load_config(ROOT / "configs/llama3-70b-128k.toml", given), jax.devices()[:count])
    for moved, theory in (plan.gathered, plan.reduced, plan.passed):
        if abs(moved / theory - 1) > 0.02:
            print(f"{given}: {moved / 1e9:.3f} GB, in theory {theory / 1e9:.3f}", file=sys.stderr, flush=True)
    state = (plan.parameters + plan.optimizer + plan.gradients) / GIB
    amounts = (plan.gathered[0], plan.reduced[0], plan.passed[0])
    memory = [f"{state:.1f}", f"{plan.total / GIB:.1f}"]
    return [
        preset,
        f"{thousands}k",
        *map(str, (count, fsdp, context, tensor)),
        *memory,
        *(f"{x / 1e9:,.0f}" for x in amounts),
    ]


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", LARGEST)
    for line in (HEAD, ["---"] * len(HEAD), *(row(*each) for each in MESHES)):
        print(f"| {' | '.join(line)} |", flush=True)
