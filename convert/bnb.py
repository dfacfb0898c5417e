"""Quantized weights in Hugging Face folders: bitsandbytes' layout for nf4 and int8, bit for bit, and ours for int4.

A 4-bit `X.weight` lies flattened beside `X.weight.absmax`, its tables, and a JSON object stored as bytes; an int8 one
is `X.weight` beside `X.SCB`. bitsandbytes knows no grouped int4: `quant_method` "puna" names that layout.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.checkpoint import Checkpoint, LazyQuantized
from convert.damage import malformed
from convert.lazy import Index, LazyTensor, check_finite
from convert.names import parameters
from model.config import LlamaConfig
from model.errors import PunaError
from model.params import LINEARS
from model.quantize import NESTED_BLOCK, NF4, Format, QuantizedArray, dequantize, dynamic_map, quantize

_STATE = "quant_state.bitsandbytes__nf4"
_SETTING = re.compile(
    r"quant_method|format|block|_?load_in_[48]bit|bnb_4bit_(quant_type|use_double_quant|compute_dtype|quant_storage)|"
    r"llm_int8_(threshold|skip_modules|enable_fp32_cpu_offload|has_fp16_weight)"
)
_STATE_BYTES = 256  # padded with spaces, so that a header can be written before the numbers are known
_PAD_CODES = 0x77  # two zeros of NF4


# --------------------------------------------------------------------------------------------------------------- write


def quantized_checkpoint(checkpoint: Checkpoint, format: Format, block: int = 64, double: bool = False) -> Checkpoint:
    """The checkpoint with every linear weight of its layers quantized when read, one at a time; see `quantize`."""
    lazy = {}
    for name, tensor in checkpoint.tensors.items():
        if name.split(".")[-1] in LINEARS:
            like = _like((tensor.shape[1], tensor.shape[0]), format, tensor.dtype.name, block, double)
            make = partial(_quantized, name, tensor, format, block, double)
            lazy[name] = LazyQuantized(like, make)
    return replace(checkpoint, quantized=lazy)


def _quantized(name: str, tensor: LazyTensor, format: Format, block: int, double: bool) -> QuantizedArray:
    rows = tensor.transposed().load()
    check_finite(rows, name, tensor.where)  # codes have no NaN, and a scale would carry it to a whole row or tensor
    return quantize_rows(rows, format, block, double)


@partial(jax.jit, static_argnames=("format", "block", "double"))
def quantize_rows(rows: jax.Array, format: Format, block: int, double: bool) -> QuantizedArray:
    """The weight given as rows [out, in], as files hold it; see `model.quantize.quantize`."""
    return quantize(rows.T, format, block, double)  # the transposes cancel: files hold what the codes run over


def quantization_config(like: QuantizedArray, floats: Sequence[str] = ()) -> dict[str, Any]:
    """The `quantization_config` of config.json for weights like this one. `floats` are the linear layers that are not
    quantized, by their modules' names."""
    if like.format == "int4":
        return {"quant_method": "puna", "format": "int4", "block": like.block}
    is_nf4 = like.format == "nf4"
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": is_nf4,
        "load_in_8bit": not is_nf4,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": like.nested_absmax is not None,
        "bnb_4bit_compute_dtype": like.dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": ["lm_head", *floats] if floats else None,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
    }


def as_tensors(name: str, weight: LazyQuantized) -> dict[str, LazyTensor]:
    """The tensors of one quantized weight under its Hugging Face name `name`, computed once when first read."""
    like = weight.like
    n_blocks = math.ceil(like.size / like.block)
    parts: dict[str, tuple[tuple[int, ...], Any]] = {}
    if like.format == "int8":
        parts[name] = (like.codes.shape, np.int8)
        parts[name.removesuffix("weight") + "SCB"] = (like.absmax.shape, np.float32)
        parts[name.removesuffix("weight") + "weight_format"] = ((), np.uint8)
    elif like.format == "int4":
        parts[name] = (like.codes.shape, np.uint8)
        parts[f"{name}.absmax"] = (like.absmax.shape, jnp.bfloat16)
    else:
        parts[name] = ((math.ceil(like.size / 2), 1), np.uint8)
        parts[f"{name}.absmax"] = ((n_blocks,), like.absmax.dtype)
        if like.nested_absmax is not None:
            parts[f"{name}.nested_absmax"] = (like.nested_absmax.shape, np.float32)
            parts[f"{name}.nested_quant_map"] = ((256,), np.float32)
        parts[f"{name}.quant_map"] = ((16,), np.float32)
        parts[f"{name}.{_STATE}"] = ((_STATE_BYTES,), np.uint8)
    read: list[str] = []

    @cache
    def arrays() -> dict[str, np.ndarray]:
        return _arrays(name, weight())

    def take(key: str, index: Index) -> np.ndarray:
        array = arrays()[key]
        read.append(key)
        if len(read) == len(parts):  # a conversion reads each once: nothing stays behind
            arrays.cache_clear()
            read.clear()
        return array[index] if index else array

    return {key: LazyTensor(shape, np.dtype(kind), partial(take, key), name) for key, (shape, kind) in parts.items()}


