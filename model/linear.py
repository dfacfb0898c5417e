"""The one linear map. What a weight *is* (plain, transposed, quantized, adapted) is a type of leaf told apart here."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from model import lora, quantize
from model.config import LlamaConfig
from model.lora import LoraArray
from model.params import LINEARS, Params, ParamSpec, param_specs, unstack
from model.quantize import FEW, QuantizedArray
from model.sharding import named_sharding


@struct.dataclass
class TransposedArray:
    """A weight [in, out] that lies in memory as [out, in].

    A product of few rows reads it once in this order; the other order is packed anew each time, which on CPU
    takes longer (`benchmarks/quantized.py` times both).
    """

    rows: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight it stands for: [in, out]."""
        return self.rows.shape[::-1]


Weight = Array | TransposedArray | QuantizedArray | LoraArray


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
        case TransposedArray():
            rows = w.rows.astype(x.dtype)
            if len(x) > FEW:
                return lax.dot_general(x, rows, (((1,), (1,)), ((), ())), preferred_element_type=out_dtype)
            # Without the barrier XLA folds both transposes away, and on CPU packs the weight instead of x.
            return lax.optimization_barrier(jnp.matmul(rows, x.T, preferred_element_type=out_dtype)).T
        case _:
            return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=out_dtype)


def for_decoding(params: Params) -> Params:
    """Layers as a tuple, linear weights transposed: the form in which few tokens pass fastest. Unstacked layers stay.

    The head is transposed too; weights of other kinds, and those under adapters, keep their form.
    """
    if isinstance(params["layers"], tuple):
        return params
    head = {"lm_head": _transposed(params["lm_head"])} if "lm_head" in params else {}
    return {**unstack(params, _transposed_linears), **head}


def _transposed_linears(layer: Params) -> Params:
    return layer | {name: _transposed(layer[name]) for name in LINEARS}


@jax.jit
def _transposed(w: Weight) -> Weight:
    return TransposedArray(w.T) if isinstance(w, Array) else w


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
