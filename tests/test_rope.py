"""RoPE frequencies against transformers' own functions: unscaled to the last bit, scaled to a few of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig as HFConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from model import PRESETS, LlamaConfig, RopeScaling
from model.errors import PunaError
from model.rope import dynamic_frequencies, frequencies, tables

BASE = {"hidden_size": 512, "num_attention_heads": 4, "max_position_embeddings": 4096, "vocab_size": 8}


def ours(theta, scaling=None):
    return LlamaConfig(**BASE, intermediate_size=8, num_hidden_layers=1, rope_theta=theta, rope_scaling=scaling)


SCALINGS = [
    None,
    RopeScaling("linear", 4.0),
    RopeScaling("llama3", 8.0, 8192, 1.0, 4.0),
    RopeScaling("llama3", 32.0, 8192, 1.0, 4.0),
    RopeScaling("yarn", 4.0, 4096),
    RopeScaling("yarn", 16.0, 1024, beta_fast=24.0, beta_slow=2.0, truncate=False),
    RopeScaling("yarn", 16.0, 1024, mscale=0.7, mscale_all_dim=1.3),
]


@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1e6])
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s.rope_type if s else "default")
def test_frequencies_equal_transformers(theta, scaling):
    config = ours(theta, scaling)
    theirs = LlamaRotaryEmbedding(HFConfig(**BASE, rope_theta=theta, rope_scaling=scaling and scaling.to_hf()))
    inverse, factor = frequencies(config)
    np.testing.assert_allclose(inverse, theirs.inv_freq.numpy(), rtol=1e-6, atol=0)
    assert factor == theirs.attention_scaling


@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_unscaled_frequencies_are_transformers_bits(theta, head_dim):
    config = LlamaConfig(head_dim=head_dim, rope_theta=theta)
    theirs = LlamaRotaryEmbedding(HFConfig(**BASE | {"head_dim": head_dim}, rope_theta=theta))
    np.testing.assert_array_equal(frequencies(config)[0], theirs.inv_freq.numpy())


def test_dynamic_frequencies_equal_transformers():
    config = ours(10000.0, RopeScaling("dynamic", 2.0))
    theirs = LlamaRotaryEmbedding(HFConfig(**BASE, rope_theta=10000.0, rope_scaling=config.rope_scaling.to_hf()))
    turn = jax.jit(tables, static_argnums=(0, 2))
    for length in (100, 4096, 4097, 10000):
        cos, sin = theirs(torch.zeros(1), torch.arange(length)[None])
        got = turn(config, jnp.arange(length)[None], None)
        # Angles reach 10,000 radians, where one unit in the last place is 1e-3.
        np.testing.assert_allclose(got[0][0], cos[0, :, :64].numpy(), atol=2e-3)
        np.testing.assert_allclose(got[1][0], sin[0, :, :64].numpy(), atol=2e-3)
        np.testing.assert_allclose(dynamic_frequencies(config, jnp.asarray(length)), theirs.inv_freq.numpy(), rtol=1e-6)


def test_frequencies_are_the_same_inside_jit():
    config = PRESETS["llama3.1-8b"]
    np.testing.assert_array_equal(jax.jit(lambda: frequencies(config)[0])(), frequencies(config)[0])


GOLDEN = {
    "llama3_8B_f8": (128, 500000.0, RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)),
    "llama32_1B_hd64_f32": (64, 500000.0, RopeScaling("llama3", 32.0, 8192, 1.0, 4.0)),
    "linear_f4_hd128": (128, 10000.0, RopeScaling("linear", 4.0)),
    "yarn_f4_hd128": (128, 10000.0, RopeScaling("yarn", 4.0, 4096)),
    "default_hd128": (128, 10000.0, None),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_frequencies(name, data_dir):
    golden = np.load(data_dir / "stories260k-derived" / "rope_inv_freq_golden.npz")[name]
    head_dim, theta, scaling = GOLDEN[name]
    config = LlamaConfig(head_dim=head_dim, rope_theta=theta, rope_scaling=scaling)
    np.testing.assert_allclose(frequencies(config)[0], golden, rtol=3e-7)


def test_llama_3_1_scales_29_of_64_frequencies_and_smooths_6():
    plain, scaled = frequencies(PRESETS["llama3-8b"])[0], frequencies(PRESETS["llama3.1-8b"])[0]
    ratio = np.asarray(plain / scaled)
    assert (ratio > 7.999).sum() == 29
    assert ((ratio > 1.0001) & (ratio < 7.999)).sum() == 6


@pytest.mark.parametrize("key", ["low_freq_factor", "original_max_position_embeddings", "factor"])
@pytest.mark.parametrize("value", [0.0, -1, float("nan"), float("inf"), True, "8"])
def test_a_number_that_is_no_length_or_ratio_is_refused(key, value):
    given = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    with pytest.raises(PunaError, match=f"rope_scaling: {key} is .*; give a number above 0"):
        RopeScaling.from_hf({"rope_type": "llama3", **given, key: value}, 512)
