"""What a LLaMA's shape is: one frozen record of numbers, read from and written to Hugging Face `config.json`.

It also holds the names of the functions that replace parts of the model (see pieces.py).
Everything a `config.json` says is honoured or refused: a field that would change the model and that this model
does not have is an error that names it. Meta's `params.json` says less; what it leaves out is the family's.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from model.errors import PunaError
from model.pieces import Pieces

_ROPE_KEYS: dict[str, tuple[str, ...]] = {
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

# Fields of transformers' base configuration that steer its runtime, its generation defaults or its bookkeeping, and
# change neither the shape nor the logits of a LLaMA. `pretraining_tp` only reorders one sum.
_INERT = frozenset(
    """
    _name_or_path _commit_hash _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled
    architectures model_type transformers_version torch_dtype dtype use_cache pretraining_tp auto_map
    return_dict output_hidden_states output_attentions torchscript use_bfloat16 tf_legacy_loss is_decoder
    add_cross_attention chunk_size_feed_forward is_encoder_decoder tie_encoder_decoder cross_attention_hidden_size
    finetuning_task id2label label2id num_labels problem_type task_specific_params tokenizer_class prefix
    pruned_heads sep_token_id decoder_start_token_id max_length min_length do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens max_sequence_length unsloth_version
    unsloth_fixed
    """.split()
)

MOST_LAYERS = 10_000  # of any model: a number beyond is damage, and would make tables without end


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
    def from_hf(cls, settings: dict[str, Any], max_position_embeddings: int) -> "RopeScaling | None":
        """Reads `rope_scaling` or `rope_parameters` (less its theta); None for the default RoPE.

        llama3 and yarn take `max_position_embeddings` for the original context where `settings` give none.

        Raises:
            PunaError: for an unknown type, a number the type needs and lacks, or one it does not know.
        """
        given = {key: value for key, value in settings.items() if value is not None}
        names = {given.pop(key) for key in ("type", "rope_type") if key in given}
        if len(names) > 1:
            raise PunaError(f"rope_scaling: type and rope_type disagree ({', '.join(sorted(names))}); keep one")
        rope_type = names.pop() if names else "default"
        if given.pop("partial_rotary_factor", 1.0) != 1.0:
            raise PunaError("rope_scaling: partial_rotary_factor other than 1 is not supported")
        if rope_type == "default":
            if active := {key for key, value in given.items() if (key, value) != ("factor", 1.0)}:
                raise PunaError(f"rope_scaling: {_names(active)} given, but rope_type is default; name the rope_type")
            return None
        if rope_type not in _ROPE_KEYS:
            raise PunaError(f"rope_scaling: rope_type {rope_type!r} is not supported; known: {', '.join(_ROPE_KEYS)}")
        if rope_type in ("llama3", "yarn"):
            given.setdefault("original_max_position_embeddings", max_position_embeddings)
        elif given.get("original_max_position_embeddings") == max_position_embeddings:
            del given["original_max_position_embeddings"]  # says nothing that these types do not already assume
        if unknown := set(given) - set(_ROPE_KEYS[rope_type]):
            raise PunaError(f"rope_scaling: {_names(unknown)} is not a setting of rope_type {rope_type!r}")
        if rope_type == "yarn":
            given.setdefault("factor", max_position_embeddings / given["original_max_position_embeddings"])
        needed = ("factor",) if rope_type == "yarn" else _ROPE_KEYS[rope_type]
        if missing := [key for key in needed if key not in given]:
            raise PunaError(f"rope_scaling: rope_type {rope_type!r} needs {_names(missing)}")
        if given["factor"] < 1:
            raise PunaError(f"rope_scaling: factor {given['factor']} is below 1; it is the ratio new/original context")
        return cls(rope_type=rope_type, **given)

    def to_hf(self) -> dict[str, Any]:
        """The `rope_scaling` object of config.json."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}


