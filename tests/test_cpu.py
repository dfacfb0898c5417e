"""What is only about CPUs is in no program for another platform, and gives the plain forms' numbers on this one."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import cpu
from model.attention import Mask, _attend, attend
from model.linear import product
from model.quantize import chunk_rows, dequantize, quantize
from model.transposed import TransposedArray

X = np.random.default_rng(0).normal(size=(3, 256)).astype(np.float32)
W = np.random.default_rng(1).normal(size=(256, 128)).astype(np.float32)
ROWS = TransposedArray(W.T.copy())
NF4, INT4, INT8 = (quantize(W, format) for format in ("nf4", "int4", "int8"))
Q = np.random.default_rng(2).normal(size=(1, 256, 2, 8)).astype(np.float32)
KV = np.random.default_rng(3).normal(size=(1, 2, 256, 8)).astype(np.float32)


def text(function, *arguments, platform):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


CHUNKS = "while"  # a loop over chunks of the weight, each decoded while it is in the processor's cache
CASES = {
    "transposed": (product, (X, ROWS), "optimization_barrier"),
    "transposed float16": (product, (X.astype(np.float16), TransposedArray(W.T.astype(np.float16))), "while"),
    "int4": (product, (X, INT4), CHUNKS),
    "attention": (attend, (Q, KV, KV, Mask()), "concatenate"),
} | ({"nf4": (product, (X, NF4), CHUNKS)} if cpu._HAS_AVX512 else {})


@pytest.mark.parametrize("case", CASES)
def test_programs_for_gpus_contain_no_form_of_cpus(case):
    function, arguments, sign = CASES[case]
    assert re.search(sign, text(function, *arguments, platform="cpu"))
    assert not re.search(sign, text(function, *arguments, platform="cuda"))


def test_the_forms_of_cpus_give_the_numbers_of_the_plain_ones():
    np.testing.assert_allclose(product(X, ROWS), X @ W, atol=1e-4)
    for quantized in (NF4, INT4, INT8):
        np.testing.assert_allclose(product(X, quantized), X @ np.asarray(dequantize(quantized)), atol=2e-4)
    seen = Mask().dense(256, 256)
    in_blocks = cpu.in_query_blocks(_attend, Q, KV, KV, seen)
    np.testing.assert_allclose(in_blocks, _attend(Q, KV, KV, seen), atol=1e-5)
    np.testing.assert_array_equal(
        jax.jit(attend)(Q, KV, KV, Mask()), jax.jit(partial(cpu.in_query_blocks, _attend))(Q, KV, KV, seen)
    )


@pytest.mark.parametrize(("n", "width", "weights"), [(128, 256, 2**12), (100, 64, 1000), (7, 1000, 10), (64, 8, 2**20)])
def test_a_chunk_is_a_divisor_of_the_rows(n, width, weights):
    rows = chunk_rows(n, width, weights)
    assert n % rows == 0 and (rows * width <= weights or rows == 1)


def test_caches_of_16_bit_models_are_float32_where_the_model_lies_on_a_cpu():
    assert cpu.platform_of({"embed": jnp.zeros(2)}) == cpu.PLATFORM
    assert cpu.CACHE_DTYPE == jnp.float32
