"""The forward pass against transformers' LlamaForCausalLM, and against itself in every other form."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import config_of, hf_config, hf_logits, hf_model, params_of

from model import LlamaConfig, RopeScaling, abstract_params, hidden, init_cache, init_params, logits, make_mesh, unstack
from model import forward as eager_forward
from model.errors import PunaError
from model.layout import per_layer, place
from model.linear import linear
from model.llama import SPLIT_SEQUENCE, block, rms_norm
from model.pieces import Pieces
from model.transposed import TransposedArray

pytestmark = pytest.mark.slow

ATOL = 1e-4
forward = jax.jit(eager_forward, static_argnames=("config", "window", "dtype", "block", "norm", "remat"))

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

VARIANTS = {
    "llama1": {},
    "gqa_4_to_1": {"num_key_value_heads": 2},
    "gqa_8_to_1": {"num_attention_heads": 16, "num_key_value_heads": 2},
    "mqa": {"num_key_value_heads": 1},
    "head_dim": {"head_dim": 24},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "eps": {"rms_norm_eps": 1e-2},
    "theta": {"rope_theta": 500000.0},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "dynamic_beyond": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16},
    "llama3": {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
    "llama3.2_factor_32": {"rope_scaling": LLAMA3 | {"factor": 32.0}, "tie_word_embeddings": True},
    "yarn": {"rope_scaling": YARN},
    "yarn_mscale": {"rope_scaling": YARN | {"mscale": 0.8, "mscale_all_dim": 0.5, "beta_fast": 20, "beta_slow": 2}},
    "yarn_untruncated": {"rope_scaling": YARN | {"truncate": False, "attention_factor": 1.3}},
}


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 99, (2, 40))


@pytest.fixture(autouse=True)
def highest():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers(name, tokens):
    model = hf_model(hf_config(**VARIANTS[name]))
    ours, _ = forward(params_of(model), jnp.asarray(tokens), config_of(model))
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, hf_logits(model, tokens), atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", ["llama1", "linear", "llama3", "llama3.2_factor_32", "yarn"])
@pytest.mark.parametrize("start", [100, 8192 + 7])
def test_far_positions_equal_transformers(name, start, tokens):
    """Beyond the original context, and past 8,192, where a frequency off by one bit already shows."""
    model = hf_model(hf_config(**VARIANTS[name]))
    positions = np.broadcast_to(np.arange(start, start + tokens.shape[1]), tokens.shape)
    ours, _ = forward(params_of(model), jnp.asarray(tokens), config_of(model), positions=jnp.asarray(positions))
    np.testing.assert_allclose(ours, hf_logits(model, tokens, positions), atol=ATOL, rtol=0)


def test_bfloat16_checkpoint_equals_transformers(tokens):
    """bfloat16 weights computed in float32 are the same numbers on both sides."""
    model = hf_model(hf_config(num_key_value_heads=2))
    for weight in model.parameters():
        weight.data = weight.data.bfloat16().float()  # the buffers of RoPE stay as a loaded checkpoint has them
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params_of(model))
    ours, _ = forward(params, jnp.asarray(tokens), config_of(model), dtype=jnp.float32)
    np.testing.assert_allclose(ours, hf_logits(model, tokens), atol=ATOL, rtol=0)


def test_bfloat16_compute_is_near_float32(tokens):
    """By default the embedding's dtype is computed in; every rounding is one of bfloat16's 8 bits."""
    model = hf_model(hf_config())
    params, config = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params_of(model)), config_of(model)
    x, _ = hidden(params, jnp.asarray(tokens), config)
    exact, _ = hidden(params, jnp.asarray(tokens), config, dtype=jnp.float32)
    assert x.dtype == jnp.bfloat16
    assert exact.dtype == jnp.float32
    assert jnp.abs(x.astype(jnp.float32) - exact).mean() < 2**-8 * 4 * jnp.abs(exact).mean()


def random_model(**changes):
    config = config_of(hf_model(hf_config(**({"num_key_value_heads": 2, "vocab_size": 96} | changes))))
    params = init_params(config, jax.random.key(0))
    return jax.tree.map(lambda x: x if (x == 1).all() else x * 6, params), config


@pytest.mark.parametrize("form", [lambda p: p, unstack, per_layer], ids=["scan", "loop", "decoding"])
@pytest.mark.parametrize("changes", [{}, {"rope_scaling": LLAMA3}], ids=["default", "llama3"])
def test_prefill_and_decode_equal_the_full_pass(form, changes, tokens):
    params, config = random_model(**changes)
    whole, _ = forward(params, jnp.asarray(tokens % 96), config)
    params, cache = form(params), init_cache(config, 2, 64)
    parts, at = [], 0
    for take, window in ((23, None), (1, 24), (1, 32), (7, 32), (1, 64), (7, None)):
        part, cache = forward(params, jnp.asarray(tokens[:, at : at + take] % 96), config, cache=cache, window=window)
        parts.append(part)
        at += take
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=ATOL, rtol=0)
    assert cache.lengths.tolist() == [40, 40]


@pytest.mark.parametrize("rows", [1, 8, 65])
def test_a_transposed_weight_is_the_same_weight(rows):
    x, w = (jax.random.normal(jax.random.key(n), shape, jnp.float32) for n, shape in ((0, (rows, 48)), (1, (48, 80))))
    transposed = TransposedArray(w.T)
    assert transposed.shape == w.shape
    np.testing.assert_allclose(linear(x, transposed), linear(x, w), atol=1e-5)
    for dtype in (jnp.bfloat16, jnp.float16):
        narrow = x.astype(dtype)
        for weight in (w, w.astype(dtype)):
            y = linear(narrow, TransposedArray(weight.T), out_dtype=jnp.float32)
            np.testing.assert_allclose(y, linear(narrow, weight, out_dtype=jnp.float32), atol=1e-5)
            assert linear(narrow, TransposedArray(weight.T)).dtype == dtype


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_decoding_never_copies_a_weight_in_a_wider_type(dtype):
    """By the compiler's account, a step of one token through weights as decoding holds them: the head is the largest,
    and tied embeddings are a head without a copy."""
    params, config = random_model(vocab_size=16384, hidden_size=256, tie_word_embeddings=True)
    params = per_layer(jax.tree.map(lambda x: x.astype(dtype), params))
    assert params["lm_head"].rows is params["embed"]
    step = jax.jit(lambda params, tokens: forward(params, tokens, config)[0]).lower(params, jnp.ones((1, 1), jnp.int32))
    temporaries = step.compile().memory_analysis().temp_size_in_bytes
    assert temporaries < 4 * params["embed"].size / 3


def test_rows_of_unequal_length_and_slots(tokens):
    """Right-padded prompts (segment 0) decode as each alone does; slots put them in any rows of a larger cache."""
    params, config = random_model()
    params, tokens = unstack(params), tokens % 96
    lengths, slots = [9, 17], jnp.asarray([3, 1])
    real = np.arange(17)[None] < np.array(lengths)[:, None]
    cache = init_cache(config, 5, 32).unstack()
    _, cache = forward(
        params,
        jnp.asarray(tokens[:, :17]),
        config,
        segments=jnp.asarray(real.astype(np.int32)),
        cache=cache,
        slots=slots,
    )
    assert cache.lengths.tolist() == [0, 17, 0, 9, 0]
    following = jnp.asarray([[tokens[0, 9]], [tokens[1, 17]]])
    together, _ = forward(params, following, config, cache=cache, slots=slots)
    for row, length in enumerate(lengths):
        alone, _ = forward(params, jnp.asarray(tokens[row : row + 1, : length + 1]), config)
        np.testing.assert_allclose(together[row, 0], alone[0, -1], atol=ATOL, rtol=0)


def test_writes_past_capacity_are_dropped(tokens):
    params, config = random_model()
    cache = init_cache(config, 2, 8)
    at = jnp.asarray([[6, 7, 8], [0, 9, 20]])
    _, cache = forward(params, jnp.asarray(tokens[:, :3] % 96), config, positions=at, cache=cache)
    written = np.abs(np.asarray(cache.k)).max(axis=(0, 2, 4)) > 0
    assert [np.flatnonzero(row).tolist() for row in written] == [[6, 7], [0]]
    assert cache.lengths.tolist() == [8, 1]


def test_packed_equals_unpacked(tokens):
    """Documents side by side in one row, with padding, give what each gives alone."""
    params, config = random_model()
    tokens = tokens[0] % 96
    documents = [tokens[:11], tokens[11:13], tokens[13:30]]
    row = np.concatenate([*documents, tokens[30:34]])
    segments = np.repeat([1, 2, 5, 0], [11, 2, 17, 4])
    packed, _ = forward(params, jnp.asarray(row)[None], config, segments=jnp.asarray(segments)[None])
    restarted = np.concatenate([np.arange(n) for n in (11, 2, 17, 4)])
    given, _ = forward(
        params,
        jnp.asarray(row)[None],
        config,
        segments=jnp.asarray(segments)[None],
        positions=jnp.asarray(restarted)[None],
    )
    np.testing.assert_allclose(packed, given, atol=1e-5, rtol=0)
    at = 0
    for document in documents:
        alone, _ = forward(params, jnp.asarray(document)[None], config)
        np.testing.assert_allclose(packed[0, at : at + len(document)], alone[0], atol=ATOL, rtol=0)
        at += len(document)
    assert jnp.isfinite(packed).all()


def test_dynamic_rope_takes_the_length_of_each_segment(tokens):
    params, config = random_model(rope_scaling={"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=8)
    row = tokens[:1] % 96
    segments = jnp.asarray(np.repeat([1, 2], [25, 15]))[None]
    packed, _ = forward(params, jnp.asarray(row), config, segments=segments)
    for part in (slice(0, 25), slice(25, 40)):
        alone, _ = forward(params, jnp.asarray(row[:, part]), config)
        np.testing.assert_allclose(packed[:, part], alone, atol=ATOL, rtol=0)


def test_dynamic_rope_refuses_a_cache_beyond_the_original_context():
    config = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, rope_scaling=RopeScaling("dynamic", 2.0),
    )  # fmt: skip
    params = init_params(config, jax.random.key(0))
    ok, _ = forward(params, jnp.ones((1, 4), jnp.int32), config, cache=init_cache(config, 1, 16))
    assert ok.shape == (1, 4, 8)
    with pytest.raises(PunaError, match="17 positions reaches beyond the original context of 16"):
        forward(params, jnp.ones((1, 4), jnp.int32), config, cache=init_cache(config, 1, 17))


MESHES = [{"fsdp": 4, "tensor": 2}, {"fsdp": 8}, {"tensor": 8}, {"data": 2, "context": 2, "tensor": 2}]


@pytest.mark.parametrize("sizes", MESHES, ids=["4x2", "8x1", "1x8", "2x2x2"])
def test_sharded_equals_unsharded(sizes):
    params, config = random_model()
    tokens = jax.random.randint(jax.random.key(1), (8, 24), 0, 96)
    whole, _ = forward(params, tokens, config)
    mesh = make_mesh(**sizes)
    placed = place(params, config, mesh)
    split = partial(block, residual=SPLIT_SEQUENCE)
    for layer in (block, split):
        sharded, _ = forward(placed, tokens, config, block=layer)
        np.testing.assert_allclose(sharded, whole, atol=ATOL, rtol=0)
    cache = init_cache(config, 8, 32, mesh=mesh)
    first, cache = forward(placed, tokens[:, :20], config, cache=cache)
    rest, _ = forward(placed, tokens[:, 20:], config, cache=cache)
    np.testing.assert_allclose(jnp.concatenate([first, rest], axis=1), whole, atol=ATOL, rtol=0)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_and_loop_give_the_same_gradients(remat, tokens):
    params, config = random_model()

    def loss(params, remat):
        out, _ = forward(params, jnp.asarray(tokens % 96), config, remat=remat)
        return jax.nn.logsumexp(out, axis=-1).mean()

    plain = jax.grad(loss)(params, "none")
    for again in (jax.grad(loss)(params, remat), jax.grad(lambda p: loss(unstack(p), remat))(params)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), plain, again)


def test_a_piece_is_replaced_by_passing_a_function(tokens):
    """No-weight norm in every block and at the end: the same as weights of one."""
    params, config = random_model()
    params["layers"]["attn_norm"] = params["layers"]["attn_norm"] * 0 + 1
    params["layers"]["mlp_norm"] = params["layers"]["mlp_norm"] * 0 + 1
    params["final_norm"] = params["final_norm"] * 0 + 1
    bare = lambda x, weight, eps: rms_norm(x, jnp.ones_like(weight), eps)  # noqa: E731
    zeroed = jax.tree.map(lambda x: x, params)
    zeroed["layers"] = zeroed["layers"] | {"attn_norm": params["layers"]["attn_norm"] * 0}
    with_ones, _ = forward(params, jnp.asarray(tokens % 96), config)
    replaced, _ = forward(zeroed, jnp.asarray(tokens % 96), config, block=partial(block, norm=bare), norm=bare)
    np.testing.assert_array_equal(with_ones, replaced)


def test_forward_is_logits_of_hidden(tokens):
    params, config = random_model()
    x, _ = hidden(params, jnp.asarray(tokens % 96), config)
    whole, _ = eager_forward(params, jnp.asarray(tokens % 96), config)
    np.testing.assert_array_equal(logits(params, x, config), whole)


def test_faults():
    params, config = random_model()
    with pytest.raises(PunaError, match="remat 'some' is not known; choose none, dots, full"):
        forward(params, jnp.ones((1, 4), jnp.int32), config, remat="some")
    out, _ = forward(params, jnp.asarray([[1, 2], [1, 96]]), config)  # one past the vocabulary
    assert jnp.isfinite(out[0]).all()
    assert jnp.isnan(out[1, 1]).all()


ARCHITECTURE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 12,
    "rms_norm_eps": 1e-2,
    "rope_theta": 500.0,
    "rope_scaling": RopeScaling("linear", 4.0),
    "tie_word_embeddings": True,
    "attention_bias": True,
    "mlp_bias": True,
    "initializer_range": 0.1,
}
SCALING = {
    "dynamic": {"factor": 3.0},
    "linear": {"factor": 3.0},
    "llama3": {"factor": 3.0, "low_freq_factor": 0.5, "high_freq_factor": 8.0, "original_max_position_embeddings": 20},
    "yarn": {
        "factor": 3.0, "original_max_position_embeddings": 1000, "attention_factor": 1.5, "beta_fast": 2.0,
        "beta_slow": 0.3, "mscale": 0.5, "mscale_all_dim": 2.0, "truncate": False,
    },
}  # fmt: skip


def shapes(config):
    return jax.tree.map(lambda x: x.shape, abstract_params(config))


def logits_of(config):
    """The logits of a fixed input; not jitted: configurations of one shape then share every compiled operation."""
    params = init_params(config, jax.random.key(0))
    # No weight may be zero, or a bias would not show.
    params = jax.tree.map(lambda x: x + 0.01 * jnp.arange(x.size, dtype=x.dtype).reshape(x.shape) % 0.07, params)
    return np.asarray(eager_forward(unstack(params), jnp.arange(60)[None] % 64, config)[0])


def differ(a, b):
    return shapes(a) != shapes(b) or not np.array_equal(logits_of(a), logits_of(b))


SMALL = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32, rope_theta=1000.0,
)  # fmt: skip


def test_every_architectural_field_changes_shapes_or_logits():
    for name, value in ARCHITECTURE.items():
        changes = {name: value} | ({"head_dim": 8} if name == "num_attention_heads" else {})
        assert differ(replace(SMALL, **changes), SMALL), name
    dynamic = replace(SMALL, rope_scaling=RopeScaling("dynamic", 2.0))
    assert differ(replace(dynamic, max_position_embeddings=48), dynamic), "max_position_embeddings"
    layer_norm = Pieces(norm="configs.ablations.layer_norm:norm")
    assert differ(replace(SMALL, pieces=layer_norm), SMALL), "pieces"
    others = {"bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "pieces"}
    assert set(ARCHITECTURE) | others == set(LlamaConfig.__dataclass_fields__)


@pytest.mark.parametrize("kind", SCALING)
def test_every_rope_field_changes_logits(kind):
    start = {
        "dynamic": RopeScaling("dynamic", 2.0),
        "linear": RopeScaling("linear", 2.0),
        "llama3": RopeScaling("llama3", 2.0, 32, 1.0, 4.0),
        "yarn": RopeScaling("yarn", 2.0, 4096),
    }[kind]
    for name, value in SCALING[kind].items():
        other = {"mscale": {"mscale_all_dim": 0.7}, "mscale_all_dim": {"mscale": 0.7}}.get(name, {})
        before, after = replace(start, **other), replace(start, **other, **{name: value})
        assert differ(replace(SMALL, rope_scaling=after), replace(SMALL, rope_scaling=before)), f"{kind}: {name}"
