"""What an adapter_config.json says: which settings are honoured, and which modules they name, as peft matches names.

Names of modules are transformers': `model.embed_tokens`, `model.layers.3.self_attn.q_proj`, `lm_head`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from model.errors import PunaError
from model.lora import check_pattern

EMBED, HEAD = "model.embed_tokens", "lm_head"
REMEDY = "load base and adapter in peft, merge_and_unload(), save_pretrained(), and convert what that wrote"

# Settings that say where an adapter came from or how it was trained, or whose effect the tensors show.
_TOLD = frozenset(
    """
    peft_type r lora_alpha use_rslora use_dora lora_bias rank_pattern alpha_pattern modules_to_save lora_dropout bias
    target_modules exclude_modules layers_to_transform layers_pattern init_lora_weights task_type inference_mode
    base_model_name_or_path revision puna auto_mapping peft_version megatron_core qalora_group_size runtime_config
    trainable_token_indices ensure_weight_tying eva_config corda_config loftq_config lora_ga_config fan_in_fan_out
    """.split()
)
_REWRITES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")  # initializations that also change the base weights
_STARTS = ("gaussian", "eva", "orthogonal", "mica")  # those that choose A and B alone


def check_settings(settings: Mapping[str, Any], where: str) -> None:
    """Raises PunaError for a setting that is active and not honoured, and says how to go on."""
    if settings.get("puna") == {}:
        raise PunaError(f"{where}: puna names no part of a model: remove it")
    _check_names(settings, where)
    if (kind := settings.get("peft_type", "LORA")) != ("PUNA_LORA" if "puna" in settings else "LORA"):
        raise PunaError(f"{where}: peft_type {kind!r} is not supported, LORA is: where peft can merge it, {REMEDY}")
    if (bias := settings.get("bias", "none")) not in ("none", "all", "lora_only"):
        raise PunaError(f"{where}: bias {bias!r} is not known: none, all and lora_only are")
    start = settings.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_REWRITES_BASE):
        raise PunaError(
            f"{where}: init_lora_weights {start!r} changes the base weights: {REMEDY}; or let peft save it as plain "
            "LoRA (path_initial_model_for_weight_conversion)"
        )
    if isinstance(start, str) and start.lower() not in _STARTS:
        raise PunaError(f"{where}: init_lora_weights {start!r} is not known, and may change the base weights: {REMEDY}")
    rate = settings.get("lora_dropout") or 0.0
    if not isinstance(rate, int | float):
        raise PunaError(f"{where}: lora_dropout {rate!r} is no number")
    active = {key: value for key, value in settings.items() if value not in (None, False, "", {}, [])}
    if unknown := sorted(active.keys() - _TOLD):
        said = ", ".join(f"{key} = {active[key]!r}" for key in unknown)
        raise PunaError(f"{where}: {said} is active and not supported: {REMEDY}")


def _check_names(settings: Mapping[str, Any], where: str) -> None:
    """Raises PunaError where modules are named by what is no name, and no pattern of names."""
    for key in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        said = settings.get(key)
        is_list = isinstance(said, list) and all(isinstance(name, str) for name in said)
        if not (said is None or is_list or (isinstance(said, str) and key != "modules_to_save")):
            kinds = "a list of names" if key == "modules_to_save" else "a list of names, or one pattern"
            raise PunaError(f"{where}: {key} is {said!r:.80}: expected {kinds}")
        if isinstance(said, str):
            check_pattern(said, f"{where}: {key}", is_whole=True)
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(said := settings.get(key) or {}, dict):
            raise PunaError(f"{where}: {key} is {said!r:.80}: expected patterns of names and their numbers")
        for pattern in said:
            check_pattern(pattern, f"{where}: {key}")


def is_targeted(module: str, settings: Mapping[str, Any], is_tied: bool = False) -> bool:
    """Whether peft puts an adapter on this module.

    Args:
        module: the name of a linear map or of the embedding.
        settings: the adapter's.
        is_tied: whether the base's head is its embedding.
    """
    if ties_targets(settings, is_tied) and module in (EMBED, HEAD):
        return True
    targets = settings.get("target_modules")
    if _is_named(module, settings.get("exclude_modules") or ()) or _is_kept_apart(module, settings):
        return False
    if targets is None:
        targets = ["q_proj", "v_proj"]  # peft's own for a LLaMA
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return module not in (EMBED, HEAD)
    if isinstance(targets, str) or module in targets or settings.get("layers_to_transform") in (None, []):
        return _is_named(module, targets)
    layers = settings["layers_to_transform"]
    return _is_named(module, targets) and _layer(module, settings) in (layers if isinstance(layers, list) else [layers])


def ties_targets(settings: Mapping[str, Any], is_tied: bool) -> bool:
    """Whether the head's adapter is the embedding's (ensure_weight_tying on a tied base)."""
    if not is_tied or not settings.get("ensure_weight_tying") or _ties_saved(settings):
        return False
    targets = settings.get("target_modules") or ()
    if isinstance(targets, str):
        return any(re.fullmatch(targets, name) for name in ("embed_tokens", "lm_head"))
    return any(name.split(".")[-1] in ("embed_tokens", "lm_head") for name in targets)


def is_saved(module: str, settings: Mapping[str, Any], is_tied: bool = False) -> bool:
    """Whether modules_to_save names the module, or one that holds it: by the end of its name, of whatever length."""
    parts = module.split(".")
    names = [".".join(parts[: i + 1]) for i in range(len(parts))]
    if ties_saved(settings, is_tied) and module in (EMBED, HEAD):
        return True
    return any(name.endswith(end) for name in names for end in settings.get("modules_to_save") or ())


def ties_saved(settings: Mapping[str, Any], is_tied: bool) -> bool:
    """Whether a table that modules_to_save names is that of the embedding and the head (ensure_weight_tying)."""
    return is_tied and bool(settings.get("ensure_weight_tying")) and _ties_saved(settings)


def _ties_saved(settings: Mapping[str, Any]) -> bool:
    return any(name.split(".")[-1] in ("embed_tokens", "lm_head") for name in settings.get("modules_to_save") or ())


def token_indices(settings: Mapping[str, Any], is_tied: bool, where: str) -> dict[str, list[int]]:
    """The rows that trainable_token_indices replaces, by module.

    Args:
        settings: the adapter's.
        is_tied: whether the base's head is its embedding. Rows of EMBED alone are then those of both.
        where: what messages call the settings.

    Raises:
        PunaError: the value is no list of different numbers, or names another module than the embedding and the head.
    """
    said = settings.get("trainable_token_indices")
    if not said:
        return {}
    found: dict[str, list[int]] = {}
    for name, rows in (said if isinstance(said, dict) else {EMBED: said}).items():
        modules = [module for module in (EMBED, HEAD) if module.endswith(name)]
        is_list = isinstance(rows, list) and all(type(row) is int and row >= 0 for row in rows)
        if len(modules) != 1 or not is_list or len(set(rows)) < len(rows):
            raise PunaError(
                f"{where}: trainable_token_indices {said!r}: lists of different token ids are read, for embed_tokens "
                f"and lm_head. Or {REMEDY}"
            )
        found[modules[0]] = rows
    if is_tied and found.get(EMBED) == found.get(HEAD):
        del found[HEAD]
    return found


def _layer(module: str, settings: Mapping[str, Any]) -> int | None:
    """The number of the layer that holds the module, where layers_pattern finds one."""
    patterns = settings.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    wanted = [rf"(?:^|.*?\.){pattern}\.(?P<number>\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(?P<number>\d+)\."]
    match = next((match for each in wanted if (match := re.match(each, module))), None)
    return None if match is None else int(match["number"])


def _is_kept_apart(module: str, settings: Mapping[str, Any]) -> bool:
    """Whether modules_to_save takes the module from the targets, by peft's rule for that."""
    return any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in settings.get("modules_to_save") or ())


def _is_named(module: str, names: str | Sequence[str]) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)
