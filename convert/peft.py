"""PEFT adapter folders, in and out: adapter_config.json beside adapter_model.safetensors (or .bin).

Tensors say which modules are adapted and at what rank; the settings say how they are scaled. Every tensor and every
active setting is honoured or refused by name.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from cli.files import at_home, atomic_path, check_free_space, write_json
from cli.said import say_once
from convert.checkpoint import SavesItself
from convert.damage import malformed
from convert.hub import download, is_hub_id
from convert.lazy import LazyTensor, check_finite, contiguous, from_array
from convert.names import hf_name, our_name
from convert.not_finite import not_finite_said
from convert.peft_settings import EMBED, HEAD, check_settings, is_saved
from convert.pickled import read_pickled
from convert.run import adapter_tensors, companions, is_step, place_of
from convert.safetensor import read_safetensors, write_safetensors
from convert.save import gathered
from model.errors import PunaError
from model.json_file import read_json
from model.lora import MODULES, SAVED_MODULES, LoraArray, module_value
from model.params import LINEARS, Params
from model.pieces import Pieces

_OUTER = ("embed", "lm_head")  # weights that are of no layer
_PREFIX = "base_model.model."  # peft's, before every name
_NO_TARGETS = "dummy-target-modules"  # peft refuses an empty list, and matches this with nothing
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")

# One module's part of an adapter, and a weight of the base, which may lie inside a wrapper of peft's.
_PART = re.compile(
    r"([\w.]+?)\.(?:(lora_A|lora_B)(?:\.default)?\.(weight|bias)|(lora_embedding_A|lora_embedding_B)(?:\.default)?"
    r"|(lora_magnitude_vector)(?:\.default)?(?:\.weight)?|token_adapter\.(trainable_tokens_delta)(?:\.default)?)"
)
_WHOLE = re.compile(
    r"([\w.]+?)(\.base_layer|\.token_adapter\.base_layer|\.modules_to_save(?:\.default)?|\.original_module)?"
    r"\.(weight|bias)"
)


class Factors(NamedTuple):
    """One module's adapter as stored: a [r, in], b [out, r], magnitude [out] (DoRA), its scale, and bias [out]
    (lora_bias). `in` of the embedding is the vocabulary."""

    a: LazyTensor
    b: LazyTensor
    magnitude: LazyTensor | None
    scale: float
    bias: LazyTensor | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def parts(self) -> list[LazyTensor]:
        """The tensors that are there."""
        return [part for part in (self.a, self.b, self.magnitude, self.bias) if part is not None]


@dataclass(frozen=True)
class Adapter:
    """An adapter folder.

    Parameters are named as in convert/names.py, and tensors lie as Hugging Face's do. `factors`: of linear weights, of
    `embed` and `lm_head`. `saved`: parameters of the base replaced whole. `originals`: `embed` and `lm_head` as they
    were before training, which peft writes beside what it trained. `tokens`: rows of `embed` and `lm_head`, replaced.
    """

    folder: Path
    settings: dict[str, Any]
    factors: dict[str, Factors]
    saved: dict[str, LazyTensor] = field(default_factory=dict)
    originals: dict[str, LazyTensor] = field(default_factory=dict)
    tokens: dict[str, LazyTensor] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """What messages call its settings."""
        return f"{self.folder}/adapter_config.json"


def read_adapter(place: str | Path) -> Adapter:
    """The adapter in a local folder, of a training run or a step of one, or of a Hub id, its tensors unread.

    Raises:
        PunaError: a setting is active and not supported, or tensors are unknown, empty, left without their other half,
            of rank 0 or of another rank than the settings say.
    """
    folder = at_home(place)
    if not folder.exists() and is_hub_id(str(place)):
        folder = download(str(place), ADAPTER_FILES)
    step = place_of(folder)
    folder = companions(step)
    if not (folder / "adapter_config.json").is_file():
        raise PunaError(f"{place} has no adapter_config.json: give the folder of a PEFT adapter, or a Hub id")
    settings = read_json(folder / "adapter_config.json")
    tensors = adapter_tensors(step, settings) if is_step(step) else _read_tensors(folder)
    with malformed(folder):
        return _understood(folder, settings, tensors)


def _understood(folder: Path, settings: dict[str, Any], tensors: Mapping[str, LazyTensor]) -> Adapter:
    """What settings and tensors say together."""
    adapter = Adapter(folder, settings, {})
    check_settings(settings, adapter.where)
    if empty := sorted(name for name, tensor in tensors.items() if 0 in tensor.shape):
        raise PunaError(
            f"{folder}: {len(empty)} of {len(tensors)} tensors are empty, as {empty[0]} of shape "
            f"{tensors[empty[0]].shape}. DeepSpeed ZeRO-3 saves such where parts were not gathered: save the adapter "
            "again inside deepspeed.zero.GatheredParameters; if it is the rank, an adapter's rank is at least 1"
        )
    parts: dict[str, dict[str, LazyTensor]] = {}
    wrapped: dict[str, str] = {}
    unknown = []
    for name, tensor in tensors.items():
        key = name.removeprefix(_PREFIX)
        if key == name:
            unknown.append(name)
        elif match := _PART.fullmatch(key):
            weight, part = our_name(f"{match[1]}.weight"), "".join(filter(None, match.groups()[1:]))
            if part == "trainable_tokens_delta" and weight in ("embed", "lm_head"):
                adapter.tokens[weight] = tensor
            elif weight is not None and _takes(weight, part):
                parts.setdefault(weight, {})[part.replace("embedding_", "").removesuffix("weight")] = tensor
            else:
                unknown.append(name)
        elif (match := _WHOLE.fullmatch(key)) and (weight := our_name(f"{match[1]}.{match[3]}")) is not None:
            if match[2] == ".original_module":
                adapter.originals[weight] = tensor
            elif weight not in adapter.saved or not match[2]:  # else written after a resize, beside the one that counts
                adapter.saved[weight], wrapped[weight] = tensor, match[2] or ""
        else:
            unknown.append(name)
    unknown += [
        _PREFIX + hf_name(name) for name, wrap in wrapped.items() if (wrap == ".base_layer") != _is_in(name, parts)
    ]
    if unknown:
        raise PunaError(
            f"{folder}: {', '.join(sorted(unknown)[:8])} belong to no part of a LLaMA that can be adapted, or are not "
            f"named as peft reads them: {_PREFIX}, the module, then lora_A.weight, lora_B.weight, ..., or "
            "base_layer.weight where the module is adapted and weight where it is not"
        )
    adapter.factors.update({name: _factors(name, part, settings, folder) for name, part in parts.items()})
    if not adapter.factors and not adapter.saved and not adapter.tokens:
        raise PunaError(f"{folder} holds no adapter tensors")
    return adapter


def _is_in(name: str, parts: Mapping[str, Any]) -> bool:
    """Whether the module that holds our parameter has a part of an adapter: peft wraps its own weights then."""
    return our_name(f"{module_name(name)}.weight") in parts


def _takes(weight: str, part: str) -> bool:
    """Whether a weight of ours can have this part of an adapter."""
    if part.startswith("lora_embedding"):
        return weight == "embed"
    if weight == "embed" or part == "lora_Abias":
        return part == "lora_magnitude_vector"
    return weight == "lm_head" or weight.split(".")[-1] in MODULES


def _read_tensors(folder: Path) -> dict[str, LazyTensor]:
    if (file := folder / ADAPTER_FILES[0]).is_file():
        if (folder / ADAPTER_FILES[1]).is_file():
            say_once(f"{folder}: {ADAPTER_FILES[0]} is read, as peft does; {ADAPTER_FILES[1]} beside it is not")
        return read_safetensors(file)
    if (file := folder / ADAPTER_FILES[1]).is_file():
        return read_pickled(file)
    raise PunaError(f"{folder} has no {ADAPTER_FILES[0]} and no {ADAPTER_FILES[1]}: fetch the weights")


def _factors(name: str, part: Mapping[str, LazyTensor], settings: Mapping[str, Any], folder: Path) -> Factors:
    if missing := {"lora_A", "lora_B"} - part.keys():
        raise PunaError(f"{folder}: {module_name(name)} lacks its {' and '.join(sorted(missing))}")
    a, b, magnitude, bias = part["lora_A"], part["lora_B"], part.get("lora_magnitude_vector"), part.get("lora_Bbias")
    if magnitude is not None and max(magnitude.shape, default=0) == math.prod(magnitude.shape):
        magnitude = replace(magnitude, shape=(max(magnitude.shape),), read=_flat(magnitude))
    if (magnitude is not None) != bool(settings.get("use_dora")):
        raise PunaError(f"{folder}: {module_name(name)}: use_dora and lora_magnitude_vector must come together")
    if (bias is not None) != bool(settings.get("lora_bias")):
        raise PunaError(f"{folder}: {module_name(name)}: lora_bias and lora_B.bias must come together")
    rank = module_value(settings.get("rank_pattern") or {}, module_name(name), settings.get("r", 8))
    alpha = module_value(settings.get("alpha_pattern") or {}, module_name(name), settings.get("lora_alpha", 8))
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise PunaError(
            f"{folder}: lora_alpha of {module_name(name)} is {alpha!r}: an adapter's alpha is a finite number"
        )
    (a_rank, _), (_, b_rank) = a.shape, b.shape
    if a_rank != b_rank or a_rank != rank or rank < 1:
        raise PunaError(
            f"{folder}: {module_name(name)} has factors of rank {a_rank} and {b_rank}; the settings say "
            f"{rank!r}. An adapter has one rank of at least 1"
        )
    return Factors(a, b, magnitude, alpha / (rank**0.5 if settings.get("use_rslora") else rank), bias)


def _flat(tensor: LazyTensor) -> Any:
    return lambda index: tensor.load().reshape(-1)[index]


def module_name(name: str) -> str:
    """peft's name of the module that holds our parameter, as of `layers.3.wq`."""
    return hf_name(name).rpartition(".")[0]


