"""What a step costs: FLOPs counted in the jaxpr, loops as often as they go round; and what its collectives should
move, from the sizes of the model alone. What they do move is read from the compiled program (cli/hlo.py).
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from model.config import LlamaConfig
from model.params import LINEARS, param_specs
from train.sections import Config


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


def theory(model: LlamaConfig, mesh: Mapping[str, int], config: Config, width: int) -> dict[str, float]:
    """Bytes that a device should gather, reduce and pass on in one step of full training.

    Fully sharded, over fsdp and context: the weights of every layer are gathered for the forward pass and again for the
    backward one, embedding and head once a step, and every gradient is reduced once a microbatch (ZeRO-3,
    arXiv:1910.02054). Tensor parallel: the activations are reduced after attention and after the MLP, again where they
    are recomputed, and once for each input gradient of q, k, v, gate and up (Megatron-LM, arXiv:1909.08053, fuses these
    five into two), beside embedding and head. Sequence parallel: they are gathered before each of these products too.
    Context parallel: keys and values go to every other device of the ring, forward, where that is computed again, and
    on the way back, then with their gradients in float32 (arXiv:2310.01889); and the segments of the keys with them.

    Args:
        model: the model's shape.
        mesh: the sizes of the axes.
        config: the run's.
        width: bytes of an element that travels.

    Returns:
        The bytes "gathered", "reduced" and "passed".
    """
    data, fsdp, context, tensor = (mesh[axis] for axis in ("data", "fsdp", "context", "tensor"))
    shards = fsdp * context
    microbatches = config.run.gradient_accumulation_steps
    specs = param_specs(model)
    layers = sum(math.prod(specs["layers"][name].shape) for name in LINEARS) / tensor
    embed = head = math.prod(specs["embed"].shape) / tensor
    gathered = (2 * microbatches * layers + embed + head) if shards > 1 else 0.0
    reduced = (layers + head) * ((shards > 1) + (data > 1) / shards)
    reduced += embed * ((data * fsdp > 1) + (context > 1))
    tokens = config.run.batch_size / microbatches / (data * fsdp) * config.data.max_length / context
    if tensor > 1:
        activations = tokens * model.hidden_size
        again = config.model.remat == "full"
        reduced += activations * (model.num_hidden_layers * (2 + 5 + again) + 2)
        if config.mesh.sequence_parallel:
            gathered += microbatches * activations * (model.num_hidden_layers * (4 + 2 * again) + 2)
    heads = model.num_key_value_heads
    numbers = 2 * (heads // tensor if heads % tensor == 0 else heads) * model.head_dim  # of a key and a value
    again = config.model.remat != "none"  # but for the first hop, whose result the way back takes
    hops = (context - 1) * (2 + again) - (again and context > 1)
    passed = model.num_hidden_layers * tokens * (hops * (numbers * width + 4) + (context - 1) * numbers * 4)
    return {"gathered": gathered * width, "reduced": microbatches * reduced * width, "passed": microbatches * passed}


def shard_bytes(tree: Any, memory_kind: str | None = None) -> int:
    """Bytes that one device holds of a tree.

    Args:
        tree: arrays, or shapes with shardings.
        memory_kind: count only what lies in this kind of memory, as "pinned_host"; None counts all.
    """
    leaves = [x for x in jax.tree.leaves(tree) if memory_kind is None or x.sharding.memory_kind == memory_kind]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
