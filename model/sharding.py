"""Logical axes onto mesh axes. A mesh has three: data (replicas), fsdp (weights and batch), tensor (heads, mlp, vocab).

Weights and activations name their axes by meaning; RULES says over which mesh axes each meaning is split. Meshes are
of the Auto type, so the compiler propagates what is not said. The mesh travels with the arrays themselves: nothing
needs a context.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from model.errors import PunaError

MESH_AXES = ("data", "fsdp", "tensor")

RULES: dict[str | None, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "sequence": ("tensor",),  # of the residual stream between blocks (sequence parallelism); attention gathers it
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "layers": (),
    "norm": (),
    None: (),
}


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of three axes, of the Auto type. One size may be -1 for "the rest".

    Args:
        data: replicas of the model, each with its part of the batch.
        fsdp: parts of every weight, and of the batch.
        tensor: parts of the heads, the MLP and the vocabulary.
        devices: those of the mesh; None for all.

    Raises:
        PunaError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    said = " x ".join(f"{name}={size}" for name, size in sizes.items())
    rest = [name for name, size in sizes.items() if size == -1]
    if len(rest) > 1 or any(size < 1 for name, size in sizes.items() if name not in rest):
        raise PunaError(f"mesh {said}: sizes are positive, and only one may be -1")
    known = math.prod(size for size in sizes.values() if size != -1)
    if rest:
        sizes[rest[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        raise PunaError(f"mesh {said} does not make {len(devices)} devices; set one axis to -1 for the rest")
    shape = tuple(sizes.values())
    if devices == jax.devices():
        return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    return Mesh(np.array(devices).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def ways(mesh: Mesh, axis: str | None) -> int:
    """Over how many devices RULES split a dimension that means `axis`."""
    return math.prod(mesh.shape[a] for a in RULES[axis])


def partition_spec(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int], name: str) -> PartitionSpec:
    """Where RULES put an array. Mesh axes of size 1 are left out.

    Args:
        mesh: one of `make_mesh`.
        axes: what each dimension means, a key of RULES.
        shape: the array's, whole.
        name: what an error calls the array.

    Raises:
        PunaError: naming the parameter, the axis and the sizes where a dimension does not divide.
    """
    spec = []
    for dim, (axis, size) in enumerate(zip(axes, shape, strict=True)):
        over = tuple(a for a in RULES[axis] if mesh.shape[a] > 1)
        if size % ways(mesh, axis):
            raise PunaError(
                f"{name}: dimension {dim} ({axis}) of size {size} does not divide over mesh axis "
                f"{'x'.join(over)} of size {ways(mesh, axis)}; choose a mesh size that divides it"
            )
        spec.append(over or None)
    return PartitionSpec(*spec)


def named_sharding(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int], name: str) -> NamedSharding:
    """The sharding that `partition_spec` gives on its mesh; see there for the arguments and the error."""
    return NamedSharding(mesh, partition_spec(mesh, axes, shape, name))


def relaxed_sharding(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """As `named_sharding`, for what is computed: a dimension that does not divide is replicated.

    A batch of one, or two key-value heads over eight devices, is no fault of the request.
    """
    spec = []
    for axis, size in zip(axes, shape, strict=True):
        over = tuple(a for a in RULES[axis] if mesh.shape[a] > 1)
        spec.append(over if over and size % ways(mesh, axis) == 0 else None)
    while spec and spec[-1] is None:  # as the compiler says it of its results: equal specs are one program
        spec.pop()
    return NamedSharding(mesh, PartitionSpec(*spec))


def constrain(x: Array, axes: Sequence[str | None]) -> Array:
    """Tells the compiler how to lay out an activation; nothing where `x` lives on no mesh of ours.

    Args:
        x: an array of any shape, traced.
        axes: what each of its dimensions means, a key of RULES.

    Returns:
        `x`, constrained.
    """
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty or mesh.axis_names != MESH_AXES or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, relaxed_sharding(mesh, axes, x.shape))
