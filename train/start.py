"""What a run starts from: the checkpoint, the model's shape, its tokenizer and the mesh."""

import inspect
import traceback
from collections.abc import Sequence
from dataclasses import MISSING, fields, replace
from typing import Any

from jax.sharding import Mesh

from convert.peft import Adapter, module_name
from convert.source import Source, find_source, tokenizer_place
from convert.tokenizer_files import find_tokenizer
from model.attention import ATTENTIONS
from model.config import PRESETS, LlamaConfig, RopeScaling
from model.errors import PunaError
from model.lora import SAVED_MODULES
from model.pieces import Pieces, load_function
from model.sharding import make_mesh
from model.tokenizer import Tokenizer
from train.checks import refuse_quantized_training
from train.sections import Config, LoraConfig, ModelConfig

# What may differ from a checkpoint that is trained further: how positions are read, not the shape of any weight.
_OVERRIDABLE = ("max_position_embeddings", "rope_theta", "rope_scaling")


def prepare(config: Config) -> None:
    """Calls what run.prepare names, if anything, with the config: it makes or fetches the data.

    Raises:
        PunaError: there is no such function, it does not take one argument, or it fails.
    """
    name = config.run.prepare
    if not name:
        return
    function = load_function(name, "run.prepare")
    try:
        inspect.signature(function).bind(config)
    except (TypeError, ValueError) as error:
        raise PunaError(
            f'run.prepare is "{name}", which cannot be called with the config alone: {error}; write a function of it'
        ) from None
    try:
        function(config)
    except (PunaError, OSError):
        raise
    except Exception as error:  # whatever the user's function does
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise PunaError(
            f'run.prepare is "{name}", which fails at {place.filename}:{place.lineno}: {type(error).__name__}: {error}'
        ) from error


