"""What Meta's `params.json` leaves out and its family tells, and the keys that it may hold beside a LLaMA's numbers."""

from collections.abc import Mapping
from typing import Any

from model.config_keys import is_idle
from model.errors import PunaError

FIRST_OF_LLAMA3 = 128000  # tokens: no vocabulary before Llama 3 has so many, and none from it on fewer

# (dim, layers, heads, key-value heads) of those whose RoPE is stretched by 32; the others of Llama 3.1 on have 8.
_BY_32 = {(2048, 16, 32, 8), (3072, 28, 24, 8)}
_HARMLESS = ("max_batch_size",)  # room for a cache in Meta's own code
# What Meta's code for other models reads, and Mistral's, whose file and tensors are named alike.
_ACTS = """
    moe moe_args lora lora_args quantization quantization_args sliding_window use_qk_norm nope_layer_interval
    attention_chunk_size attn_temperature_tuning vision_args vision_chunk_size vision_max_num_tiles
    vision_num_cross_attention_layers use_biases yarn
""".split()


def rope_factor(dim: int, layers: int, heads: int, kv_heads: int) -> float:
    """By how much `use_scaled_rope` stretches RoPE in the family that these numbers show."""
    return 32.0 if (dim, layers, heads, kv_heads) in _BY_32 else 8.0


def context(theta: float, eps: float, dim: int, kv_heads: int | None, vocab: int, scaled: bool) -> int:
    """The longest sequence in tokens of the family that these numbers show."""
    if scaled:
        return 131072  # Llama 3.1 on
    if vocab >= FIRST_OF_LLAMA3:
        return 8192  # Llama 3
    if theta > 10000.0:
        return 16384  # Code Llama
    first = eps < 1e-5 or (dim == 8192 and kv_heads is None)  # LLaMA 1; its 65B has Llama 2's epsilon
    return 2048 if first else 4096


def width_params(dim: int, width: int) -> dict[str, Any]:
    """The multiple_of and ffn_dim_multiplier from which Meta's rule gives `width`."""
    plain = int(8 * dim / 3)
    for multiplier in (1.0, 1.3, 1.5, 1.4, 1.2, 1.1):
        for multiple in (256, 1024, 4096, 512, 128, 64, 32, 16, 8, 4, 2, 1):
            if -(-int(multiplier * plain) // multiple) * multiple == width:
                return {"multiple_of": multiple} | ({} if multiplier == 1.0 else {"ffn_dim_multiplier": multiplier})
    return {"multiple_of": 1, "ffn_dim_multiplier": (width + 0.5) / plain}


def unread_params(given: Mapping[str, Any], head_dim: int) -> list[str]:
    """What to say of the keys of a params.json that hold no number of a LLaMA.

    Args:
        given: those keys and their values; `hidden_dim` and `head_dim`, which Mistral's files say, among them.
        head_dim: entries of a head, as the other numbers have it.

    Returns:
        Lines for a person; none where there is nothing to say.

    Raises:
        PunaError: for a key that would make another model.
    """
    left = {key: value for key, value in given.items() if key not in _HARMLESS and not is_idle(value)}
    left.pop("hidden_dim", None)
    if left.get("head_dim") == head_dim:
        del left["head_dim"]
    if acting := sorted(left.keys() & {*_ACTS, "head_dim"}):
        said = ", ".join(f"{key} = {left[key]!r}" for key in acting)
        raise PunaError(f"params.json: unknown active field {said}; this would not be the same model")
    return [f"unknown keys, not used: {', '.join(sorted(left))}"] if left else []
