"""Quantized weights: bounded errors, honest sizes, and products that never build the float weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from model import LlamaConfig, cpu, forward, init_params, make_mesh
from model.config import PRESETS
from model.errors import PunaError
from model.layout import place, weight_shardings
from model.linear import linear
from model.params import LINEARS, abstract_params, param_specs, stack, unstack
from model.quantize import NF4, block_scales, dequantize, dynamic_map, quantize
from model.quantized_matmul import fused_product, fused_transposed_product, quantized_matmul

pytestmark = pytest.mark.slow

FORMATS = {
    "int8": {"format": "int8"},
    "int4 of 32": {"format": "int4", "block": 32},
    "int4 of 64": {"format": "int4"},
    "int4 of 128": {"format": "int4", "block": 128},
    "nf4": {"format": "nf4"},
    "nf4 double": {"format": "nf4", "double": True},
}
SHAPES = [(172, 64), (256, 96), (172, 6)]
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=64,
)


def weight(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape) * 0.05


def bound(w, q):
    """The largest error that each weight may have, [in, out], from the formats' definitions."""
    ulp = 2.0**-22 * np.abs(w).max()
    rows = np.asarray(w).T
    if q.format == "int8":  # half of one of 127 steps, after rounding to float16
        return (np.abs(rows).max(axis=1, keepdims=True) / 254 * (1 + 2**-10) + np.abs(rows) * 2**-11 + ulp).T
    flat = np.pad(rows.reshape(-1), (0, -rows.size % q.block)).reshape(-1, q.block)
    absmax = np.abs(flat).max(axis=1, keepdims=True)
    if q.format == "int4":  # half of one of 7 steps of the absmax, itself rounded to 8 bits
        each = absmax * (1 + 2**-8) / 14
    else:
        each = absmax * np.diff(NF4).max() / 2
        if q.offset is not None:  # the scale is off by half of the 8-bit table's widest gap
            groups = np.pad(absmax[:, 0] - absmax.mean(), (0, -len(absmax) % 256)).reshape(-1, 256)
            gap = max(np.diff(dynamic_map()).max(), 1 + dynamic_map()[0]) / 2 + 2**-15
            nested = np.repeat(np.abs(groups).max(axis=1), 256)[: len(absmax), None]
            each = each + nested * max(gap, 1 + dynamic_map()[0])
    return np.broadcast_to(each + ulp, flat.shape).reshape(-1)[: rows.size].reshape(rows.shape).T


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_no_weight_is_off_by_more_than_its_format_allows(name, shape):
    w = weight(shape)
    q = quantize(w, **FORMATS[name])
    error = np.abs(np.asarray(dequantize(q)) - np.asarray(w))
    allowed = bound(w, q)
    assert (error <= allowed).all()
    assert error.max() > allowed.max() / 4  # the bound says something


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_and_one_large_weight_survive(name):
    w = jnp.zeros((128, 8)).at[3, 2].set(5.0)
    restored = dequantize(quantize(w, **FORMATS[name]))
    np.testing.assert_allclose(restored, w, atol=0.06)  # 8 bits of the scale under double quantization
    assert np.isfinite(restored).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_the_product_and_its_gradient_are_those_of_the_dequantized_weight(name, shape):
    q = quantize(weight(shape), **FORMATS[name])
    w = dequantize(q)
    for rows in (1, 5, 20, 80):  # few and many take different ways
        x = weight((rows, shape[0]), 1)
        dy = weight((rows, shape[1]), 2)
        with jax.default_matmul_precision("highest"):
            y, back = jax.vjp(lambda x: quantized_matmul(x, q), x)
            np.testing.assert_allclose(y, x @ w, atol=1e-5)
            np.testing.assert_allclose(back(dy)[0], dy @ w.T, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_the_products_of_other_platforms_are_those_of_the_dequantized_weight_too(name, shape):
    q = quantize(weight(shape), **FORMATS[name])
    w = dequantize(q)
    with jax.default_matmul_precision("highest"):
        for rows in (1, 8, 9):  # up to 8 are multiplied inside a sum
            x = weight((rows, shape[0]), 1)
            np.testing.assert_allclose(jax.jit(fused_product)(x, q), x @ w, atol=1e-5)
        dy = weight((9, shape[1]), 2)
        scaled = dy * (q.absmax / 127) if q.format == "int8" else dy
        np.testing.assert_allclose(jax.jit(fused_transposed_product)(scaled, q), dy @ w.T, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_by_table_and_by_selects_are_the_same_numbers(shape, monkeypatch):
    """Which of them a product takes depends on the processor."""
    q = quantize(weight(shape), "nf4", double=True)
    q = q.replace(absmax=block_scales(q), nested_absmax=None, offset=None)  # as products decode it
    monkeypatch.setattr(cpu, "_HAS_AVX512", True)
    even, odd = cpu.decoded(q)
    monkeypatch.setattr(cpu, "_HAS_AVX512", False)
    (rows,) = cpu.decoded(q)
    np.testing.assert_array_equal(jnp.stack([even, odd], axis=-1).reshape(rows.shape), rows)
    np.testing.assert_array_equal(rows[: shape[1]].T, dequantize(q))


def test_stacked_weights_slice_into_layers_and_stack_again():
    for settings in FORMATS.values():
        q = quantize(weight((3, 172, 64)), **settings)
        assert q.shape == (3, 172, 64)
        one = jax.tree.map(lambda a: a[1], q)
        assert one.shape == (172, 64)
        np.testing.assert_array_equal(dequantize(one), dequantize(q)[1])
        np.testing.assert_array_equal(dequantize(one), dequantize(quantize(weight((3, 172, 64))[1], **settings)))


# GiB at 8 and at 4 bits, as Chinese-LLaMA-Alpaca's README gives them (65B at 8 bits only as "about 60").
PUBLISHED = {"llama-7b": (7.8, 3.9), "llama-13b": (14.9, 7.8), "llama-33b": (32.4, 17.2), "llama-65b": (61.5, 38.5)}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_whole_models_are_no_larger_than_the_published_ones(preset):
    """By exact account of the buffers, embeddings and head in bfloat16."""
    for name, published in zip(("int8", "nf4 double"), PUBLISHED[preset], strict=True):

        def quantized(params, name=name):
            layers = {key: quantize(w, **FORMATS[name]) if key in LINEARS else w for key, w in params["layers"].items()}
            return params | {"layers": layers}

        shapes = jax.eval_shape(quantized, abstract_params(PRESETS[preset], jnp.bfloat16))
        assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes)) / 2**30 <= published


