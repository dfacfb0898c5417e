"""Attention against JAX's own dot_product_attention and torch's, and the mask's few rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import model.attention
from model.attention import Mask
from model.cache import LayerCache
from model.cudnn import attend_cudnn, segment_lengths
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


@pytest.mark.parametrize("length", [12, 301, 700])  # one block of queries, two, four
@pytest.mark.parametrize("heads", [(8, 8), (8, 4), (8, 1)])
def test_segments_equal_jax(heads, length):
    q, k, v = qkv(T=length, S=length, H=heads[0], K=heads[1])
    segments = jnp.asarray([[1] * 5 + [2] * (length - 5), [3] * (length // 2) + [1] * (length - length // 2)])
    same = segments[:, None, :, None] == segments[:, None, None, :]
    theirs = jax.nn.dot_product_attention(
        q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), mask=same, is_causal=True
    )
    ours = attend(q, k, v, Mask(q_segments=segments, k_segments=segments))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_blocks_of_queries_have_the_gradients_of_one():
    q, k, v = qkv(B=1, T=520, S=520, H=4, K=2)
    segments = jnp.asarray([[1] * 200 + [2] * 300 + [0] * 20])
    positions = jnp.arange(520)[None]
    indexed = Mask(q_segments=segments, k_segments=segments)
    assert indexed.by_index(520, 520) and not indexed.by_index(1, 520)
    one_block = indexed._replace(q_positions=positions, k_positions=positions)
    seen = (segments != 0)[..., None, None]  # what padding gives is nobody's concern

    def total(mask):
        return jax.value_and_grad(lambda *x: jnp.sum(jnp.where(seen, jnp.sin(attend(*x, mask)), 0)), argnums=(0, 1, 2))

    (ours, gradients), (theirs, expected) = total(indexed)(q, k, v), total(one_block)(q, k, v)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    for ours, theirs in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_scores_nobody_sees_are_not_computed():
    q, k, v = qkv(B=1, T=1024, S=1024, H=2, K=2, d=64)
    flops = attend.lower(q, k, v, Mask()).compile().cost_analysis()["flops"]
    every = 2 * 2 * 2 * 1024 * 1024 * 64  # two products, two heads
    assert flops < 0.75 * every


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


def test_a_float32_cache_holds_16_bit_keys_exactly():
    q, k, v = (x.astype(jnp.bfloat16) for x in qkv(T=4, S=4))
    empty = jnp.zeros((2, 2, 8, 16))
    cache = LayerCache(empty, empty, layer=None, slots=None, window=4)
    keys, values, _ = cache.extend(k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), jnp.tile(jnp.arange(4), (2, 1)))
    assert keys.dtype == jnp.float32 and (keys.astype(k.dtype) == k).all() and (values.astype(v.dtype) == v).all()
    out = attend(q, keys, values, Mask())
    assert out.dtype == jnp.bfloat16
    exactly = attend(*(x.astype(jnp.float32) for x in (q, k, v)), Mask())
    assert (out == exactly.astype(jnp.bfloat16)).all()


def test_packed_lengths_mean_the_mask_of_segments():
    """Read as JAX's code for cuDNN reads them, each segment of each row is attended to by itself."""
    from jax._src.cudnn.fused_attention_stablehlo import _fix_seqlen_offsets

    q, k, v = qkv(B=3, T=24, S=24, H=4, K=2)
    segments = jnp.asarray([[1] * 5 + [2] * 12 + [3] * 7, [1] * 20 + [0] * 4, [1] * 1 + [2] * 3 + [3] * 9 + [0] * 11])
    lengths, begins = segment_lengths(segments, 4)
    lengths, _, begins, _ = _fix_seqlen_offsets(lengths, lengths, begins, begins, q, k.transpose(0, 2, 1, 3))
    flat = [x.reshape(3 * 24, 1, -1, 16) for x in (q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))]
    out, covered = np.zeros((3 * 24, 4, 16)), np.zeros(3 * 24, int)
    for length, begin in zip(lengths.reshape(-1), begins.reshape(-1) // (4 * 16), strict=False):
        if length:
            one, keys, values = (x[begin : begin + length, 0][None] for x in flat)
            out[begin : begin + length] = attend(one, keys.swapaxes(1, 2), values.swapaxes(1, 2), Mask())[0]
            covered[begin : begin + length] += 1
    assert (covered == 1).all()  # padding too: no result is left as memory happened to be
    whole = attend(q, k, v, Mask(q_segments=segments, k_segments=segments))
    real = np.asarray(segments != 0)
    np.testing.assert_allclose(out.reshape(3, 24, 4, 16)[real], whole[real], atol=1e-5)


def test_cudnn_is_never_silently_replaced():
    q, k, v = qkv()
    with pytest.raises(PunaError, match="attention 'cudnn' computes in bfloat16 or float16, not float32; choose 'xla'"):
        attend_cudnn(q, k, v, Mask())
    q, k, v = (jnp.pad(x.astype(jnp.bfloat16), ((0, 0),) * 3 + ((0, 1),)) for x in (q, k, v))
    with pytest.raises(PunaError, match="takes a head_dim that is a multiple of 8 up to 256, not 17; choose 'xla'"):
        attend_cudnn(q, k, v, Mask())
