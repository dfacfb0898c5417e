"""Logical axes onto mesh axes. A mesh has four: data (replicas), fsdp (weights and batch), context (weights and a row's
tokens), tensor (heads, mlp, vocab).

Weights and activations name their axes by meaning; RULES says over which mesh axes each meaning is split. Meshes are
of the Auto type, so the compiler propagates what is not said. The mesh travels with the arrays themselves: nothing
needs a context.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from model.errors import PunaError

MESH_AXES = ("data", "fsdp", "context", "tensor")

RULES: dict[str | None, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "tokens": ("context",),  # of a row, as long as it is computed with (context parallelism)
    "sequence": ("context", "tensor"),  # the same between blocks (sequence parallelism); attention gathers it
    "embed": ("fsdp", "context"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "layers": (),
    "norm": (),
    None: (),
}


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None, context: int = 1
) -> Mesh:
    """A mesh of the axes data, fsdp, context and tensor; one size may be -1 for "the rest".

    Args:
        data: replicas.
        fsdp: parts of weights and of the batch.
        tensor: parts of heads, MLP and vocabulary.
        devices: all of the program's by default.
        context: parts of each row of tokens, and of weights.

    Raises:
        PunaError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}
    said = described(sizes).replace(" ", " x ")
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
        return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    return Mesh(np.array(devices).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def described(sizes: Mapping[str, int]) -> str:
    """The sizes of a mesh's axes in words; one that nobody has asked for is left out."""
    return " ".join(f"{axis}={size}" for axis, size in sizes.items() if axis != "context" or size != 1)


def ways(mesh: Mesh, axis: str | None) -> int:
    """Over how many devices RULES split a dimension that means `axis`."""
    return math.prod(mesh.shape[a] for a in RULES[axis])


def partition_spec(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int], name: str) -> PartitionSpec:
    """Where RULES put an array. Mesh axes of size 1 are left out.

    Args:
        axes: what each dimension means, a key of RULES.
        shape: the array's.
        name: what messages call it.

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
    """`partition_spec` on its mesh.

    Raises:
        PunaError: as `partition_spec`.
    """
    return NamedSharding(mesh, partition_spec(mesh, axes, shape, name))


def relaxed_sharding(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """As `named_sharding`, for what is computed: a dimension that does not divide is replicated.

    A batch of one or two key-value heads over eight devices is no fault of the request.
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
        axes: what each dimension of x means, a key of RULES.

    Returns:
        x.
    """
    mesh = _mesh_of(x)
    return x if mesh is None else jax.lax.with_sharding_constraint(x, relaxed_sharding(mesh, axes, x.shape))


def flattened(x: Array, in_order: bool = False) -> tuple[Array, Callable[[Array], Array]]:
    """The vectors of an activation as the rows of a matrix, each on its device.

    Where a mesh splits both the batch and the tokens of its rows, vectors in their order would move to other devices:
    there they come device by device.

    Args:
        x: [..., D].
        in_order: whether they are to come in their order nevertheless.

    Returns:
        [M, D], and what turns rows [M, N] back into [..., N].
    """
    mesh = _mesh_of(x) if x.ndim == 3 and not in_order else None
    if mesh is None or mesh.shape["context"] == 1:
        return x.reshape(-1, x.shape[-1]), lambda y: y.reshape(*x.shape[:-1], y.shape[-1])
    B, T, _ = x.shape
    rows, tokens = (n if size % n == 0 else 1 for n, size in ((ways(mesh, "batch"), B), (ways(mesh, "tokens"), T)))
    cut = rows, B // rows, tokens, T // tokens
    over = (RULES["batch"] if rows > 1 else None, RULES["tokens"] if tokens > 1 else None, PartitionSpec.UNCONSTRAINED)
    where = NamedSharding(mesh, PartitionSpec(*over))

    def whole(x: Array) -> Array:  # over the tensor axis: gathered once for several products
        return jax.lax.with_sharding_constraint(x, where)

    def back(y: Array) -> Array:
        y = y.reshape(rows, tokens, B // rows, T // tokens, -1).swapaxes(1, 2)
        return whole(y.reshape(B, T, -1))

    return whole(x).reshape(*cut, -1).swapaxes(1, 2).reshape(B * T, -1), back


def _mesh_of(x: Array) -> Any:
    """The mesh of ours that an array lies on, or its abstract form while it is traced; None for no or one device."""
    mesh = jax.typeof(x).sharding.mesh
    return None if mesh.empty or mesh.axis_names != MESH_AXES or mesh.size == 1 else mesh
