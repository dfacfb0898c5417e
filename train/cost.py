"""What a compiled step costs: FLOPs counted in the jaxpr, collectives in the HLO, both with loops unrolled in thought.

XLA's own cost analysis counts the body of a loop once. `theory` states what the collectives should move, from the
sizes of the model alone.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from model.config import LlamaConfig
from model.params import LINEARS, param_specs
from train.config import Config

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "f64": 8,
}
_BYTES |= {"s16": 2, "u16": 2, "s64": 8, "u64": 8}


def flops(jaxpr: Jaxpr | ClosedJaxpr, platform: str = "cpu") -> float:
    """FLOPs of the matrix products in a jaxpr over all devices: 2 m n k each, times the lengths of the scans around.

    Args:
        jaxpr: of a whole step.
        platform: of what depends on the platform, the form for this one counts.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        match eqn.primitive.name:
            case "dot_general":
                (contracted, _), _ = eqn.params["dimension_numbers"]
                inner = math.prod(_shape(eqn.invars[0])[axis] for axis in contracted)
                total += 2.0 * inner * math.prod(_shape(eqn.outvars[0]))
            case "scan":
                total += eqn.params["length"] * flops(eqn.params["jaxpr"])
            case "shard_map":  # its shapes are those of one device
                total += eqn.params["mesh"].size * flops(eqn.params["jaxpr"])
            case "cond" if (platforms := eqn.params.get("branches_platforms")) is not None:
                own = [names is not None and platform in names for names in platforms]
                total += flops(eqn.params["branches"][own.index(True) if any(own) else platforms.index(None)])
            case "cond":
                total += max(map(flops, eqn.params["branches"]))
            case _:
                total += sum(map(flops, filter(_is_jaxpr, eqn.params.values())))
    return total


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, Jaxpr | ClosedJaxpr)


@dataclass(frozen=True)
class Traffic:
    """The collectives of one kind in a step.

    Attributes:
        count: how many.
        bytes: what they hand to or take from each device, all together.
    """

    count: int
    bytes: float


def collectives(hlo: str) -> dict[str, Traffic]:
    """The collectives of one step, those in loops times their trips.

    Bytes are of the whole array: the result of a gather, the operand of a reduction. Groups of one device are left
    out: nothing travels.

    Args:
        hlo: the text of the compiled module.

    Returns:
        The traffic by the kind of collective, as "all-gather".
    """
    bodies, entry = _computations(hlo)
    totals: dict[str, list[tuple[int, float]]] = defaultdict(list)

    def visit(name: str, times: int) -> None:
        for line in bodies[name]:
            if called := re.search(r" while\(.*body=%?([\w.\-]+)", line):
                trips = re.search(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', line)
                visit(called[1], times * (int(trips[1]) if trips else 1))
            elif called := re.search(r" call\(.*to_apply=%?([\w.\-]+)", line):
                visit(called[1], times)
            elif found := re.search(rf"= (.*?) ({'|'.join(_COLLECTIVES)})\(", line):
                group = _group_size(line)
                if group > 1:
                    size = _size(found[1]) * (group if found[2] == "reduce-scatter" else 1)
                    totals[found[2]].append((times, times * size))

    visit(entry, 1)
    return {kind: Traffic(sum(n for n, _ in all_), sum(b for _, b in all_)) for kind, all_ in totals.items()}


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation by its name, and the name of the entry."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = head[2]
            bodies[name] = []
            entry = name if head[1] else entry
        elif name and line.startswith(" "):
            bodies[name].append(line)
    return bodies, entry


def _group_size(line: str) -> int:
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(iota[2])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):  # XLA of jax 0.12
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    return 2  # all devices, or pairs of a permutation


def _size(shapes: str) -> float:
    """Bytes of an HLO type such as `f32[8,128]{1,0}` or a tuple of them."""
    return sum(
        _BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    )


def theory(model: LlamaConfig, mesh: Mapping[str, int], config: Config, width: int) -> dict[str, float]:
    """Bytes that a device should gather and reduce in one step of full training.

    Fully sharded: the weights of every layer are gathered for the forward pass and again for the backward one,
    embedding and head once a step, and every gradient is reduced once a microbatch (ZeRO-3, arXiv:1910.02054). Tensor
    parallel: the activations are reduced after attention and after the MLP, again where they are recomputed, and once
    for each input gradient of q, k, v, gate and up (Megatron-LM, arXiv:1909.08053, fuses these five into two), beside
    embedding and head. Sequence parallel: they are gathered before each of these products too.

    Args:
        model: the model's shape.
        mesh: the sizes of the axes data, fsdp and tensor.
        config: the run's.
        width: bytes of an element that travels.

    Returns:
        The bytes "gathered" and "reduced".
    """
    data, fsdp, tensor = (mesh[axis] for axis in ("data", "fsdp", "tensor"))
    microbatches = config.run.gradient_accumulation_steps
    specs = param_specs(model)
    layers = sum(math.prod(specs["layers"][name].shape) for name in LINEARS) / tensor
    embed = head = math.prod(specs["embed"].shape) / tensor
    gathered = (2 * microbatches * layers + embed + head) if fsdp > 1 else 0.0
    reduced = (layers + head) * ((fsdp > 1) + (data > 1) / fsdp) + embed * (data * fsdp > 1)
    if tensor > 1:
        rows = config.run.batch_size / microbatches / (data * fsdp)
        activations = rows * config.data.max_length * model.hidden_size
        again = config.model.remat == "full"
        reduced += activations * (model.num_hidden_layers * (2 + 5 + again) + 2)
        if config.mesh.sequence_parallel:
            gathered += microbatches * activations * (model.num_hidden_layers * (4 + 2 * again) + 2)
    return {"gathered": gathered * width, "reduced": microbatches * reduced * width}


def shard_bytes(tree: Any, memory_kind: str | None = None) -> int:
    """Bytes that one device holds of a tree.

    Args:
        tree: arrays, or shapes with shardings.
        memory_kind: count only what lies in this kind of memory, as "pinned_host"; None counts all.
    """
    leaves = [x for x in jax.tree.leaves(tree) if memory_kind is None or x.sharding.memory_kind == memory_kind]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
