"""Adapters: only they train, whatever is under them, and merging them changes no logit."""

import logging
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from model import LlamaConfig, forward, init_params, make_mesh, stack, unstack
from model.errors import PunaError
from model.layout import place
from model.linear import linear
from model.lora import LoraArray, add, join, split, with_dropout
from model.merge import merge
from model.params import LINEARS
from model.quantize import dequantize, quantize

pytestmark = pytest.mark.slow

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
TOKENS = jax.random.randint(jax.random.key(9), (8, 12), 0, 64)
BASES = ("float32", "int8", "int4", "nf4")


def base_params(kind="float32", config=CONFIG):
    params = init_params(config, jax.random.key(0))
    if kind == "float32":
        return params
    layers = {name: quantize(w, kind) if name in LINEARS else w for name, w in params["layers"].items()}
    return {**params, "layers": layers}


def adapted(kind="float32", key=1, **settings):
    """A model with adapters that do something."""
    config, params = add(base_params(kind), CONFIG, jax.random.key(key), **settings)
    return config, noisy(params, key)


def noisy(params, key):
    layers = {
        name: replace(w, b=jax.random.normal(jax.random.key(key), w.b.shape) * 0.05) if isinstance(w, LoraArray) else w
        for name, w in params["layers"].items()
    }
    return {**params, "layers": layers}


def logits(params, config=CONFIG):
    with jax.default_matmul_precision("highest"):
        return np.asarray(forward(params, TOKENS, config)[0])


def loss(params):
    out, _ = forward(params, TOKENS[:, :-1], CONFIG)
    return optax.softmax_cross_entropy_with_integer_labels(out, TOKENS[:, 1:]).mean()


def train(params, steps=3):
    """Adam on the trained part; returns the trained and frozen parts after it, the losses, and the compiled step."""
    trained, frozen = split(params)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(trained, state, frozen):
        value, gradient = jax.value_and_grad(lambda trained: loss(join(trained, frozen)))(trained)
        with jax.numpy_dtype_promotion("standard"):  # Optax counts steps in integers
            updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(trained, updates), state, value

    state = optimizer.init(trained)
    compiled = step.lower(trained, state, frozen).compile()
    losses = []
    for _ in range(steps):
        trained, state, value = step(trained, state, frozen)
        losses.append(float(value))
    return trained, frozen, losses, compiled


def nbytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", BASES)
def test_fresh_adapters_change_nothing(kind, dora):
    plain = base_params(kind)
    _, params = add(plain, CONFIG, jax.random.key(1), dora=dora, targets=["q_proj", "down_proj"])
    np.testing.assert_allclose(logits(params), logits(plain), atol=1e-5)


@pytest.mark.parametrize("kind", ["float32", "nf4"])
def test_training_leaves_the_base_as_it_was_and_keeps_nothing_for_it(kind):
    _, params = adapted(kind, rank=4)
    before = jax.tree.map(np.array, split(params)[1])
    trained, frozen, losses, compiled = train(params)
    assert losses[-1] < losses[0]
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(frozen), strict=True):
        np.testing.assert_array_equal(a, b)
    memory = compiled.memory_analysis()
    # In: base, adapters and two moments. Out: adapters and moments alone, so no gradient or state of the base.
    assert memory.argument_size_in_bytes <= nbytes(frozen) + 3 * nbytes(trained) + 1024
    assert memory.output_size_in_bytes <= 3 * nbytes(trained) + 1024
    text = compiled.as_text()
    whole = f"f32[{CONFIG.num_hidden_layers},{CONFIG.hidden_size},{CONFIG.intermediate_size}]"
    if kind == "nf4":  # no stacked float weight of any linear, as a gradient or otherwise
        assert whole not in text


def test_split_and_join_are_inverse_with_saved_modules():
    config, params = add(
        base_params(), CONFIG, jax.random.key(1), targets=["v_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    trained, frozen = split(params, ["embed_tokens", "lm_head"])
    assert frozen["embed"] is None and frozen["lm_head"] is None and frozen["layers"]["wv"].a is None
    assert len(jax.tree.leaves(trained)) == 4
    again = join(trained, frozen)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, again, params)))
    np.testing.assert_array_equal(logits(again, config), logits(params, config))


def test_saved_modules_untie_a_tied_model():
    tied = replace(CONFIG, tie_word_embeddings=True)
    config, params = add(base_params(config=tied), tied, jax.random.key(1), modules_to_save=["embed_tokens"])
    assert not config.tie_word_embeddings
    np.testing.assert_array_equal(params["lm_head"], params["embed"].T)


