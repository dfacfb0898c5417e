"""Products in 8-bit floats (arXiv:2209.05433): a leaf that stands for a weight whose products are so computed.

Weight, activations and gradients are each scaled so that their largest number, as they are at that moment ("current
scaling"), is the largest that the type holds, and rounded: e4m3 forward, e5m2 for gradients, which need its range. Sums
are float32. NVIDIA's Hopper multiplies such numbers in twice the speed of bfloat16; on CPUs XLA multiplies the same
rounded numbers in float32.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax
from jax.typing import DTypeLike

from model.errors import PunaError
from model.lora import LoraArray
from model.params import LINEARS, Params

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2


@struct.dataclass
class Fp8Array:
    """A weight [..., in, out] whose products are computed in 8-bit floats; the weight itself is kept as it is."""

    weight: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight: [..., in, out]."""
        return self.weight.shape

    @property
    def dtype(self) -> Any:
        """The dtype that the weight is kept in."""
        return self.weight.dtype


def check_matmul(matmul: str, is_quantized: bool, has_dora: bool) -> None:
    """Refuses products in 8-bit floats where there are none, or where they would not do.

    Raises:
        PunaError: naming the setting that is in their way.
    """
    if matmul != "fp8":
        return
    if is_quantized:
        raise PunaError('model.matmul is "fp8" with [quantize], whose weights are multiplied as stored: drop either')
    if has_dora:
        raise PunaError('model.matmul is "fp8" with lora.dora, whose norms need finer products: drop either')


def in_fp8(params: Params) -> Params:
    """Parameters of which the layers' linear weights in float, adapted or not, are multiplied in 8-bit floats."""
    layers = {name: _in_fp8(w) if name in LINEARS else w for name, w in params["layers"].items()}
    return {**params, "layers": layers}


def _in_fp8(w: Any) -> Any:
    if isinstance(w, LoraArray):
        return replace(w, base=_in_fp8(w.base))
    return Fp8Array(w) if isinstance(w, jax.Array) else w


@jax.custom_vjp
def fp8_product(x: Array, w: Array) -> Array:
    """x [M, in] times w [in, out] in 8-bit floats, and so both gradients; each result is in the dtype of its array."""
    return _forward(x, w)[0]


def _forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array, Array, Array]]:
    small, scale = scaled(x, E4M3)
    y = _product((small, scale), scaled(w, E4M3), (1, 0), x.dtype)
    return y, (small, scale, w, jnp.zeros(0, x.dtype))


def _backward(kept: tuple[Array, Array, Array, Array], dy: Array) -> tuple[Array, Array]:
    """The weight is rounded again: its 8-bit form of every layer is not kept from the forward pass."""
    small, scale, w, like = kept
    slope = scaled(dy, E5M2)
    dx = _product(slope, scaled(w, E4M3), (1, 1), like.dtype)
    dw = _product((small, scale), slope, (0, 0), w.dtype)
    return dx, dw


fp8_product.defvjp(_forward, _backward)


def scaled(x: Array, dtype: DTypeLike) -> tuple[Array, Array]:
    """`x` in an 8-bit float type, and the scale, float32 [], that times it is `x`; zeros have the scale 1."""
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide))
    scale = jnp.where(largest > 0, largest / float(jnp.finfo(dtype).max), 1)
    return (wide / scale).astype(dtype), scale


def _product(a: tuple[Array, Array], b: tuple[Array, Array], axes: tuple[int, int], dtype: DTypeLike) -> Array:
    """The product of two matrices and their scales over an axis of each.

    It is in `dtype` before it is scaled too, so that what a remat policy keeps of it is no larger than of any product.
    """
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    codes = lax.dot_general(a[0], b[0], dimensions, preferred_element_type=dtype)
    return (codes.astype(jnp.float32) * (a[1] * b[1])).astype(dtype)