def load_finite(tensor: LazyTensor, what: str) -> np.ndarray:
    """The tensor in memory, row-major. Raises PunaError where it holds a NaN or an infinity."""
    array = contiguous(tensor.load())
    check_finite(array, what, tensor.where)
    return array


# --------------------------------------------------------------------------------------------------------------- write


def save_adapter(
    path: str | Path,
    params: Params,
    modules_to_save: Sequence[str] = (),
    rslora: bool = False,
    base_model: str | None = None,
    tokenizer: SavesItself | None = None,
    overwrite: bool = False,
    pieces: Pieces | None = None,
) -> None:
    """Write the adapters of stacked parameters as a PEFT folder. Ranks and scales that differ become patterns.

    With several processes all call this, and the first one writes.

    Args:
        path: the folder to write.
        params: stacked, with `LoraArray` leaves.
        modules_to_save: ends of modules' names, as `embed_tokens` and `lm_head`, whose weights are written whole. The
            embedding of tied parameters is written as the head's too.
        rslora: alphas are such that peft divides by sqrt(rank).
        base_model: the name of the base that the settings give.
        tokenizer: what saves its files beside the weights.
        overwrite: replace what stands at `path`.
        pieces: what replaced parts of the model in training; the adapter names them, under a type that peft refuses.

    Raises:
        PunaError: parameters without adapters, or with several over one weight; a module to save that is not there, or
            whose weight is no plain array.
    """
    adapted = _adapted(params)
    if not adapted and not modules_to_save:
        raise PunaError("these parameters have no adapter to save")
    tensors: dict[str, np.ndarray] = {}
    has_bias = any(w.bias is not None for w in adapted.values())
    for name, w in adapted.items():
        a, b = gathered(w.a), gathered(w.b)
        magnitude, bias = (None if x is None else gathered(x) for x in (w.magnitude, w.bias))
        for (place, i), rank in zip(_places(name, w), w.ranks, strict=True):
            if not rank:
                continue
            key = _PREFIX + module_name(place)
            half = ("lora_embedding_A", "lora_embedding_B") if name == "embed" else ("lora_A.weight", "lora_B.weight")
            tensors[f"{key}.{half[0]}"] = a[i][:, :rank].T
            tensors[f"{key}.{half[1]}"] = b[i][:rank].T
            if magnitude is not None:
                tensors[f"{key}.lora_magnitude_vector"] = magnitude[i]
            if has_bias:
                tensors[f"{key}.lora_B.bias"] = np.zeros(b.shape[-1], b.dtype) if bias is None else bias[i]
            if name in _OUTER:  # as peft does: the tables may be others than the base's
                tensors[f"{key}.base_layer.weight"] = _whole(w.base, name)
    tensors |= _whole_modules(params, modules_to_save)
    settings = adapter_settings(params, modules_to_save, rslora, base_model, pieces)
    if jax.process_index() > 0:
        return
    lazy = {key: from_array(contiguous(x), key) for key, x in tensors.items()}
    write_adapter(path, settings, lazy, tokenizer, overwrite)


