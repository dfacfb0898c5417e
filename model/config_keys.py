"""The keys of a `config.json` that are no number of a LLaMA: which do nothing, and which would make another model.

What transformers' LlamaForCausalLM reads decides. A key that neither list knows is one that it does not read, and is
said; where its name is that of something which changes the numbers of other models, it is refused.
"""

from collections.abc import Mapping
from typing import Any

from model.errors import PunaError

# Why each group changes neither the shape nor the logits of a LLaMA.
_HARMLESS = {
    "names, and how the file came to be": """
        _name_or_path _commit_hash name_or_path architectures model_type transformers_version auto_map unsloth_version
        unsloth_fixed is_llama_config base_model_name_or_path transformers.js_config neuron""",
    "how transformers computes the same numbers, and what it returns": """
        torch_dtype dtype use_cache pretraining_tp return_dict output_hidden_states output_attentions output_scores
        return_dict_in_generate torchscript use_bfloat16 chunk_size_feed_forward attn_implementation
        _attn_implementation _attn_implementation_internal _attn_implementation_autoset _experts_implementation_internal
        _flash_attn_2_enabled use_flash_attn use_flash_attention tie_last_hidden_states""",
    "settings of models that LlamaForCausalLM is not: classifiers, encoders and decoders": """
        is_decoder is_encoder_decoder add_cross_attention tie_encoder_decoder cross_attention_hidden_size
        finetuning_task id2label label2id num_labels problem_type task_specific_params pruned_heads tf_legacy_loss
        sep_token_id cls_token_id decoder_start_token_id tokenizer_class prefix""",
    "defaults of generating, which newer files keep in generation_config.json": """
        max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k
        top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
        bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values
        exponential_decay_length_penalty suppress_tokens begin_suppress_tokens""",
    "lengths that a tokenizer or a trainer was told": "max_sequence_length model_max_length tokenizer_model_max_length",
}
HARMLESS = {name: reason for reason, names in _HARMLESS.items() for name in names.split()}

# Each name with the values at which it does nothing, beside those of `_IDLE`.
_ACTS: dict[str, tuple[Any, ...]] = {
    "attention_chunk_size": (),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "compression_config": (),
    "dim_model_base": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "hidden_activation": ("silu", "swish"),
    "is_causal": (True,),
    "kv_lora_rank": (),
    "kv_sharing_modes": (),
    "layer_sharing": (),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "moe_intermediate_size": (),
    "moe_num_experts": (1,),
    "mup_scale_emb": (1,),
    "n_routed_experts": (),
    "no_rope_layer_interval": (),
    "no_rope_layers": (),
    "num_experts": (1,),
    "num_kv_shared_layers": (),
    "num_local_experts": (1,),
    "parallel_attn": (),
    "per_layer_config": (),
    "q_lora_rank": (),
    "qk_layernorm": (),
    "qk_norm": (),
    "quantization": (),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "rope_interleaved": (),
    "rope_ratio": (1,),
    "rotary_dim": (),
    "rotary_pct": (1,),
    "scale_depth": (),
    "scale_emb": (1,),
    "transformers_weights": ("model.safetensors",),
    "use_alibi": (),
    "use_parallel_residual": (),
    "use_qk_norm": (),
}
_REMEDIES = {
    "is_causal": "its tokens see what follows them, as in embedding models: use transformers",
    "transformers_weights": "rename that file model.safetensors and remove the key",
    "quantization": "these are MLX's quantized weights: give the unquantized model",
    "compression_config": "give the unquantized model, or decompress it with llm-compressor",
    "per_layer_config": "layers that differ are not supported: use transformers",
}
_IDLE = (None, False, 0, 0.0, "", [], {})
_TRAINING = "attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop neftune_noise_alpha".split()
_NO_HEAD = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "RewardModel")


def is_idle(value: Any) -> bool:
    """Whether a value says that a key does nothing."""
    return any(type(value) is type(idle) and value == idle for idle in _IDLE)


def unread(given: Mapping[str, Any], layers: int, context: int) -> list[str]:
    """What to say of the keys of a config.json that hold no number of a LLaMA.

    Args:
        given: those keys and their values.
        layers: the model's number of layers.
        context: its longest sequence in tokens.

    Returns:
        Lines for a person; none where there is nothing to say.

    Raises:
        PunaError: for a key that would make another model.
    """
    _check_architectures(given.get("architectures"))
    active = {key: value for key, value in given.items() if key not in HARMLESS and not is_idle(value)}
    if given.get("is_causal") is False:
        active["is_causal"] = False
    if all(kind == "full_attention" for kind in _listed(active.get("layer_types"), layers)):
        active.pop("layer_types", None)
    if isinstance(window := active.get("sliding_window"), int) and window >= context:
        del active["sliding_window"]  # no token is further away
    windows = {"sliding_window", "layer_types"} & active.keys()
    if "sliding_window" not in windows:
        for key in ("use_sliding_window", "max_window_layers"):
            active.pop(key, None)
    acting = {key for key in active if key in _ACTS and active[key] not in _ACTS[key]} | windows
    if acting:
        said = ", ".join(f"{key} = {active[key]!r}" for key in sorted(acting))
        remedies = [_REMEDIES[key] for key in sorted(acting) if key in _REMEDIES]
        why = remedies[0] if remedies else "this would not be the same model"
        raise PunaError(f"config.json: unknown active field {said}; {why}")
    trained = {key for key in _TRAINING if key in active}
    unknown = sorted(active.keys() - _ACTS.keys() - trained)
    lines = [f"unknown keys, not used: {', '.join(unknown)}"] if unknown else []
    if trained:
        said = ", ".join(f"{key} = {active[key]!r}" for key in sorted(trained))
        lines.append(f"{said}: for training in transformers, not used here")
    return lines


def _listed(kinds: Any, layers: int) -> list[Any]:
    return kinds if isinstance(kinds, list) and len(kinds) == layers else [kinds] if kinds is not None else []


def _check_architectures(said: Any) -> None:
    for name in said if isinstance(said, list) else ():
        if isinstance(name, str) and name.endswith(_NO_HEAD):
            raise PunaError(
                f"config.json: architectures says {name}, which has another head than a language model's; Puna reads "
                "LlamaForCausalLM"
            )
