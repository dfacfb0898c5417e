"""The one linear map. What a weight *is* (plain, quantized, with adapters) is a type of leaf, told apart here only."""

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

Weight = Array


def linear(x: Array, w: Weight, b: Array | None = None, out_dtype: DTypeLike | None = None) -> Array:
    """x [..., in] times w [in, out] plus b [out], computed in x's dtype (accumulated and returned in `out_dtype`).

    Leading axes are flattened first: a 3-D product has a slow weight gradient on CPU.
    """
    flat = x.reshape(-1, x.shape[-1])
    y = jnp.matmul(flat, w.astype(x.dtype), preferred_element_type=out_dtype)
    if b is not None:
        y = y + b.astype(y.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])