def adapter_settings(
    params: Params,
    modules_to_save: Sequence[str] = (),
    rslora: bool = False,
    base_model: str | None = None,
    pieces: Pieces | None = None,
) -> dict[str, Any]:
    """The adapter_config.json of what `save_adapter` writes, whose arguments these are. All processes call it."""
    adapted = _adapted(params)
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, w in adapted.items():
        scale = gathered(w.scale)
        for (place, i), rank in zip(_places(name, w), w.ranks, strict=True):
            if rank:
                module = module_name(place)
                ranks[module], alphas[module] = rank, _alpha(np.float32(scale[i]), rank**0.5 if rslora else rank)
    settings = _settings(adapted, ranks, alphas)
    is_shared = "lm_head" not in params and is_saved(EMBED, {"modules_to_save": modules_to_save})
    has_bias = any(w.bias is not None for w in adapted.values())
    settings |= {"lora_bias": has_bias, "ensure_weight_tying": is_shared}
    settings |= {"modules_to_save": list(dict.fromkeys(modules_to_save)) or None, "use_rslora": rslora}
    settings |= {"base_model_name_or_path": base_model}
    if pieces:
        settings |= {"peft_type": "PUNA_LORA", "puna": pieces.to_hf()}
    return settings


def write_adapter(
    path: str | Path,
    settings: dict[str, Any],
    tensors: Mapping[str, LazyTensor],
    tokenizer: SavesItself | None = None,
    overwrite: bool = False,
) -> None:
    """Write a PEFT folder.

    Args:
        path: the folder to write.
        settings: its adapter_config.json.
        tensors: under peft's names.
        tokenizer: what saves its files beside the weights.
        overwrite: replace what stands at `path`.
    """
    with atomic_path(path, overwrite) as folder:
        check_free_space(path, sum(tensor.nbytes for tensor in tensors.values()))
        folder.mkdir()
        write_json(folder / "adapter_config.json", settings)
        with not_finite_said(tensors) as watched:
            write_safetensors(folder / "adapter_model.safetensors", watched, lambda count: None)
        if tokenizer is not None:
            tokenizer.save(folder)


