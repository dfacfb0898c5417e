"""8-bit activations: int4 weights as CPUs hold them against the plain ones, and what rounding does to a real text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import load_model
from model import LlamaConfig, forward, init_params
from model.errors import PunaError
from model.layout import per_layer, round_activations
from model.linear import linear
from model.lora import LoraArray, add
from model.params import LINEARS
from model.quantize import dequantize, quantize, rounded_groups
from model.sharding import make_mesh
from model.tiles import FEW_ROWS, TiledArray, tiled
from model.tokenizer import load_tokenizer

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64,
)  # fmt: skip


def rounded(x, block):
    codes, scale = rounded_groups(x, block)
    return np.asarray(codes, np.float64) * np.asarray(scale, np.float64)[..., None]


def test_rounding_is_to_the_nearest_of_127_steps_of_each_group():
    x = jax.random.normal(jax.random.key(0), (3, 128)).at[0, :32].set(0)
    error = np.abs(rounded(x, 32).reshape(3, 128) - x).reshape(3, 4, 32)
    assert (error <= np.abs(x).reshape(3, 4, 32).max(axis=2, keepdims=True) / 254 * (1 + 1e-5)).all()
    assert np.array_equal(rounded(x, 32)[0, 0], np.zeros(32))


@pytest.mark.parametrize(("n_in", "n_out", "block"), [(128, 64, 64), (64, 100, 32), (384, 130, 128), (2752, 64, 64)])
@pytest.mark.parametrize("rows", [1, 3, FEW_ROWS + 1])
def test_a_tiled_weight_multiplies_rounded_activations_exactly(n_in, n_out, block, rows):
    """Codes at both ends of their range, and weights of all sizes; the reference is float64."""
    size = jnp.exp2(jax.random.uniform(jax.random.key(2), (n_in, 1), minval=-8, maxval=3))
    w = quantize(jax.random.normal(jax.random.key(0), (n_in, n_out)) * size, "int4", block)
    x = jax.random.normal(jax.random.key(1), (rows, n_in)).at[:, :block].set(-3)
    want = rounded(x, block).reshape(rows, n_in) @ np.asarray(dequantize(w), np.float64)
    for product in (jax.jit(linear)(x, tiled(w)), jax.jit(linear)(x, w.replace(activations="int8"))):
        np.testing.assert_allclose(product, want, atol=2e-6 * np.abs(want).max())


def test_sums_of_16_bits_hold_the_largest_products():
    w = quantize(jnp.ones((64, 64)), "int4")
    for x in (jnp.ones((1, 64)), -jnp.ones((1, 64)), jnp.tile(jnp.array([[1.0, -1.0]]), 32)):
        np.testing.assert_allclose(linear(x, tiled(w)), linear(x, w), rtol=1e-6)


def model(format, lora=False):
    params = init_params(CONFIG, jax.random.key(0))
    if format:
        layers = {name: quantize(w, format) if name in LINEARS else w for name, w in params["layers"].items()}
        params = {**params, "layers": layers}
    if lora:
        _, params = add(params, CONFIG, jax.random.key(1), rank=2, targets=["q_proj", "down_proj"])
        moved = [w for w in params["layers"].values() if isinstance(w, LoraArray)]
        layers = {k: w.replace(b=w.b + 0.1) if any(w is m for m in moved) else w for k, w in params["layers"].items()}
        params = {**params, "layers": layers}
    return per_layer(params)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "under an adapter"])
def test_a_model_of_tiles_computes_what_the_same_weights_do_elsewhere(lora):
    """On a mesh no weight is tiled."""
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 64)
    plain = round_activations(model("int4", lora), make_mesh(devices=jax.devices()[:1]))
    tiles = round_activations(model("int4", lora))
    leaves = jax.tree.leaves(tiles["layers"], is_leaf=lambda w: isinstance(w, TiledArray))
    assert sum(isinstance(w, TiledArray) for w in leaves) == 2 * len(LINEARS)
    want = forward(plain, tokens, CONFIG)[0]
    np.testing.assert_allclose(forward(tiles, tokens, CONFIG)[0], want, atol=2e-5)
    assert np.abs(want - forward(model("int4", lora), tokens, CONFIG)[0]).max() > 1e-4  # rounding does something


@pytest.mark.parametrize(("format", "said"), [(None, "no weight of the model is quantized"), ("nf4", "codes of nf4")])
def test_weights_without_integer_codes_are_refused(format, said):
    with pytest.raises(PunaError, match=said):
        round_activations(model(format))


@pytest.mark.slow
@pytest.mark.parametrize("format", ["int8", "int4"])
def test_the_perplexity_of_stories_is_that_of_the_weights_alone(data_dir, format):
    """Within 1 %: a trained model on the kind of text that it was trained on."""
    folder = data_dir / "stories260k-derived" / "hf_sharded"
    config, params = load_model(folder, quantize=format, layout="per_layer")
    text = (data_dir / "stories260k" / "tinystories_sample.txt").read_text(encoding="utf-8")
    ids = load_tokenizer(folder).encode(text)[: 7 * 256]
    tokens = jnp.asarray(ids).reshape(7, 256)

    @jax.jit
    def perplexity(params):
        logprobs = jax.nn.log_softmax(forward(params, tokens, config)[0][:, :-1])
        return jnp.exp(-jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1).mean())

    alone = perplexity(params)
    both = perplexity(round_activations(dict(params)))
    assert 2 < alone < 8
    assert both != alone and abs(both / alone - 1) < 0.01
