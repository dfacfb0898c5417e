"""The one linear map. What a weight *is* (plain, transposed, quantized, adapted) is a type of leaf told apart here."""

from functools import partial

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from model import cpu, lora
from model.layout import Weight
from model.lora import LoraArray
from model.quantize import QuantizedArray
from model.quantized_matmul import quantized_matmul
from model.selected import SelectedLora, selected
from model.transposed import TransposedArray


def linear(x: Array, w: Weight, b: Array | None = None, out_dtype: DTypeLike | None = None) -> Array:
    """x times w plus b, computed in x's dtype.

    Leading axes are flattened first: a 3-D product has a slow weight gradient on CPU.

    Args:
        x: [..., in].
        w: [in, out], of any kind.
        b: [out]; None for no bias.
        out_dtype: what is accumulated in and returned; None for x's.

    Returns:
        [..., out].
    """
    y = product(x.reshape(-1, x.shape[-1]), w, out_dtype)
    if b is not None:
        y = y + b.astype(y.dtype)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def product(x: Array, w: Weight, out_dtype: DTypeLike | None = None) -> Array:
    """x times one weight of any kind, which decides how.

    Args:
        x: [M, in].
        w: [in, out].
        out_dtype: as in `linear`.

    Returns:
        [M, out].
    """
    match w:
        case QuantizedArray():
            return quantized_matmul(x, w).astype(out_dtype or x.dtype)
        case LoraArray():
            return lora.adapted(x, w, lambda x: product(x, w.base, out_dtype))
        case SelectedLora():
            return selected(x, w, lambda x: product(x, w.base, out_dtype))
        case TransposedArray():
            plain, rows_first = (partial(f, out_dtype=out_dtype) for f in (_times_rows, cpu.times_rows))
            return lax.platform_dependent(x, w.rows, cpu=rows_first, default=plain)
        case _:
            return jnp.matmul(x, w.astype(x.dtype), preferred_element_type=out_dtype)


def _times_rows(x: Array, rows: Array, out_dtype: DTypeLike | None) -> Array:
    return lax.dot_general(x, rows.astype(x.dtype), (((1,), (1,)), ((), ())), preferred_element_type=out_dtype)
