"""The ring equals attention on one device, in values and in gradients, and all its devices have as much to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import model.ring
from model.attention import Mask, attend
from model.ring import make_ring, unzigzag, zigzag
from model.sharding import make_mesh

B, T, H, K, d = 2, 64, 8, 4, 16


def given(dtype=jnp.float32):
    """Queries, keys, values, and segments of which some cross blocks of any mesh here and one row ends in padding."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (B, T, H, d), (B, K, T, d), (B, K, T, d)
    q, k, v = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
    segments = jnp.asarray([[1] * 21 + [2] * 5 + [3] * 24 + [0] * 14, [1] * 3 + [2] * 61])
    return q, k, v, segments


def gradients(attend, q, k, v, segments, lay=lambda x, axis: x, back=lambda x, axis: x):
    """The results of real tokens, and the gradients of a sum of them, with the tokens in their order."""
    weights = jax.random.normal(jax.random.key(1), q.shape, q.dtype)
    real = jnp.ones(q.shape[:2]) if segments is None else segments != 0
    weights = jnp.where(real[..., None, None], weights, 0)

    def total(q, k, v):
        laid = None if segments is None else lay(segments, 1)
        out = back(attend(lay(q, 1), lay(k, 2), lay(v, 2), Mask(None, None, laid, laid)), 1)
        return jnp.sum(jnp.where(weights != 0, out * weights, 0)), jnp.where(weights != 0, out, 0)

    (_, out), grads = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out, *grads


def round_the_ring(sizes, *arrays):
    count = sizes["context"]
    mesh = make_mesh(**sizes, devices=jax.devices()[: int(np.prod(list(sizes.values())))])
    over = lambda move: lambda x, axis: move(x.swapaxes(1, axis), count).swapaxes(1, axis)  # noqa: E731
    placed = jax.device_put(arrays, NamedSharding(mesh, PartitionSpec()))
    return jax.jit(lambda *x: gradients(make_ring(mesh), *x, over(zigzag), over(unzigzag)))(*placed)


def assert_same(sizes, *arrays):
    theirs = jax.jit(gradients, static_argnums=0)(attend, *arrays)
    for ours, expected in zip(round_the_ring(sizes, *arrays), theirs, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=2e-6 * float(jnp.abs(expected).max()))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"context": 8}, {"context": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_it_is_attention_on_one_device(sizes):
    assert_same(sizes, *given())


@pytest.mark.slow
def test_queries_in_parts_and_rows_without_segments(monkeypatch):
    monkeypatch.setattr(model.ring, "MOST_QUERIES", 3)  # of 8 in a block: four parts
    assert_same({"context": 4}, *given()[:3], None)


@pytest.mark.slow
def test_fewer_key_heads_than_devices():
    q, k, v, segments = given()
    assert_same({"context": 2, "tensor": 2}, q, k[:, :1], v[:, :1], segments)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_zigzag_gives_every_device_as_much_to_see(count):
    index = jnp.arange(48)[None]
    laid = zigzag(index, count)
    assert (unzigzag(laid, count) == index).all()
    seen = laid.reshape(count, -1) + 1  # the keys that a query of each index sees
    assert (seen.sum(axis=1) == seen.sum() // count).all()
    assert laid[0, : 24 // count].tolist() == list(range(24 // count))  # the first device begins with the first block
