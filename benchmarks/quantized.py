"""int8, int4 and nf4 against float32 in one run: a product, a decode step, and what each holds in memory.

    python benchmarks/quantized.py                  the figures of the README, a minute or two on two cores
    python benchmarks/quantized.py --smoke          the same on tiny shapes, for a look at the table
    python benchmarks/quantized.py --model llama-7b decoding with a 7B-shaped nf4 model, or another --format
    python benchmarks/quantized.py --gguf FILE      beside llama.cpp (xllamacpp) on a GGUF file of that shape

Forms are timed in turn, again and again, and the fastest of each is kept: what else the machine does hits all alike.
`temporaries` are the compiler's own account; a full float copy of the weight would show there.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parent.parent)  # the root: this folder has names that packages have

import jax
import jax.numpy as jnp

from benchmarks.gguf import serve
from model import PRESETS, LlamaConfig, forward, init_cache
from model.layout import round_activations
from model.linear import linear
from model.params import LINEARS, Params, param_specs
from model.quantize import FORMATS, quantize
from model.tiles import tiled
from model.transposed import TransposedArray

RESULT = Path(__file__).parent / "results" / "quantized.json"
QUANTIZERS: dict[str, Callable[[jax.Array], Any]] = {
    "float32": lambda w: TransposedArray(w.T),  # as decoding holds it
    "float32, [in, out]": lambda w: w,
    "int8": partial(quantize, format="int8"),
    "int8 x int8": lambda w: replace(quantize(w, "int8"), activations="int8"),
    "int4": partial(quantize, format="int4"),
    "int4 x int8": lambda w: jax.jit(tiled)(quantize(w, "int4")),
    "int4, groups of 128": partial(quantize, format="int4", block=128),
    "nf4": partial(quantize, format="nf4"),
    "nf4, double": partial(quantize, format="nf4", double=True),
}
DECODER = LlamaConfig(  # 110M, as the figures of PERFORMANCE have it
    vocab_size=32000,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=12,
    max_position_embeddings=1024,
)
SMOKE = LlamaConfig(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)


def best_times(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """The fastest run of each call in seconds, taken in turn for about `seconds` in all."""
    for call in calls.values():
        jax.block_until_ready(call())
    best = dict.fromkeys(calls, float("inf"))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def temporaries(compiled: jax.stages.Compiled) -> int:
    """Bytes that a compiled function needs beside its arguments and results."""
    memory = compiled.memory_analysis()
    return 0 if memory is None else memory.temp_size_in_bytes


def product(shape: tuple[int, int], batches: list[int], seconds: float) -> list[dict[str, Any]]:
    """x [batch, in] times one weight [in, out] in every format."""
    w = jax.random.normal(jax.random.key(0), shape) * 0.02
    weights = {name: jax.block_until_ready(make(w)) for name, make in QUANTIZERS.items()}
    rows = []
    for batch in batches:
        x = jax.random.normal(jax.random.key(1), (batch, shape[0]))
        compiled = {name: jax.jit(linear).lower(x, weight).compile() for name, weight in weights.items()}
        times = best_times({n: partial(run, x, weights[n]) for n, run in compiled.items()}, seconds)
        for name, run in compiled.items():
            rows.append(
                {
                    "what": f"product {shape[0]}x{shape[1]}, batch {batch}",
                    "format": name,
                    "ms": times[name] * 1e3,
                    "of float32's time": times[name] / times["float32"],
                    "of float32's bytes": nbytes(weights[name]) / nbytes(w),
                    "temporaries MiB": temporaries(run) / 2**20,
                }
            )
    return rows


def random_params(config: LlamaConfig, kind: str, dtype: Any = jnp.float32) -> Params:
    """Random parameters as decoding holds them, each linear a `kind` of QUANTIZERS as soon as it is made."""
    key, make = jax.random.key(0), QUANTIZERS[kind.removesuffix(" x int8")]
    specs = param_specs(config)

    def array(shape: tuple[int, ...], init: str) -> jax.Array:
        return jnp.ones(shape, dtype) if init == "ones" else jax.random.normal(key, shape, dtype) * 0.02

    def layer() -> Params:
        weights = {name: array(spec.shape[1:], spec.init) for name, spec in specs["layers"].items()}
        return {name: jax.block_until_ready(make(w)) if name in LINEARS else w for name, w in weights.items()}

    outer = {name: array(spec.shape, spec.init) for name, spec in specs.items() if name != "layers"}
    layers = tuple(layer() for _ in range(config.num_hidden_layers))
    head = TransposedArray(outer.pop("lm_head").T)
    params = {**outer, "lm_head": head, "layers": layers}
    return round_activations(params) if kind.endswith(" x int8") else params


def decoder(params: Params, config: LlamaConfig, batch: int) -> Callable[[], Any]:
    """One greedy step after 64 tokens, its cache donated and carried on."""

    @partial(jax.jit, donate_argnums=1)
    def step(params: Params, cache: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        out, cache = forward(params, tokens, config, cache=cache)
        return out[:, -1:].argmax(axis=-1), cache.replace(lengths=jnp.full(batch, 64, jnp.int32))

    state = {"tokens": jnp.ones((batch, 1), jnp.int32), "cache": init_cache(config, batch, 128).unstack()}

    def run() -> jax.Array:
        state["tokens"], state["cache"] = step(params, state["cache"], state["tokens"])
        return state["tokens"]

    return run


def decode(config: LlamaConfig, batches: list[int], seconds: float) -> list[dict[str, Any]]:
    """Tokens a second of a whole model, embeddings and head in float32 (the head in int8 with 8-bit activations)."""
    models = {name: random_params(config, name) for name in QUANTIZERS}
    rows = []
    for batch in batches:
        times = best_times({name: decoder(params, config, batch) for name, params in models.items()}, seconds)
        for name, params in models.items():
            rows.append(
                {
                    "what": f"decode {config.hidden_size}x{config.num_hidden_layers}, batch {batch}",
                    "format": name,
                    "tokens/s": batch / times[name],
                    "of float32's time": times[name] / times["float32"],
                    "of float32's bytes": nbytes(params["layers"]) / nbytes(models["float32"]["layers"]),
                }
            )
    return rows


def decode_large(preset: str, layers: int | None, format: str, seconds: float) -> list[dict[str, Any]]:
    """A preset's shape with random weights, embeddings in bfloat16; or all of it in 16 bits."""
    config = replace(PRESETS[preset], num_hidden_layers=layers or PRESETS[preset].num_hidden_layers)
    if format in ("bfloat16", "float16"):
        params = random_params(config, "float32", jnp.dtype(format))
    else:
        params = random_params(config, "nf4, double" if format == "nf4" else format, jnp.bfloat16)
    times = best_times({format: decoder(params, config, 1)}, seconds)
    weights = nbytes(params) / 2**30
    what = f"decode {preset}{f', {layers} layers' if layers else ''}, batch 1"
    return [{"what": what, "format": format, "tokens/s": 1 / times[format], "GiB": weights}]