@pytest.mark.parametrize(
    ("name", "bits"),
    [("int8", 8.008), ("int4 of 64", 4.25), ("int4 of 128", 4.125), ("nf4", 4.5), ("nf4 double", 4.1271)],
)
def test_nbytes_are_what_the_buffers_hold(name, bits):
    shape = (4096, 512)
    q = jax.eval_shape(lambda w: quantize(w, **FORMATS[name]), jax.ShapeDtypeStruct(shape, jnp.float32))
    assert q.nbytes * 8 / q.size == pytest.approx(bits, abs=1e-3)
    small = quantize(weight((256, 64)), **FORMATS[name])
    assert small.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(small))


@pytest.mark.parametrize("name", FORMATS)
def test_no_full_float_copy_is_among_the_temporaries(name):
    """At most an eighth of the weight is decoded at a time; scales in float32, x, y and their gradients come on top."""
    shape = (2048, 4096)
    abstract = jax.eval_shape(lambda w: quantize(w, **FORMATS[name]), jax.ShapeDtypeStruct(shape, jnp.float32))
    x = jax.ShapeDtypeStruct((8, shape[0]), jnp.float32)
    bound = 4 * (shape[0] * shape[1] / 8 + abstract.absmax.size + 2 * 8 * sum(shape))
    forward_pass = jax.jit(quantized_matmul).lower(x, abstract).compile()
    assert forward_pass.memory_analysis().temp_size_in_bytes < bound
    backward = jax.jit(jax.grad(lambda x, q: jnp.square(quantized_matmul(x, q)).sum())).lower(x, abstract).compile()
    assert backward.memory_analysis().temp_size_in_bytes < bound


