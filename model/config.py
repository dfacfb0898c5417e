"""What a LLaMA's shape is: one frozen record of numbers, read from and written to Hugging Face `config.json`.

It also holds the names of the functions that replace parts of the model (see pieces.py).
Everything a `config.json` says is honoured or refused: a field that would change the model and that this model
does not have is an error that names it. Meta's `params.json` says less; what it leaves out is the family's.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from model.config_keys import unread
from model.errors import PunaError
from model.meta_params import FIRST_OF_LLAMA3, context, rope_factor, unread_params, width_params
from model.pieces import Pieces
from model.rope_scaling import RopeScaling, take_rope_settings

_LOG = logging.getLogger(__name__)
_OF_CONFIG, _OF_PARAMS = (partial(_LOG.warning, f"{name}: %s") for name in ("config.json", "params.json"))

MOST_LAYERS = 10_000  # of any model: a number beyond is damage, and would make tables without end


@dataclass(frozen=True)
class LlamaConfig:
    """The numbers of a LLaMA, under Hugging Face's names. Hashable, so it may be a static argument of `jit`.

    Attributes:
        num_key_value_heads: 0 for num_attention_heads.
        head_dim: 0 for hidden_size / num_attention_heads.
        max_position_embeddings: the context in tokens.
        rope_theta: the RoPE base.
        initializer_range: the standard deviation of fresh weights.
        eos_token_id: every stop id.
        pieces: what replaces parts of the forward pass; a model with any is no plain LLaMA.

    Raises:
        PunaError: naming a size that is not positive or does not fit the others.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: tuple[int, ...] = (2,)
    pad_token_id: int | None = None
    pieces: Pieces = Pieces()

    def __post_init__(self) -> None:
        if not self.num_key_value_heads:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if not self.head_dim and self.num_attention_heads > 0:
            if self.hidden_size % self.num_attention_heads:
                raise PunaError(
                    f"hidden_size {self.hidden_size} does not divide by num_attention_heads "
                    f"{self.num_attention_heads}; give head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise PunaError(f"{name} is {value!r}; it must be a positive integer")
        for name in ("rope_theta", "rms_norm_eps"):
            if not is_number(value := getattr(self, name)) or not 0 < value < math.inf:
                raise PunaError(f"{name} is {value!r}; it must be a positive number")
        if not is_number(self.initializer_range) or not 0 <= self.initializer_range < math.inf:
            raise PunaError(f"initializer_range is {self.initializer_range!r}; it must be a number from 0 on")
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            if type(value := getattr(self, name)) is not bool:  # the text "false" is true to Python
                raise PunaError(f"{name} is {value!r}; it must be true or false")
        for name, ids in (
            ("eos_token_id", self.eos_token_id),
            *((name, (getattr(self, name),)) for name in ("bos_token_id", "pad_token_id")),
        ):
            if wrong := [one for one in ids if one is not None and type(one) is not int]:
                raise PunaError(f"{name} is {wrong[0]!r}; it must be a token's number")
        if self.num_hidden_layers > MOST_LAYERS:
            raise PunaError(f"num_hidden_layers is {self.num_hidden_layers}; no LLaMA has more than {MOST_LAYERS}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise PunaError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise PunaError(f"head_dim {self.head_dim} is odd; RoPE rotates pairs")

    @classmethod
    def from_hf(cls, config: dict[str, Any], say: Callable[[str], Any] = _OF_CONFIG) -> "LlamaConfig":
        """Reads the object of a `config.json` as transformers 4 or 5 writes it.

        `quantization_config` is a property of the files, not of the model: their reader takes it away first.

        Args:
            config: the object.
            say: hears of what is derived, and of keys that are not used.

        Raises:
            PunaError: naming any field that would change the model and is not known here, or two that disagree.
        """
        given = {key: value for key, value in config.items() if value is not None}
        pieces = given.pop("puna", None)
        if pieces == {}:
            raise PunaError("config.json: puna names no part of a model: remove it")
        if (kind := given.get("model_type", "llama")) != ("llama" if pieces is None else "puna"):
            raise PunaError(f"config.json: model_type {kind!r} is not supported; Puna reads 'llama'")
        if (act := given.pop("hidden_act", "silu")) not in ("silu", "swish"):
            raise PunaError(f"config.json: hidden_act {act!r} is not supported; LLaMA's is 'silu'")
        if (part := given.pop("partial_rotary_factor", 1.0)) != 1.0:
            raise PunaError(f"config.json: partial_rotary_factor {part} is not supported; only 1.0 is")
        if "quantization_config" in given:
            raise PunaError("config.json: quantization_config says that the weights are quantized; here they are not")
        rope = take_rope_settings(given)
        theta = rope.pop("rope_theta", None)
        known = {f.name for f in fields(cls)} - {"pieces"}
        kept = {key: value for key, value in given.items() if key in known}
        max_position = kept.get("max_position_embeddings", cls.max_position_embeddings)
        kept["rope_scaling"] = RopeScaling.from_hf(rope, max_position, say)
        kept["eos_token_id"] = _as_tuple(config.get("eos_token_id", (2,)))
        kept["bos_token_id"] = config.get("bos_token_id", 1)
        if theta is not None:
            kept["rope_theta"] = float(theta) if is_number(theta) else theta
        if pieces is not None:
            kept["pieces"] = Pieces.from_hf(pieces)
        others = {key: value for key, value in given.items() if key not in known}
        for line in unread(others, kept.get("num_hidden_layers", cls.num_hidden_layers), max_position):
            say(line)
        return cls(**kept)

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        """The object of a `config.json` in the spelling that transformers 4 and 5 both read; `dtype` is of the weights.

        A model with replaced `pieces` has an architecture and a model_type of its own, which other readers refuse.
        """
        config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
        if self.pieces:
            config |= {"architectures": ["PunaForCausalLM"], "model_type": "puna", "puna": self.pieces.to_hf()}
        config |= {f.name: getattr(self, f.name) for f in fields(self) if f.name != "pieces"}
        config["rope_scaling"] = self.rope_scaling.to_hf() if self.rope_scaling else None
        stops = self.eos_token_id
        config["eos_token_id"] = None if not stops else stops[0] if len(stops) == 1 else list(stops)
        return config | {"attention_dropout": 0.0, "use_cache": True, "torch_dtype": dtype}

    @classmethod
    def from_meta(
        cls, params: dict[str, Any], vocab_size: int | None = None, say: Callable[[str], Any] = _OF_PARAMS
    ) -> "LlamaConfig":
        """Reads Meta's `params.json`.

        The hidden width of the MLP is round_up(int(multiplier * int(8 dim / 3)), multiple_of), as in Meta's code.
        What the file does not say is that of the family which the other numbers show: how long the context is, and by
        how much RoPE is stretched (32 for Llama 3.2's 1B and 3B, whatever Meta's own code makes of it: llama-models,
        issues 166 and 241).

        Args:
            params: the object.
            vocab_size: the embedding's rows, where the file says -1 or nothing.
            say: hears of what is derived, and of keys that are not used.

        Raises:
            PunaError: naming a number that is missing, or any field that would change the model and is not known here.
        """
        given = {key: value for key, value in params.get("model", params).items() if value is not None}
        rows = given.pop("vocab_size", -1)
        vocab = rows if rows > 0 else vocab_size
        if vocab is None:
            raise PunaError(f"params.json: vocab_size is {rows}; give the tokenizer's size or the embedding's rows")
        try:
            dim, heads, depth = (given.pop(key) for key in ("dim", "n_heads", "n_layers"))
        except KeyError as missing:
            raise PunaError(f"params.json: {missing.args[0]} is missing") from None
        theta = float(given.pop("rope_theta", 10000.0))
        eps = given.pop("norm_eps", 1e-5)
        kv_heads = given.pop("n_kv_heads", None)
        width = int(given.pop("ffn_dim_multiplier", 1.0) * int(8 * dim / 3))
        multiple = given.pop("multiple_of", 256)
        scaled, derived = given.pop("use_scaled_rope", False), []
        factors = [given.pop(key) for key in ("rope_scale_factor", "rope_scaling_factor") if key in given]
        if scaled and not factors:
            factors = [rope_factor(dim, depth, heads, kv_heads or heads)]
            derived.append(f"use_scaled_rope is by {factors[0]:g}")
        length = given.pop("max_seq_len", None)
        if not length:
            length = context(theta, eps, dim, kv_heads, vocab, scaled)
            derived.append(f"max_seq_len is {length}")
        high = given.pop("rope_high_freq_factor", 4.0)
        for line in unread_params(given, dim // heads):
            say(line)
        if derived:
            say(f"what it does not say is its family's: {', '.join(derived)}")
        third = vocab >= FIRST_OF_LLAMA3
        return cls(
            vocab_size=vocab,
            hidden_size=dim,
            intermediate_size=given.get("hidden_dim") or -(-width // multiple) * multiple,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads or heads,
            max_position_embeddings=length,
            rms_norm_eps=eps,
            rope_theta=theta,
            rope_scaling=RopeScaling("llama3", float(factors[0]), 8192, 1.0, float(high)) if scaled else None,
            bos_token_id=128000 if third else 1,
            eos_token_id=(128001,) if third else (2,),
        )

    def to_meta(self) -> dict[str, Any]:
        """The object of a `params.json`.

        Raises:
            PunaError: naming what Meta's format cannot say.
        """
        scaling = self.rope_scaling
        factor = rope_factor(
            self.hidden_size, self.num_hidden_layers, self.num_attention_heads, self.num_key_value_heads
        )  # which the file does not say, and readers take from the family
        for name, cannot in (
            ("attention_bias", self.attention_bias),
            ("mlp_bias", self.mlp_bias),
            ("head_dim", self.head_dim * self.num_attention_heads != self.hidden_size),
            ("rope_scaling", scaling not in (None, RopeScaling("llama3", factor, 8192, 1.0, 4.0))),
        ):
            if cannot:
                said = f"{name} = {getattr(self, name)}"
                raise PunaError(f"{said} cannot be written as Meta's params.json; use format='hf'")
        if self.pieces:
            replaced = ", ".join(f"{part} = {name!r}" for part, name in self.pieces.names().items())
            raise PunaError(f"Meta's params.json cannot say what replaces a part ({replaced}); use format='hf'")
        params = {
            "dim": self.hidden_size,
            "n_layers": self.num_hidden_layers,
            "n_heads": self.num_attention_heads,
            "n_kv_heads": self.num_key_value_heads,
            "vocab_size": self.vocab_size,
            "norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "max_seq_len": self.max_position_embeddings,
        } | width_params(self.hidden_size, self.intermediate_size)
        return params | ({"use_scaled_rope": True} if scaling else {})


def is_number(value: Any) -> bool:
    """Whether JSON's value is a number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_tuple(value: int | list[int] | tuple[int, ...] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


# The published LLaMAs, by lower-case name.


def _llama1(d: int, f: int, layers: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=d, intermediate_size=f, num_hidden_layers=layers, num_attention_heads=heads, rms_norm_eps=1e-6
    )


def _llama2(d: int, f: int, layers: int, heads: int, kv_heads: int) -> LlamaConfig:
    one = _llama1(d, f, layers, heads)
    return replace(one, num_key_value_heads=kv_heads, max_position_embeddings=4096, rms_norm_eps=1e-5)


def _code(base: LlamaConfig, vocab: int) -> LlamaConfig:
    return replace(base, vocab_size=vocab, max_position_embeddings=16384, rope_theta=1e6)


def _llama3(d: int, f: int, layers: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=d,
        intermediate_size=f,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        bos_token_id=128000,
        eos_token_id=(128001,),
    )


def _llama31(base: LlamaConfig, factor: float = 8.0) -> LlamaConfig:
    scaling = RopeScaling("llama3", factor, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    return replace(base, max_position_embeddings=131072, rope_scaling=scaling)


_2_7B = _llama2(4096, 11008, 32, 32, 32)
_2_13B = _llama2(5120, 13824, 40, 40, 40)
_2_70B = _llama2(8192, 28672, 80, 64, 8)
_3_8B = _llama3(4096, 14336, 32, 32)
_3_70B = _llama3(8192, 28672, 80, 64)

PRESETS: dict[str, LlamaConfig] = {
    "llama-7b": _llama1(4096, 11008, 32, 32),
    "llama-13b": _llama1(5120, 13824, 40, 40),
    "llama-33b": _llama1(6656, 17920, 60, 52),
    "llama-65b": replace(_llama1(8192, 22016, 80, 64), rms_norm_eps=1e-5),
    "llama2-7b": _2_7B,
    "llama2-13b": _2_13B,
    "llama2-70b": _2_70B,
    "codellama-7b": _code(_2_7B, 32016),
    "codellama-13b": _code(_2_13B, 32016),
    "codellama-34b": _code(_llama2(8192, 22016, 48, 64, 8), 32000),
    "codellama-70b": replace(_code(_2_70B, 32016), max_position_embeddings=4096),
    "llama3-8b": _3_8B,
    "llama3-70b": _3_70B,
    "llama3.1-8b": _llama31(_3_8B),
    "llama3.1-70b": _llama31(_3_70B),
    "llama3.1-405b": _llama31(_llama3(16384, 53248, 126, 128)),
    "llama3.2-1b": replace(_llama31(replace(_llama3(2048, 8192, 16, 32), head_dim=64), 32.0), tie_word_embeddings=True),
    "llama3.2-3b": replace(_llama31(_llama3(3072, 8192, 28, 24), 32.0), tie_word_embeddings=True),
    "llama3.3-70b": replace(_llama31(_3_70B), eos_token_id=(128001, 128008, 128009)),
}
