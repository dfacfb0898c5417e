"""Whether an adapter fits a model, and what it makes of the model's config and of its two tables."""

import logging
from dataclasses import replace
from typing import NamedTuple

from convert.damage import malformed
from convert.lazy import LazyTensor
from convert.names import hf_name, parameters
from convert.peft import Adapter, module_name
from convert.peft_settings import EMBED, HEAD, REMEDY, is_saved, is_targeted, ties_saved, token_indices
from model.config import LlamaConfig
from model.errors import PunaError
from model.lora import MODULES
from model.params import param_specs
from model.pieces import Pieces

_TABLES = {"embed": EMBED, "lm_head": HEAD}


class Rows(NamedTuple):
    """Rows [n, D] that take the places `indices` of a table."""

    indices: list[int]
    tensor: LazyTensor


class Tables(NamedTuple):
    """What an adapter makes of the embedding and the head, as [V, D].

    Attributes:
        whole: `embed` and `lm_head`, where a new table takes the old one's place.
        rows: those where only some rows are new. Whole tables come first.
        is_tied: whether the head is the embedding afterwards, which then stands under `embed`.
    """

    whole: dict[str, LazyTensor]
    rows: dict[str, Rows]
    is_tied: bool


def new_tables(adapter: Adapter, config: LlamaConfig) -> Tables:
    """What the adapter makes of the two tables of a model `config`, as peft would load it.

    On a tied base a table in modules_to_save is a copy that only one of the two uses, while a table that peft wrote
    beside the adapter (as it does after a resize) is the one that both share.

    Raises:
        PunaError: token rows that the settings do not name, or that lie in a table with another change.
    """
    settings, saved, was_tied = adapter.settings, adapter.saved, config.tie_word_embeddings
    tables = {name: saved[name] for name in _TABLES if name in saved}
    rows = _token_rows(adapter, config)
    copied = {name for name, module in _TABLES.items() if is_saved(module, settings, was_tied)}
    changed = copied | {name for name in _TABLES if name in adapter.factors}
    if clash := changed if was_tied and rows else changed & rows.keys():
        raise PunaError(
            f"{adapter.where}: trainable_token_indices beside another change of {' and '.join(sorted(clash))} is not "
            f"supported: {REMEDY}"
        )
    if not was_tied:
        return Tables(tables, rows, is_tied=False)
    if ties_saved(settings, was_tied):
        return Tables({"embed": list(tables.values())[-1]} if tables else {}, rows, is_tied=True)
    # peft reads the embedding first, then the head: the last one that is read into the shared table stays.
    read = [(adapter.originals.get(name), None if name in copied else tables.get(name)) for name in _TABLES]
    base = next((table for pair in reversed(read) for table in reversed(pair) if table is not None), None)
    if not changed and "lm_head" not in rows:
        return Tables({} if base is None else {"embed": base}, rows, is_tied=True)
    both = {name: tables.get(name) if name in copied else base for name in _TABLES}
    return Tables({name: table for name, table in both.items() if table is not None}, rows, is_tied=False)


def _token_rows(adapter: Adapter, config: LlamaConfig) -> dict[str, Rows]:
    said = token_indices(adapter.settings, config.tie_word_embeddings, adapter.where)
    named = {name: said[module] for name, module in _TABLES.items() if module in said}
    for name, indices in named.items():
        tensor = adapter.tokens.get(name)
        if tensor is None or tensor.shape != (len(indices), config.hidden_size):
            found = "none" if tensor is None else f"a tensor {tensor.shape}"
            raise PunaError(
                f"{adapter.folder}: trainable_token_indices names {len(indices)} rows of {_TABLES[name]}, of "
                f"{config.hidden_size} numbers in this base, and the adapter holds {found}"
            )
    if lost := adapter.tokens.keys() - named.keys() - ({"lm_head"} if config.tie_word_embeddings else set()):
        raise PunaError(f"{adapter.folder} holds token rows of {' and '.join(lost)} that trainable_token_indices lacks")
    return {name: Rows(indices, adapter.tokens[name]) for name, indices in named.items()}


def adapted_config(adapter: Adapter, config: LlamaConfig) -> LlamaConfig:
    """The config of the model `config` with the adapter, unmerged: as many rows as the tables that it saved, a head of
    its own where the adapter changes one of the two tables alone, and the pieces that it was trained with, where it
    names any. Raises PunaError where the adapter does not fit."""
    with malformed(adapter.folder):
        tables = new_tables(adapter, config)
        rows = _check_tables(adapter, config, tables)
        _check_factors(adapter, config, rows)
        _check_saved(adapter, config)
    said = adapter.settings.get("puna")
    return replace(
        config,
        vocab_size=rows,
        tie_word_embeddings=tables.is_tied,
        pieces=config.pieces if said is None else Pieces.from_hf(said, adapter.where),
    )


