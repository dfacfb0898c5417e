"""What training costs from one GPU to thousands, by XLA's own compiler for an H100; nothing is measured.

    python benchmarks/scaling.py                    on Python 3.12 with the extra gpu-plan; about an hour on two cores
    python benchmarks/scaling.py --only 8B

Writes results/scaling.json, of which benchmarks/figures.py makes docs/scaling.md and the table of what fits in
docs/finetuning.md. Each case is compiled in a process of
its own, for so many GPUs, as `train plan --gpu h100` does it.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[0] = str(ROOT)  # the root: this folder has names that packages have
RESULT = Path(__file__).parent / "results" / "scaling.json"

# Between hosts each GPU has a 400 Gb/s adapter, and the eight of a host carry its share of a ring together: what a GPU
# gathers or reduces enters its host once. Within a host it is NVLink.
GPUS_A_HOST, ADAPTER = 8, 50e9


@dataclass(frozen=True)
class Case:
    """One training step.

    Attributes:
        model: a preset.
        devices: how many GPUs.
        length: tokens of a row.
        rows: of a GPU.
        sections: settings beside those that all cases have.
        mesh: settings of [mesh].
        published: tokens a second and GPU that another system reports of the same work, or None.
        source: which system, where.
    """

    model: str
    devices: int
    length: int
    rows: int = 1
    sections: dict[str, Any] = field(default_factory=dict)
    mesh: dict[str, int] = field(default_factory=dict)
    published: int | None = None
    source: str = ""

    @property
    def name(self) -> str:
        """What tables call it."""
        kind = "LoRA " if "lora" in self.sections else ""
        kind = "QLoRA " if "quantize" in self.sections else kind
        return f"{kind}{self.model}, {self.devices} GPUs, {self.rows} x {self.length} tokens"


LORA = {"lora": {"rank": 16}}
BF16 = {"model": {"param_dtype": "bfloat16"}}
MAXTEXT = "MaxText, JAX-Toolbox"
TITAN = "torchtitan, docs/performance.md"
DGXC = "MaxText, dgxc-benchmarking"
CASES = (
    Case("llama3.2-1b", 1, 4096, 4),
    Case("llama3-8b", 1, 4096, 2, LORA | BF16),
    Case("llama3-8b", 1, 4096, 2, LORA | BF16 | {"quantize": {}}),
    Case("llama2-7b", 8, 4096, 2, published=11_361, source=MAXTEXT),
    Case("llama3.1-8b", 8, 8192, 2, published=6_667, source=TITAN),
    Case("llama3.1-8b", 128, 8192, 2),
    Case("llama3-70b", 8, 4096, 1, LORA | BF16),
    Case("llama2-70b", 64, 4096, 2, published=1_170, source=DGXC),
    Case("llama2-70b", 512, 4096, 2),
    Case("llama2-70b", 2048, 4096, 2, mesh={"data": 8}, published=1_159, source=DGXC),
    Case("llama3.1-405b", 512, 8192, 1),
    Case("llama3.1-405b", 2048, 8192, 1, mesh={"data": 2}),
)
MODELS = ("llama3.2-1b", "llama3.2-3b", "llama3-8b", "llama2-13b", "llama3-70b")
QLORA = LORA | BF16 | {"quantize": {}}
# What fits which GPU: docs/finetuning.md's table, a column each.
FITS = tuple(
    Case(model, devices, 4096, 1, sections)
    for model in MODELS
    for devices, sections in ((1, {}), (8, {}), (1, LORA | BF16), (1, QLORA))
)


def cost(case: Case) -> dict[str, Any]:
    """What a step of a case takes on each GPU."""
    from cli.gpu import GIB, USABLE, devices_of, gpu_named
    from cli.roofline import estimate
    from train.config import read_config
    from train.metrics import flops_per_token
    from train.plan import make_plan, tokens_of

    wanted = {"model": {"preset": case.model, "dtype": "bfloat16", "remat": "full", **case.sections.get("model", {})}}
    data = {"path": "unread", "max_length": case.length}
    run = {"batch_size": case.rows * case.devices}
    rest = {key: value for key, value in case.sections.items() if key != "model"}
    config = read_config({**wanted, "data": data, "run": run, "mesh": {"fsdp": -1, **case.mesh}, **rest})
    gpu = gpu_named("h100")
    link = gpu.link if case.devices <= GPUS_A_HOST else min(gpu.link, ADAPTER * GPUS_A_HOST)
    with devices_of("h100", case.devices) as there:
        plan = make_plan(config, devices=there, options=None)
    made = estimate(plan.program, replace(gpu, link=link))
    is_full = "lora" not in rest
    adapters = None if is_full else plan.parameters * case.devices // 4  # float32; replicated ones weigh nothing here
    speed = tokens_of(config) / made.seconds / case.devices
    return {
        "case": case.name,
        "model": case.model,
        "method": "full" if is_full else "QLoRA nf4" if "quantize" in rest else "LoRA",
        "devices": case.devices,
        "mesh": plan.mesh,
        "length": case.length,
        "rows": case.rows,
        "state_gib": (plan.parameters + plan.frozen + plan.optimizer) / GIB,
        "total_gib": plan.total / GIB,
        "fits": plan.total <= USABLE * gpu.memory,
        "gathered_gb": plan.gathered[0] / 1e9,
        "reduced_gb": plan.reduced[0] / 1e9,
        "waited_ms": made.waited * 1e3,
        "hidden_ms": made.hidden * 1e3,
        "step_ms": made.seconds * 1e3,
        "tokens_per_second": speed,
        "of_peak": speed * flops_per_token(plan.model, case.length, adapters) / gpu.bf16,
        "published": case.published,
        "source": case.source,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="a part of the names of cases; the others keep the numbers that they had")
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(cost((*CASES, *FITS)[options.case])))
        return
    import jax

    from cli.roofline import ASSUMED

    found = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": [], "fits": []}
    known = {row["case"]: row for row in (*found["rows"], *found["fits"])}
    for number, case in enumerate((*CASES, *FITS)):
        if options.only and options.only.lower() not in case.name.lower():
            continue
        print(case.name, file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--case", str(number)]
        done = subprocess.run(command, stdout=subprocess.PIPE, env=os.environ | {"JAX_PLATFORMS": "cpu"})
        if done.returncode:
            sys.exit(f"{case.name}: failed with exit code {done.returncode}")
        known[case.name] = json.loads(done.stdout)
        setting: dict[str, Any] = {"command": "python benchmarks/scaling.py", "versions": {"jax": jax.__version__}}
        setting["assumed"] = ASSUMED[0].upper() + ASSUMED[1:]
        kept = [[known[each.name] for each in cases if each.name in known] for cases in (CASES, FITS)]
        RESULT.write_text(json.dumps({"setting": setting, "rows": kept[0], "fits": kept[1]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