def mesh_of(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of [mesh] over all devices.

    Args:
        config: the run's.
        devices: others than those of this process.

    Raises:
        PunaError: the sizes do not multiply to the number of devices.
    """
    sizes = config.mesh
    return make_mesh(sizes.data, sizes.fsdp, sizes.tensor, devices, sizes.context)


def tokenizer_of(config: Config) -> Tokenizer:
    """model.tokenizer, or that of model.path: a file, a folder or a Hub id.

    Raises:
        PunaError: neither is given, or there is no tokenizer.
    """
    path = config.model.tokenizer or config.model.path
    if path is None:
        raise PunaError("model.tokenizer is missing: give a tokenizer file or folder")
    return find_tokenizer(tokenizer_place(path))


def base_of(config: Config) -> Source | None:
    """The model that model.path names, opened once for all of a run; None for a run from scratch.

    Raises:
        PunaError: naming what is wrong with its files.
    """
    return None if config.model.path is None else find_source(config.model.path)


def with_adapter_settings(config: Config, base: Source | None) -> Config:
    """The config, whose [lora] says what the adapter is that model.path names, if any: training goes on with it.

    Raises:
        PunaError: [lora] says something else, the adapter has parts that do not train here, or [quantize] is given and
            nothing is an adapter.
    """
    if base is None or not base.adapters:
        refuse_quantized_training(config)
        return config
    *below, adapter = base.adapters
    if below:
        raise PunaError(
            f"model.path {config.model.path} is an adapter over the adapter {below[-1].folder}: merge that one into "
            "its base first (python -m convert merge)"
        )
    own, wanted = _lora_of(adapter), config.lora
    for field in fields(LoraConfig):
        if wanted is None or field.name == "dropout":
            continue
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        given = getattr(wanted, field.name)
        if given not in (default, getattr(own, field.name)):
            raise PunaError(
                f"lora.{field.name} is {given!r}, and the adapter {config.model.path} that model.path names has "
                f"{getattr(own, field.name)!r}: drop it, or merge the adapter into its base and train another"
            )
    return replace(config, lora=replace(own, dropout=wanted.dropout if wanted and wanted.dropout else own.dropout))


def _lora_of(adapter: Adapter) -> LoraConfig:
    """What [lora] would say of an adapter. Raises PunaError for parts that do not train here."""
    said = adapter.settings
    tables = {name: module for module, name in SAVED_MODULES.items()}
    others = [name for name in (*adapter.factors, *adapter.tokens) if name in tables]
    others += [name for name in adapter.saved if name not in tables]
    others += [f"the bias of {name}" for name, factors in adapter.factors.items() if factors.bias is not None]
    if others:
        raise PunaError(
            f"model.path: the adapter {adapter.folder} changes {', '.join(others[:3])}, which does not train here: "
            "merge it into its base (python -m convert merge) and train another over that"
        )
    modules = dict.fromkeys(module_name(name).split(".")[-1] for name in adapter.factors)
    return LoraConfig(
        rank=said.get("r", 8),
        alpha=float(said.get("lora_alpha", 8)),
        dropout=float(said.get("lora_dropout") or 0.0),
        targets=tuple(modules),
        modules_to_save=tuple(module for name, module in tables.items() if name in adapter.saved),
        rslora=bool(said.get("use_rslora")),
        dora=bool(said.get("use_dora")),
        rank_pattern=dict(said.get("rank_pattern") or {}),
        alpha_pattern={name: float(value) for name, value in (said.get("alpha_pattern") or {}).items()},
    )


def model_of(config: Config, tokenizer: Tokenizer | None = None, base: Source | None = None) -> LlamaConfig:
    """The shape that [model] describes, with the functions that it names.

    Args:
        config: the run's.
        tokenizer: gives a fresh model its special tokens, and its vocab_size where [model] does not.
        base: what `base_of` gave; opened here where it is not given.

    Raises:
        PunaError: [model] says too little, contradicts its checkpoint, or cannot hold the data.
    """
    wanted = config.model
    if wanted.path is not None:
        model = (base or find_source(wanted.path)).config
        given = _given(wanted, model.max_position_embeddings)
        for name in given.keys() - set(_OVERRIDABLE):
            if given[name] != getattr(model, name):
                raise PunaError(f"model.{name} is {given[name]}, and {wanted.path} has {getattr(model, name)}: drop it")
        model = replace(model, **given)
    elif wanted.preset is not None:
        if wanted.preset not in PRESETS:
            raise PunaError(f"model.preset {wanted.preset!r} is not known; choose {', '.join(PRESETS)}")
        model = PRESETS[wanted.preset]
        own = _special_tokens(tokenizer)
        own.pop("vocab_size", None)  # tables may be padded beyond the tokenizer's tokens
        if set(own.get("eos_token_id", ())) <= set(model.eos_token_id):
            own.pop("eos_token_id", None)  # the tokenizer tells one of several stops
        special = {name: value for name, value in own.items() if value is not None}
        model = replace(model, **(special | _given(wanted, model.max_position_embeddings)))
    elif wanted.hidden_size is None:
        raise PunaError("model is empty: give path, preset, or dims such as hidden_size and num_hidden_layers")
    else:
        model = LlamaConfig(**(_special_tokens(tokenizer) | _given(wanted, LlamaConfig.max_position_embeddings)))
    model = replace(model, pieces=_pieces(wanted, model.pieces))
    if tokenizer is not None and tokenizer.vocab_size > model.vocab_size:
        raise PunaError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {model.vocab_size} rows: set "
            "model.vocab_size, or resize the checkpoint with `python -m convert vocab resize`"
        )
    if config.data.max_length > model.max_position_embeddings:
        raise PunaError(
            f"data.max_length {config.data.max_length} is beyond the model's max_position_embeddings "
            f"{model.max_position_embeddings}: shorten it, or set model.max_position_embeddings and model.rope_scaling"
        )
    is_untied = config.lora is not None and bool(config.lora.modules_to_save)  # what trains apart is two tables
    return replace(model, tie_word_embeddings=False) if is_untied else model


def _given(wanted: ModelConfig, length: int) -> dict[str, Any]:
    """The fields of LlamaConfig that [model] sets; `length` is the context of what it starts from."""
    names = {f.name for f in fields(LlamaConfig)} & {f.name for f in fields(ModelConfig)}
    given = {name: getattr(wanted, name) for name in names if getattr(wanted, name) is not None}
    if "rope_scaling" in given:
        length = given.get("max_position_embeddings", length)
        given["rope_scaling"] = RopeScaling.from_hf(given["rope_scaling"], length)
    return given


def _pieces(wanted: ModelConfig, own: Pieces) -> Pieces:
    """The functions that [model] names in place of LLaMA's, else those of the checkpoint that it starts from."""
    attention = None if wanted.attention in ATTENTIONS else wanted.attention
    named = {"block": wanted.block, "attention": attention, "norm": wanted.norm}
    pieces = replace(own, **{part: name for part, name in named.items() if name is not None})
    for part, name in pieces.names().items():
        load_function(name, f"model.{part}")
    return pieces


def _special_tokens(tokenizer: Tokenizer | None) -> dict[str, Any]:
    if tokenizer is None:
        return {}
    stops = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops, "pad_token_id": tokenizer.pad_id}
    return {"vocab_size": tokenizer.vocab_size, **ids}
