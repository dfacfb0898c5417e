"""Attention and MLP side by side on one norm (GPT-J; PaLM, arXiv:2204.02311), in place of one after the other."""

from typing import Any

from jax import Array

from model.llama import REPLICATED_SEQUENCE, attention, mlp, rms_norm
from model.sharding import constrain


def block(x: Array, layer: Any, config: Any, context: Any, cache: Any) -> tuple[Array, Any]:
    """One decoder layer; `mlp_norm` is left unused."""
    x = constrain(x, REPLICATED_SEQUENCE)
    normed = rms_norm(x, layer["attn_norm"], config.rms_norm_eps)
    mixed, cache = attention(normed, layer, config, context, cache)
    return x + mixed + mlp(normed, layer), cache
