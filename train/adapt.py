"""[lora] and [quantize]: what of a model trains and what stays as it is, as two trees of one shape.

Without [lora] everything trains and nothing is frozen.
"""

from dataclasses import asdict, replace
from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh

from convert.formats import open_model
from model import lora
from model.config import LlamaConfig
from model.linear import weight_shardings
from model.params import LINEARS, Params, ParamSpec, abstract_params, param_specs
from model.quantize import quantizer
from train.config import Config, QuantizeConfig


def adapted_model(config: Config, model: LlamaConfig) -> LlamaConfig:
    """The model's config once [lora] has untied what it trains apart."""
    untied = config.lora is not None and bool(config.lora.modules_to_save)
    return replace(model, tie_word_embeddings=False) if untied else model


def add_adapters(config: Config, model: LlamaConfig, params: Params, mesh: Mesh | None) -> tuple[Any, Any]:
    """(trained, frozen) of a base: its adapters and its own weights."""
    if config.lora is None:
        return params, None
    key = jax.random.key(config.run.seed)
    _, params = lora.add(params, model, key, mesh=mesh, **asdict(config.lora))
    return lora.split(params, config.lora.modules_to_save)


def wanted_quantizer(wanted: QuantizeConfig | None) -> Any:
    """The function from a weight to its quantized form that [quantize] asks for; None without it."""
    return wanted and quantizer(wanted.method, wanted.block, wanted.double_quant)


def quantize_linears(params: Params, wanted: QuantizeConfig | None) -> Params:
    """Parameters whose layers' linear weights are quantized as [quantize] says."""
    if wanted is None:
        return params
    layers = {name: wanted_quantizer(wanted)(w) if name in LINEARS else w for name, w in params["layers"].items()}
    return {**params, "layers": layers}


def abstract_parts(config: Config, model: LlamaConfig, mesh: Mesh) -> tuple[Any, Any]:
    """(trained, frozen) as shapes, dtypes and shardings."""
    params = abstract_params(model, config.model.param_dtype, mesh)
    if config.lora is None:
        return params, None

    def build(params: Params) -> Params:
        wanted = config.quantize or _stored(config.model.path)
        trained, frozen = add_adapters(config, model, quantize_linears(params, wanted), None)
        return lora.join(trained, frozen)

    shapes = jax.eval_shape(build, params)
    where = _shardings(shapes, param_specs(model), mesh)
    placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)
    return lora.split(placed, config.lora.modules_to_save)


def _stored(path: str | None) -> QuantizeConfig | None:
    """How the checkpoint at `path` is quantized; it stays so under adapters. None where some of it is float, which
    is counted as if all were."""
    if path is None:
        return None
    checkpoint = open_model(path)
    quantized = checkpoint.quantized
    if len(quantized) < len(LINEARS) * checkpoint.config.num_hidden_layers:
        return None
    like = next(iter(quantized.values())).like
    return QuantizeConfig(like.format, like.nested_absmax is not None, like.block)


def join(trained: Any, frozen: Any, key: Array) -> Params:
    """The parameters that a step computes with; `key` is what its dropout comes from."""
    return trained if frozen is None else lora.with_dropout(lora.join(trained, frozen), key)


def _shardings(params: Any, specs: Any, mesh: Mesh, name: str = "") -> Any:
    """The sharding of every array, as the table says of the weight that it belongs to."""
    if isinstance(specs, ParamSpec):
        return weight_shardings(params, specs.axes, mesh, name)
    return {key: _shardings(params[key], specs[key], mesh, f"{name}/{key}".lstrip("/")) for key in params}
