"""The chunked cross-entropy equals the plain one, sharded or not, and its memory does not grow with the vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.sharding import make_mesh
from train.loss import IGNORE_INDEX, make_loss, make_token_losses

B, T, D, V = 4, 30, 16, 64


def mesh_of(data: int, fsdp: int, tensor: int):
    return make_mesh(data, fsdp, tensor, devices=jax.devices()[: data * fsdp * tensor])


@pytest.fixture
def arrays():
    keys = jax.random.split(jax.random.key(0), 4)
    x, head = jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (D, V))
    targets = jax.random.randint(keys[2], (B, T), 0, V)
    return x, head, jnp.where(jax.random.bernoulli(keys[3], 0.4, targets.shape), IGNORE_INDEX, targets)


def plain(x, head, targets, z_loss):
    logits = x @ head
    log_z = jax.nn.logsumexp(logits, -1)
    chosen = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
    return jnp.sum(jnp.where(targets == IGNORE_INDEX, 0.0, log_z - chosen + z_loss * log_z**2))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 2), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("chunk", [7, 1000])
def test_equals_the_plain_form(arrays, sizes, chunk):
    x, head, targets = arrays
    loss = make_loss(mesh_of(*sizes), chunk, z_loss=0.01)
    ours, our_grads = jax.jit(jax.value_and_grad(lambda x, w: 3 * loss(x, w, targets), (0, 1)))(x, head)
    theirs, their_grads = jax.value_and_grad(lambda x, w: 3 * plain(x, w, targets, 0.01), (0, 1))(x, head)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    np.testing.assert_allclose(loss(x, head, targets), theirs / 3, rtol=1e-6)
    for own, other in zip(our_grads, their_grads, strict=True):
        np.testing.assert_allclose(own, other, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("of", [(0, 1), 0, 1], ids=str)
def test_losses_token_by_token_equal_the_plain_form(arrays, sizes, of):
    x, head, targets = arrays
    losses, weights = make_token_losses(mesh_of(*sizes), 7), jnp.linspace(-1, 2, B * T).reshape(B, T)

    def weighed(x, head):
        each = losses(x, head, targets)
        return jnp.sum(weights * each**2), each  # what a token weighs in the gradient is not known before

    def plainly(x, head):
        each = jax.vmap(jax.vmap(lambda x, t: plain(x[None], head, t[None], 0.0)))(x, targets)
        return jnp.sum(weights * each**2), each

    ours, our_grads = jax.jit(jax.value_and_grad(weighed, of, has_aux=True))(x, head)
    theirs, their_grads = jax.value_and_grad(plainly, of, has_aux=True)(x, head)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-6, atol=1e-6)
    jax.tree.map(
        lambda own, other: np.testing.assert_allclose(own, other, rtol=1e-5, atol=5e-5), our_grads, their_grads
    )


def test_nothing_trained_is_zero(arrays):
    x, head, targets = arrays
    loss = make_loss(mesh_of(1, 1, 1))
    total, grad = jax.value_and_grad(loss)(x, head, jnp.full_like(targets, IGNORE_INDEX))
    assert total == 0 and not jnp.any(grad)


def test_a_frozen_head_costs_no_product(arrays):
    x, head, targets = arrays
    loss = make_loss(mesh_of(1, 1, 1))

    def flops(function, *arguments) -> float:
        return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]

    product = 2 * B * T * D * V
    both = flops(jax.grad(loss, (0, 1)), x, head, targets)
    frozen = flops(jax.grad(loss), x, head, targets)
    alone = flops(loss, x, head, targets)
    assert both - frozen > 0.9 * product and frozen - alone > 0.9 * product


def test_memory_is_bounded_by_the_chunk():
    n, d, v, chunk = 8192, 32, 128_000, 256
    loss = make_loss(mesh_of(1, 1, 1), chunk)
    shapes = [jax.ShapeDtypeStruct(s, t) for s, t in (((1, n, d), "f4"), ((d, v), "f4"), ((1, n), "i4"))]
    memory = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).compile().memory_analysis()
    logits, chunk_logits, head = 4 * n * v, 4 * chunk * v, 4 * d * v
    assert memory.temp_size_in_bytes < 3 * chunk_logits + 4 * head < logits / 5