def _check_tables(adapter: Adapter, config: LlamaConfig, tables: Tables) -> int:
    """The number of rows of both tables afterwards. Raises PunaError unless they are tables of this model."""
    vocab, width = config.vocab_size, config.hidden_size
    for name, tensor in tables.whole.items():
        if len(tensor.shape) != 2 or tensor.shape[1] != width or tensor.shape[0] < vocab:
            raise PunaError(
                f"{adapter.folder}: its {name} is {tensor.shape} and the base's {(vocab, width)}: rows may grow only"
            )
    sizes = {name: tensor.shape[0] for name, tensor in tables.whole.items()}
    if len(set(sizes.values())) > 1:
        raise PunaError(f"{adapter.folder}: embed_tokens and lm_head have different numbers of rows")
    size = max(sizes.values(), default=vocab)
    if size > vocab and len(sizes) < 2 and not tables.is_tied:
        raise PunaError(
            f"{adapter.folder}: the vocabulary grows, and only one of embed_tokens and lm_head was saved: resize the "
            "base first, or save both"
        )
    for rows in tables.rows.values():
        if max(rows.indices) >= size:
            raise PunaError(f"{adapter.where}: trainable_token_indices {max(rows.indices)} in a table of {size} rows")
    return size


def _check_factors(adapter: Adapter, config: LlamaConfig, rows: int) -> None:
    """Raises PunaError unless low-rank updates are of this model's shapes, and where peft would put them."""
    layers = param_specs(config)["layers"]
    shapes = {"embed": (rows, config.hidden_size), "lm_head": (config.hidden_size, rows)}
    for name, factors in adapter.factors.items():
        number, key = (0, name) if name in _TABLES else (int(name.split(".")[1]), name.split(".")[2])
        n_in, n_out = shapes[name] if name in _TABLES else layers[key].shape[1:]
        found = (factors.a.shape[1], factors.b.shape[0])
        if number >= config.num_hidden_layers or found != (n_in, n_out):
            raise PunaError(
                f"{adapter.folder}: {module_name(name)} adapts {found[0]} inputs and {found[1]} outputs; this base has "
                f"{n_in} and {n_out} in {config.num_hidden_layers} layers. The adapter belongs to another base"
            )
        for what, part in (("magnitudes", factors.magnitude), ("biases", factors.bias)):
            if part is not None and part.shape != (n_out,):
                raise PunaError(f"{adapter.folder}: {module_name(name)} has {part.shape} {what} for {n_out} outputs")
        if not is_targeted(module_name(name), adapter.settings, config.tie_word_embeddings):
            raise PunaError(
                f"{adapter.folder} holds an adapter of {module_name(name)}, which target_modules, exclude_modules, "
                "modules_to_save and layers_to_transform leave out, so that peft would not use it: correct "
                "adapter_config.json"
            )


def _check_saved(adapter: Adapter, config: LlamaConfig) -> None:
    """Raises PunaError unless what the adapter saved whole is in this model, and all of what it says that it saved."""
    expected = {param.name: param.foreign_shape for param in parameters(config)}
    for name, tensor in adapter.saved.items():
        if name in _TABLES:
            continue
        if name not in expected:
            raise PunaError(
                f"{adapter.folder} holds {hf_name(name)}, which this base lacks: it belongs to another base"
            )
        if tensor.shape != expected[name]:
            raise PunaError(
                f"{adapter.folder}: {hf_name(name)} has shape {tensor.shape} and the base's {expected[name]}: the "
                "adapter belongs to another base"
            )
    tied, settings = config.tie_word_embeddings, adapter.settings
    lost = [name for name in {**expected, "lm_head": None} if is_saved(module_name(name), settings, tied)]
    lost = [name for name in lost if name not in adapter.saved]
    if ties_saved(settings, tied) and adapter.saved.keys() & _TABLES:
        lost = [name for name in lost if name not in _TABLES]
    if lost:
        said = " and ".join(map(hf_name, lost[:4]))
        raise PunaError(f"{adapter.folder} lacks the {said} that modules_to_save says it has: fetch it again")


def say_left_out(adapter: Adapter, config: LlamaConfig) -> None:
    """Warns of modules that the settings name and no tensor adapts.

    Raises:
        PunaError: peft would draw their numbers at random, as init_lora_weights says.
    """
    settings, tied = adapter.settings, config.tie_word_embeddings
    if settings.get("target_modules") is None:
        return
    names = [*(f"layers.{i}.{name}" for name in MODULES for i in range(config.num_hidden_layers)), *_TABLES]
    unadapted = [module_name(name) for name in names if name not in adapter.factors]
    if not (left := [module for module in unadapted if is_targeted(module, settings, tied)]):
        return
    more = f" and {len(left) - 1} more" if len(left) > 1 else ""
    lacking = f"{adapter.folder} holds no adapter of {left[0]}{more}, which its target_modules names"
    start = settings.get("init_lora_weights", True)
    if start is False or start == "orthogonal":
        raise PunaError(f"{lacking}; peft would draw its numbers (init_lora_weights {start!r}): fetch it again")
    logging.getLogger(__name__).warning("%s: the base is used there as it is", lacking)