def decode_llama_cpp(file: Path, tokens: int) -> list[dict[str, Any]]:
    """Greedy tokens a second of llama.cpp on a GGUF file, after 64 tokens."""
    post = serve(file, threads=os.cpu_count() or 1)
    settings = {"temperature": 0, "samplers": ["temperature"], "ignore_eos": True}
    answer = post("/completion", prompt=[1] * 64, n_predict=tokens, **settings)
    return [{"what": file.name, "format": "llama.cpp", "tokens/s": answer["timings"]["predicted_per_second"]}]


def write_result(path: Path, figures: dict[str, Any]) -> None:
    """Keeps figures with the command that gave them, and where."""
    setting = {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "backend": jax.default_backend(),
        "cores": os.cpu_count(),
        "malloc": os.environ.get("GLIBC_TUNABLES", "default"),
        "jax": jax.__version__,
    }
    path.write_text(json.dumps({"setting": setting, **figures}, indent=2) + "\n")


def main() -> None:
    """Prints a table, and writes the rows as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timing for each batch size")
    parser.add_argument("--model", help="a preset to decode with instead, as llama-7b")
    parser.add_argument("--layers", type=int, help="of --model: fewer than it has")
    parser.add_argument(
        "--format",
        default="nf4",
        choices=[*FORMATS, "int8 x int8", "int4 x int8", "bfloat16", "float16"],
        help="of --model",
    )
    parser.add_argument("--gguf", type=Path, help="a GGUF file to decode with in llama.cpp")
    parser.add_argument("--json", type=Path, help="where to write the rows (a plain run: results/quantized.json)")
    options = parser.parse_args()
    if options.gguf:
        rows = decode_llama_cpp(options.gguf, 32)
    elif options.model:
        rows = decode_large(options.model, options.layers, options.format, options.seconds)
    elif options.smoke:
        rows = product((256, 512), [1, 8], 0.2) + decode(SMOKE, [1], 0.2)
    else:
        rows = product((2048, 5504), [1, 8, 64], options.seconds) + decode(DECODER, [1, 8], options.seconds)
    for row in rows:
        print(
            "  ".join(
                f"{key} {value:.3g}" if isinstance(value, float) else f"{value:<28}" for key, value in row.items()
            )
        )
    is_plain = not (options.gguf or options.model or options.smoke)
    if path := options.json or (RESULT if is_plain else None):
        write_result(path, {"rows": rows})


if __name__ == "__main__":
    main()
