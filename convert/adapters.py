"""Adapters over a model's parameters: whether they fit, what they make of its config, and the parameters with them."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from convert.peft import Adapter, is_targeted, load_finite, module_name, read_adapter
from model.config import LlamaConfig
from model.errors import PunaError
from model.layout import weight_shardings
from model.lora import MODULES, LoraArray, on_mesh, untie, with_magnitude
from model.params import Params, param_specs
from model.pieces import Pieces
from model.transposed import TransposedArray


def apply_adapters(
    params: Params, config: LlamaConfig, adapters: Iterable[Adapter | str | Path], mesh: Mesh | None = None
) -> tuple[LlamaConfig, Params]:
    """Parameters with every adapter active, in order, unmerged; a saved embedding replaces the base's.

    Args:
        params: the base's, stacked or per layer.
        config: the base's.
        adapters: PEFT folders, or what `read_adapter` gave for them.
        mesh: the devices that hold `params`; None is one.

    Returns:
        The config and the parameters with the adapters.

    Raises:
        PunaError: an adapter does not fit the model (other shapes, missing layers, fewer vocabulary rows), or holds
            numbers that are not finite.
    """
    for given in adapters:
        adapter = given if isinstance(given, Adapter) else read_adapter(given)
        after = adapted_config(adapter, config)
        say_left_out(adapter, config)
        specs = param_specs(config)
        if isinstance(params["layers"], tuple):
            each = enumerate(params["layers"])
            layers: Any = tuple(_adapted_layer(adapter, i, layer, specs["layers"], mesh) for i, layer in each)
        else:
            layers = dict(params["layers"])
            for name in dict.fromkeys(name.split(".")[2] for name in adapter.factors):
                layers[name] = _stacked(adapter, name, layers[name], specs["layers"][name].axes, mesh)
        params = {**params, "layers": layers}
        params = _replace_saved(params, config, after, adapter, mesh)
        config = after
    return config, params


def check_fits(adapter: Adapter, config: LlamaConfig) -> None:
    """Raises PunaError unless the adapter's shapes are those of adapters for this model."""
    shapes = param_specs(config)["layers"]
    for name, factors in adapter.factors.items():
        _, number, weight = name.split(".")
        _, n_in, n_out = shapes[weight].shape
        found = (factors.a.shape[1], factors.b.shape[0])
        if int(number) >= config.num_hidden_layers or found != (n_in, n_out):
            raise PunaError(
                f"{adapter.folder}: {module_name(name)} adapts {found[0]} inputs and {found[1]} outputs; this base has "
                f"{n_in} and {n_out} in {config.num_hidden_layers} layers. The adapter belongs to another base"
            )
        if factors.magnitude is not None and factors.magnitude.shape != (n_out,):
            raise PunaError(
                f"{adapter.folder}: {module_name(name)} has {factors.magnitude.shape} magnitudes for {n_out} outputs"
            )
    vocab, width = config.vocab_size, config.hidden_size
    for name, tensor in adapter.saved.items():
        if len(tensor.shape) != 2 or tensor.shape[1] != width or tensor.shape[0] < vocab:
            raise PunaError(
                f"{adapter.folder}: its {name} is {tensor.shape} and the base's {(vocab, width)}: rows may grow only"
            )
    if len({tensor.shape[0] for tensor in adapter.saved.values()}) > 1:
        raise PunaError(f"{adapter.folder}: embed_tokens and lm_head have different numbers of rows")
    grown = any(tensor.shape[0] > vocab for tensor in adapter.saved.values())
    if grown and len(adapter.saved) < 2 and (not config.tie_word_embeddings or "embed" not in adapter.saved):
        raise PunaError(f"{adapter.folder}: the vocabulary grows, and only one of embed_tokens and lm_head was saved")


