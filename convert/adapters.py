"""Adapters over a model's parameters: the parameters with them, active and unmerged."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from convert.adapter_fit import adapted_config, new_tables, say_left_out
from convert.lazy import LazyTensor, narrowed
from convert.peft import Adapter, Factors, load_finite, read_adapter
from model.config import LlamaConfig
from model.errors import PunaError
from model.layout import weight_shardings
from model.lora import LoraArray, added_bias, dense, on_mesh, untie, with_magnitude
from model.merge import BIASES
from model.params import LINEARS, Params, param_specs
from model.transposed import TransposedArray


def apply_adapters(
    params: Params, config: LlamaConfig, adapters: Iterable[Adapter | str | Path], mesh: Mesh | None = None
) -> tuple[LlamaConfig, Params]:
    """Parameters with every adapter active, in order, unmerged; what an adapter saved whole replaces the base's.

    Args:
        params: the base's, stacked or per layer.
        config: the base's.
        adapters: PEFT folders, Hub ids, or what `read_adapter` gave for them.
        mesh: the devices that hold `params`; None is one.

    Returns:
        The config and the parameters with the adapters.

    Raises:
        PunaError: an adapter does not fit the model (other shapes, missing layers, fewer vocabulary rows), replaces
            weights that lie under another adapter, or holds numbers that are not finite.
    """
    for given in adapters:
        adapter = given if isinstance(given, Adapter) else read_adapter(given)
        after = adapted_config(adapter, config)
        say_left_out(adapter, config)
        params = _with_tables(params, config, adapter, mesh)
        params = _with_saved(params, adapter, mesh, config)
        params = _with_factors(params, after, adapter, mesh)
        config = after
    return config, params


def _with_factors(params: Params, config: LlamaConfig, adapter: Adapter, mesh: Mesh | None) -> Params:
    """The parameters with the adapter's low-rank updates."""
    specs = param_specs(replace(config, tie_word_embeddings=False))
    params = dict(params)
    for name in ("embed", "lm_head"):
        if (factors := adapter.factors.get(name)) is not None:
            params[name] = _adapted(adapter, factors, params[name], specs[name].axes, mesh, name)
    layered = dict.fromkeys(name.split(".")[2] for name in adapter.factors if name.startswith("layers."))
    if isinstance(params["layers"], tuple):
        layers: Any = tuple(map(dict, params["layers"]))
        for number, layer in enumerate(layers):
            for name in layered:
                if (factors := adapter.factors.get(f"layers.{number}.{name}")) is not None:
                    axes = specs["layers"][name].axes[1:]
                    layer[name] = _adapted(adapter, factors, layer[name], axes, mesh, f"layers/{name}")
    else:
        layers = dict(params["layers"])
        for name in layered:
            layers[name] = _stacked(adapter, name, layers[name], specs["layers"][name].axes, mesh)
    return params | {"layers": layers}


def _adapted(
    adapter: Adapter, factors: Factors, base: Any, axes: Sequence[str], mesh: Mesh | None, name: str
) -> LoraArray:
    """One weight with its adapter."""

    def load(part: LazyTensor | None) -> Array | None:
        return None if part is None else jnp.asarray(load_finite(part, name).astype(np.float32))

    a, b = jnp.asarray(load(factors.a)).T, jnp.asarray(load(factors.b)).T
    bias, rate = load(factors.bias), float(adapter.settings.get("lora_dropout") or 0.0)
    w = LoraArray(base, a, b, jnp.float32(factors.scale), bias=bias, ranks=(factors.rank,), dropout=rate)
    if factors.magnitude is not None:
        w = with_magnitude(w, load(factors.magnitude))
    return on_mesh(w, axes, mesh, name)


def _stacked(adapter: Adapter, name: str, base: Any, axes: Sequence[str], mesh: Mesh | None) -> LoraArray:
    """All layers' adapters of one weight, ranks padded with zeros to the largest."""
    L, n_in, n_out = base.shape
    found = [adapter.factors.get(f"layers.{i}.{name}") for i in range(L)]
    ranks = tuple(factors.rank if factors else 0 for factors in found)
    a, b = np.zeros((L, n_in, max(ranks)), np.float32), np.zeros((L, max(ranks), n_out), np.float32)
    for i, factors in enumerate(found):
        if factors is not None:
            a[i, :, : ranks[i]] = load_finite(factors.a, f"{name} lora_A of layer {i}").astype(np.float32).T
            b[i, : ranks[i]] = load_finite(factors.b, f"{name} lora_B of layer {i}").astype(np.float32).T
    scale = jnp.array([factors.scale if factors else 0.0 for factors in found], jnp.float32)
    rate = float(adapter.settings.get("lora_dropout") or 0.0)
    bias = None
    if adapter.settings.get("lora_bias"):
        bias = jnp.asarray(_rows([factors and factors.bias for factors in found], n_out, name))
    w = LoraArray(base, jnp.asarray(a), jnp.asarray(b), scale, bias=bias, ranks=ranks, dropout=rate)
    if adapter.settings.get("use_dora"):
        w = with_magnitude(w, None)
        rows = _rows([factors and factors.magnitude for factors in found], n_out, name)
        has_own = np.array([factors is not None for factors in found])[:, None]
        # A layer without adapter keeps the base's norms, which change nothing.
        w = replace(w, magnitude=jnp.where(has_own, rows, jnp.asarray(w.magnitude)))
    return on_mesh(w, axes, mesh, name)


