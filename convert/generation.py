"""generation_config.json: which of its keys change a text, and which of those are followed here."""

from pathlib import Path
from typing import Any

from cli.said import say_once
from model.config_keys import is_idle
from model.errors import PunaError
from model.json_file import read_json

NAME = "generation_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_TYPES: dict[str, tuple[type, ...]] = {**dict.fromkeys(IDS, (int,)), "do_sample": (bool,), "top_k": (int,)}

# Why each group changes no token of a text of a decoder.
_HARMLESS = {
    "how the file came to be": "_from_model_config transformers_version",
    "how long a text may be and how many there are, which commands and requests say themselves": """
        max_length max_new_tokens max_time num_return_sequences""",
    "how transformers computes the same tokens": """
        use_cache cache_implementation cache_config max_cache_len compile_config disable_compile low_memory
        prefill_chunk_size continuous_batching_config use_mtp is_assistant num_assistant_tokens
        num_assistant_tokens_schedule assistant_confidence_threshold prompt_lookup_num_tokens max_matching_ngram_size
        assistant_early_exit assistant_lookbehind target_lookbehind assistant_ensemble_weight speculation_type""",
    "what is returned beside a text": """
        output_attentions output_hidden_states output_scores output_logits return_dict_in_generate""",
    "of beams, which are refused by their number": "early_stopping length_penalty diversity_penalty num_beam_groups",
    "of encoders and decoders": "decoder_start_token_id",
}
HARMLESS = {name: reason for reason, names in _HARMLESS.items() for name in names.split()}

# What changes a text and is not followed, with the value at which it does nothing.
_ACTS: dict[str, Any] = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "constraints": None,
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "penalty_alpha": 0.0,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": None,
    "token_healing": False,
    "top_h": None,
    "typical_p": 1.0,
    "watermarking_config": None,
}


def read_generation(file: Path) -> dict[str, Any]:
    """The object of a generation_config.json, for generating by it.

    Raises:
        PunaError: it asks for what changes a text and is not done here.
    """
    said = _read(file)
    acting = [key for key, idle in _ACTS.items() if not is_idle(said.get(key)) and said[key] != idle]
    if acting:
        words = ", ".join(f"{key} = {said[key]!r}" for key in acting)
        raise PunaError(f"{file}: {words} is not supported, and would change every text; take it out to go on without")
    unknown = sorted(said.keys() - HARMLESS.keys() - _ACTS.keys() - {*IDS, *SAMPLING})
    if unknown := [key for key in unknown if not is_idle(said[key])]:
        say_once(f"{file}: unknown keys, not used: {', '.join(unknown)}")
    return said


def _read(file: Path) -> dict[str, Any]:
    """The object of the file, whose token ids and sampling settings are of their types."""
    said = read_json(file)
    for key in (*IDS, *SAMPLING):
        values = said.get(key)
        if key in IDS and isinstance(values, list):
            allowed = all(type(value) is int for value in values)
        else:
            allowed = values is None or type(values) in _TYPES.get(key, (int, float))
        if not allowed:
            names = " or ".join(kind.__name__ for kind in _TYPES.get(key, (int, float)))
            raise PunaError(f"{file}: {key} is {str(values)[:80]!r}: give {names}{' or a list' * (key in IDS)}")
    return said


def asked(folder: Path) -> dict[str, Any]:
    """What a generation_config.json asks for, by key: all that changes a text and does not do nothing; ids in lists."""
    said = _read(folder / NAME) if (folder / NAME).is_file() else {}
    said = {key: value for key, value in said.items() if key not in HARMLESS}
    ids = {key: id_list(said.pop(key)) for key in IDS if said.get(key) is not None}
    idle = _ACTS | {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0}
    return ids | {key: value for key, value in said.items() if not is_idle(value) and value != idle.get(key)}


def id_list(said: Any) -> list[Any] | None:
    """The ids of one or several tokens in order; None for none."""
    return None if said is None else sorted(said) if isinstance(said, list | tuple) else [said]