@dataclass(frozen=True)
class LlamaConfig:
    """The numbers of a LLaMA, under Hugging Face's names. Hashable, so it may be a static argument of `jit`.

    Attributes:
        num_key_value_heads, head_dim: 0 for num_attention_heads, and for hidden_size / num_attention_heads.
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
        for name, value in (("rope_theta", self.rope_theta), ("rms_norm_eps", self.rms_norm_eps)):
            if not 0 < value < math.inf:
                raise PunaError(f"{name} is {value}; it must be a positive number")
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
    def from_hf(cls, config: dict[str, Any]) -> "LlamaConfig":
        """Reads the object of a `config.json` as transformers 4 or 5 writes it.

        `quantization_config` is a property of the files, not of the model: their reader takes it away first.

        Raises:
            PunaError: naming any field that would change the model and is not known here.
        """
        given = {key: value for key, value in config.items() if value is not None}
        pieces = given.pop("puna", None)
        if (kind := given.get("model_type", "llama")) != ("llama" if pieces is None else "puna"):
            raise PunaError(f"config.json: model_type {kind!r} is not supported; Puna reads 'llama'")
        if (act := given.pop("hidden_act", "silu")) not in ("silu", "swish"):
            raise PunaError(f"config.json: hidden_act {act!r} is not supported; LLaMA's is 'silu'")
        if rate := given.pop("attention_dropout", 0.0):
            raise PunaError(f"config.json: attention_dropout {rate} is not supported; set it to 0.0")
        if (part := given.pop("partial_rotary_factor", 1.0)) != 1.0:
            raise PunaError(f"config.json: partial_rotary_factor {part} is not supported; only 1.0 is")
        scaling = dict(given.pop("rope_scaling", {}))
        rope = {**scaling, **given.pop("rope_parameters", {})}  # transformers 5 keeps theta beside the scaling
        theta = given.pop("rope_theta", None)
        theta = rope.pop("rope_theta", theta)
        known = {f.name for f in fields(cls)} - {"pieces"}
        kept = {key: value for key, value in given.items() if key in known}
        unknown = {k: v for k, v in given.items() if k not in known and k not in _INERT and _is_active(v)}
        if unknown:
            said = ", ".join(f"{key} = {value!r}" for key, value in sorted(unknown.items()))
            raise PunaError(f"config.json: unknown active field {said}; this would not be the same model")
        max_position = kept.get("max_position_embeddings", cls.max_position_embeddings)
        kept["rope_scaling"] = RopeScaling.from_hf(rope, max_position)
        kept["eos_token_id"] = _as_tuple(config.get("eos_token_id", (2,)))
        kept["bos_token_id"] = config.get("bos_token_id", 1)
        if theta is not None:
            kept["rope_theta"] = float(theta)
        if pieces is not None:
            kept["pieces"] = Pieces.from_hf(pieces)
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
    def from_meta(cls, params: dict[str, Any], vocab_size: int | None = None) -> "LlamaConfig":
        """Reads Meta's `params.json`. Raises PunaError naming a field that is missing or not known here.

        The hidden width of the MLP is round_up(int(multiplier * int(8 dim / 3)), multiple_of), as in Meta's code.
        `params.json` does not say how long the context is: it is that of the family which the other numbers show.

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
        scaled, factor = given.pop("use_scaled_rope", False), float(given.pop("rope_scale_factor", 8.0))
        eps = given.pop("norm_eps", 1e-5)
        kv_heads = given.pop("n_kv_heads", None)
        width = int(given.pop("ffn_dim_multiplier", 1.0) * int(8 * dim / 3))
        multiple = given.pop("multiple_of", 256)
        length = given.pop("max_seq_len", None) or _meta_context(theta, eps, dim, kv_heads, vocab, scaled)
        given.pop("max_batch_size", None)
        if unknown := {key for key, value in given.items() if _is_active(value)}:
            raise PunaError(f"params.json: unknown active field {_names(unknown)}; this would not be the same model")
        third = vocab >= 128000
        return cls(
            vocab_size=vocab,
            hidden_size=dim,
            intermediate_size=-(-width // multiple) * multiple,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads or heads,
            max_position_embeddings=length,
            rms_norm_eps=eps,
            rope_theta=theta,
            rope_scaling=RopeScaling("llama3", factor, 8192, 1.0, 4.0) if scaled else None,
            bos_token_id=128000 if third else 1,
            eos_token_id=(128001,) if third else (2,),
        )

    def to_meta(self) -> dict[str, Any]:
        """The object of a `params.json`.

        Raises:
            PunaError: naming what Meta's format cannot say.
        """
        scaling = self.rope_scaling
        meta_scaling = scaling and RopeScaling("llama3", scaling.factor, 8192, 1.0, 4.0)
        for name, cannot in (
            ("attention_bias", self.attention_bias),
            ("mlp_bias", self.mlp_bias),
            ("head_dim", self.head_dim * self.num_attention_heads != self.hidden_size),
            ("rope_scaling", scaling != meta_scaling),
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
        } | _meta_width(self.hidden_size, self.intermediate_size)
        return params | ({"use_scaled_rope": True, "rope_scale_factor": scaling.factor} if scaling else {})


def _meta_context(theta: float, eps: float, dim: int, kv_heads: int | None, vocab: int, scaled: bool) -> int:
    if scaled:
        return 131072  # Llama 3.1 on
    if vocab >= 128000:
        return 8192  # Llama 3
    if theta > 10000.0:
        return 16384  # Code Llama
    first = eps < 1e-5 or (dim == 8192 and kv_heads is None)  # LLaMA 1; its 65B has Llama 2's epsilon
    return 2048 if first else 4096


def _meta_width(dim: int, width: int) -> dict[str, Any]:
    """The multiple_of and ffn_dim_multiplier from which Meta's rule gives `width`."""
    plain = int(8 * dim / 3)
    for multiplier in (1.0, 1.3, 1.5, 1.4, 1.2, 1.1):
        for multiple in (256, 1024, 4096, 512, 128, 64, 32, 16, 8, 4, 2, 1):
            if -(-int(multiplier * plain) // multiple) * multiple == width:
                return {"multiple_of": multiple} | ({} if multiplier == 1.0 else {"ffn_dim_multiplier": multiplier})
    return {"multiple_of": 1, "ffn_dim_multiplier": (width + 0.5) / plain}


def _is_active(value: Any) -> bool:
    return value not in (None, False, 0, 0.0, "", [], {})


def _as_tuple(value: int | list[int] | tuple[int, ...] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _names(keys: Any) -> str:
    return ", ".join(sorted(keys))


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
