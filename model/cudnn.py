"""Attention through cuDNN's fused kernels on NVIDIA GPUs: what is only about them.

No score is written to memory. How a mask is told to the kernel decides what it costs: rows of one text need none, rows
of several have the texts' lengths (an array of a few numbers), and any other mask is an array [B, 1, T, S].
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from model.attention import Mask
from model.errors import PunaError
from model.sharding import constrain

Attend = Callable[[Array, Array, Array, Mask], Array]

# Segments of a row up to which their lengths are told to the kernel: its statistics take as many times the memory as a
# row has segments, and above this more than a mask.
MOST_SEGMENTS = 64


def attend_cudnn(q: Array, k: Array, v: Array, mask: Mask) -> Array:
    """As `model.attention.attend`, for any mask. Segments and explicit positions are passed as one, [B, 1, T, S].

    Other platforms have no such kernel: a program with it does not compile there.

    Args:
        q: queries [B, T, H, d], bfloat16 or float16; d is a multiple of 8 up to 256.
        k: keys [B, K, S, d].
        v: values [B, K, S, d].

    Returns:
        [B, T, H, d] in q's dtype.

    Raises:
        PunaError: the kernel does not apply: it is chosen by name and never silently replaced.
    """
    T, S = q.shape[1], k.shape[2]
    by_index = mask.by_index(T, S)
    seen = mask.same_segment() if by_index else mask.dense(T, S)
    if seen is not None:
        seen = jnp.broadcast_to(seen, (q.shape[0], T, S))[:, None]
    return _attend(q, k, v, seen=seen, is_causal=by_index)


def attend_rows(q: Array, k: Array, v: Array, mask: Mask) -> Array:
    """As `attend_cudnn`, for rows of one segment that begins at index 0 and whose padding, if any, follows it.

    No mask is made: a query sees no key behind it, and padding is behind all. What padding itself sees is nobody's
    concern.
    """
    del mask
    return _attend(q, k, v, seen=None, is_causal=True)


def attend_packed(segments: Array, most: int) -> Attend:
    """As `attend_cudnn`, for rows of several segments whose positions follow from the index: no mask is made.

    Padding is a segment of its own, so that every query has a result.

    Args:
        segments: int32 [B, T], of queries and keys; a segment is one run of equal numbers.
        most: how many segments a row has at most, padding left out.
    """
    lengths, offsets = segment_lengths(segments, most + 1)

    def attend(q: Array, k: Array, v: Array, mask: Mask) -> Array:
        del mask
        _check(q)
        # JAX's own dot_product_attention does not take lengths of several segments yet (jax#29731).
        from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

        given: dict[str, Any] = {"q_seqlen": lengths, "kv_seqlen": lengths, "q_offsets": offsets, "kv_offsets": offsets}
        keys, values = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        scale = float(q.shape[-1]) ** -0.5
        out: Any = dot_product_attention(q, keys, values, mask_type=MaskType.PADDING_CAUSAL, scale=scale, **given)
        return out

    return attend


def segment_lengths(segments: Array, most: int) -> tuple[Array, Array]:
    """The lengths of the runs of equal numbers in every row, and where they begin.

    Args:
        segments: int32 [B, T].
        most: M, runs of a row at most.

    Returns:
        Lengths int32 [B, M] and begins int32 [B, M + 1], filled up with -1, as cuDNN's packed layout has them.
    """
    differs = segments[:, 1:] != segments[:, :-1]
    number = jnp.cumsum(jnp.pad(differs, ((0, 0), (1, 0))), axis=1, dtype=jnp.int32)
    lengths = jnp.sum(number[:, :, None] == jnp.arange(most), axis=1, dtype=jnp.int32)
    begins = jnp.cumsum(lengths, axis=1, dtype=jnp.int32) - lengths
    lengths, begins = jnp.where(lengths > 0, lengths, -1), jnp.where(lengths > 0, begins, -1)
    begins = jnp.pad(begins, ((0, 0), (0, 1)), constant_values=-1)
    return constrain(lengths, ("batch", None)), constrain(begins, ("batch", None))


def attend_for(segments: Array, most: int | None) -> Attend:
    """The form of cuDNN attention that costs least for rows of segments whose positions follow from the index.

    Args:
        segments: int32 [B, T], 0 is padding.
        most: how many segments a row has at most, padding left out; None where that is not known.
    """
    match form(most):
        case "rows":
            return attend_rows
        case "packed":
            assert most is not None
            return attend_packed(segments, most)
        case _:
            return attend_cudnn


def form(most: int | None) -> str:
    """What `attend_for` takes: "rows", "packed" or "mask"."""
    if most is None or most > MOST_SEGMENTS:
        return "mask"
    return "rows" if most == 1 else "packed"


def why_not(dtype: DTypeLike, head_dim: int) -> str | None:
    """Why the kernel does not apply to heads of this dtype and width; None where it does."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"computes in bfloat16 or float16, not {jnp.dtype(dtype).name}"
    if head_dim % 8 or head_dim > 256:
        return f"takes a head_dim that is a multiple of 8 up to 256, not {head_dim}"
    return None


def _check(q: Array) -> None:
    if (reason := why_not(q.dtype, q.shape[-1])) is not None:
        raise PunaError(f"attention 'cudnn' {reason}; choose 'xla' or what it takes")


def _attend(q: Array, k: Array, v: Array, seen: Array | None, is_causal: bool) -> Array:
    _check(q)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    attend = partial(jax.nn.dot_product_attention, implementation="cudnn")
    return attend(q, k, v, mask=seen, is_causal=is_causal)


def is_nvidia(device: Any) -> bool:
    """Whether a device is an NVIDIA GPU on which cuDNN's fused attention runs: Ampere or newer."""
    capability = str(getattr(device, "compute_capability", "0"))
    return device.platform in ("gpu", "cuda") and capability.split(".")[0].isdecimal() and float(capability) >= 8
