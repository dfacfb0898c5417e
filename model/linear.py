"""The one linear map. What a weight *is* (plain, quantized, with adapters) is a type of leaf, told apart here only."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from jax.typing import DTypeLike

from model import lora, quantize
from model.config import LlamaConfig
from model.lora import LoraArray
from model.params import Params, ParamSpec, param_specs
from model.quantize import QuantizedArray
from model.sharding import named_sharding

Weight = Array | QuantizedArray | LoraArray


def linear(x: Array, w: Weight, b: Array | None = None, out_dtype: DTypeLike | None = None) -> Array:
    """x [..., in] times w [in, out] plus b [out], computed in x's dtype (accumulated and returned in `out_dtype`).

    Leading axes are flattened first: a 3-D product has a slow weight gradient on CPU.
    """
    y = product(x.reshape(-1, x.shape[-1]), w, out_dtype)
    if b is not None:
        y = y + b.astype(y.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def product(x: Array, w: Weight, out_dtype: DTypeLike | None = None) -> Array:
    """x [M, in] times one weight [in, out] of any kind."""
    match w:
        case QuantizedArray():
            return quantize.matmul(x, w).astype(out_dtype or x.dtype)
        case LoraArray():
            return lora.adapted(x, w, lambda x: product(x, w.base, out_dtype))
        case _:
            return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=out_dtype)


def shardings(w: Weight, axes: Sequence[str | None], mesh: Mesh, name: str) -> Any:
    """The `NamedSharding` of every leaf of a weight whose dimensions mean `axes` (..., in, out).

    `w` may be abstract. Raises PunaError where a dimension of a plain array does not divide over the mesh.
    """
    match w:
        case QuantizedArray():
            return quantize.shardings(w, axes, mesh, name)
        case LoraArray():
            return lora.shardings(w, axes, mesh, name, shardings(w.base, axes, mesh, name))
        case _:
            return named_sharding(mesh, axes, w.shape, name)


def tree_shardings(params: Params, config: LlamaConfig, mesh: Mesh) -> Params:
    """The `NamedSharding` of every leaf of stacked parameters, which may be abstract, whatever their kinds."""

    def one(path: Any, spec: ParamSpec, w: Weight) -> Any:
        return shardings(w, spec.axes, mesh, "/".join(entry.key for entry in path))

    specs = param_specs(config)
    return jax.tree_util.tree_map_with_path(one, specs, params, is_leaf=lambda node: isinstance(node, ParamSpec))


def place(params: Params, config: LlamaConfig, mesh: Mesh) -> Params:
    """Moves stacked parameters of any kinds onto `mesh` as the parameter table says."""
    return jax.device_put(params, tree_shardings(params, config, mesh))
