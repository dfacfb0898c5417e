"""Configurations as the Hub has them, each with what becomes of it here: transformers' logits, or a refusal by name.

The keys are those of the published files; sizes and lengths are small ones. docs/conversion.md shows this table, and
tests/test_config_variants.py tries every row.
"""

from typing import Any, NamedTuple

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "transformers_version": "4.31.0",
}
LLAMA31 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_type": "llama3",
}
SPECIALS3 = {"bos_token_id": 128000, "eos_token_id": 128001}
FIVE = {"torch_dtype": None, "dtype": "float32", "transformers_version": "5.0.0"}


class Variant(NamedTuple):
    """One row.

    Attributes:
        config: what differs from TINY; None takes a key away.
        said: of what stderr must speak.
        refused: of what the message must speak, where Puna refuses it.
    """

    config: dict[str, Any] = {}
    said: str = ""
    refused: str = ""

    @property
    def outcome(self) -> str:
        """As docs/conversion.md says it."""
        if self.refused:
            return "refused"
        return "transformers' logits; what is not used or is derived is said" if self.said else "transformers' logits"


def refused(words: str, **config: Any) -> Variant:
    """A row of what is refused."""
    return Variant(config, refused=words)


def quantized(method: str, **settings: Any) -> Variant:
    """A row of quantized weights that are not read."""
    return refused(
        f"quantized by {method} are not read.*dequantize", quantization_config={"quant_method": method} | settings
    )


