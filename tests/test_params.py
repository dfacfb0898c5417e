"""The parameter table and what comes from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import LlamaConfig, abstract_params, init_params, make_mesh, param_count, stack, unstack
from model.params import param_shardings, param_specs

TINY = LlamaConfig(
    vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=8,
    num_key_value_heads=4, attention_bias=True, mlp_bias=True,
)  # fmt: skip


def equal(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_init_fills_the_table(dtype):
    params = init_params(TINY, jax.random.key(0), dtype)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract_params(TINY, dtype)
    )
    assert sum(x.size for x in jax.tree.leaves(params)) == param_count(TINY)
    wq = params["layers"]["wq"].astype(jnp.float32)
    assert abs(wq.std() - TINY.initializer_range) < 0.001
    assert not params["layers"]["bq"].any()
    assert (params["final_norm"] == 1).all()


@pytest.mark.slow
def test_a_weight_does_not_depend_on_which_others_exist():
    bare = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    full, less = init_params(TINY, jax.random.key(0)), init_params(bare, jax.random.key(0))
    assert all(np.array_equal(full["layers"][name], less["layers"][name]) for name in less["layers"])


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_parameters_are_born_sharded_with_the_same_numbers(sizes):
    mesh = make_mesh(**sizes)
    params = init_params(TINY, jax.random.key(0), mesh=mesh)
    assert equal(params, init_params(TINY, jax.random.key(0)))
    expected = param_shardings(TINY, mesh)
    jax.tree.map(lambda x, s: pytest.fail("elsewhere") if x.sharding != s else None, params, expected)
    wq = params["layers"]["wq"]
    assert wq.addressable_shards[0].data.size * mesh.shape["fsdp"] * mesh.shape["tensor"] == wq.size


def test_unstack_and_stack_are_inverse():
    params = init_params(TINY, jax.random.key(0))
    loose = unstack(params)
    assert [layer["wq"].shape for layer in loose["layers"]] == [(64, 64)] * 3
    assert equal(stack(loose), params)
    assert unstack(loose) is loose
    assert stack(params) is params


def test_every_axis_has_a_rule_and_every_shape_an_axis():
    from model.sharding import RULES

    for spec in jax.tree.leaves(param_specs(TINY), is_leaf=lambda x: hasattr(x, "axes")):
        assert len(spec.shape) == len(spec.axes)
        assert set(spec.axes) <= set(RULES)