def _rows(parts: Sequence[LazyTensor | None], size: int, name: str) -> np.ndarray:
    """One row for each layer, float32 [L, size]; zeros for a layer without."""
    none = np.zeros(size, np.float32)
    return np.stack([none if part is None else load_finite(part, name).astype(np.float32) for part in parts])


# --------------------------------------------------------------------------------------------- what replaces the base's


def _with_tables(params: Params, before: LlamaConfig, adapter: Adapter, mesh: Mesh | None) -> Params:
    """The parameters with the embedding and the head, or rows of them, that the adapter brings."""
    whole, rows, is_tied = new_tables(adapter, before)
    is_per_layer, dtype = isinstance(params["layers"], tuple), params["embed"].dtype
    if not is_tied and "lm_head" not in params:
        params = untie(params)
    params, changed = dict(params), dict.fromkeys([*whole, *rows])
    for name in changed:
        table = _table(params[name], name, dtype)
        if name in whole:
            table = jnp.asarray(_in(dtype, whole[name], name))
        if name in rows:
            new = jnp.asarray(_in(dtype, rows[name].tensor, f"the token rows of {name}"))
            table = table.at[jnp.asarray(rows[name].indices)].set(new)
        params[name] = table if name == "embed" else TransposedArray(table) if is_per_layer else table.T
        if mesh is not None:
            axes = ("vocab", "embed") if name == "embed" else ("embed", "vocab")
            params[name] = jax.device_put(params[name], weight_shardings(params[name], axes, mesh, name))
    if is_tied and is_per_layer and changed:
        params["lm_head"] = TransposedArray(params["embed"])
    return params


def _in(dtype: Any, tensor: LazyTensor, name: str) -> np.ndarray:
    """The tensor's numbers in `dtype`. Raises PunaError where it holds NaN, infinities or numbers beyond `dtype`."""
    return narrowed(load_finite(tensor, name), np.dtype(dtype), name, tensor.where)


def _table(leaf: Any, name: str, dtype: Any) -> Array:
    """The embedding or the head of any kind as rows [V, D]."""
    if isinstance(leaf, TransposedArray):
        return leaf.rows
    table = leaf if isinstance(leaf, Array) else dense(leaf).astype(dtype)
    return table if name == "embed" else table.T


def _with_saved(params: Params, adapter: Adapter, mesh: Mesh | None, config: LlamaConfig) -> Params:
    """The parameters with the norms, biases and linear weights that the adapter saved whole."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for name, tensor in adapter.saved.items():
        if name == "final_norm":
            params = params | {name: jnp.asarray(_in(params[name].dtype, tensor, name))}
        elif name.startswith("layers."):
            _, number, key = name.split(".")
            layer = params["layers"]
            leaf = layer[int(number)][key] if isinstance(layer, tuple) else layer[key]
            found.setdefault(key, {})[int(number)] = _in(_dtype(leaf), tensor, name)
    specs, layers = param_specs(config)["layers"], params["layers"]
    if isinstance(layers, tuple):
        for number, key in ((number, key) for key, arrays in found.items() for number in arrays):
            layer = layers[number]
            _refuse_under_adapter(adapter, layer, key)
            array = jnp.asarray(found[key][number])
            new = TransposedArray(array) if key in LINEARS else array
            layers = (*layers[:number], layer | {key: _on(mesh, new, specs[key].axes[1:], key)}, *layers[number + 1 :])
        return params | {"layers": layers}
    for key, arrays in found.items():
        _refuse_under_adapter(adapter, layers, key)
        leaf, numbers = layers[key], sorted(arrays)
        new = np.stack([arrays[i].T if key in LINEARS else arrays[i] for i in numbers])
        if len(numbers) == config.num_hidden_layers:
            leaf = jnp.asarray(new)
        elif isinstance(leaf, Array):
            leaf = leaf.at[jnp.asarray(numbers)].set(jnp.asarray(new))
        else:
            raise PunaError(
                f"{adapter.folder} replaces {key} in layers {numbers} of a quantized base, whose layers lie in one "
                "array: merge it into the base (convert merge), or load the base with a dtype"
            )
        layers = layers | {key: _on(mesh, leaf, specs[key].axes, key)}
    return params | {"layers": layers}


def _refuse_under_adapter(adapter: Adapter, layer: Params, key: str) -> None:
    weight = next((weight for weight, bias in BIASES.items() if bias == key), key)
    over = layer.get(weight)
    if isinstance(over, LoraArray) and (weight == key or added_bias(over) is not None):
        raise PunaError(f"{adapter.folder} replaces {key}, over which an earlier adapter lies: merge that one first")


def _dtype(leaf: Any) -> Any:
    return leaf.rows.dtype if isinstance(leaf, TransposedArray) else leaf.dtype


def _on(mesh: Mesh | None, leaf: Any, axes: Sequence[str], key: str) -> Any:
    return leaf if mesh is None else jax.device_put(leaf, weight_shardings(leaf, axes, mesh, f"layers/{key}"))