def adapted_config(adapter: Adapter, config: LlamaConfig) -> LlamaConfig:
    """The config of the model `config` with the adapter: as many rows as the tables that it saved, a head of its own
    where it saved one, or trained the embedding alone, and the pieces that it was trained with, where it names any.
    Raises PunaError where the adapter does not fit."""
    check_fits(adapter, config)
    rows = max((tensor.shape[0] for tensor in adapter.saved.values()), default=config.vocab_size)
    trained = "embed_tokens" in (adapter.settings.get("modules_to_save") or ())
    untied = "lm_head" in adapter.saved or (trained and rows == config.vocab_size)
    said = adapter.settings.get("puna")
    return replace(
        config,
        vocab_size=rows,
        tie_word_embeddings=config.tie_word_embeddings and not untied,
        pieces=config.pieces if said is None else Pieces.from_hf(said),
    )


def say_left_out(adapter: Adapter, config: LlamaConfig) -> None:
    """Warns of modules that the settings name and no tensor adapts."""
    if adapter.settings.get("target_modules") is None:
        return
    names = [f"layers.{i}.{name}" for name in MODULES for i in range(config.num_hidden_layers)]
    unadapted = [module_name(name) for name in names if name not in adapter.factors]
    if left := [module for module in unadapted if is_targeted(module, adapter.settings)]:
        said = "%s holds no adapter of %s%s, which its target_modules names: the base is used there as it is"
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        logging.getLogger(__name__).warning(said, adapter.folder, left[0], more)


def _adapted_layer(adapter: Adapter, number: int, layer: Params, specs: Params, mesh: Mesh | None) -> Params:
    """One layer with those of its weights adapted that the adapter has."""
    layer = dict(layer)
    rate = float(adapter.settings.get("lora_dropout") or 0.0)
    for name, base in layer.items():
        if (factors := adapter.factors.get(f"layers.{number}.{name}")) is None:
            continue
        a, b = (
            jnp.asarray(load_finite(part, f"{name} {half} of layer {number}").astype(np.float32).T)
            for part, half in ((factors.a, "lora_A"), (factors.b, "lora_B"))
        )
        w = LoraArray(base, a, b, jnp.float32(factors.scale), ranks=(factors.rank,), dropout=rate)
        if factors.magnitude is not None:
            w = with_magnitude(w, jnp.asarray(load_finite(factors.magnitude, name).astype(np.float32)))
        layer[name] = on_mesh(w, specs[name].axes[1:], mesh, name)
    return layer


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
    w = LoraArray(base, jnp.asarray(a), jnp.asarray(b), scale, ranks=ranks, dropout=rate)
    if adapter.settings.get("use_dora"):
        w = with_magnitude(w, None)
        own = [
            None if factors is None or factors.magnitude is None else load_finite(factors.magnitude, name)
            for factors in found
        ]
        rows = np.stack([np.zeros(n_out, np.float32) if row is None else row.astype(np.float32) for row in own])
        has_own = np.array([row is not None for row in own])[:, None]
        # A layer without adapter keeps the base's norms, which change nothing.
        w = replace(w, magnitude=jnp.where(has_own, rows, jnp.asarray(w.magnitude)))
    return on_mesh(w, axes, mesh, name)


def _replace_saved(
    params: Params, before: LlamaConfig, after: LlamaConfig, adapter: Adapter, mesh: Mesh | None
) -> Params:
    if not adapter.saved:
        return params
    dtype, is_per_layer = params["embed"].dtype, isinstance(params["layers"], tuple)
    if before.tie_word_embeddings and not after.tie_word_embeddings and not is_per_layer:  # which has a head already
        params = untie(params)
    tables: Params = {name: jnp.asarray(load_finite(x, name)).astype(dtype) for name, x in adapter.saved.items()}
    if "lm_head" in tables:
        tables["lm_head"] = TransposedArray(tables["lm_head"]) if is_per_layer else tables["lm_head"].T
    elif is_per_layer and after.tie_word_embeddings:
        tables["lm_head"] = TransposedArray(tables["embed"])
    params = {**params, **tables}
    if mesh is not None:
        specs = param_specs(replace(after, tie_word_embeddings=False))
        for name in ("embed", "lm_head"):
            if name in params:
                where = weight_shardings(params[name], specs[name].axes, mesh, name)
                params[name] = jax.device_put(params[name], where)
    return params