VARIANTS: dict[str, Variant] = {
    # families
    "LLaMA, as first converted": Variant(
        {
            "architectures": ["LLaMAForCausalLM"],
            "num_key_value_heads": None,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": -1,
            "max_sequence_length": 128,
            "rms_norm_eps": 1e-6,
            "torch_dtype": "float16",
            "transformers_version": "4.27.0.dev0",
        }
    ),
    "OpenLLaMA": Variant({"num_key_value_heads": None, "rms_norm_eps": 1e-6, "pad_token_id": 0, "_name_or_path": "x"}),
    "Alpaca, Vicuna 1.1: a grown vocabulary": Variant({"vocab_size": 97, "num_key_value_heads": None}),
    "Vicuna 1.5": Variant({"pretraining_tp": 1, "rope_scaling": None, "_name_or_path": "vicuna-7b-v1.5"}),
    "Vicuna 1.5 16k": Variant(
        {"rope_scaling": {"factor": 4.0, "type": "linear"}, "max_sequence_length": 512, "max_position_embeddings": 32}
    ),
    "Llama 2": Variant({"pretraining_tp": 1, "rope_scaling": None, "attention_bias": False, "rope_theta": 10000.0}),
    "Llama 2 Chat": Variant({"pad_token_id": 0, "temperature": 0.9, "top_p": 0.6, "max_length": 4096}),
    "Code Llama": Variant({"rope_theta": 1000000, "pretraining_tp": 1, "auto_map": {"AutoModel": "x.LlamaModel"}}),
    "TinyLlama": Variant({"num_key_value_heads": 1, "attention_bias": False, "attention_dropout": 0.0}),
    "Yi": Variant({"rope_theta": 5000000.0, "pad_token_id": 0, "eos_token_id": 7, "attention_bias": False}),
    "DeepSeek LLM": Variant({"bos_token_id": 100000, "eos_token_id": 100001, "pretraining_tp": 1}),
    "DeepSeek Coder": Variant(
        {"rope_scaling": {"factor": 4.0, "type": "linear"}, "rope_theta": 100000, "bos_token_id": 32013}
    ),
    "DeepSeek R1 Distill Llama": Variant(
        {"rope_scaling": LLAMA31, "rope_theta": 500000.0, "head_dim": 8, "attention_dropout": 0.0, **SPECIALS3}
    ),
    "InternLM, converted": Variant({"attention_bias": True, "bias": True}, said="unknown keys, not used: bias"),
    "Qwen, converted": Variant({"attention_bias": True, "seq_length": 128, "rope_theta": 1000000.0}, said="seq_length"),
    "Mistral, converted": Variant({"sliding_window": None, "rope_theta": 10000.0, "head_dim": 8}),
    "Nous Hermes: a grown vocabulary, ChatML's end": Variant({"vocab_size": 101, "eos_token_id": 100}),
    "Nous Yarn Llama 2": Variant(
        {
            "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32, "type": "yarn", "finetuned": True},
            "auto_map": {"AutoModelForCausalLM": "modeling_llama_together_yarn.LlamaForCausalLM"},
        }
    ),
    "LLongMA, Together 32K": Variant({"rope_scaling": {"type": "linear", "factor": 8.0}, "pretraining_tp": 1}),
    "Llama 3": Variant({"rope_theta": 500000.0, "attention_bias": False, "pretraining_tp": 1, **SPECIALS3}),
    "Llama 3.1 Instruct": Variant(
        {
            "rope_scaling": LLAMA31,
            "rope_theta": 500000.0,
            "mlp_bias": False,
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
        }
    ),
    "Llama 3.2": Variant(
        {
            "rope_scaling": LLAMA31 | {"factor": 32.0},
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "head_dim": 16,
            **SPECIALS3,
        }
    ),
    "Llama Guard 3": Variant({"rope_scaling": LLAMA31, "pad_token_id": 95, "eos_token_id": [128001, 128009]}),
    "Llama 3, by Unsloth": Variant({"unsloth_version": "2025.1", "unsloth_fixed": True, "pad_token_id": 95}),
    "Llama 3, dynamic RoPE": Variant({"rope_scaling": {"type": "dynamic", "factor": 4.0}, "rope_theta": 500000.0}),
    "SmolLM": Variant(
        {"num_attention_heads": 8, "num_key_value_heads": 1, "tie_word_embeddings": True, "rope_scaling": None}
    ),
    "SmolLM2": Variant(
        {
            "is_llama_config": True,
            "rope_interleaved": False,
            "rope_theta": 100000,
            "tie_word_embeddings": True,
            "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        }
    ),
    "Falcon 3": Variant({"activation": "swiglu", "head_dim": 16, "rope_theta": 1000042}, said="activation"),
    "Minitron Llama: narrow": Variant({"hidden_size": 24, "head_dim": 8, "mlp_bias": False}),
    "EXAONE, converted": Variant(
        {"rope_scaling": LLAMA31, "head_dim": None, "layer_norm_epsilon": 1e-5}, said="layer_"
    ),
    # spellings of transformers 4 and 5
    "transformers 5": Variant({**FIVE, "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}),
    "transformers 5, llama3": Variant({**FIVE, "rope_parameters": {**LLAMA31, "rope_theta": 500000.0}}),
    "transformers 5, yarn": Variant(
        {
            **FIVE,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 5000.0,
                "partial_rotary_factor": 1.0,
            },
        }
    ),
    **{
        f"yarn, truncate {value}": Variant(
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "truncate": value}}
        )
        for value in (None, 0, False, True)
    },
    "rope_scaling with type and rope_type": Variant(
        {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}}
    ),
    "rope_scaling and rope_parameters that agree": Variant(
        {
            "rope_theta": 20000.0,
            "rope_scaling": {"type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 20000.0},
        }
    ),
    "rope_theta in two places that agree": Variant(
        {"rope_theta": 20000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}
    ),
    "dtype and torch_dtype": Variant({"dtype": "float32", "torch_dtype": "float16"}),
    # RoPE
    "yarn without its original length": Variant(
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        said="embeddings is max_position_embeddings, 128",
    ),
    "yarn with every number": Variant(
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 16,
                "attention_factor": 1.2,
                "beta_fast": 16,
                "beta_slow": 2,
                "truncate": False,
            }
        }
    ),
    "yarn with mscale, as DeepSeek": Variant(
        {
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "mscale": 0.707,
                "mscale_all_dim": 0.5,
            }
        }
    ),
    "the original length beside rope_scaling": Variant(
        {
            "original_max_position_embeddings": 32,
            "rope_scaling": {key: LLAMA31[key] for key in LLAMA31 if not key.startswith("original")},
        }
    ),
    "an original length that no scaling reads": Variant({"original_max_position_embeddings": 32}),
    "rope_scaling: default": Variant({"rope_scaling": {"rope_type": "default"}}),
    # shapes
    "mlp_bias": Variant({"mlp_bias": True}),
    "attention_bias and mlp_bias": Variant({"attention_bias": True, "mlp_bias": True}),
    "hidden_act: swish": Variant({"hidden_act": "swish"}),
    "numbers that are left out": Variant(
        {key: None for key in ("rms_norm_eps", "num_key_value_heads", "initializer_range", "bos_token_id", "use_cache")}
    ),
    # what does nothing
    "sliding_window beyond the context": Variant({"sliding_window": 4096, "use_sliding_window": True}),
    "layer_types: all full_attention": Variant({"layer_types": ["full_attention"] * 2}),
    "pretraining_tp: 2": Variant({"pretraining_tp": 2}),
    "dropout and noise of training": Variant(
        {"attention_dropout": 0.1, "neftune_noise_alpha": 5, "hidden_dropout": 0.1}, said="attention_dropout = 0.1, hid"
    ),
    "model_max_length, attn_implementation": Variant({"model_max_length": 64, "attn_implementation": "eager"}),
    "classifier's labels": Variant({"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}),
    "keys that nobody knows": Variant({"my_note": "x", "my_number": 3}, said="unknown keys, not used: my_note, my"),
    # what is refused
    "weights quantized by gptq": quantized("gptq", bits=4, group_size=128, desc_act=True),
    "weights quantized by awq": quantized("awq", bits=4, group_size=128, version="gemm", zero_point=True),
    "weights quantized by fp8": quantized("fp8", activation_scheme="dynamic", weight_block_size=[128, 128]),
    "weights quantized by fbgemm_fp8": quantized("fbgemm_fp8", activation_scale_ub=1200.0),
    "weights quantized by compressed-tensors": quantized("compressed-tensors", format="float-quantized"),
    "weights quantized by aqlm, hqq, eetq, quanto, torchao, vptq, mxfp4": quantized("hqq", quant_config={}),
    "weights quantized by MLX": refused(
        "quantization = .*MLX", quantization={"group_size": 64, "bits": 4}, quantization_config={"group_size": 64}
    ),
    "compression_config": refused("compression_config.*llm-compressor", compression_config={"format": "int-quantized"}),
    "model_type: mistral, mixtral, Yi, mobilellm, ...": refused("model_type 'mistral' is not", model_type="mistral"),
    "LlamaForSequenceClassification": refused("another head", architectures=["LlamaForSequenceClassification"]),
    "sliding_window within the context": refused("sliding_window = 64", sliding_window=64),
    "layer_types: some sliding_attention": refused("layer_types", layer_types=["full_attention", "sliding_attention"]),
    "is_causal: false": refused("is_causal = False.*use transformers", is_causal=False),
    "per_layer_config": refused("per_layer_config", per_layer_config={"0": {"intermediate_size": 32}}),
    "transformers_weights": refused("transformers_weights.*rename", transformers_weights="other.safetensors"),
    "rope_interleaved: true": refused("rope_interleaved = True", rope_interleaved=True),
    "num_local_experts": refused("num_local_experts = 8", num_local_experts=8),
    "logit_scale, residual_multiplier, ...": refused("logit_scale = 0.5", logit_scale=0.5),
    "attn_logit_softcapping, qk_norm, use_alibi, clip_qkv, ...": refused("qk_norm = True", qk_norm=True),
    "hidden_act: gelu": refused("hidden_act 'gelu' is not supported", hidden_act="gelu"),
    "partial_rotary_factor": refused("partial_rotary_factor 0.5", partial_rotary_factor=0.5),
    "rope_type: longrope": refused(
        "longrope.* is not supported", rope_scaling={"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}
    ),
    "rope_type: dynamic, with another original length": refused(
        "is not a setting",
        rope_scaling={"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32},
    ),
    "rope_parameters by layer type": refused(
        "full_attention given", rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    ),
    "rope_scaling and rope_parameters that disagree": refused(
        "disagree",
        rope_scaling={"type": "linear", "factor": 2.0},
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    ),
    "rope_theta in two places that disagree": refused(
        "rope_theta is 20000.0 and rope_parameters says 10000.0",
        rope_theta=20000.0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "original lengths that disagree": refused(
        "original_max_position_embeddings is 64", original_max_position_embeddings=64, rope_scaling=LLAMA31
    ),
    "num_hidden_layers: 1000000000": refused("no LLaMA has more than 10000", num_hidden_layers=1000000000),
}
