"""Attention over keys that lie in index order: one signature, one mask, two implementations.

A mask is made of positions and segments, never of a mode: training, packing, prefill and decoding differ only in
which of them are given.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from model import cpu
from model.errors import PunaError

MASKED = -1e30  # finite: a query that may see nothing (padding) averages instead of giving NaN


class Mask(NamedTuple):
    """Which keys a query may see: those at its position or before, of its own non-zero segment.

    Attributes:
        q_positions: int32 [B, T]; None for the index itself.
        k_positions: int32 [B, S]; None for the index itself.
        q_segments: int32 [B, T]; None, here or for the keys, where all belong together. 0 is padding.
        k_segments: int32 [B, S]; keys of segment 0 are seen by nobody.
    """

    q_positions: Array | None = None
    k_positions: Array | None = None
    q_segments: Array | None = None
    k_segments: Array | None = None

    def by_index(self, T: int, S: int) -> bool:
        """Whether query i may see keys 0 to i, and no other, of its segment."""
        return self.q_positions is None and self.k_positions is None and T == S

    def same_segment(self) -> Array | None:
        """Whether query and key are of one segment: bool [B, T, S], or None where there are no segments."""
        if self.q_segments is None or self.k_segments is None:
            return None
        q, k = self.q_segments[:, :, None], self.k_segments[:, None, :]
        return (q == k) & (k != 0)

    def dense(self, T: int, S: int) -> Array:
        """The whole mask for T queries and S keys, true where the key is seen: bool [B or 1, T, S]."""
        q = jnp.arange(T)[None] if self.q_positions is None else self.q_positions
        k = jnp.arange(S)[None] if self.k_positions is None else self.k_positions
        causal = q[:, :, None] >= k[:, None, :]
        same = self.same_segment()
        return causal if same is None else causal & same


def attend(q: Array, k: Array, v: Array, mask: Mask) -> Array:
    """Grouped-query attention (arXiv:2305.13245) in XLA: scores, times d**-0.5, and softmax in float32.

    Args:
        q: [B, T, H, d].
        k: [B, K, S, d], K a divisor of H. Query head h reads key-value head h // (H / K).
        v: [B, K, S, d].
        mask: which keys each query sees.

    Returns:
        [B, T, H, d] in q's dtype.
    """
    T, S = q.shape[1], k.shape[2]
    seen = mask.dense(T, S)
    if not mask.by_index(T, S):
        return _attend(q, k, v, seen)
    return lax.platform_dependent(q, k, v, seen, cpu=partial(cpu.in_query_blocks, _attend), default=_attend)


def _attend(q: Array, k: Array, v: Array, seen: Array) -> Array:
    """`attend` where seen [B or 1, T, S] says it.

    The G = H / K heads of a group are folded into the query axis, so that both products are plain batched matmuls
    and keys are never repeated. Scores and softmax are float32; what is smaller, the output, is divided by the sums.
    """
    B, T, H, d = q.shape
    K, S = k.shape[1:3]
    G = H // K
    folded = q.reshape(B, T, K, G, d).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, d)
    scores = jnp.einsum("BKQd,BKSd->BKQS", folded.astype(k.dtype), k, preferred_element_type=jnp.float32) * d**-0.5
    unseen = jnp.where(seen, 0, MASKED)[:, None, None]
    scores = (scores.reshape(B, K, G, T, S) + unseen).reshape(B, K, G * T, S)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("BKQS,BKSd->BKQd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    return out.astype(q.dtype).reshape(B, K, G, T, d).transpose(0, 3, 1, 2, 4).reshape(B, T, H, d)


def attend_cudnn(q: Array, k: Array, v: Array, mask: Mask) -> Array:
    """As `attend`, through cuDNN's fused kernel on NVIDIA GPUs.

    Plain causal passes need no mask in memory; segments and explicit positions are passed as one, [B, 1, T, S].
    Other platforms have no such kernel: a program with it does not compile there.

    Args:
        q: as `attend` takes it, in bfloat16 or float16, d a multiple of 8 up to 256.
        k: as `attend` takes it.
        v: as `attend` takes it.
        mask: which keys each query sees.

    Returns:
        [B, T, H, d] in q's dtype.

    Raises:
        PunaError: the kernel does not apply: it is chosen by name and never silently replaced.
    """
    d = q.shape[-1]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise PunaError(f"attention 'cudnn' computes in bfloat16 or float16, not {q.dtype}; choose 'xla' or a dtype")
    if d % 8 or d > 256:
        raise PunaError(f"attention 'cudnn' takes a head_dim that is a multiple of 8 up to 256, not {d}; choose 'xla'")
    T, S = q.shape[1], k.shape[2]
    by_index = mask.by_index(T, S)
    seen = mask.same_segment() if by_index else mask.dense(T, S)
    if seen is not None:
        seen = jnp.broadcast_to(seen, (q.shape[0], T, S))[:, None]
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    return jax.nn.dot_product_attention(q, k, v, mask=seen, is_causal=by_index, implementation="cudnn")


ATTENTIONS = {"xla": attend, "cudnn": attend_cudnn}
