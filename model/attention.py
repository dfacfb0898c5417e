"""Attention over keys that lie in index order: one signature, one mask. cudnn.py and ring.py have others.

A mask is made of positions and segments, never of a mode: training, packing, prefill and decoding differ only in
which of them are given.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from model import cpu

ATTENTIONS = ("auto", "xla", "cudnn", "ring")  # the names of what we have; any other is a "module:function"
MASKED = -1e30  # finite: a query that may see nothing (padding) averages instead of giving NaN


class Mask(NamedTuple):
    """Which keys a query may see: those at its position or before, of its own non-zero segment.

    Attributes:
        q_positions: int32 [B, T], of the queries; None for the index itself.
        k_positions: int32 [B, S], of the keys; None for the index itself.
        q_segments: int32 [B, T]; None where all belong together.
        k_segments: int32 [B, S]; None where all belong together. Keys of segment 0 are padding, which no query sees.
    """

    q_positions: Array | None = None
    k_positions: Array | None = None
    q_segments: Array | None = None
    k_segments: Array | None = None

    def by_index(self, T: int, S: int) -> bool:
        """Whether query i may see keys 0 to i, and no other, of its segment.

        Args:
            T: number of queries.
            S: number of keys.
        """
        return self.q_positions is None and self.k_positions is None and T == S

    def same_segment(self) -> Array | None:
        """Where a query and a key are of the same segment: bool [B, T, S], or None where there are no segments."""
        if self.q_segments is None or self.k_segments is None:
            return None
        q, k = self.q_segments[:, :, None], self.k_segments[:, None, :]
        return (q == k) & (k != 0)

    def dense(self, T: int, S: int) -> Array:
        """The mask as an array.

        Args:
            T: number of queries.
            S: number of keys.

        Returns:
            Bool [B or 1, T, S], true where the query sees the key.
        """
        q = jnp.arange(T)[None] if self.q_positions is None else self.q_positions
        k = jnp.arange(S)[None] if self.k_positions is None else self.k_positions
        causal = q[:, :, None] >= k[:, None, :]
        same = self.same_segment()
        return causal if same is None else causal & same


def attend(q: Array, k: Array, v: Array, mask: Mask) -> Array:
    """Grouped-query attention (arXiv:2305.13245) in XLA: softmax(q kᵀ / sqrt(d)) v over the keys that `mask` lets see.

    Args:
        q: queries [B, T, H, d].
        k: keys [B, K, S, d]; K divides H, and H / K query heads share each key head.
        v: values [B, K, S, d].

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