def _arrays(name: str, q: QuantizedArray) -> dict[str, np.ndarray]:
    codes, absmax = np.asarray(q.codes), np.asarray(q.absmax)
    if q.format == "int8":
        prefix = name.removesuffix("weight")
        return {name: codes, f"{prefix}SCB": absmax, f"{prefix}weight_format": np.zeros((), np.uint8)}
    if q.format == "int4":
        return {name: codes, f"{name}.absmax": absmax}
    n_blocks = math.ceil(q.size / q.block)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": q.block, "dtype": q.dtype}
    state["shape"] = [q.out_features, q.in_features]
    arrays = {
        name: codes.reshape(-1, 1)[: math.ceil(q.size / 2)],
        f"{name}.absmax": absmax.reshape(-1)[:n_blocks],
        f"{name}.quant_map": np.array(NF4, np.float32),
    }
    if q.nested_absmax is not None and q.offset is not None:
        arrays[f"{name}.nested_absmax"] = np.asarray(q.nested_absmax)
        arrays[f"{name}.nested_quant_map"] = dynamic_map()
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": float(q.offset)}
    said = json.dumps(state).encode().ljust(_STATE_BYTES)
    return arrays | {f"{name}.{_STATE}": np.frombuffer(said, np.uint8)}


# ---------------------------------------------------------------------------------------------------------------- read


def read_quantized(
    settings: Any, tensors: dict[str, LazyTensor], config: LlamaConfig, dtype: str, folder: Path
) -> tuple[dict[str, LazyTensor], dict[str, LazyQuantized]]:
    """Splits what a quantized folder holds: every tensor as floats under its Hugging Face name, [out, in], and the
    quantized weights under ours. `dtype` is what int8 weights were, which their files do not say.

    Raises PunaError for another method or type, other tables or block sizes, and tensors that do not fit the config.
    """
    if not isinstance(settings, Mapping):
        raise PunaError(f"{folder / 'config.json'}: quantization_config is {settings!r}, and no object")
    _check_method(settings, folder)
    found: dict[str, LazyQuantized] = {}
    left = dict(tensors)
    for param in parameters(config):
        if param.name.split(".")[-1] not in (*LINEARS, "lm_head") or param.hf not in left:
            continue
        n_in, n_out = param.shape
        with malformed(folder):
            weight = _read_weight(param.hf, left, settings, (n_out, n_in), dtype)
        if weight is not None:
            if param.name != "lm_head":  # which is no quantized weight here: it is read as the floats it stands for
                found[param.name] = weight
            left[param.hf] = _dequantized(weight, tensors[param.hf].where)
    return left, found


def _check_method(settings: Mapping[str, Any], folder: Path) -> None:
    is_old = "load_in_4bit" in settings or "load_in_8bit" in settings  # which bitsandbytes alone has
    method = settings.get("quant_method") or ("bitsandbytes" if is_old else "a method that quant_method does not name")
    is_ours = method == "puna" and settings.get("format") == "int4"
    if method != "bitsandbytes" and not is_ours:
        raise PunaError(
            f"{folder}: weights quantized by {method} are not read (bitsandbytes' nf4 and int8 are): give the "
            "unquantized model, or what transformers' model.dequantize() and save_pretrained() make of this one"
        )
    active = {key for key, value in settings.items() if value not in (None, False)}
    if unknown := sorted(key for key in active if not _SETTING.fullmatch(key)):
        raise PunaError(f"{folder}: quantization_config has {', '.join(unknown)}, which Puna does not know")
    if is_ours:
        return
    kind = settings.get("bnb_4bit_quant_type", "fp4")
    if settings.get("load_in_4bit") and kind != "nf4":
        raise PunaError(f"{folder}: bnb_4bit_quant_type {kind!r} is not read; Puna reads nf4")
    storage = settings.get("bnb_4bit_quant_storage") or "uint8"
    if settings.get("load_in_4bit") and storage != "uint8":
        raise PunaError(f"{folder}: bnb_4bit_quant_storage {storage!r} is not read; save it with uint8")


def _read_weight(
    name: str, left: dict[str, LazyTensor], settings: Mapping[str, Any], shape: tuple[int, int], dtype: str
) -> LazyQuantized | None:
    """Takes the tensors of one weight out of `left`; None where it is not quantized."""
    scb = left.pop(name.removesuffix("weight") + "SCB", None)
    if scb is not None:
        layout = left.pop(name.removesuffix("weight") + "weight_format", None)
        if layout is not None and layout.load().any():
            raise PunaError(f"{scb.where}: {name} lies in a layout of GPUs (weight_format); save it in rows")
        return _read_int8(name, left.pop(name), scb, shape, dtype)
    own = {key: left.pop(key) for key in list(left) if key.startswith(f"{name}.")}
    if not own:
        return None
    own = {key.removeprefix(f"{name}."): tensor for key, tensor in own.items()}
    codes = left.pop(name)
    if settings.get("quant_method") == "puna":
        return _read_int4(name, codes, own["absmax"], shape, settings["block"], dtype)
    return _read_nf4(name, codes, own, shape)


