"""A LLaMA's numbers in GGUF's metadata: written for llama.cpp, and read as llama.cpp reads them.

A key of the model that does not do nothing and is not honoured is refused: it would change the logits.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cli.said import say_once
from convert.lazy import LazyTensor
from model.config import LlamaConfig, RopeScaling
from model.config_keys import is_idle
from model.errors import PunaError
from model.rope import frequencies

ROPE_FREQS = "rope_freqs.weight"

# Keys that change no logit, and why.
_HARMLESS = {
    "GGUF.": "the file's own layout",
    "general.": "names, authors and licences, and how the file was quantized",
    "split.": "how many parts the model lies in, which are all read",
    "quantize.": "what the quantization was measured on",
    "tokenizer.": "the tokenizer is read from the files beside the model; its special ids are taken",
    "llama.tensor_data_layout": "a remark of old converters",
    "llama.pooling_type": "how embeddings of texts are made, not logits",
    "llama.rope.scaling.finetuned": "how the weights came to be",
    "llama.attention.layer_norm_epsilon": "of a norm with a mean, which LLaMA has not",
    "llama.expert_used_count": "of experts, which are refused by their count",
}
_NO_NAMES = ("general.sampling.",)  # defaults of sampling, which act in llama.cpp


def add_config(gguf: Any, writer: Any, config: LlamaConfig) -> None:
    """Write the config to a GGUFWriter. Raises PunaError for a RoPE that llama.cpp does not have."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    match config.rope_scaling:
        case None | RopeScaling(rope_type="llama3"):  # llama3 is a tensor
            pass
        case RopeScaling(rope_type="linear") as scaling:
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(scaling.factor)
        case (
            RopeScaling(
                rope_type="yarn", attention_factor=None, mscale=None, mscale_all_dim=None, truncate=None | True
            ) as scaling
        ):
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(scaling.factor)
            writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
            writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast or 32.0)
            writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow or 1.0)
        case scaling:
            raise PunaError(
                f"rope_scaling {scaling.to_hf()} cannot be said in GGUF as llama.cpp reads it; use format='hf'"
            )


def rope_factors(config: LlamaConfig) -> np.ndarray:
    """float32 [d/2]: what llama.cpp divides each frequency by, for Llama 3.1's scaling."""
    plain, _ = frequencies(replace(config, rope_scaling=None))
    scaled, _ = frequencies(config)
    return np.asarray(plain / scaled, np.float32)


class _Metadata:
    """What the file says, and which of it has been asked for."""

    def __init__(self, reader: Any, path: Path):
        self.reader, self.path = reader, path
        self.asked: set[str] = set()

    def value(self, key: str, default: Any = None) -> Any:
        """Of a list that says one value for every layer, that value. Raises PunaError where there is no default."""
        self.asked.add(key)
        found = self.reader.get_field(key)
        if found is None:
            if default is None:
                raise PunaError(f"{self.path} does not say {key}: it is no LLaMA that llama.cpp runs")
            return default
        value = found.contents()
        if isinstance(value, list) and key.startswith("llama."):
            if len(set(value)) != 1:
                raise PunaError(f"{self.path}: {key} is {value}: layers that differ are not supported")
            return value[0]
        return _float(value) if isinstance(value, float) else value

    def left(self) -> dict[str, Any]:
        """What nothing has asked for and is not known to be harmless."""
        found = {}
        for key in self.reader.fields.keys() - self.asked:
            if not any(key.startswith(name) for name in _HARMLESS) or key.startswith(_NO_NAMES):
                found[key] = self.reader.get_field(key).contents()
        return found


