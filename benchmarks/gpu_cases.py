"""What benchmarks/gpu.py measures: programs, the shapes that they are given, and what we predict of each.

A prediction is a share of a ceiling that the same run measures (memory read, products in bfloat16), written here before
any GPU ran it, or of the data sheet where a step says MFU.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from infer.load import Quantization
from infer.plan import abstract_weights
from infer.sample import Sampling, stack_sampling
from infer.slots import decode, empty_slots
from model import attention, cudnn
from model.cache import init_cache
from model.config import PRESETS, LlamaConfig
from model.fp8 import fp8_product
from model.linear import linear
from model.quantize import Format, quantize, quantizer
from model.transposed import TransposedArray
from train.config import read_config
from train.metrics import flops_per_token
from train.optim import make_schedule
from train.start import mesh_of
from train.state import abstract_batch, abstract_state, shardings_of
from train.step import make_step

BF16 = jnp.bfloat16


@dataclass
class Case:
    """A program and its inputs.

    Attributes:
        name: what it is.
        function: jitted.
        inputs: shapes, dtypes and, where they matter, values (NumPy arrays).
        moved: bytes that it must read and write; 0 where that is not what bounds it.
        flops: of its products; 0 likewise.
        tokens: that a call makes or trains.
        carried: the number of the input that its first result takes the place of.
        predicted: what part of its ceiling it reaches.
        ceiling: "read", "bf16" or "sheet".
        on_gpu: whether it compiles for GPUs alone.
    """

    name: str
    function: Any
    inputs: tuple[Any, ...]
    moved: float = 0.0
    flops: float = 0.0
    tokens: int = 0
    carried: int | None = None
    predicted: float | None = None
    ceiling: str = "read"
    on_gpu: bool = False
    keywords: dict[str, Any] = field(default_factory=dict)

    def lower(self, device: Any) -> Any:
        """The program, lowered for a device."""
        return self.function.lower(*abstract(self.inputs, device), **self.keywords)


def abstract(tree: Any, device: Any) -> Any:
    """Shapes and dtypes of a tree on a device; those that have a sharding keep it."""
    one = SingleDeviceSharding(device)

    def place(x: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(x, "sharding", None) or one
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(place, tree)


def born(case: Case, device: Any) -> list[Any]:
    """The inputs on the device: random weights and codes, and zeros for what is counted and summed."""

    def make(path: Any, x: Any) -> Any:
        sharding = getattr(x, "sharding", None) or SingleDeviceSharding(device)
        if isinstance(x, Placed | np.ndarray | np.generic):
            return jax.device_put(x.value if isinstance(x, Placed) else x, sharding)
        name = jax.tree_util.keystr(path)
        numbers = partial(_numbers, name, x.shape, x.dtype)
        return jax.jit(numbers, out_shardings=sharding)(jax.random.key(len(name)))

    return list(jax.tree_util.tree_map_with_path(make, case.inputs))


def _numbers(name: str, sizes: tuple[int, ...], dtype: Any, key: Any) -> Any:
    if "opt_state" in name or "cache" in name or dtype in (bool, jnp.int32, jnp.uint32):
        return jnp.zeros(sizes, dtype)
    if "absmax" in name:
        return jnp.full(sizes, 0.02, dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        return jax.random.bits(key, sizes, jnp.uint8).astype(dtype)
    return (jax.random.normal(key, sizes, jnp.float32) * 0.02).astype(dtype)


def shape(*sizes: int, dtype: Any = BF16) -> jax.ShapeDtypeStruct:
    """An input of random numbers."""
    return jax.ShapeDtypeStruct(sizes, dtype)


def ceilings(tiny: bool, device: Any) -> Iterator[Case]:
    """What the device gives at most: the ceilings of all that follows."""
    gib, n = (2**20, 256) if tiny else (2**30, 8192)
    copied, read = shape(4 * gib // 4, dtype=jnp.float32), shape(8 * gib // 4, dtype=jnp.float32)
    yield Case("copy 4 GiB", jax.jit(lambda x: x + 1), (copied,), moved=8.0 * gib, predicted=0.85, ceiling="sheet")
    yield Case("read 8 GiB", jax.jit(jnp.sum), (read,), moved=8.0 * gib, predicted=0.90, ceiling="sheet")
    square = jax.jit(partial(jnp.matmul, preferred_element_type=BF16))
    yield Case("product 8192, bf16", square, (shape(n, n),) * 2, flops=2.0 * n**3, predicted=0.72, ceiling="sheet")
    fp8 = shape(n, n, dtype=jnp.float8_e4m3fn)
    by_rows = jax.jit(lambda x, y: jax.lax.dot_general(x, y, (((1,), (1,)), ((), ())), preferred_element_type=BF16))
    yield Case("product 8192, fp8", by_rows, (fp8, fp8), flops=2.0 * n**3, predicted=1.3, ceiling="sheet")


FORMS: dict[str, tuple[Callable[[Any], Callable[..., Any]], float]] = {  # of attention, from segments; predictions
    "causal": (lambda segments: cudnn.attend_rows, 0.55),
    "packed, by lengths": (lambda segments: cudnn.attend_packed(segments, 8), 0.48),
    "packed, by a mask": (lambda segments: cudnn.attend_cudnn, 0.40),
    "XLA's": (lambda segments: attention.attend, 0.10),
}


def packed_segments(rows: int, length: int) -> np.ndarray:
    """Eight uneven segments in each row, and padding behind them: int32 [B, T]."""
    ends = np.cumsum([0.05, 0.2, 0.1, 0.15, 0.02, 0.18, 0.12, 0.08]) * length
    number = np.searchsorted(ends, np.arange(length), side="right") + 1
    return np.tile(np.where(number > 8, 0, number), (rows, 1)).astype(np.int32)


def slopes_of(form: Callable[[Any], Callable[..., Any]]) -> Callable[..., Any]:
    """The result of an attention and its gradients, of the sum of the squares of what is not padding."""

    def total(q: Any, k: Any, v: Any, segments: Any) -> Any:
        out = form(segments)(q, k, v, attention.Mask(q_segments=segments, k_segments=segments)).astype(jnp.float32)
        out = jnp.where((segments != 0)[..., None, None], out, 0)
        return jnp.sum(out**2), out

    def both(q: Any, k: Any, v: Any, segments: Any) -> Any:
        (_, out), slopes = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v, segments)
        return out, *slopes

    return both


def attentions(tiny: bool, device: Any) -> Iterator[Case]:
    """Forward and backward of one layer of an 8B model, by each form of attention."""
    B, T, H, K, d = (2, 256, 4, 2, 64) if tiny else (2, 4096, 32, 8, 128)
    flops = 3.5 * 4 * B * H * T * T * d / 2
    inputs = (shape(B, T, H, d), shape(B, K, T, d), shape(B, K, T, d), packed_segments(B, T))
    for name, (form, predicted) in FORMS.items():
        own = {"flops": flops, "predicted": predicted, "ceiling": "bf16", "on_gpu": name != "XLA's"}
        yield Case(f"attention {name}", jax.jit(slopes_of(form)), inputs, **own)


def attention_checks(tiny: bool, device: Any) -> Iterator[dict[str, Any]]:
    """How far each form, and its gradients, are from float32; and whether three runs of it give the same bits."""
    B, T, H, K, d = (1, 128, 4, 2, 64) if tiny else (1, 1024, 8, 2, 128)
    one = np.ones((B, T), np.int32)
    random = np.random.default_rng(0)
    arrays = [random.standard_normal(sizes).astype(np.float32) for sizes in ((B, T, H, d), (B, K, T, d), (B, K, T, d))]
    for name, (form, _) in FORMS.items():
        row = {"name": f"attention {name}: error"}
        if name != "XLA's" and device.platform != "gpu":
            yield row | {"skipped": "needs hardware: cuDNN runs on NVIDIA GPUs"}
            continue
        segments = one if name == "causal" else packed_segments(B, T)
        halves = [jax.device_put(x, device).astype(BF16) for x in arrays]
        found = [jax.jit(slopes_of(form))(*halves, segments) for _ in range(3)]
        with jax.default_matmul_precision("highest"):
            exact = jax.jit(slopes_of(FORMS["XLA's"][0]))(*(x.astype(jnp.float32) for x in halves), segments)
        errors = [_distance(a, b) for a, b in zip(found[0], exact, strict=True)]
        same = all(bool(jnp.all(a == b)) for other in found[1:] for a, b in zip(found[0], other, strict=True))
        yield row | {
            "of the largest number": dict(zip(("out", "dq", "dk", "dv"), errors, strict=True)),
            "repeats": same,
        }


def _distance(a: Any, b: Any) -> float:
    return float(jnp.max(jnp.abs(a.astype(jnp.float32) - b)) / jnp.max(jnp.abs(b)))


def products(tiny: bool, device: Any) -> Iterator[Case]:
    """x times one weight of an 8B model, by its form and the rows of x."""
    n_in, n_out = (256, 512) if tiny else (4096, 14336)
    forms = {
        "bf16 [in, out]": (lambda w: w, 2.0, 0.85),
        "bf16 [out, in]": (lambda w: TransposedArray(w.T), 2.0, 0.85),
        "int8": (partial(quantize, format="int8"), 1.0, 0.6),
        "int4": (partial(quantize, format="int4"), 0.53, 0.45),
        "nf4": (partial(quantize, format="nf4"), 0.56, 0.4),
    }
    for name, (form, held, predicted) in forms.items():
        weight = jax.eval_shape(form, shape(n_in, n_out))
        for rows in (1, 8, 4096):
            bound = {"moved": held * n_in * n_out, "predicted": predicted}
            if rows > 8:
                bound = {"flops": 2.0 * rows * n_in * n_out, "predicted": 0.8, "ceiling": "bf16"}
            yield Case(f"{name}, {rows} rows", jax.jit(linear), (shape(rows, n_in), weight), **bound)
    rows = 512 if tiny else 16384
    flops = {"flops": 6.0 * rows * n_in * n_out, "ceiling": "bf16"}
    for name, product, predicted in (("bf16", jnp.matmul, 0.85), ("fp8", fp8_product, 1.2)):
        inputs = shape(rows, n_in), shape(n_in, n_out), shape(rows, n_out)
        yield Case(f"{name}, {rows} rows, with gradients", jax.jit(partial(_pulled, product)), inputs, **flops,
                   predicted=predicted)  # fmt: skip


def _pulled(product: Callable[..., Any], x: Any, w: Any, dy: Any) -> Any:
    """A product and both of its gradients."""
    y, pull = jax.vjp(product, x, w)
    return y, *pull(dy)


def decoding(tiny: bool, device: Any) -> Iterator[Case]:
    """The engine's program for one token, batch 1, 1,024 positions."""
    sizes: list[tuple[str, int, Format | None, float]] = [
        ("llama3.2-1b", 16, None, 0.70),
        ("llama3-8b", 8, None, 0.80),
        ("llama3-8b", 8, "int8", 0.60),
        ("llama3-8b", 8, "int4", 0.45),
        ("llama3-8b", 8, "nf4", 0.40),
        ("llama3-8b", 32, None, 0.82),
    ]
    for name, layers, form, predicted in sizes:
        config = replace(PRESETS[name], num_hidden_layers=layers)
        if tiny:
            config = replace(small(config), num_hidden_layers=2)
        length = 128 if tiny else 1024
        weights = abstract_weights(config, "bfloat16", Quantization(quantizer(form) if form else None))
        slots = jax.eval_shape(partial(_slots, config, length))
        words = np.full((1, -(-config.vocab_size // 32)), 0xFFFFFFFF, np.uint32)
        read = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((weights["layers"], weights["lm_head"])))
        inputs = (weights, slots, np.ones(1, bool), words, np.int32(0))
        keywords = {"config": config, "rows": 1, "window": length, "scored": False}
        title = f"decode {name} {form or 'bf16'}, {layers} layers"
        yield Case(title, decode, inputs, moved=read, tokens=1, carried=1, predicted=predicted, keywords=keywords)


def _slots(config: LlamaConfig, length: int) -> Any:
    cache = init_cache(config, 1, length, BF16, layout="per_layer")
    return empty_slots(cache, stack_sampling([Sampling()]), config.vocab_size)


def small(config: LlamaConfig) -> LlamaConfig:
    """The same shape of model, of a size that runs anywhere."""
    dims = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 2}
    return replace(config, **dims, num_attention_heads=4, num_key_value_heads=2)


def training(tiny: bool, device: Any, kind: str) -> Iterator[Case]:
    """Steps of training; `kind` is a key of STEPS."""
    for name, preset, rows, predicted, packed, sections in STEPS[kind]:
        model = PRESETS[preset]
        length = 256 if tiny else 4096
        wanted = {"preset": preset, "dtype": "bfloat16"} | sections.get("model", {})
        rest = {key: value for key, value in sections.items() if key != "model"}
        data = {"path": "unread", "max_length": length, "packing": packed}
        config = read_config({"model": wanted, "data": data, "run": {"batch_size": rows}, **rest})
        if tiny:
            model = small(model)
        mesh = mesh_of(config, [device])
        state, batch = abstract_state(config, model, mesh), abstract_batch(config, mesh)
        step = make_step(config, model, mesh, make_schedule(config.optim, 1000), shardings_of(state), 16)
        trained = sum(x.size for x in jax.tree.leaves(state.params)) if config.lora else None
        flops = rows * length * flops_per_token(model, length, trained)
        segments = np.repeat(np.arange(1, 9), length // 8)[None] if packed else np.ones((1, length), int)
        random = np.random.default_rng(0).integers(0, model.vocab_size, (rows, length), np.int32)
        values = {"tokens": random, "labels": random, "segments": np.tile(segments, (rows, 1)).astype(np.int32)}
        given = {key: Placed(value, batch[key].sharding) for key, value in values.items()}
        yield Case(name, step, (state, given), flops=flops, tokens=rows * length, carried=0, predicted=predicted,
                   ceiling="sheet")  # fmt: skip


class Placed:
    """A NumPy array and where it goes; a leaf of the inputs."""

    def __init__(self, value: np.ndarray, sharding: Any):
        self.value, self.sharding, self.shape, self.dtype = value, sharding, value.shape, value.dtype


_LORA = {"model": {"remat": "full", "param_dtype": "bfloat16"}, "lora": {"rank": 16}}
STEPS: dict[str, list[tuple[str, str, int, float, bool, dict[str, Any]]]] = {
    "1b": [
        ("1B, cuDNN", "llama3.2-1b", 4, 0.45, False, {"model": {"remat": "dots"}}),
        ("1B, packed", "llama3.2-1b", 4, 0.42, True, {"model": {"remat": "dots"}}),
        ("1B, fp8", "llama3.2-1b", 4, 0.55, False, {"model": {"remat": "dots", "matmul": "fp8"}}),
        ("1B, loss in chunks of 512", "llama3.2-1b", 4, 0.38, False, {"model": {"remat": "dots", "loss_chunk": 512}}),
    ],
    "8b lora": [
        ("8B LoRA", "llama3-8b", 2, 0.50, False, _LORA),
        ("8B QLoRA nf4", "llama3-8b", 2, 0.40, False, _LORA | {"quantize": {}}),
    ],
    "8b full": [
        ("8B full", "llama3-8b", 1, 0.38, False, {"model": {"remat": "full", "param_dtype": "bfloat16"}}),
    ],
}


class Group(NamedTuple):
    """Cases that one process runs.

    Attributes:
        seconds: that it may take.
        cases: of (tiny, device).
        checks: rows of what is no time, of (tiny, device).
        environment: of its process.
    """

    seconds: int
    cases: Callable[[bool, Any], Iterator[Case]]
    checks: Callable[[bool, Any], Iterator[dict[str, Any]]] | None = None
    environment: Mapping[str, str] = {}


def nothing(tiny: bool, device: Any) -> Iterator[Case]:
    """No case, of a group of checks alone."""
    yield from ()


GROUPS = {
    "ceilings": Group(40, ceilings),
    "attention": Group(70, attentions),
    "attention checks": Group(
        40, nothing, attention_checks, {"XLA_FLAGS": "--xla_gpu_exclude_nondeterministic_ops=true"}
    ),
    "products": Group(70, products),
    "decoding": Group(110, decoding),
    "1b": Group(110, partial(training, kind="1b")),
    "8b lora": Group(110, partial(training, kind="8b lora")),
    "8b full": Group(90, partial(training, kind="8b full")),
}
