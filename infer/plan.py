"""What decoding and reading prompts will cost on a GPU, by that GPU's own compiler: no GPU is needed, no weight read.

The programs are the engine's: one token for each of B rows, and a piece of a prompt into one row.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from cli.gpu import GIB, USABLE, Gpu, devices_of, gpu_named
from cli.hlo import Program
from cli.roofline import estimate, table
from convert.checkpoint import main_dtype
from convert.source import find_source
from infer.load import AS_STORED, Quantization
from infer.sample import Sampling, stack_sampling
from infer.slots import decode, empty_slots, extend
from model.cache import init_cache
from model.config import PRESETS, LlamaConfig
from model.layout import per_layer
from model.params import LINEARS, Params, abstract_params, param_count

PIECE = 512  # tokens of a prompt that the engine reads at once


class Compiled(NamedTuple):
    """A program for a GPU.

    Attributes:
        program: what was compiled.
        arguments: bytes of weights, cache and the rest of what it is given.
        temporaries: bytes beside them.
        total: bytes that it takes in all: its arguments, results and temporaries.
    """

    program: Program
    arguments: int
    temporaries: int
    total: int


def abstract_weights(config: LlamaConfig, dtype: str, form: Quantization = AS_STORED) -> Params:
    """The shapes of a model's weights as decoding has them, without any memory for them."""

    def laid_out(params: Params) -> Params:
        if form.quantize is not None:
            layers = {
                name: form.quantize(w) if name in LINEARS else w for name, w in params["layers"].items()
            }  # as convert.load quantizes them
            params = {**params, "layers": layers}
        return per_layer(params)

    return jax.eval_shape(laid_out, abstract_params(config, dtype))


def compile_decode(config: LlamaConfig, weights: Params, dtype: str, rows: int, length: int, device: Any) -> Compiled:
    """The engine's program for one token of every row.

    Args:
        config: the shape of the model.
        weights: as `abstract_weights` gives them.
        dtype: of the cache.
        rows: B.
        length: positions of each row, all of them read.
        device: a GPU that `devices_of` gave.
    """
    slots = jax.eval_shape(partial(_slots, config, rows, length, dtype))
    words = jax.ShapeDtypeStruct((rows, -(-config.vocab_size // 32)), jnp.uint32)
    given = (weights, slots, jax.ShapeDtypeStruct((rows,), bool), words, jax.ShapeDtypeStruct((), jnp.int32))
    return compile_on(device, partial(decode.lower, config=config, rows=rows, window=length, scored=False), *given)


def compile_prefill(config: LlamaConfig, weights: Params, dtype: str, rows: int, length: int, device: Any) -> Compiled:
    """The engine's program for a piece of a prompt; the arguments are those of `compile_decode`."""
    slots = jax.eval_shape(partial(_slots, config, rows, length, dtype))
    tokens = jax.ShapeDtypeStruct((1, min(PIECE, length)), jnp.int32)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    given = (weights, slots, tokens, tokens, jax.ShapeDtypeStruct(tokens.shape[1:], jnp.int32), number, number, number)
    return compile_on(device, partial(extend.lower, config=config, window=length, scored=False), *given)


def _slots(config: LlamaConfig, rows: int, length: int, dtype: str) -> Any:
    cache = init_cache(config, rows, length, dtype, layout="per_layer")
    return empty_slots(cache, stack_sampling([Sampling()] * rows), config.vocab_size)


def compile_on(device: Any, lower: Callable[..., Any], *arguments: Any) -> Compiled:
    """A jitted function, compiled for a device.

    Args:
        device: that `devices_of` gave.
        lower: the function's `lower`.
        arguments: shapes and dtypes.
    """
    sharding = SingleDeviceSharding(device)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    compiled = lower(*placed).compile()
    memory = compiled.memory_analysis()
    arguments_size, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Compiled(Program(compiled.as_text()), arguments_size, temporaries, arguments_size + temporaries + results)


def plan(model: str, name: str, rows: int, length: int, dtype: str | None, form: Quantization) -> str:
    """The report on a model. Call it in a process that has used no device yet.

    Args:
        model: a preset, or as in `find_source`; no weight is read.
        name: the GPU, a key of cli.gpu.GPUS.
        rows: B, texts that are made at once.
        length: positions of each.
        dtype: what is computed in; None as stored.
        form: what is done with the layers' linear weights.

    Raises:
        PunaError: the GPU is not known, its compiler is not here, or there is no such model.
    """
    gpu = gpu_named(name)
    with devices_of(name) as (device,):
        if model in PRESETS:
            config, stored = PRESETS[model], "bfloat16"
        else:
            source = find_source(model)
            config, stored = source.config, main_dtype(source.checkpoint.tensors)
        dtype = dtype or stored
        weights = abstract_weights(config, dtype, form)
        made = [make(config, weights, dtype, rows, length, device) for make in (compile_decode, compile_prefill)]
    return report(config, made[0], made[1], gpu, rows, length, weights)


def report(
    config: LlamaConfig, decoding: Compiled, prefill: Compiled, gpu: Gpu, rows: int, length: int, weights: Params
) -> str:
    """What was compiled, in words.

    Args:
        config: the shape of the model.
        decoding: as `compile_decode` gave it.
        prefill: as `compile_prefill` gave it.
        gpu: what for.
        rows: B.
        length: positions of each row.
        weights: the weights' shapes.
    """
    held = _bytes(weights)
    cache = rows * length * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    cache *= jnp.dtype(weights["embed"].dtype).itemsize
    decoded, read = estimate(decoding.program, gpu), estimate(prefill.program, gpu)
    piece = min(PIECE, length)
    total = max(decoding.total, prefill.total)
    memory = {
        "weights": held,
        "cache": cache,
        "temporaries": max(decoding.temporaries, prefill.temporaries),
        "total": total,
    }
    fits = total <= USABLE * gpu.memory
    return "\n".join(
        [
            f"{param_count(config):,} parameters, {rows} rows of {length:,} positions; compiled for {gpu.name}",
            "",
            "memory, as the compiler has laid it out",
            *(f"  {what:<18} {size / GIB:>8.2f} GiB" for what, size in memory.items()),
            "",
            "a token of every row, an estimate",
            *table(decoded, gpu),
            f"  {rows / decoded.seconds:,.0f} tokens a second; reading weights and cache once takes "
            f"{(held + cache) / gpu.bandwidth * 1e3:.2f} ms",
            "",
            f"a piece of {piece} prompt tokens, an estimate",
            *table(read, gpu),
            f"  {piece / read.seconds:,.0f} tokens a second",
            "",
            _verdict(fits, held, cache, gpu),
        ]
    )


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _verdict(fits: bool, held: int, cache: int, gpu: Gpu) -> str:
    free = f"{USABLE:.0%} of {gpu.memory / GIB:.1f} GiB"
    if fits:
        return f"fits: {free} are taken to be free"
    change = "--quantize int8 or int4" if held > cache else "a smaller --batch or --length"
    return f"does not fit {free}: {change}, or more GPUs (--mesh tensor=2 when it runs)"
