"""Rotary position embedding (arXiv:2104.09864) and its stretchings, with transformers' numbers bit for bit."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from model.config import LlamaConfig, RopeScaling


def frequencies(config: LlamaConfig) -> tuple[Array, float]:
    """The inverse frequencies of RoPE, rope_theta^(-2i/d) for i < d/2, as the config's scaling stretches them.

    linear is position interpolation (arXiv:2306.15595), llama3 Meta's rule for Llama 3.1, yarn arXiv:2309.00071. For
    dynamic these are the plain ones: see `dynamic_frequencies`.

    Computed outside any trace, and on the CPU: a compiler folding the power would round it otherwise, as a GPU may, and
    an error of one unit in the last place is 5e-4 radians at position 8,192.

    Returns:
        Inverse frequencies, float32 [d/2], radians per position; and the factor on cos and sin (YaRN's; else 1).
    """
    scaling, base, d = config.rope_scaling, config.rope_theta, config.head_dim
    with jax.ensure_compile_time_eval(), jax.default_device(_cpu()):
        periods = base ** (jnp.arange(0, d, 2, dtype=jnp.float32) / d)
        inverse = 1.0 / periods
        match scaling:
            case RopeScaling(rope_type="linear"):
                return inverse / scaling.factor, 1.0
            case RopeScaling(rope_type="llama3"):
                return _llama3(inverse, scaling), 1.0
            case RopeScaling(rope_type="yarn"):
                return _yarn(periods, scaling, base, d), _yarn_attention_factor(scaling)
            case _:
                return inverse, 1.0


def _cpu() -> Any:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return None


def dynamic_frequencies(config: LlamaConfig, longest: Array) -> Array:
    """Dynamic NTK, as transformers computes it: inverse frequencies for sequences of a length.

    Within the original context they are the plain ones; beyond it the base grows with the length.

    Args:
        longest: [...], lengths in tokens.

    Returns:
        Float32 [..., d/2], radians per position.
    """
    scaling, d, original = config.rope_scaling, config.head_dim, config.max_position_embeddings
    assert scaling is not None
    longest = jnp.maximum(longest, original).astype(jnp.float32)
    growth = (scaling.factor * longest / original) - (scaling.factor - 1)
    base = config.rope_theta * growth ** (d / (d - 2))
    return 1.0 / (base[..., None] ** (jnp.arange(0, d, 2, dtype=jnp.float32) / d))


def tables(config: LlamaConfig, positions: Array, segments: Array | None) -> tuple[Array, Array]:
    """cos and sin of the angles of all positions.

    Args:
        positions: int32 [B, T].
        segments: int32 [B, T]; with dynamic RoPE each segment has a length of its own. None where rows are whole.

    Returns:
        cos and sin, float32 [B, T, d/2] each.
    """
    inverse, factor = frequencies(config)
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "dynamic":
        ends = positions + 1
        if segments is None:
            longest = jnp.broadcast_to(ends.max(axis=1, keepdims=True), ends.shape)
        else:
            same = segments[:, :, None] == segments[:, None, :]
            longest = jnp.where(same, ends[:, None, :], 0).max(axis=-1)
        inverse = dynamic_frequencies(config, longest)
    angles = positions[..., None].astype(jnp.float32) * inverse
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def positions_of(segments: Array) -> Array:
    """The position of every token of packed rows: they count from 0, anew at each segment.

    Args:
        segments: int32 [B, T]; a segment is one run of equal numbers.

    Returns:
        Int32 [B, T].
    """
    index = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    starts = jnp.concatenate([jnp.ones_like(segments[:, :1]), jnp.diff(segments)], axis=1) != 0
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates heads in float32; dimension i pairs with i + d/2, Hugging Face's layout.

    Args:
        x: [B, T, N, d], of N heads.
        cos: [B, T, d/2].
        sin: [B, T, d/2].

    Returns:
        [B, T, N, d] in x's dtype.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _llama3(inverse: Array, s: RopeScaling) -> Array:
    """Llama 3.1: long waves are divided by the factor, short ones kept, those between interpolated."""
    assert s.original_max_position_embeddings and s.low_freq_factor and s.high_freq_factor
    original, low, high = s.original_max_position_embeddings, s.low_freq_factor, s.high_freq_factor
    wavelength = 2 * math.pi / inverse
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * inverse / s.factor + smooth * inverse
    return jnp.where(
        wavelength > original / low, inverse / s.factor, jnp.where(wavelength < original / high, inverse, between)
    )


def _yarn(periods: Array, s: RopeScaling, base: float, d: int) -> Array:
    """YaRN (arXiv:2309.00071, section 3.2): interpolates slow dimensions, keeps fast ones, ramps between."""
    assert s.original_max_position_embeddings
    original = s.original_max_position_embeddings

    def dimension_of(rotations: float) -> float:
        return d * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension_of(s.beta_fast or 32), dimension_of(s.beta_slow or 1)
    if s.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    if low == high:
        high += 0.001  # as transformers has it: the ramp may not be vertical
    kept = 1 - jnp.clip((jnp.arange(d // 2, dtype=jnp.float32) - low) / (high - low), 0, 1)
    return 1.0 / (s.factor * periods) * (1 - kept) + 1.0 / periods * kept


def _yarn_attention_factor(s: RopeScaling) -> float:
    def scale(m: float) -> float:
        return 1.0 if s.factor <= 1 else 0.1 * m * math.log(s.factor) + 1.0

    if s.attention_factor is not None:
        return s.attention_factor
    return scale(s.mscale) / scale(s.mscale_all_dim) if s.mscale and s.mscale_all_dim else scale(1)
