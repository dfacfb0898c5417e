"""How weights lie: transposed for decoding, layer by layer, and over the devices of a mesh."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh

from model import cpu
from model.config import LlamaConfig
from model.errors import PunaError
from model.fp8 import Fp8Array
from model.lora import LoraArray, lora_shardings
from model.params import LINEARS, Params, ParamSpec, param_specs, unstack
from model.quantize import QuantizedArray, quantize, quantized_shardings
from model.selected import SelectedLora
from model.sharding import named_sharding
from model.tiles import TiledArray, can_tile, tiled
from model.transposed import TransposedArray

Weight = Array | TransposedArray | QuantizedArray | TiledArray | Fp8Array | LoraArray | SelectedLora


def per_layer(params: Params) -> Params:
    """Layers as a tuple, linear weights transposed: the form in which few tokens pass fastest. Unstacked layers stay.

    `load_model(layout="per_layer")` reads a model into this form without building the stacked one. The head is
    transposed too, and a tied embedding, which lies so already, is one; weights of other kinds, and those under
    adapters, keep their form.
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


def round_activations(params: Params, mesh: Mesh | None = None) -> Params:
    """The quantized weights of unstacked layers, and the head, to be multiplied with activations of 8 bits.

    On one CPU int4 weights take the layout of `TiledArray`, where their groups divide their inputs. A head of floats
    becomes int8: in small models it takes longer than all layers.

    Args:
        params: as `per_layer` gives them; taken over, so that no layer is held twice.
        mesh: over which they lie.

    Raises:
        PunaError: no weight of the layers is quantized, or to nf4, whose codes are no integers.
    """
    layers = list(params.pop("layers"))
    tiles = mesh is None and cpu.platform_of(layers) == cpu.PLATFORM
    if not any(isinstance(w, QuantizedArray) for w in jax.tree.leaves(layers, is_leaf=_is_quantized)):
        raise PunaError(
            "activations int8: no weight of the model is quantized; quantize it to int8 or int4 (--quantize)"
        )

    def one(w: Any) -> Any:
        if not _is_quantized(w):
            return w
        if w.format == "nf4":
            raise PunaError("activations int8: the codes of nf4 are no integers; quantize the model to int8 or int4")
        return _tiled(w) if tiles and can_tile(w) else replace(w, activations="int8")

    for i, layer in enumerate(layers):
        layers[i] = jax.block_until_ready(jax.tree.map(one, layer, is_leaf=_is_quantized))
    head = params["lm_head"]
    head = _int8_head(head) if isinstance(head, TransposedArray) else head  # under an adapter it stays
    return params | {"layers": tuple(layers), "lm_head": head}


_tiled = jax.jit(tiled)


@jax.jit
def _int8_head(head: TransposedArray) -> QuantizedArray:
    return replace(quantize(head.rows.T, "int8"), activations="int8")


def _is_quantized(node: Any) -> bool:
    return isinstance(node, QuantizedArray)


def weight_shardings(w: Weight, axes: Sequence[str | None], mesh: Mesh, name: str) -> Any:
    """The `NamedSharding` of every leaf of a weight, which may be abstract.

    Args:
        axes: the logical axis of each dimension (..., in, out); see sharding.RULES.
        name: what messages call the weight.

    Returns:
        A sharding for a plain array; else the weight's own type with shardings for arrays.

    Raises:
        PunaError: a dimension of a plain or transposed array does not divide over the mesh.
    """
    match w:
        case QuantizedArray():
            return quantized_shardings(w, axes, mesh, name)
        case LoraArray():
            return lora_shardings(w, axes, mesh, name, weight_shardings(w.base, axes, mesh, name))
        case TransposedArray():
            return TransposedArray(named_sharding(mesh, axes[::-1], w.rows.shape, name))  # type: ignore[arg-type]
        case _:
            return named_sharding(mesh, axes, w.shape, name)


def tree_shardings(params: Params, config: LlamaConfig, mesh: Mesh) -> Params:
    """The `NamedSharding` of every leaf of stacked parameters, which may be abstract, whatever their kinds.

    Raises:
        PunaError: a dimension of a plain array does not divide over the mesh.
    """

    def one(path: Any, spec: ParamSpec, w: Weight) -> Any:
        return weight_shardings(w, spec.axes, mesh, "/".join(entry.key for entry in path))

    specs = param_specs(config)
    return jax.tree_util.tree_map_with_path(one, specs, params, is_leaf=lambda node: isinstance(node, ParamSpec))


def place(params: Params, config: LlamaConfig, mesh: Mesh) -> Params:
    """Moves stacked parameters of any kinds onto `mesh` as the parameter table says.

    Raises:
        PunaError: a dimension of a plain array does not divide over the mesh.
    """
    return jax.device_put(params, tree_shardings(params, config, mesh))
