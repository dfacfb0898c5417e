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

from cli.files import atomic_path, write_json
from convert.checkpoint import SavesItself
from convert.damage import malformed
from convert.lazy import LazyTensor, check_finite, contiguous, from_array
from convert.pickled import read_pickled
from convert.safetensor import read_safetensors, write_safetensors
from convert.save import gathered
from model.errors import PunaError
from model.json_file import read_json
from model.lora import MODULES, SAVED_MODULES, LoraArray, module_value
from model.params import Params
from model.pieces import Pieces

_KEY = re.compile(
    r"model\.layers\.(0|[1-9]\d*)\.([\w.]+?)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?"
)
_SAVED = re.compile(r"(?:model\.)?(embed_tokens|lm_head)(?:\.base_layer|\.modules_to_save(?:\.default)?)?\.weight")
_DUPLICATE = re.compile(
    r"(?:model\.)?(?:embed_tokens|lm_head)\.(?:modules_to_save(?:\.default)?|original_module)\.weight"
)
_OURS = {module: name for name, module in MODULES.items()}

# Settings that say where an adapter came from or how it was trained, or whose effect the tensors show.
_TOLD = frozenset(
    """
    peft_type r lora_alpha use_rslora use_dora rank_pattern alpha_pattern modules_to_save lora_dropout bias
    target_modules exclude_modules layers_to_transform layers_pattern init_lora_weights task_type inference_mode
    base_model_name_or_path revision puna auto_mapping peft_version megatron_core qalora_group_size runtime_config
    """.split()
)
_REWRITES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")  # initializations that also change the base weights


class Factors(NamedTuple):
    """One module's adapter as stored: a [r, in], b [out, r], magnitude [out] (DoRA), and its scale."""

    a: LazyTensor
    b: LazyTensor
    magnitude: LazyTensor | None
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class Adapter:
    """An adapter folder. `factors` are named `layers.3.wq`; `saved` are whole `embed` and `lm_head`, [V, D]."""

    folder: Path
    settings: dict[str, Any]
    factors: dict[str, Factors]
    saved: dict[str, LazyTensor] = field(default_factory=dict)


def read_adapter(folder: str | Path) -> Adapter:
    """The adapter in `folder`, its tensors unread.

    Raises:
        PunaError: a setting is active and not supported, or tensors are unknown, left without their other half, of
            rank 0 or of another rank than the settings say, or on modules that the settings leave out.
    """
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise PunaError(f"{folder} has no adapter_config.json: give the folder of a PEFT adapter")
    settings = read_json(folder / "adapter_config.json")
    tensors = _read_tensors(folder)
    with malformed(folder):
        return _understood(folder, settings, tensors)


def _understood(folder: Path, settings: dict[str, Any], tensors: Mapping[str, LazyTensor]) -> Adapter:
    """What settings and tensors say together."""
    _check_settings(settings, folder)
    parts: dict[str, dict[str, LazyTensor]] = {}
    saved: dict[str, LazyTensor] = {}
    unknown = []
    for name, tensor in tensors.items():
        key = name.removeprefix("base_model.model.")
        if (match := _KEY.fullmatch(key)) and match[2] in _OURS:
            parts.setdefault(f"layers.{match[1]}.{_OURS[match[2]]}", {})[match[3]] = tensor
        elif _DUPLICATE.fullmatch(key) and _plain(name) in tensors:
            continue  # written after a resize, beside the weight that counts
        elif match := _SAVED.fullmatch(key):
            saved[SAVED_MODULES[match[1]]] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise PunaError(f"{folder}: {', '.join(sorted(unknown)[:8])} belong to no part of a LLaMA that can be adapted")
    for name in parts:
        if not is_targeted(module_name(name), settings):
            raise PunaError(
                f"{folder} holds an adapter of {module_name(name)}, which target_modules, exclude_modules and "
                "layers_to_transform leave out, so that peft would not use it: correct adapter_config.json"
            )
    if lost := [
        m for m in settings.get("modules_to_save") or () if m in SAVED_MODULES and SAVED_MODULES[m] not in saved
    ]:
        raise PunaError(f"{folder} lacks the {' and '.join(lost)} that modules_to_save says it has: fetch it again")
    factors = {name: _factors(name, part, settings, folder) for name, part in parts.items()}
    if not factors and not saved:
        raise PunaError(f"{folder} holds no adapter tensors")
    return Adapter(folder, settings, factors, saved)


def _plain(name: str) -> str:
    return re.sub(r"\.(modules_to_save(\.default)?|original_module)\.weight$", ".weight", name)


def _check_settings(settings: Mapping[str, Any], folder: Path) -> None:
    where = f"{folder}/adapter_config.json"
    if (kind := settings.get("peft_type", "LORA")) != ("PUNA_LORA" if "puna" in settings else "LORA"):
        raise PunaError(f"{where}: peft_type {kind!r} is not supported; Puna reads LORA")
    if settings.get("bias", "none") != "none":
        raise PunaError(f"{where}: bias {settings['bias']!r} is not supported; only 'none' is")
    start = settings.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_REWRITES_BASE):
        raise PunaError(
            f"{where}: init_lora_weights {start!r} changes the base weights; convert it to plain LoRA in peft"
        )
    rate = settings.get("lora_dropout") or 0.0
    if not isinstance(rate, int | float):
        raise PunaError(f"{where}: lora_dropout {rate!r} is no number")
    active = {key: value for key, value in settings.items() if value not in (None, False, "", {}, [])}
    if unknown := sorted(active.keys() - _TOLD):
        said = ", ".join(f"{key} = {active[key]!r}" for key in unknown)
        raise PunaError(f"{where}: {said} is active and not supported")


