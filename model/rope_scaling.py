"""How a config says that RoPE is stretched: read from `rope_scaling` or `rope_parameters`, and written."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from model.errors import PunaError

_LOG = logging.getLogger(__name__)

_KEYS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}

_HAVE_ORIGINAL = ("llama3", "yarn")
_POSITIVE = {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}
# Keys of the authors' own code, which transformers passes over: `finetuned` says how the weights came to be, the
# others do nothing at these values.
_IDLE = {"finetuned": None, "attn_factor": 1, "extrapolation_factor": 1}


@dataclass(frozen=True)
class RopeScaling:
    """How the RoPE frequencies are stretched beyond the original context (Hugging Face `rope_scaling`).

    Attributes:
        rope_type: linear, dynamic (NTK), llama3 or yarn; the other fields are None where the type has no such number.
        factor: the ratio of the new context to the original.
        original_max_position_embeddings: the original context in tokens.
        low_freq_factor, high_freq_factor: llama3's wavelength bounds, as the original context over the wavelength.
        attention_factor, beta_fast, beta_slow, mscale, mscale_all_dim, truncate: YaRN's (arXiv:2309.00071).
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None

    @classmethod
    def from_hf(
        cls, settings: dict[str, Any], max_position_embeddings: int, say: Callable[[str], Any] = _LOG.warning
    ) -> "RopeScaling | None":
        """Reads `rope_scaling` or `rope_parameters` (less its theta); None for the default RoPE.

        llama3 and yarn take `max_position_embeddings` for the original context where `settings` give none, as
        transformers does, and yarn the ratio of the two for its factor.

        Args:
            settings: the object.
            max_position_embeddings: the context in tokens.
            say: hears of what is derived.

        Raises:
            PunaError: for an unknown type, a number the type needs and lacks, or one it does not know.
        """
        given = with_one_type(settings)
        rope_type = given.pop("rope_type", "default")
        if given.pop("partial_rotary_factor", 1.0) != 1.0:
            raise PunaError("rope_scaling: partial_rotary_factor other than 1 is not supported")
        for key, idle in _IDLE.items():
            if given.get(key) == idle or key == "finetuned":
                given.pop(key, None)
        if rope_type == "default":
            if active := {key for key, value in given.items() if (key, value) != ("factor", 1.0)}:
                raise PunaError(f"rope_scaling: {_names(active)} given, but rope_type is default; name the rope_type")
            return None
        if rope_type not in _KEYS:
            raise PunaError(f"rope_scaling: rope_type {rope_type!r} is not supported; known: {', '.join(_KEYS)}")
        derived = []
        if rope_type in _HAVE_ORIGINAL:
            if "original_max_position_embeddings" not in given:
                derived.append(
                    f"original_max_position_embeddings is max_position_embeddings, {max_position_embeddings}"
                )
            given.setdefault("original_max_position_embeddings", max_position_embeddings)
        if rope_type not in _HAVE_ORIGINAL and given.get("original_max_position_embeddings") == max_position_embeddings:
            del given["original_max_position_embeddings"]  # says nothing that these types do not already assume
        if unknown := set(given) - set(_KEYS[rope_type]):
            raise PunaError(f"rope_scaling: {_names(unknown)} is not a setting of rope_type {rope_type!r}")
        if rope_type == "yarn" and "factor" not in given:
            given["factor"] = max_position_embeddings / given["original_max_position_embeddings"]
            derived.append(f"factor is {given['factor']:g}, the context over the original one")
        needed = ("factor",) if rope_type == "yarn" else _KEYS[rope_type]
        if missing := [key for key in needed if key not in given]:
            raise PunaError(f"rope_scaling: rope_type {rope_type!r} needs {_names(missing)}")
        for key in _POSITIVE & given.keys():
            number = given[key]
            if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < math.inf:
                raise PunaError(f"rope_scaling: {key} is {number!r}; give a number above 0")
        if given["factor"] < 1:
            raise PunaError(f"rope_scaling: factor {given['factor']} is below 1; it is the ratio new/original context")
        if derived:
            say(f"rope_scaling of type {rope_type} does not say all: {', '.join(derived)}, as transformers has it")
        return cls(rope_type=rope_type, **given)

    def to_hf(self) -> dict[str, Any]:
        """The `rope_scaling` object of config.json."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}


def with_one_type(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that are not null, the type under `rope_type`. Raises PunaError where `type` says another."""
    given = {key: value for key, value in settings.items() if value is not None}
    names = {given.pop(key) for key in ("type", "rope_type") if key in given}
    if len(names) > 1:
        raise PunaError(f"rope_scaling: type and rope_type disagree ({', '.join(sorted(names))}); keep one")
    if names == {"yarn"} and "truncate" in settings:
        given["truncate"] = bool(settings["truncate"])  # transformers takes null and 0 as false here
    return given | ({"rope_type": names.pop()} if names else {})


def take_rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Take what a config.json says of RoPE out of it: one object, with `rope_theta` in it where that is said.

    transformers 4 writes `rope_scaling` with `rope_theta` beside it, transformers 5 `rope_parameters` with it inside.

    Raises:
        PunaError: two places disagree.
    """
    outer = {key: config.pop(key) for key in ("rope_theta", "original_max_position_embeddings") if key in config}
    said = {key: with_one_type(config.pop(key)) for key in ("rope_scaling", "rope_parameters") if config.get(key)}
    for name, settings in said.items():
        for key, value in outer.items():
            if settings.get(key, value) != value:
                raise PunaError(f"config.json: {key} is {value} and {name} says {settings[key]}; keep one of them")
            settings[key] = value
    first, *second = said.values() or [outer]
    if second and second[0] != first:
        raise PunaError(f"config.json: rope_scaling and rope_parameters disagree ({first}, {second[0]}); keep one")
    if first.get("rope_type", "default") not in _HAVE_ORIGINAL and "original_max_position_embeddings" in outer:
        del first["original_max_position_embeddings"]  # which transformers reads for these types alone
    return first


def _names(keys: Any) -> str:
    return ", ".join(sorted(keys))
