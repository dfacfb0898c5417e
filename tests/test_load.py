"""What is loaded for decoding is what is loaded for training, laid out another way, whatever file it comes from."""

import jax
import numpy as np
import peft
import pytest
from converting import save_hf
from reference import hf_config, hf_model

from convert import load_model, save_model
from model import forward, make_mesh
from model.layout import per_layer
from model.params import unstack
from model.quantize import QuantizedArray
from model.transposed import TransposedArray

SHAPE = {"num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 96}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 2, "vocab_size": 96}
VARIANTS = {"untied": {}, "tied": {"tie_word_embeddings": True}, "biases": {"attention_bias": True}}
ADAPTERS = [{}, {"use_dora": True}, {"modules_to_save": ["embed_tokens", "lm_head"]}]
TARGETS = {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"layers.1.mlp.down_proj": 2}}
TOKENS = np.arange(20, dtype=np.int32)[None] % 96


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, changes in {
        "untied": {},
        "tied": {"tie_word_embeddings": True},
        "biases": {"attention_bias": True},
    }.items():
        save_hf(root / name, **SHAPE, **changes)
    for format in ("orbax", "meta"):
        save_model(root / format, *load_model(root / "untied"), format=format)
    return root


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert one.dtype == other.dtype and one.sharding.is_equivalent_to(other.sharding, one.ndim)
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("untied", None),
        ("tied", None),
        ("biases", None),
        ("orbax", None),
        ("meta", None),
        ("untied", {"fsdp": 4, "tensor": 2}),
    ],
)
def test_layers_read_apart_are_those_of_the_stack(folders, name, mesh):
    mesh = mesh and make_mesh(**mesh)
    config, stacked = load_model(folders / name, mesh=mesh)
    again, apart = load_model(folders / name, mesh=mesh, layout="per_layer")
    assert config == again
    expected = per_layer(stacked)
    if mesh is None:
        assert_same(apart, expected)
    for ours, theirs in zip(jax.tree.leaves(apart), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    logits = jax.jit(forward, static_argnums=2)
    np.testing.assert_allclose(logits(apart, TOKENS, config)[0], logits(stacked, TOKENS, config)[0], atol=1e-5)


def test_a_tied_head_is_the_embedding_itself(folders):
    _, params = load_model(folders / "tied", layout="per_layer")
    assert params["lm_head"].rows is params["embed"]


@pytest.mark.parametrize("format", ["int8", "int4", "nf4"])
def test_quantized_layers_are_those_of_the_stack(folders, format):
    _, stacked = load_model(folders / "untied", quantize=format)
    _, apart = load_model(folders / "untied", quantize=format, layout="per_layer")
    assert_same(apart["layers"], unstack(stacked)["layers"])
    kinds = {type(w) for w in apart["layers"][0].values() if not isinstance(w, jax.Array)}
    assert kinds == {QuantizedArray} and isinstance(apart["lm_head"], TransposedArray)


@pytest.mark.slow
@pytest.mark.parametrize("settings", ADAPTERS, ids=str)
@pytest.mark.parametrize(("quantize", "mesh"), [(None, {"tensor": 8}), ("nf4", None)], ids=["mesh", "nf4"])
def test_adapters_over_layers_read_apart_give_the_stacks_logits(tmp_path, settings, quantize, mesh):
    save_hf(tmp_path / "base", **HEADS)
    theirs = peft.get_peft_model(
        hf_model(hf_config(**HEADS)), peft.LoraConfig(r=4, init_lora_weights=False, **TARGETS, **settings)
    )
    theirs.save_pretrained(tmp_path / "adapter")
    mesh = mesh and make_mesh(**mesh)
    found = [
        load_model(tmp_path / "base", mesh=mesh, quantize=quantize, adapters=[tmp_path / "adapter"], layout=layout)
        for layout in ("stacked", "per_layer")
    ]
    assert found[0][0] == found[1][0]
    logits = jax.jit(forward, static_argnums=2)
    stacked, apart = (logits(params, TOKENS, config)[0] for config, params in found)
    np.testing.assert_allclose(apart, stacked, atol=1e-5)
