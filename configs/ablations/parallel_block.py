"""Attention and MLP side by side on one norm (GPT-J; PaLM, arXiv:2204.02311), in place of one after the other."""

from collections.abc import Callable
from typing import Any

from jax import Array

from model.attention import attend
from model.llama import REPLICATED_SEQUENCE, attention, mlp, rms_norm
from model.sharding import constrain


def block(
    x: Array,
    layer: Any,
    config: Any,
    context: Any,
    cache: Any,
    *,
    attend: Callable = attend,
    norm: Callable = rms_norm,
    residual: tuple[str | None, ...] = REPLICATED_SEQUENCE,
) -> tuple[Array, Any]:
    """One decoder layer; `mlp_norm` is left unused. The keywords are what [model] attention, norm and [mesh]
    sequence_parallel set; a block that lacks one is refused with that setting."""
    x = constrain(x, residual)
    normed = norm(x, layer["attn_norm"], config.rms_norm_eps)
    mixed, cache = attention(normed, layer, config, context, cache, attend)
    return x + mixed + mlp(normed, layer), cache