def _read_int8(name: str, codes: LazyTensor, scb: LazyTensor, shape: tuple[int, int], dtype: str) -> LazyQuantized:
    like = _like(shape, "int8", dtype)
    _check_parts(codes, {"codes": like.codes, "SCB": like.absmax}, {"codes": codes, "SCB": scb})
    return _stored(like, lambda: [codes.load(), scb.load()], name, codes.where)


def _read_int4(
    name: str, codes: LazyTensor, absmax: LazyTensor, shape: tuple[int, int], block: int, dtype: str
) -> LazyQuantized:
    like = _like(shape, "int4", dtype, block)
    _check_parts(codes, {"codes": like.codes, "absmax": like.absmax}, {"codes": codes, "absmax": absmax})
    return _stored(like, lambda: [codes.load(), absmax.load()], name, codes.where)


def _read_nf4(name: str, codes: LazyTensor, own: Mapping[str, LazyTensor], shape: tuple[int, int]) -> LazyQuantized:
    where = codes.where
    if _STATE not in own:
        raise PunaError(f"{where}: {name} lacks its {_STATE}; found {', '.join(sorted(own))}")
    if unknown := own.keys() - {"absmax", "nested_absmax", "quant_map", "nested_quant_map", _STATE}:
        raise PunaError(f"{where}: {name} has {', '.join(sorted(unknown))}, which no nf4 weight has")
    state = json.loads(own[_STATE].load().tobytes())
    if (kind := state["quant_type"]) != "nf4":
        raise PunaError(f"{where}: {name} is of type {kind!r}; Puna reads nf4")
    double = "nested_offset" in state
    said = (tuple(state["shape"]), state["blocksize"], state.get("nested_blocksize", NESTED_BLOCK))
    known = (shape, 64, NESTED_BLOCK)
    if said != known:
        raise PunaError(f"{where}: {name} has shape, block and nested block {said}; this model needs {known}")
    tables = {"quant_map": np.array(NF4, np.float32)} | ({"nested_quant_map": dynamic_map()} if double else {})
    for key, table in tables.items():
        if key in own and not np.array_equal(own[key].load(), table):
            raise PunaError(f"{where}: {name}.{key} is not the standard table")
    like = _like(shape, "nf4", state["dtype"], double=double)
    sizes = {"codes": math.ceil(like.size / 2), "absmax": math.ceil(like.size / 64)}
    if double:
        sizes["nested_absmax"] = math.ceil(sizes["absmax"] / NESTED_BLOCK)
    found = {"codes": codes, **own}
    if {key: math.prod(found[key].shape) if key in found else 0 for key in sizes} != sizes:
        raise PunaError(f"{where}: {name} and its states have other sizes than {shape} needs ({sizes})")

    def load() -> list[np.ndarray]:
        parts = [
            _padded(codes.load(), like.codes.shape, _PAD_CODES),
            _padded(own["absmax"].load(), like.absmax.shape, 0),
        ]
        if double:
            parts += [own["nested_absmax"].load().reshape(-1), np.array(state["nested_offset"], np.float32)]
        return parts

    return _stored(like, load, name, where)


@cache
def _like(shape: tuple[int, int], format: Format, dtype: str, block: int = 64, double: bool = False) -> QuantizedArray:
    """The shapes that quantizing a weight [out, in] gives."""
    make = partial(quantize_rows, format=format, block=block, double=double)
    return jax.eval_shape(make, jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)))


def _check_parts(codes: LazyTensor, expected: Mapping[str, Any], found: Mapping[str, LazyTensor]) -> None:
    for key, like in expected.items():
        if (found[key].shape, found[key].dtype) != (like.shape, like.dtype):
            said = f"{found[key].dtype.name} {found[key].shape}; this model needs {like.dtype.name} {like.shape}"
            raise PunaError(f"{codes.where}: {key} of a quantized weight is {said}")


def _padded(flat: np.ndarray, shape: tuple[int, ...], fill: int) -> np.ndarray:
    flat = flat.reshape(-1)
    return np.pad(flat, (0, math.prod(shape) - flat.size), constant_values=fill).reshape(shape)


def _stored(like: QuantizedArray, load: Any, name: str, where: str) -> LazyQuantized:
    structure = jax.tree.structure(like)

    def read() -> QuantizedArray:
        leaves = load()
        for scales in leaves[1:]:
            check_finite(scales, name, where)
        return jax.tree.unflatten(structure, [jnp.array(leaf) for leaf in leaves])

    return LazyQuantized(like, read)


def _dequantized(weight: LazyQuantized, where: str) -> LazyTensor:
    """The float weight [out, in] that a quantized one stands for."""
    like = weight.like
    kind = np.dtype(jnp.dtype(like.dtype))

    def read(index: Index) -> np.ndarray:
        return np.asarray(dequantize(weight())).T[index]

    return LazyTensor((like.out_features, like.in_features), kind, read, where)
