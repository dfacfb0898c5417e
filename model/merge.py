"""Adapters merged into the parameters that they lie over."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from model.errors import PunaError
from model.lora import LoraArray, added_bias, dense, is_weight
from model.params import LINEARS, Params
from model.quantize import QuantizedArray, quantize

# The bias beside each linear weight, and the weights that have one where that field of the config is true.
BIASES = {"wq": "bq", "wk": "bk", "wv": "bv", "wo": "bo", "w_gate": "b_gate", "w_up": "b_up", "w_down": "b_down"}
BIAS_GROUPS = {"attention_bias": ("wq", "wk", "wv", "wo"), "mlp_bias": ("w_gate", "w_up", "w_down")}
HEAD_BIAS = "an adapter adds a bias to lm_head (lora_bias), and no LLaMA has one there: use the adapter unmerged"


def merge(params: Params) -> tuple[Params, dict[str, float]]:
    """Parameters without adapters: the update in float32, the result in the base's dtype and format.

    A quantized base is dequantized, added to and quantized again, which loses something. Biases that adapters add
    become the model's: its config must then say `attention_bias` or `mlp_bias`.

    Returns:
        The parameters, and what was lost: the largest relative error (Frobenius norm) over the layers, by weight. It is
        empty for float bases.

    Raises:
        PunaError: an adapter adds a bias to the head.
    """
    if added_bias(params.get("lm_head")) is not None:
        raise PunaError(HEAD_BIAS)
    layers = params["layers"]
    biased = tuple(map(_with_biases, layers)) if isinstance(layers, tuple) else _with_biases(layers)
    errors: dict[str, float] = {}

    def one(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, LoraArray):
            return leaf
        merged, error = _merge(leaf)
        if isinstance(merged, QuantizedArray):
            errors["/".join(str(getattr(entry, "key", getattr(entry, "idx", ""))) for entry in path)] = float(error)
        return merged

    return jax.tree_util.tree_map_with_path(one, {**params, "layers": biased}, is_leaf=is_weight), errors


def _with_biases(layer: Params) -> Params:
    """One layer's parameters, or all layers', with the biases that adapters add, and zeros where a LLaMA that has those
    has others beside them."""
    added = {name: bias for name in LINEARS if (bias := added_bias(layer[name])) is not None}
    like, layer = layer["attn_norm"], dict(layer)
    for group in BIAS_GROUPS.values():
        for name in group if added.keys() & set(group) else ():
            none = jnp.zeros((*like.shape[:-1], layer[name].shape[-1]), like.dtype)
            own = layer.get(BIASES[name], none)
            layer[BIASES[name]] = (own + added[name]).astype(own.dtype) if name in added else own
    return layer


@jax.jit
def _merge(w: LoraArray) -> tuple[Any, Array]:
    if w.a.ndim > 2:
        merged, errors = lax.map(_merge, w)
        return merged, errors.max()
    base = w.base
    while isinstance(base, LoraArray):
        base = base.base
    full = dense(w)
    if not isinstance(base, QuantizedArray):
        return full.astype(base.dtype), jnp.zeros(())
    rounded = quantize(full.astype(base.dtype), base.format, base.block, base.nested_absmax is not None)
    error = jnp.linalg.norm(dense(rounded) - full) / jnp.linalg.norm(full)
    return replace(rounded, activations=base.activations), error