def read_config(gguf: Any, reader: Any, tensors: dict[str, LazyTensor], path: Path) -> LlamaConfig:
    """The config that a file's metadata and tensors say.

    Args:
        gguf: the library.
        reader: its GGUFReader.
        tensors: the model's, by llama.cpp's names.
        path: the file, for messages.

    Raises:
        PunaError: another architecture, or a key that would change the logits and is not honoured.
    """
    said = _Metadata(reader, path)
    value = said.value
    if (architecture := value("general.architecture")) != "llama":
        raise PunaError(f"{path} holds a model of architecture {architecture!r}; Puna reads 'llama'")
    if (kind := value("general.type", "model")) != "model":
        raise PunaError(f"{path} holds no model: its general.type is {kind!r}")
    heads, hidden = value("llama.attention.head_count"), value("llama.embedding_length")
    head_dim = value("llama.attention.key_length", hidden // heads)
    for key, default in (("attention.value_length", hidden // heads), ("rope.dimension_count", head_dim)):
        if (found := value(f"llama.{key}", default)) != head_dim:
            raise PunaError(f"{path}: llama.{key} is {found} and heads have {head_dim} entries, which must be equal")
    rows = tensors["token_embd.weight"].shape[0] if "token_embd.weight" in tensors else 1
    if (vocabulary := value("llama.vocab_size", rows)) != rows:
        raise PunaError(f"{path}: llama.vocab_size is {vocabulary} and token_embd.weight has {rows} rows")
    biases = {name.rpartition(".")[0].rpartition(".")[2] for name in tensors if name.endswith(".bias")}
    eos = [value(f"tokenizer.ggml.{end}_token_id", -1) for end in ("eos", "eot", "eom")]
    pad = value("tokenizer.ggml.padding_token_id", -1)
    plain = LlamaConfig(
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=value("llama.feed_forward_length"),
        num_hidden_layers=value("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=value("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=value("llama.context_length"),
        rms_norm_eps=value("llama.attention.layer_norm_rms_epsilon"),
        rope_theta=value("llama.rope.freq_base", 10000.0),
        tie_word_embeddings="output.weight" not in tensors,
        attention_bias="attn_q" in biases,
        mlp_bias="ffn_gate" in biases,
        bos_token_id=value("tokenizer.ggml.bos_token_id", 1),
        eos_token_id=tuple(dict.fromkeys(id for id in eos if id >= 0)) or (2,),
        pad_token_id=None if pad < 0 else pad,
    )
    config = replace(plain, rope_scaling=_rope_scaling(said, plain, tensors))
    _check_left(gguf, said.left(), config, path)
    return config


def _rope_scaling(said: _Metadata, plain: LlamaConfig, tensors: dict[str, LazyTensor]) -> RopeScaling | None:
    """As llama.cpp's loader has it: a factor without a type stretches linearly, and scale_linear is its old name."""
    value, path, context = said.value, said.path, plain.max_position_embeddings
    factor = value("llama.rope.scaling.factor", 0.0) or value("llama.rope.scale_linear", 0.0) or 1.0
    value("llama.rope.scale_linear", 0.0)
    kind = value("llama.rope.scaling.type", "linear")
    original = value("llama.rope.scaling.original_context_length", context)  # which other types do not use
    attention = value("llama.rope.scaling.attn_factor", 1.0) * value("llama.rope.scaling.yarn_attn_factor", 1.0)
    extrapolated = value("llama.rope.scaling.yarn_ext_factor", -1.0)
    betas = {f"beta_{end}": value(f"llama.rope.scaling.yarn_beta_{end}", default) for end, default in _BETAS.items()}
    if attention != 1.0 and kind != "yarn":
        raise PunaError(f"{path}: an attn_factor of {attention:g} is not supported with rope scaling of type {kind!r}")
    if extrapolated not in ((-1.0, 1.0) if kind == "yarn" else (-1.0, 0.0)):
        raise PunaError(f"{path}: llama.rope.scaling.yarn_ext_factor {extrapolated:g} is not supported")
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return _llama3(plain, tensors, path)
    if ROPE_FREQS in tensors:
        raise PunaError(f"{path}: {ROPE_FREQS} beside rope scaling of type {kind!r} is not supported")
    settings = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        settings |= {"original_max_position_embeddings": original, **betas}
        if attention != 1.0:  # which multiplies YaRN's own
            settings["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
        if said.reader.get_field("llama.rope.scaling.original_context_length") is None:
            say_once(f"{path}: rope scaling of type yarn says no original context: {context}, the context, is taken")
    return RopeScaling.from_hf(settings, context)


_BETAS = {"fast": 32.0, "slow": 1.0}


def _llama3(plain: LlamaConfig, tensors: dict[str, LazyTensor], path: Path) -> RopeScaling | None:
    """GGUF has only what each frequency is divided by; the published Llama 3s tell which scaling that is."""
    if ROPE_FREQS not in tensors:
        return None
    found = tensors[ROPE_FREQS].load()
    for factor in (8.0, 32.0):
        scaling = RopeScaling("llama3", factor, 8192, 1.0, 4.0)
        expected = rope_factors(replace(plain, rope_scaling=scaling))
        if found.shape == expected.shape and np.allclose(found, expected, rtol=1e-4):
            return scaling
    if (found == 1.0).all():
        return None
    raise PunaError(f"{path}: {ROPE_FREQS} is not that of Llama 3.1, 3.2 or 3.3; convert from the original instead")


def _check_left(gguf: Any, left: dict[str, Any], config: LlamaConfig, path: Path) -> None:
    """Raises PunaError for a key that acts; says the others."""
    idle = {
        "logit_scale": 1.0,
        "embedding_scale": 1.0,
        "residual_scale": 1.0,
        "attention.scale": _float(config.head_dim**-0.5),
        "attention.causal": True,
        "rope.freq_base_swa": config.rope_theta,
        "embedding_length_out": config.hidden_size,
    }
    model = _keys_of_models(gguf.Keys)
    unknown = []
    for key, value in sorted(left.items()):
        name = key.removeprefix("llama.")
        value = _float(value) if isinstance(value, float) else value
        is_known = name in model or name.startswith(("attention.", "rope.", "expert"))
        is_near = name == "attention.sliding_window" and value >= config.max_position_embeddings
        if not key.startswith("llama.") or not is_known:
            unknown.append(key)
        elif not (is_near or (is_idle(value) and name != "attention.causal") or value == idle.get(name)):
            raise PunaError(f"{path}: {key} = {value!r} is not supported; this would not be the same model")
    if unknown:
        say_once(f"{path}: unknown keys, not used: {', '.join(unknown)}")


def _keys_of_models(keys: Any) -> set[str]:
    """The keys that llama.cpp reads for a model of any architecture, without its name."""
    found = set()
    for value in vars(keys).values():
        if isinstance(value, type):
            found |= _keys_of_models(value)
        elif isinstance(value, str) and value.startswith("{arch}."):
            found.add(value.removeprefix("{arch}."))
    return found


def _float(value: float) -> float:
    """The shortest decimal of a float32: 1e-05 is stored as 9.999999747e-06."""
    return float(str(np.float32(value)))
