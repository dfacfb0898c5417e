"""The one linear map, and the one look-up of rows. What a weight *is* (plain, transposed, quantized, adapted) is a type
of leaf told apart here."""

from functools import partial

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from model import cpu, lora
from model.fp8 import Fp8Array, fp8_product
from model.layout import Weight
from model.lora import LoraArray
from model.quantize import QuantizedArray
from model.quantized_matmul import quantized_matmul
from model.selected import SelectedLora, selected, selected_bias, selected_rows
from model.sharding import constrain, flattened
from model.tiles import TiledArray, tiled_product
from model.transposed import TransposedArray


def linear(x: Array, w: Weight, b: Array | None = None, out_dtype: DTypeLike | None = None) -> Array:
    """x times a weight plus a bias, computed in x's dtype.

    Leading axes are flattened first: a 3-D product has a slow weight gradient on CPU.

    Args:
        x: [..., in].
        w: [in, out], of any kind.
        b: [out].
        out_dtype: what is accumulated in and returned; None for x's dtype.

    Returns:
        [..., out].
    """
    flat, back = flattened(x, in_order=isinstance(w, SelectedLora))
    y = product(flat, w, out_dtype)
    for bias in (b, _added_bias(w, len(y))):
        if bias is not None:
            y = y + bias.astype(y.dtype)
    return back(y)


def _added_bias(w: Weight, count: int) -> Array | None:
    """What a weight's adapters add to its output: [out], or [count, out] for that many rows; None for nothing."""
    return selected_bias(w, count) if isinstance(w, SelectedLora) else lora.added_bias(w)


def look_up(w: Array | LoraArray | SelectedLora, tokens: Array) -> Array:
    """Rows of an embedding: what the product of one-hot vectors and the weight would give.

    The table is gathered over fsdp as any weight is; else the compiler moves activations from D to B as it can. A token
    beyond the table gives NaN.

    Args:
        w: [V, D], plain or adapted.
        tokens: int32 [B, T].

    Returns:
        [B, T, D], in the table's dtype.
    """
    match w:
        case LoraArray():
            return lora.adapted_rows(tokens, w, lambda tokens: look_up(w.base, tokens), lambda x: product(x, w.base))
        case SelectedLora():
            return selected_rows(tokens, w, lambda tokens: look_up(w.base, tokens))
        case _:
            return jnp.take(constrain(w, ("vocab", None)), tokens, axis=0)


def product(x: Array, w: Weight, out_dtype: DTypeLike | None = None) -> Array:
    """x times one weight, computed in x's dtype.

    Args:
        x: [M, in].
        w: [in, out], of any kind.
        out_dtype: what is accumulated in and returned; None for x's dtype.

    Returns:
        [M, out].
    """
    match w:
        case QuantizedArray():
            return quantized_matmul(x, w).astype(out_dtype or x.dtype)
        case Fp8Array():
            return fp8_product(x, w.weight).astype(out_dtype or x.dtype)
        case TiledArray():
            return tiled_product(x, w).astype(out_dtype or x.dtype)
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
