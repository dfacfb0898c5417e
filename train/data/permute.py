"""A shuffle that is a formula: where an index goes is computed, not looked up, so it needs no memory and no history."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio
ROUND_KEYS = np.array([(number * GOLDEN) % 2**64 for number in range(6)], np.uint64)


def mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer (Steele, Lea, Flood 2014): every bit of the result depends on every bit of `value`."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def mix_key(*numbers: int) -> NDArray[np.uint64]:
    """One 64-bit key, uint64 [1], made of several numbers, such as a seed and an epoch."""
    value = np.zeros(1, np.uint64)
    for number in numbers:
        value = mix(value + np.uint64(GOLDEN) + np.array([number & (2**64 - 1)], np.uint64))
    return value


def permute(index: ArrayLike, size: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where a random permutation of `range(size)` sends each index.

    A Feistel network over the next power of four, walked until the value is inside (Black and Rogaway 2002).

    Args:
        index: [N], each below `size`.
        size: how many are permuted.
        keys: [1] or [N], which permutation; see `mix_key`.

    Returns:
        [N], each below `size`.
    """
    half = max(1, -(-(size - 1).bit_length() // 2))
    low = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    value = np.array(index, np.uint64, ndmin=1)
    keys = np.broadcast_to(keys, value.shape)
    outside = np.ones(value.shape, bool)
    while outside.any():
        left, right = value[outside] >> shift, value[outside] & low
        for round_key in ROUND_KEYS:
            left, right = right, left ^ (mix(right + keys[outside] + round_key) & low)
        value[outside] = (left << shift) | right
        outside[outside] = value[outside] >= np.uint64(size)
    return value.astype(np.int64)
