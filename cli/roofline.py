"""How long a program compiled for a GPU will take: of each kernel the longer of its arithmetic and its memory traffic.

A roofline (Williams, Waterman and Patterson, 2009) with assumed efficiencies, which ASSUMED says in words. It knows
nothing of launches, of caches, or of how good a kernel is.
"""

import re
from dataclasses import dataclass, field

from cli.gpu import Gpu
from cli.hlo import COLLECTIVES, Program, Run, collective, dimensions, size

PRODUCTS, MEMORY, LINK = 0.70, 0.85, 0.80  # of the peaks
ATTENTION = {"forward": 0.60, "backward": 0.45}  # of the bfloat16 peak, half of the square counted
ASSUMED = (
    f"products at {PRODUCTS:.0%} of the dense peak, cuDNN attention at {ATTENTION['forward']:.0%} forward and "
    f"{ATTENTION['backward']:.0%} backward, memory at {MEMORY:.0%} and links at {LINK:.0%} of their data sheets; "
    "asynchronous collectives beside all else; nothing for launches"
)


@dataclass
class Share:
    """What the kernels of one class do in a run of a program, all together.

    Attributes:
        count: executions.
        flops: of matrix products.
        bytes: read and written.
        seconds: by the roofline.
    """

    count: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0


@dataclass
class Estimate:
    """The roofline of a program.

    Attributes:
        shares: by the class of kernel: products, attention, other kernels, copies.
        waited: seconds of collectives that nothing else runs beside.
        hidden: seconds of those that run beside other work.
    """

    shares: dict[str, Share] = field(default_factory=dict)
    waited: float = 0.0
    hidden: float = 0.0

    @property
    def seconds(self) -> float:
        """Of the whole program."""
        return max(sum(share.seconds for share in self.shares.values()), self.hidden) + self.waited


def estimate(program: Program, gpu: Gpu) -> Estimate:
    """The roofline of a program on a GPU.

    Args:
        program: what was compiled for it.
        gpu: which.
    """
    total = Estimate()
    for run in program.runs:
        if (one := collective(program, run)) is not None:
            ways = (2 if one.kind == "all-reduce" else 1) * (one.devices - 1) / one.devices
            seconds = run.times * one.bytes * ways / (LINK * gpu.link)
            if one.is_asynchronous:
                total.hidden += seconds
            else:
                total.waited += seconds
            continue
        if run.instruction.opcode.removesuffix("-start") in COLLECTIVES:  # of groups of one device
            continue
        kind, flops, seconds = _kernel(program, run, gpu)
        moved = program.moved(run)
        share = total.shares.setdefault(kind, Share())
        share.count += run.times
        share.flops += run.times * flops
        share.bytes += run.times * moved
        share.seconds += run.times * max(seconds, moved / (MEMORY * gpu.bandwidth))
    return total


def _kernel(program: Program, run: Run, gpu: Gpu) -> tuple[str, float, float]:
    """The class of a kernel, its FLOPs, and the seconds of its arithmetic."""
    if (flops := attention_flops(run)) is not None:
        way = "backward" if "Backward" in run.instruction.target else "forward"
        return "attention", flops, flops / (ATTENTION[way] * gpu.bf16)
    if flops := program.flops(run):
        return "products", flops, flops / (PRODUCTS * gpu.peak(product_bits(program, run)))
    is_copy = run.instruction.opcode in ("copy", "copy-start")
    return "copies" if is_copy else "other kernels", 0.0, 0.0


def attention_flops(run: Run) -> float | None:
    """FLOPs of a call of cuDNN's fused attention on [B, T, H, d], of a causal square the half; None for all else."""
    if not is_attention(run):
        return None
    q, k = (dimensions(run.computation[name].shape) for name in run.instruction.operands[:2])
    forward = 4.0 * q[0] * q[1] * q[2] * q[3] * k[1]
    causal = "CAUSAL" in run.instruction.rest
    return forward * (0.5 if causal else 1.0) * (2.5 if "Backward" in run.instruction.target else 1.0)


def is_attention(run: Run) -> bool:
    """Whether a run is a call of cuDNN's fused attention."""
    return run.instruction.target.startswith("__cudnn$fmha")


def product_bits(program: Program, run: Run) -> float:
    """Bits of the wider operand of a run's matrix product: what its tensor cores multiply."""
    widest = 0.0
    for name, computation in program.computations_of(run):
        for one in computation.values() if name else (run.instruction,):
            if one.opcode == "dot" or one.target.startswith("__cublas"):
                for operand in one.operands[:2]:
                    shape = computation[operand].shape
                    count = 1
                    for n in dimensions(shape):
                        count *= n
                    widest = max(widest, 8 * size(re.sub(r"^\((.*)", r"\1", shape)) / max(count, 1))
    return widest or 16.0


def table(made: Estimate, gpu: Gpu) -> list[str]:
    """The estimate in lines, for people."""
    order = ("products", "attention", "other kernels", "copies")
    lines = []
    for kind in order:
        if share := made.shares.get(kind):
            lines.append(
                f"  {kind:<18} {share.count:>7,} times {share.bytes / 1e9:>10.2f} GB {share.flops / 1e12:>9.2f} TFLOP "
                f"{share.seconds * 1e3:>10.2f} ms"
            )
    if made.waited or made.hidden:
        lines.append(f"  {'collectives':<18} {made.waited * 1e3:.2f} ms waited for, {made.hidden * 1e3:.2f} ms beside")
    lines.append(
        f"  {'together':<18} {made.seconds * 1e3:.2f} ms, if {ASSUMED} ({gpu.bf16 / 1e12:.0f} TFLOP/s in bfloat16, "
        f"{gpu.bandwidth / 1e12:.2f} TB/s, {gpu.link / 1e9:.0f} GB/s)"
    )
    return lines
