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
from model.quantize import QuantizedArray
from model.quantized_matmul import FEW, chunk_rows, quantized_matmul
from model.selected import SelectedLora, selected
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


Weight = Array | TransposedArray | QuantizedArray | LoraArray | SelectedLora


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
            return quantized_matmul(x, w).astype(out_dtype or x.dtype)
        case LoraArray():
            return lora.adapted(x, w, lambda x: product(x, w.base, out_dtype))
        case SelectedLora():
            return selected(x, w, lambda x: product(x, w.base, out_dtype))
        case TransposedArray() if len(x) <= FEW:
            return _times_rows(x, w.rows, out_dtype or x.dtype)
        case TransposedArray():
            return lax.dot_general(x, w.rows.astype(x.dtype), _ROWS, preferred_element_type=out_dtype)
        case _:
            return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=out_dtype)


_ROWS = (((1,), (1,)), ((), ()))  # contracts the inputs of both, x [M, in] and rows [out, in]


def _times_rows(x: Array, rows: Array, out_dtype: DTypeLike) -> Array:
    """A few x [M, in] times the rows of a weight [out, in], each of which is read once.

    XLA on CPU would first write a float32 copy of a whole 16-bit weight, which takes ten times as long. It does not for
    bfloat16 where the product gives float32 and has two rows or more; float16 is converted a chunk at a time.
    """
    rows = rows.astype(x.dtype)
    if x.dtype == jnp.float32:
        # Without the barrier XLA folds both transposes away, and on CPU packs the weight instead of x.
        return lax.optimization_barrier(jnp.matmul(rows, x.T, preferred_element_type=out_dtype)).T
    if jax.default_backend() != "cpu":
        return lax.dot_general(x, rows, _ROWS, preferred_element_type=out_dtype)
    if x.dtype == jnp.bfloat16:
        two = jnp.pad(x, ((0, max(0, 2 - len(x))), (0, 0)))
        return lax.dot_general(two, rows, _ROWS, preferred_element_type=jnp.float32)[: len(x)].astype(out_dtype)
    chunks = rows.reshape(-1, chunk_rows(*rows.shape), rows.shape[1])
    y = lax.map(lambda chunk: lax.dot_general(chunk.astype(jnp.float32), x.astype(jnp.float32), _ROWS), chunks)
    return y.reshape(-1, len(x)).T.astype(out_dtype)


def decode_layout(params: Params) -> Params:
    """Layers as a tuple, linear weights transposed: the form in which few tokens pass fastest. Unstacked layers stay.

    The head is transposed too, and a tied embedding, which lies so already, is one; weights of other kinds, and those
    under adapters, keep their form.
    """
    if isinstance(params["layers"], tuple):
        return params
    head = _transposed(params["lm_head"]) if "lm_head" in params else TransposedArray(params["embed"])
    return {**unstack(params, _transposed_linears), "lm_head": head}


def _transposed_linears(layer: Params) -> Params:
    return layer | {name: _transposed(layer[name]) for name in LINEARS}


@jax.jit
def _transposed(w: Weight) -> Weight:
    return TransposedArray(w.T) if isinstance(w, Array) else w


def weight_shardings(w: Weight, axes: Sequence[str | None], mesh: Mesh, name: str) -> Any:
    """The `NamedSharding` of every leaf of a weight whose dimensions mean `axes` (..., in, out).

    `w` may be abstract. Raises PunaError where a dimension of a plain array does not divide over the mesh.
    """
    match w:
        case QuantizedArray():
            return quantize.quantized_shardings(w, axes, mesh, name)
        case LoraArray():
            return lora.lora_shardings(w, axes, mesh, name, weight_shardings(w.base, axes, mesh, name))
        case _:
            return named_sharding(mesh, axes, w.shape, name)


def tree_shardings(params: Params, config: LlamaConfig, mesh: Mesh) -> Params:
    """The `NamedSharding` of every leaf of stacked parameters, which may be abstract, whatever their kinds."""

    def one(path: Any, spec: ParamSpec, w: Weight) -> Any:
        return weight_shardings(w, spec.axes, mesh, "/".join(entry.key for entry in path))

    specs = param_specs(config)
    return jax.tree_util.tree_map_with_path(one, specs, params, is_leaf=lambda node: isinstance(node, ParamSpec))


def place(params: Params, config: LlamaConfig, mesh: Mesh) -> Params:
    """Moves stacked parameters of any kinds onto `mesh` as the parameter table says."""
    return jax.device_put(params, tree_shardings(params, config, mesh))