def is_targeted(module: str, settings: Mapping[str, Any]) -> bool:
    """Whether peft puts an adapter on this module, by the names and layers of the settings, where they say any."""
    targets, layers = settings.get("target_modules"), settings.get("layers_to_transform")
    if _is_named(module, settings.get("exclude_modules") or ()):
        return False
    if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
        return True
    if isinstance(targets, str) or module in targets or layers in (None, []):
        return _is_named(module, targets)
    patterns, number = settings.get("layers_pattern") or ["layers"], int(module.split(".")[2])
    is_chosen = "layers" in ([patterns] if isinstance(patterns, str) else patterns) and number in (
        layers if isinstance(layers, list) else [layers]
    )
    return is_chosen and _is_named(module, targets)


def _is_named(module: str, names: str | Sequence[str]) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _read_tensors(folder: Path) -> dict[str, LazyTensor]:
    if (file := folder / "adapter_model.safetensors").is_file():
        return read_safetensors(file)
    if (file := folder / "adapter_model.bin").is_file():
        return read_pickled(file)
    raise PunaError(f"{folder} has no adapter_model.safetensors and no adapter_model.bin: fetch the weights")


def _factors(name: str, part: Mapping[str, LazyTensor], settings: Mapping[str, Any], folder: Path) -> Factors:
    if missing := {"lora_A", "lora_B"} - part.keys():
        raise PunaError(f"{folder}: {module_name(name)} lacks its {' and '.join(sorted(missing))}")
    a, b, magnitude = part["lora_A"], part["lora_B"], part.get("lora_magnitude_vector")
    if magnitude is not None and max(magnitude.shape, default=0) == math.prod(magnitude.shape):
        magnitude = replace(magnitude, shape=(max(magnitude.shape),), read=_flat(magnitude))
    if (magnitude is not None) != bool(settings.get("use_dora")):
        raise PunaError(f"{folder}: {module_name(name)}: use_dora and lora_magnitude_vector must come together")
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
            f"{rank}. An adapter has one rank of at least 1"
        )
    return Factors(a, b, magnitude, alpha / (rank**0.5 if settings.get("use_rslora") else rank))


def _flat(tensor: LazyTensor) -> Any:
    return lambda index: tensor.load().reshape(-1)[index]


def module_name(name: str) -> str:
    """peft's name of the module of our weight `layers.3.wq`."""
    _, number, weight = name.split(".")
    return f"model.layers.{number}.{MODULES[weight]}"


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
        modules_to_save: `embed_tokens`, `lm_head`, written whole.
        rslora: alphas are such that peft divides by sqrt(rank).
        base_model: the name of the base that the settings give.
        tokenizer: what saves its files beside the weights.
        overwrite: replace what stands at `path`.
        pieces: what replaced parts of the model in training; the adapter names them, under a type that peft refuses.

    Raises:
        PunaError: parameters without adapters, or with several over one weight.
    """
    adapted = {name: w for name, w in params["layers"].items() if isinstance(w, LoraArray)}
    if not adapted and not modules_to_save:
        raise PunaError("these parameters have no adapter to save")
    if nested := [name for name, w in adapted.items() if isinstance(w.base, LoraArray)]:
        raise PunaError(f"{nested[0]} has several adapters: merge them, or save each where it was made")
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, w in adapted.items():
        a, b, scale = gathered(w.a), gathered(w.b), gathered(w.scale)
        magnitude = None if w.magnitude is None else gathered(w.magnitude)
        for i, rank in enumerate(w.ranks):
            if not rank:
                continue
            module = f"model.layers.{i}.{MODULES[name]}"
            ranks[module], alphas[module] = rank, _alpha(scale[i], rank**0.5 if rslora else rank)
            tensors[f"base_model.model.{module}.lora_A.weight"] = a[i, :, :rank].T
            tensors[f"base_model.model.{module}.lora_B.weight"] = b[i, :rank].T
            if magnitude is not None:
                tensors[f"base_model.model.{module}.lora_magnitude_vector"] = magnitude[i]
    for module in modules_to_save:
        table = gathered(params[SAVED_MODULES[module]])
        prefix = "model." if module == "embed_tokens" else ""
        tensors[f"base_model.model.{prefix}{module}.weight"] = table if module == "embed_tokens" else table.T
    if jax.process_index() > 0:
        return
    settings = _settings(adapted, ranks, alphas)
    settings |= {"modules_to_save": list(dict.fromkeys(modules_to_save)) or None, "use_rslora": rslora}
    settings |= {"base_model_name_or_path": base_model}
    if pieces:
        settings |= {"peft_type": "PUNA_LORA", "puna": pieces.to_hf()}
    with atomic_path(path, overwrite) as folder:
        folder.mkdir()
        write_json(folder / "adapter_config.json", settings)
        file = folder / "adapter_model.safetensors"
        write_safetensors(file, {key: from_array(contiguous(x), key) for key, x in tensors.items()}, lambda count: None)
        if tokenizer is not None:
            tokenizer.save(folder)


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
    names = [MODULES[name].split(".")[1] for name in adapted] if whole else list(ranks)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": max((w.dropout for w in adapted.values()), default=0.0),
        "rank_pattern": {module: value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {module: value for module, value in alphas.items() if value != alpha},
        "target_modules": names,
        "use_dora": any(w.magnitude is not None for w in adapted.values()),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
