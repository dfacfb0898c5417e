"""Products in 8-bit floats: those of the rounded numbers, within the bounds of the types, over a mesh and with LoRA."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from model import LlamaConfig, forward, init_params, lora, make_mesh
from model.fp8 import E4M3, E5M2, Fp8Array, fp8_product, in_fp8, scaled
from model.linear import linear
from model.params import LINEARS
from model.quantize import QuantizedArray, quantize

# Of a type, with numbers scaled so that the largest is its largest: half a unit in the last place, relative; half of
# the smallest step, over that largest number.
HALF = {E4M3: (2.0**-4, 2.0**-10 / 448), E5M2: (2.0**-3, 2.0**-17 / 57344)}
THEIRS = {E4M3: ml_dtypes.float8_e4m3fn, E5M2: ml_dtypes.float8_e5m2}
SMALL = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)


def matrix(*shape: int, seed: int, spread: float = 1.0) -> jax.Array:
    """Numbers whose sizes differ by as much as `spread` says."""
    random = np.random.default_rng(seed)
    return jnp.asarray(random.standard_normal(shape) * np.exp(spread * random.standard_normal(shape)), jnp.float32)


def rounded(x: np.ndarray, dtype) -> np.ndarray:
    """x in an 8-bit type and back, by ml_dtypes, in float64."""
    scale = np.float32(np.abs(x).max() / float(ml_dtypes.finfo(THEIRS[dtype]).max))
    return (x / scale).astype(THEIRS[dtype]).astype(np.float64) * np.float64(scale)


def error(x: np.ndarray, dtype) -> np.ndarray:
    """How far each number may be from its rounding."""
    relative, smallest = HALF[dtype]
    return np.abs(x) * (relative + 2**-20) + np.abs(x).max() * smallest


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_scaling_is_that_of_ml_dtypes_and_within_the_types_bound(dtype):
    x = matrix(64, 48, seed=0, spread=4.0)
    small, scale = scaled(x, dtype)
    back = np.asarray(small).astype(np.float64) * float(scale)
    np.testing.assert_allclose(back, rounded(np.asarray(x), dtype), rtol=1e-6)
    assert (np.abs(back - x) <= error(np.asarray(x), dtype)).all()
    assert float(jnp.abs(small.astype(jnp.float32)).max()) == float(jnp.finfo(dtype).max)
    zeros, one = scaled(jnp.zeros((2, 2)), dtype)
    assert float(one) == 1 and not zeros.astype(jnp.float32).any()
    assert jnp.isnan(scaled(x.at[0, 0].set(jnp.nan), dtype)[0].astype(jnp.float32)).any()


def test_products_are_those_of_rounded_numbers_and_within_bounds_of_float32():
    x, w, dy = matrix(24, 32, seed=1), matrix(32, 40, seed=2), matrix(24, 40, seed=3, spread=2.0)
    y, pull = jax.vjp(fp8_product, x, w)
    dx, dw = pull(dy)
    x_, w_, dy_ = map(np.asarray, (x, w, dy))
    for found, (a, kind_a), (b, kind_b) in (
        (y, (x_, E4M3), (w_, E4M3)),
        (dx, (dy_, E5M2), (w_.T, E4M3)),
        (dw, (x_.T, E4M3), (dy_, E5M2)),
    ):
        np.testing.assert_allclose(found, rounded(a, kind_a) @ rounded(b, kind_b), rtol=1e-5, atol=1e-5)
        off_a, off_b = error(a, kind_a), error(b, kind_b)
        bound = np.abs(a) @ off_b + off_a @ np.abs(b) + off_a @ off_b
        difference = np.abs(np.asarray(found, np.float64) - a.astype(np.float64) @ b)
        assert (difference <= bound * (1 + 1e-5)).all()
        assert difference.max() > 1e-3 * np.abs(found).max()  # that it was rounded at all


def test_a_product_over_a_mesh_is_that_of_one_device():
    """The largest number is that of all devices. Sums are float32 here: in bfloat16 those of parts are rounded too."""
    given = matrix(16, 32, seed=1), matrix(32, 64, seed=2), matrix(16, 64, seed=3)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)

    def all_of(x, w, dy):
        y, pull = jax.vjp(fp8_product, x, w)
        return y, *pull(dy)

    rows = ("data", "fsdp")
    places = PartitionSpec(rows, None), PartitionSpec("fsdp", "tensor"), PartitionSpec(rows, "tensor")
    spread = [jax.device_put(each, NamedSharding(mesh, place)) for each, place in zip(given, places, strict=True)]
    for one, other in zip(jax.jit(all_of)(*spread), jax.jit(all_of)(*given), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())


def test_the_layers_linear_weights_in_float_are_multiplied_so_and_no_others():
    params = init_params(SMALL, jax.random.key(0))
    small = in_fp8(params)
    assert {name for name, w in small["layers"].items() if isinstance(w, Fp8Array)} == set(LINEARS)
    assert small["embed"] is params["embed"] and small["layers"]["wq"].shape == params["layers"]["wq"].shape
    held = {**params["layers"], "wq": jax.vmap(partial(quantize, format="int8"))(params["layers"]["wq"])}
    assert isinstance(in_fp8({**params, "layers": held})["layers"]["wq"], QuantizedArray)
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, 64)
    exact, found = (forward(each, tokens, SMALL)[0] for each in (params, small))
    assert 1e-4 < float(jnp.abs(found - exact).max() / jnp.abs(exact).max()) < 0.1


def test_adapters_are_multiplied_as_they_are():
    _, adapted = lora.add(init_params(SMALL, jax.random.key(0)), SMALL, jax.random.key(1), rank=4)
    w = jax.tree.map(lambda leaf: leaf[0], adapted["layers"]["w_up"])
    w = replace(w, b=jnp.ones_like(w.b))
    x = matrix(8, 32, seed=4)
    small = replace(w, base=Fp8Array(w.base))
    np.testing.assert_array_equal(linear(x, small), fp8_product(x, w.base) + (x @ w.a) @ w.b * w.scale)
    assert isinstance(in_fp8(adapted)["layers"]["w_up"].base, Fp8Array)