@pytest.mark.parametrize("dora", [False, True])
def test_merged_is_adapted_on_a_float_base_with_one_and_two_adapters(dora):
    config, params = adapted(rank=4, alpha=8.0, dora=dora)
    merged, errors = merge(params)
    assert errors == {}
    np.testing.assert_allclose(logits(merged), logits(params), atol=1e-5)
    _, twice = add(params, config, jax.random.key(7), rank=2, rslora=True, dora=dora, targets=["q_proj"])
    twice = noisy(twice, 5)
    np.testing.assert_allclose(logits(merge(twice)[0]), logits(twice), atol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_merging_into_a_quantized_base_says_what_it_cost(kind):
    _, params = adapted(kind, rank=4, targets=["q_proj"])
    merged, errors = merge(params)
    assert errors.keys() == {"layers/wq"}
    w, before = params["layers"]["wq"], dequantize(params["layers"]["wq"].base)
    exact = before + w.scale[:, None, None] * jnp.matmul(w.a, w.b, precision="highest")
    after = dequantize(merged["layers"]["wq"])
    relative = jnp.linalg.norm(after - exact, axis=(1, 2)) / jnp.linalg.norm(exact, axis=(1, 2))
    np.testing.assert_allclose(errors["layers/wq"], relative.max(), rtol=1e-4)
    assert merged["layers"]["wq"].format == kind and 0 < errors["layers/wq"] < 0.2


def test_ranks_that_differ_are_padded_and_the_padding_stays_zero():
    settings = {"rank": 4, "rank_pattern": {"layers.1.self_attn.q_proj": 2}, "targets": ["q_proj", "v_proj"]}
    _, params = add(base_params(), CONFIG, jax.random.key(1), **settings)
    assert params["layers"]["wq"].ranks == (4, 2) and params["layers"]["wv"].ranks == (4, 4)
    trained, *_ = train(params)
    assert not np.asarray(trained["layers"]["wq"].a[1, :, 2:]).any()
    assert not np.asarray(trained["layers"]["wq"].b[1, 2:]).any()
    assert np.asarray(trained["layers"]["wq"].b[1, :2]).all()


def test_dropout_is_fresh_for_each_key_and_right_on_average():
    _, params = adapted(rank=4, dropout=0.5, targets=["q_proj"])
    first, again, other = (logits(with_dropout(params, jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    one = jax.tree.map(lambda x: x[0], params["layers"]["wq"])
    x = jax.random.normal(jax.random.key(2), (4, 128))
    keys = jax.random.split(jax.random.key(3), 4000)
    mean = jax.vmap(lambda key: linear(x, replace(one, key=key)))(keys).mean(axis=0)
    spread = jax.vmap(lambda key: linear(x, replace(one, key=key)))(keys).std(axis=0)
    assert (np.abs(mean - linear(x, one)) < 6 * spread / 4000**0.5 + 1e-5).all()


@pytest.mark.parametrize("kind", ["float32", "nf4"])
def test_sharded_training_is_training_on_one_device(kind, caplog):
    _, params = adapted(kind, rank=4)
    trained, _, losses, _ = train(params)
    placed = place(params, CONFIG, make_mesh(fsdp=4, tensor=2))
    with caplog.at_level(logging.ERROR):
        sharded, _, sharded_losses, _ = train(placed)
    np.testing.assert_allclose(sharded_losses, losses, rtol=1e-4)
    wq = placed["layers"]["wq"]
    assert wq.a.sharding.spec == PartitionSpec(None, "fsdp", None)
    assert wq.b.sharding.spec == PartitionSpec(None, None, "tensor")
    assert jax.tree.structure(sharded) == jax.tree.structure(trained)


def test_a_target_named_twice_is_one():
    once, twice = (add(base_params(), CONFIG, jax.random.key(0), targets=["q_proj"] * n)[1] for n in (1, 2))
    assert jax.tree.structure(once) == jax.tree.structure(twice)
    assert isinstance(twice["layers"]["wq"].base, jax.Array)


def test_unstacked_adapters_compute_the_same():
    _, params = adapted("nf4", rank=4)
    np.testing.assert_allclose(logits(unstack(params)), logits(params), atol=1e-5)
    np.testing.assert_allclose(logits(stack(unstack(params))), logits(params), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 0}, "rank 0"),
        ({"targets": ["q_proj", "x_proj"]}, "x_proj"),
        ({"targets": []}, "targets"),
        ({"modules_to_save": ["norm"]}, "norm"),
        ({"rank_pattern": {"x_proj": 2}}, "x_proj"),
        ({"targets": ["q_proj"], "alpha_pattern": {"v_proj": 2.0}}, "v_proj"),
        ({"rank_pattern": {"q_proj": 0}}, "rank 0"),
        ({"rank": 10**6}, "rank 1000000 of self_attn.q_proj: more than"),
        ({"alpha": float("nan")}, "alpha"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "alpha"),
        ({"rank_pattern": {"(": 2}}, r"lora rank_pattern: '\(' is no regular expression"),
        ({"alpha_pattern": {"[": 2.0}}, r"lora alpha_pattern: '\[' is no regular expression"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings, said):
    with pytest.raises(PunaError, match=said):
        add(base_params(), CONFIG, jax.random.key(0), **settings)
