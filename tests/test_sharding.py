"""Meshes, rules, and the errors that name what does not divide."""

import jax
import pytest
from jax.sharding import AxisType, PartitionSpec

from model import LlamaConfig, make_mesh
from model.errors import PunaError
from model.params import param_shardings
from model.sharding import constrain

CONFIG = LlamaConfig(
    vocab_size=99, hidden_size=64, intermediate_size=112, num_hidden_layers=1, num_attention_heads=8
)  # fmt: skip


def test_minus_one_is_the_rest():
    mesh = make_mesh(fsdp=-1, tensor=2)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "context": 1, "tensor": 2}
    assert mesh.axis_types == (AxisType.Auto,) * 4
    part = make_mesh(tensor=2, devices=jax.devices()[:2])
    assert part.size == 2


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"fsdp": 3}, "data=1 x fsdp=3 x tensor=1 does not make 8 devices"),
        ({"fsdp": -1, "tensor": 3}, "does not make 8 devices"),
        ({"fsdp": -1, "tensor": -1}, "only one may be -1"),
        ({"tensor": 0}, "sizes are positive"),
        ({"context": 3}, "data=1 x fsdp=1 x context=3 x tensor=1 does not make 8 devices"),
    ],
)
def test_wrong_sizes(sizes, said):
    with pytest.raises(PunaError, match=said):
        make_mesh(**sizes)


def test_a_dimension_that_does_not_divide_is_named():
    with pytest.raises(PunaError, match=r"embed: dimension 0 \(vocab\) of size 99 .* mesh axis tensor of size 8"):
        param_shardings(CONFIG, make_mesh(tensor=8))


def test_rules():
    shardings = param_shardings(CONFIG, make_mesh(data=2, fsdp=4))
    assert shardings["layers"]["wq"].spec == PartitionSpec(None, ("fsdp",), None)
    split = param_shardings(CONFIG, make_mesh(data=2, fsdp=2, context=2))
    assert split["layers"]["wq"].spec == PartitionSpec(None, ("fsdp", "context"), None)
    assert shardings["layers"]["attn_norm"].spec == PartitionSpec(None, None)


def test_constrain_needs_no_context_and_leaves_what_has_no_mesh():
    x = jax.numpy.ones((8, 4, 16))
    assert constrain(x, ("batch", None, None)) is x
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, PartitionSpec()))
    out = jax.jit(lambda x: constrain(x, ("batch", "sequence", None)))(placed)
    assert out.sharding.spec == PartitionSpec(("data", "fsdp"), "tensor")
    one = jax.jit(lambda x: constrain(x[:1], ("batch", None, None)))(placed)  # a batch of one does not divide
    assert one.sharding.is_fully_replicated
