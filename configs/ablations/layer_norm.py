"""LayerNorm (arXiv:1607.06450) without a bias, in place of RMSNorm: the mean is taken away as well."""

import jax.numpy as jnp
from jax import Array

from model.llama import rms_norm


def norm(x: Array, weight: Array, eps: float) -> Array:
    """x [..., D] less its mean, then as RMSNorm."""
    wide = x.astype(jnp.float32)
    return rms_norm((wide - wide.mean(axis=-1, keepdims=True)).astype(x.dtype), weight, eps)
