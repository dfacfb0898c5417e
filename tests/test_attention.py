"""Attention against JAX's own dot_product_attention and torch's, and the mask's few rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import model.attention
from model.attention import Mask, attend_cudnn
from model.errors import PunaError

attend = jax.jit(model.attention.attend)


def qkv(B=2, T=12, S=12, H=8, K=2, d=16):
    keys = jax.random.split(jax.random.key(0), 3)
    return (
        jax.random.normal(keys[0], (B, T, H, d)),
        jax.random.normal(keys[1], (B, K, S, d)),
        jax.random.normal(keys[2], (B, K, S, d)),
    )


def test_causal_equals_torch():
    q, k, v = qkv()
    group = [torch.tensor(np.asarray(x)) for x in (q.transpose(0, 2, 1, 3), k, v)]
    theirs = torch.nn.functional.scaled_dot_product_attention(*group, is_causal=True, enable_gqa=True)
    np.testing.assert_allclose(attend(q, k, v, Mask()), theirs.numpy().transpose(0, 2, 1, 3), atol=1e-5)


@pytest.mark.parametrize("heads", [(8, 8), (8, 4), (8, 1)])
def test_segments_equal_jax(heads):
    q, k, v = qkv(H=heads[0], K=heads[1])
    segments = jnp.asarray([[1] * 5 + [2] * 7, [3] * 4 + [1] * 8])
    same = segments[:, None, :, None] == segments[:, None, None, :]
    theirs = jax.nn.dot_product_attention(
        q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), mask=same, is_causal=True
    )
    ours = attend(q, k, v, Mask(q_segments=segments, k_segments=segments))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_queries_in_the_middle_of_a_cache_see_what_came_before():
    q, k, v = qkv(T=3, S=16)
    positions = jnp.asarray([[4, 5, 6], [9, 10, 11]])
    ours = attend(q, k, v, Mask(q_positions=positions))
    for row in range(2):
        for t in (0, 2):
            end = int(positions[row, t]) + 1
            alone = attend(q[row : row + 1, t : t + 1], k[row : row + 1, :, :end], v[row : row + 1, :, :end], Mask(
                q_positions=positions[row : row + 1, t : t + 1]
            ))  # fmt: skip
            np.testing.assert_allclose(ours[row, t], alone[0, 0], atol=1e-5)


def test_padding_sees_nothing_and_is_seen_by_nobody():
    segments = jnp.asarray([[1, 1, 0, 0]])
    dense = Mask(q_segments=segments, k_segments=segments).dense(4, 4)[0]
    assert dense.tolist() == [[True, False, False, False], [True, True, False, False], [False] * 4, [False] * 4]
    q, k, v = qkv(B=1, T=4, S=4)
    assert jnp.isfinite(attend(q, k, v, Mask(q_segments=segments, k_segments=segments))).all()


def test_cudnn_is_never_silently_replaced():
    q, k, v = qkv()
    with pytest.raises(PunaError, match="attention 'cudnn' needs an NVIDIA GPU, not cpu; choose 'xla'"):
        attend_cudnn(q, k, v, Mask())