def test_int8_activations_are_a_value_of_the_weight():
    q = quantize(weight((256, 96)), "int8")
    x = weight((3, 256), 1)
    exact = x @ dequantize(q)
    rounded = linear(x, q.replace(activations="int8"))
    assert 0 < np.abs(rounded - exact).max()
    # Each activation is off by at most half of one of 127 steps of its row's largest.
    step = np.abs(x).max(axis=1, keepdims=True) / 254
    assert (np.abs(rounded - exact) <= step * np.abs(dequantize(q)).sum(axis=0) * 1.001).all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"format": "fp4"}, "fp4"),
        ({"format": "int4", "block": 16}, "blocks of 16"),
        ({"format": "nf4", "block": 128}, "blocks of 128"),
        ({"format": "int8", "double": True}, "double"),
    ],
)
def test_unknown_formats_are_refused_by_name(settings, said):
    with pytest.raises(PunaError, match=said):
        quantize(weight((64, 64)), **settings)


def test_an_odd_number_of_inputs_is_refused_at_four_bits():
    with pytest.raises(PunaError, match="33 inputs"):
        quantize(weight((33, 64)), "nf4")


def quantized_model(settings):
    params = init_params(CONFIG, jax.random.key(0))
    layers = {name: quantize(w, **settings) if name in LINEARS else w for name, w in params["layers"].items()}
    return {**params, "layers": layers}


@pytest.mark.parametrize("name", ["int8", "int4 of 64", "nf4", "nf4 double"])
def test_a_sharded_model_computes_what_one_device_does(name):
    params = quantized_model(FORMATS[name])
    tokens = jax.random.randint(jax.random.key(1), (8, 16), 0, 64)

    def loss(embed, params):
        return jnp.square(forward({**params, "embed": embed}, tokens, CONFIG)[0]).mean()

    mesh = make_mesh(fsdp=4, tensor=2)
    placed = place(params, CONFIG, mesh)
    wq = placed["layers"]["wq"]
    assert wq.codes.sharding.spec == PartitionSpec(None, ("tensor",), ("fsdp",))
    assert wq.codes.addressable_shards[0].data.size * 8 == wq.codes.size
    value, gradient = jax.jit(jax.value_and_grad(loss))(params["embed"], params)
    sharded_value, sharded_gradient = jax.jit(jax.value_and_grad(loss))(placed["embed"], placed)
    np.testing.assert_allclose(sharded_value, value, rtol=1e-5)
    np.testing.assert_allclose(sharded_gradient, gradient, atol=1e-5 * np.abs(gradient).max())


def test_an_axis_that_would_cut_a_block_is_replicated_and_said_once(caplog):
    mesh = make_mesh(fsdp=8)
    q = quantize(weight((2, 256, 64)), "nf4")  # 4 blocks a row, 8 ways
    for _ in range(2):
        where = weight_shardings(q, ("layers", "embed", "heads"), mesh, "layers/once")
    assert where.codes.spec == PartitionSpec(None, None, None)
    assert [record.getMessage().count("embed") for record in caplog.records] == [1]


def test_unstacked_layers_give_the_same_logits():
    params = quantized_model(FORMATS["nf4"])
    tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, 64)
    stacked, _ = forward(params, tokens, CONFIG)
    np.testing.assert_allclose(forward(unstack(params), tokens, CONFIG)[0], stacked, atol=1e-5)
    np.testing.assert_allclose(forward(stack(unstack(params)), tokens, CONFIG)[0], stacked, atol=1e-6)
    assert param_specs(CONFIG)["layers"]["wq"].shape == params["layers"]["wq"].shape