def _adapted(params: Params) -> dict[str, LoraArray]:
    """The weights with an adapter, by name. Raises PunaError where one has several."""
    outer = {name: params[name] for name in _OUTER if name in params}
    adapted = {name: w for name, w in (outer | params["layers"]).items() if isinstance(w, LoraArray)}
    if nested := [name for name, w in adapted.items() if isinstance(w.base, LoraArray)]:
        raise PunaError(f"{nested[0]} has several adapters: merge them, or save each where it was made")
    return adapted


def _places(name: str, w: LoraArray) -> list[tuple[str, Any]]:
    """The parameters that one stacked weight is, and their indices in it."""
    return [(name, ())] if name in _OUTER else [(f"layers.{i}.{name}", i) for i in range(len(w.ranks))]


def _whole_modules(params: Params, modules: Sequence[str]) -> dict[str, np.ndarray]:
    """The weights of the modules whose names end so, under peft's names."""
    leaves = {name: (leaf, ()) for name, leaf in params.items() if name != "layers"}
    for key, leaf in params["layers"].items():
        leaves |= {f"layers.{i}.{key}": (leaf, i) for i in range(leaf.shape[0])}
    if "lm_head" not in params and is_saved(EMBED, {"modules_to_save": modules}):
        leaves["lm_head"] = (params["embed"].T, ())
        modules = [*modules, HEAD]
    found: dict[str, np.ndarray] = {}
    for module in modules:
        names = [name for name in leaves if is_saved(module_name(name), {"modules_to_save": [module]})]
        if not names:
            raise PunaError(f"modules_to_save {module!r}: these parameters have no module whose name ends so")
        for name in names:
            leaf, select = leaves[name]
            found[_PREFIX + hf_name(name)] = _whole(leaf, name, select)
    return found


def _whole(leaf: Any, name: str, select: Any = ()) -> np.ndarray:
    """One weight, as peft has it."""
    if not isinstance(leaf, jax.Array):
        raise PunaError(f"{name} is a {type(leaf).__name__}, and only a plain array is written whole")
    array = gathered(leaf[select])
    return array.T if name.split(".")[-1] in (*LINEARS, "lm_head") else array


def _alpha(scale: np.float32, divisor: float) -> float:
    """The shortest alpha that gives this scale to the bit."""
    exact = float(scale) * divisor
    return next(
        (a for digits in range(1, 17) if np.float32((a := float(f"{exact:.{digits}g}")) / divisor) == scale), exact
    )


def _settings(
    adapted: Mapping[str, LoraArray], ranks: Mapping[str, int], alphas: Mapping[str, float]
) -> dict[str, Any]:
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 8
    alpha = Counter(alphas.values()).most_common(1)[0][0] if alphas else 8.0
    whole = all(all(w.ranks) for w in adapted.values())
    names = [
        module_name(name if name in SAVED_MODULES.values() else f"layers.0.{name}").split(".")[-1] for name in adapted
    ]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": max((w.dropout for w in adapted.values()), default=0.0),
        "rank_pattern": {module: value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {module: value for module, value in alphas.items() if value != alpha},
        "target_modules": (names if whole else list(ranks)) or _NO_TARGETS,
        "use_dora": any(w.magnitude is not None for w in adapted.values()),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
