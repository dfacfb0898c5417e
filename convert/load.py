"""Reading a model into memory: straight into the shards that each device holds, one layer at a time.

For training the stacked parameters are allocated empty on their devices, and each layer is read from its file, only the
slices that local devices hold, and written into its place. For decoding each layer is read into arrays of its own, as
they will be multiplied. Either way loading needs the parameters' memory and one layer more.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial, reduce
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from convert.adapters import apply_adapters
from convert.checkpoint import Checkpoint
from convert.lazy import Index, LazyTensor, contiguous
from convert.source import find_source
from model.config import LlamaConfig
from model.layout import Weight
from model.params import LINEARS, Params, ParamSpec, param_specs
from model.quantize import Format, QuantizedArray, quantized_shardings
from model.quantize import quantize as quantize_array
from model.sharding import named_sharding
from model.transposed import TransposedArray

Quantize = Callable[[jax.Array], QuantizedArray]
Layout = Literal["stacked", "per_layer"]


def load_model(
    path: str | Path,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    quantize: Format | Quantize | None = None,
    adapters: Sequence[str | Path] = (),
    layout: Layout = "stacked",
) -> tuple[LlamaConfig, Params]:
    """The config and the parameters of the model at `path`: a folder of any format we read, a Hub id, a training run or
    a step of one, or an adapter folder, whose base is then loaded under it.

    dtype: what to convert all weights to, quantized ones too; None keeps what is stored. mesh: the devices to load onto
    (sharded as model.sharding.RULES say); None is the first device. quantize: int8, int4 or nf4, or a function from a
    weight to a quantized one, for the layers' linear weights; each is quantized as it is read. adapters: PEFT folders,
    all active, in order, unmerged; one that saved a larger vocabulary changes the config.
    layout: "stacked" for training; "per_layer" for decoding, with transposed linear weights (`model.layout.per_layer`).
    Raises PunaError naming what is wrong with the files, or numbers that `dtype` cannot hold.
    """
    source = find_source(path)
    checkpoint = source.checkpoint
    as_floats = checkpoint if dtype is None else replace(checkpoint, quantized={})
    params = load_params(as_floats, dtype, mesh, quantize, layout)
    return apply_adapters(params, checkpoint.config, (*source.adapters, *adapters), mesh)


def load_params(
    checkpoint: Checkpoint,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    quantize: Format | Quantize | None = None,
    layout: Layout = "stacked",
) -> Params:
    """The parameters of an open checkpoint; see `load_model`. Here `dtype` is that of its floats: weights that
    are stored quantized stay so, unless others are asked for with `quantize`."""
    specs = param_specs(checkpoint.config)
    layers = specs.pop("layers")
    depth = checkpoint.config.num_hidden_layers
    dtypes = {key: dtype or _common_dtype(checkpoint, key, depth) for key in layers}
    # Layers are stacked: a weight that some of them keep in float is loaded in float.
    whole = {key for key in LINEARS if all(f"layers.{i}.{key}" in checkpoint.quantized for i in range(depth))}

    def read(name: str, spec: ParamSpec, dtype: DTypeLike | None) -> jax.Array:
        tensor = checkpoint.tensors[name]
        return _placed(tensor.cast(np.dtype(dtype or tensor.dtype), name), _sharding(name, spec, mesh))

    def read_transposed(name: str, spec: ParamSpec, dtype: DTypeLike | None) -> TransposedArray:
        tensor = checkpoint.tensors[name].transposed()  # as most files have it
        reverse = ParamSpec(spec.shape[::-1], spec.axes[::-1], spec.init)
        return TransposedArray(
            _placed(tensor.cast(np.dtype(dtype or tensor.dtype), name), _sharding(name, reverse, mesh))
        )

    def weight(name: str, key: str, spec: ParamSpec) -> Weight:
        if key in whole and quantize is None:
            return _placed_quantized(checkpoint.quantized[name](), key, spec, mesh)
        if key in LINEARS and quantize is None and layout == "per_layer":
            return read_transposed(name, spec, dtypes[key])
        array = read(name, spec, dtypes[key])
        if quantize is None or key not in LINEARS:
            return array
        return _placed_quantized(_quantizer(quantize)(array), key, spec, mesh)

    def layer(number: int) -> Params:
        each = {key: ParamSpec(spec.shape[1:], spec.axes[1:], spec.init) for key, spec in layers.items()}
        return {key: weight(f"layers.{number}.{key}", key, spec) for key, spec in each.items()}

    if layout == "per_layer":
        head = specs.pop("lm_head", None)
        params: Params = {name: _owned(read(name, spec, dtype)) for name, spec in specs.items()}
        tied = TransposedArray(params["embed"])
        params["lm_head"] = tied if head is None else _owned(read_transposed("lm_head", head, dtype))
        return params | {"layers": tuple(jax.block_until_ready(_owned(layer(number))) for number in range(depth))}
    params = {name: _owned(read(name, spec, dtype)) for name, spec in specs.items()}
    first = layer(0)
    stacked = _put(_empty(first, depth), first, 0)
    for number in range(1, depth):
        one = layer(number)
        jax.block_until_ready(stacked)  # where quantizing is slower than reading, layers would pile up
        stacked = _put(stacked, one, number)
    return params | {"layers": stacked}


def _quantizer(quantize: Format | Quantize) -> Quantize:
    return partial(quantize_array, format=quantize) if isinstance(quantize, str) else quantize


def _placed_quantized(array: QuantizedArray, key: str, spec: ParamSpec, mesh: Mesh | None) -> QuantizedArray:
    where = _first_device() if mesh is None else quantized_shardings(array, spec.axes, mesh, f"layers/{key}")
    return jax.device_put(array, where)


def _common_dtype(checkpoint: Checkpoint, key: str, depth: int) -> DTypeLike:
    """The dtype that holds one parameter of every layer: they are stacked in one array."""
    return reduce(jnp.promote_types, (checkpoint.tensors[f"layers.{i}.{key}"].dtype for i in range(depth)))


def _first_device() -> Sharding:
    return SingleDeviceSharding(jax.local_devices()[0])


def _sharding(name: str, spec: ParamSpec, mesh: Mesh | None) -> Sharding:
    if mesh is None:
        return _first_device()
    return named_sharding(mesh, spec.axes, spec.shape, name)


def _placed(tensor: LazyTensor, sharding: Sharding) -> jax.Array:
    """The tensor on its devices, of which each part is read once, even where several devices hold it."""

    @cache
    def part(*bounds: tuple[int, int]) -> np.ndarray:
        return contiguous(tensor.read(tuple(slice(*bound) for bound in bounds)))

    def callback(index: Index | None) -> np.ndarray:
        return part(*(side.indices(size)[:2] for side, size in zip(index or (), tensor.shape, strict=True)))

    return jax.make_array_from_callback(tensor.shape, sharding, callback, tensor.dtype)


def _stacked(sharding: Sharding) -> Sharding:
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
    return sharding


def _empty(layer: Params, depth: int) -> Params:
    """Room for `depth` layers like this one."""

    def make() -> Params:
        return jax.tree.map(lambda x: jnp.zeros((depth, *x.shape), x.dtype), layer)

    return jax.jit(make, out_shardings=jax.tree.map(lambda x: _stacked(x.sharding), layer))()


@partial(jax.jit, donate_argnums=0)
def _put(stacked: Params, layer: Params, number: int) -> Params:
    # `at[].set` is a scatter, which XLA on CPU computes for bfloat16 in a float32 copy of the whole.
    return jax.tree.map(lambda all, one: lax.dynamic_update_index_in_dim(all, one, number, 0), stacked, layer)


@jax.jit
def _owned(tree: Any) -> Any:
    """A copy: on the CPU an array may be the mapped file itself, which must not change under it."""
    return jax.tree.map(jnp.copy, tree)
