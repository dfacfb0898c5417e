"""Weights in and out of every format: transformers' numbers, byte for byte, and only the bytes that are needed."""

import json
import zipfile
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from converting import command, save_hf, tensors_of  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.sharding import PartitionSpec
from reference import hf_logits, params_of
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from convert import load_model, save_model
from convert.__main__ import parse_size
from convert.checkpoint import WriteOptions
from convert.formats import open_model
from convert.lazy import concatenate, contiguous, from_array
from convert.load import load_params
from convert.meta import read as read_meta
from convert.pickled import read_pickled, write_pickled
from convert.safetensor import read_safetensors, write_safetensors
from convert.save import write_model
from model.config import PRESETS
from model.llama import forward
from model.sharding import make_mesh

pytestmark = pytest.mark.slow

GQA = {"num_key_value_heads": 4, "vocab_size": 101}
TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12)


def assert_same_tree(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def logits_of(folder):
    config, params = load_model(folder)
    with jax.default_matmul_precision("highest"):
        return np.asarray(forward(params, jnp.asarray(TOKENS), config)[0])


# ------------------------------------------------------------------------------------------- transformers as reference


@pytest.mark.parametrize(
    ("pickled", "changes"),
    [
        (False, GQA | {"shard_size": "40KB"}),
        (False, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        (True, GQA | {"head_dim": 16}),
    ],
    ids=["sharded", "tied and biased", "pickled"],
)
def test_what_transformers_saves_gives_its_logits(tmp_path, pickled, changes):
    model = save_hf(tmp_path, pickled, **changes)
    config, params = load_model(tmp_path)
    assert_same_tree(params, params_of(model))
    np.testing.assert_allclose(logits_of(tmp_path), hf_logits(model, TOKENS), atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_what_we_write(tmp_path, tied):
    model = save_hf(tmp_path / "theirs", tie_word_embeddings=tied, **GQA)
    config, params = load_model(tmp_path / "theirs")
    save_model(tmp_path / "ours", config, params)
    written = read_safetensors(tmp_path / "ours" / "model.safetensors")
    assert ("lm_head.weight" in written) is not tied
    ours = LlamaForCausalLM.from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_array_equal(hf_logits(ours, TOKENS), hf_logits(model, TOKENS))
    assert ours.generation_config.eos_token_id == model.config.eos_token_id


def test_an_index_of_pickled_shards(tmp_path):
    model = save_hf(tmp_path, pickled=True)
    weights = torch.load(tmp_path / "pytorch_model.bin")
    (tmp_path / "pytorch_model.bin").unlink()
    names = sorted(weights)
    weight_map = {}
    for number, part in enumerate([names[::2], names[1::2]], 1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: weights[name] for name in part}, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same_tree(load_model(tmp_path)[1], params_of(model))


def test_buffers_of_old_checkpoints_are_left_out(tmp_path):
    model = save_hf(tmp_path, pickled=True)
    weights = torch.load(tmp_path / "pytorch_model.bin")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert_same_tree(load_model(tmp_path)[1], params_of(model))


def test_a_tied_model_may_store_its_head_and_another_unties_it_as_in_transformers(tmp_path, capsys):
    save_hf(tmp_path, pickled=True, tie_word_embeddings=True)
    weights = torch.load(tmp_path / "pytorch_model.bin")
    assert "lm_head.weight" in weights and "lm_head" not in load_model(tmp_path)[1]
    torch.save(weights | {"lm_head.weight": weights["lm_head.weight"] + 1}, tmp_path / "pytorch_model.bin")
    assert not load_model(tmp_path)[0].tie_word_embeddings and "both are kept, untied" in capsys.readouterr().err
    theirs = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    np.testing.assert_allclose(logits_of(tmp_path), hf_logits(theirs, TOKENS), atol=1e-4)
    weights.pop("model.embed_tokens.weight")  # the head alone is both
    torch.save(weights, tmp_path / "pytorch_model.bin")
    np.testing.assert_array_equal(load_model(tmp_path)[1]["embed"], weights["lm_head.weight"].numpy())


# --------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("format", "shards"), [("orbax", 1), ("meta", 1), ("meta", 2), ("meta", 4), ("meta", 8)])
def test_round_trips_keep_every_byte(tmp_path, format, shards, tied):
    save_hf(tmp_path / "hf", dtype=torch.bfloat16, tie_word_embeddings=tied, **GQA)
    source = open_model(tmp_path / "hf")
    write_model(tmp_path / "there", replace(source, format=format), WriteOptions(shards=shards))
    there = open_model(tmp_path / "there")
    assert there.format == format and tensors_of(tmp_path / "there") == tensors_of(tmp_path / "hf")
    write_model(tmp_path / "back", replace(there, format="hf"), WriteOptions(max_shard_size=50_000))
    back = {}
    for file in (tmp_path / "back").glob("*.safetensors"):
        back |= load_file(file)
    original = load_file(tmp_path / "hf" / "model.safetensors")
    assert back.keys() == original.keys()
    assert all(back[name].dtype == original[name].dtype and torch.equal(back[name], original[name]) for name in back)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in back.values())
    assert index["weight_map"].keys() == back.keys()


def test_mixed_dtypes_survive(tmp_path):
    save_hf(tmp_path / "source")
    source = open_model(tmp_path / "source")
    half = {
        name: tensor.cast(np.dtype(np.float16), name) for name, tensor in source.tensors.items() if "norm" not in name
    }
    mixed = replace(source, tensors=source.tensors | half)
    for format in ("hf", "orbax", "meta"):
        write_model(tmp_path / format, replace(mixed, format=format))
        kinds = {name: tensor.dtype for name, tensor in open_model(tmp_path / format).tensors.items()}
        assert kinds == {name: tensor.dtype for name, tensor in mixed.tensors.items()}
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "float16"


@pytest.mark.parametrize("name", ["hf_sharded", "meta_mp1"])
def test_a_real_model_gives_the_published_logits(data_dir, name):
    golden = np.load(data_dir / "stories260k-derived" / "hf_logits_201x512.npz")
    config, params = load_model(data_dir / "stories260k-derived" / name)
    with jax.default_matmul_precision("highest"):
        logits = forward(params, jnp.asarray(golden["ids"], jnp.int32)[None], config)[0][0]
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4)


def test_the_command_converts_casts_and_copies_companions(tmp_path, command):  # noqa: F811
    save_hf(tmp_path / "hf", **GQA)
    (tmp_path / "hf" / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    (tmp_path / "hf" / "tokenizer.model").write_bytes(b"pieces")
    (tmp_path / "hf" / "README.md").write_text("not ours")
    code, output, errors = command("model", tmp_path / "hf", tmp_path / "out", "--to", "orbax", "--dtype", "bfloat16")
    assert (code, output) == (0, []) and "writing out" in errors[-1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "params",
        "tokenizer.model",
    ]
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"eos_token_id": [2, 7]}
    cast = load_model(tmp_path / "hf", dtype=jnp.bfloat16)
    assert_same_tree(load_model(tmp_path / "out")[1], cast[1])
    assert {leaf.dtype for leaf in jax.tree.leaves(cast[1])} == {jnp.dtype(jnp.bfloat16)}


# ------------------------------------------------------------------------------------------------------- Meta's layout


def test_meta_shards_hold_what_metas_code_expects(tmp_path):
    """Rows of wq, w1, w3 and the output, columns of wo, w2 and the embedding; an odd row of the vocabulary is last."""
    model = save_hf(tmp_path / "hf", **GQA)
    write_model(tmp_path / "meta", replace(open_model(tmp_path / "hf"), format="meta"), WriteOptions(shards=2))
    shards = [torch.load(tmp_path / "meta" / f"consolidated.0{i}.pth", weights_only=True) for i in range(2)]
    whole = model.state_dict()
    for name, theirs, axis in (
        ("attention.wv", "self_attn.v_proj", 0),
        ("attention.wo", "self_attn.o_proj", 1),
        ("feed_forward.w1", "mlp.gate_proj", 0),
        ("feed_forward.w2", "mlp.down_proj", 1),
        ("feed_forward.w3", "mlp.up_proj", 0),
    ):
        parts = [shard[f"layers.1.{name}.weight"] for shard in shards]
        assert torch.equal(torch.cat(parts, axis), whole[f"model.layers.1.{theirs}.weight"])
    assert [shard["output.weight"].shape for shard in shards] == [(50, 64), (51, 64)]
    embeddings = [shard["tok_embeddings.weight"] for shard in shards]
    assert torch.equal(torch.cat(embeddings, 1), whole["model.embed_tokens.weight"])
    for shard in shards:
        assert torch.equal(shard["norm.weight"], whole["model.norm.weight"])
    for name, theirs, heads in (("wq", "q_proj", 8), ("wk", "k_proj", 4)):
        # the order of transformers' own converter: interleaved pairs to halves, head by head
        rows = torch.cat([shard[f"layers.0.attention.{name}.weight"] for shard in shards])
        halves = rows.view(heads, 4, 2, 64).transpose(1, 2).reshape(heads * 8, 64)
        assert torch.equal(halves, whole[f"model.layers.0.self_attn.{theirs}.weight"])


def test_meta_with_embeddings_split_by_rows_and_nested_params(tmp_path):
    save_hf(tmp_path / "hf", **GQA)
    write_model(tmp_path / "meta", replace(open_model(tmp_path / "hf"), format="meta"), WriteOptions(shards=2))
    files = [tmp_path / "meta" / f"consolidated.0{i}.pth" for i in range(2)]
    shards = [torch.load(file, weights_only=True) for file in files]
    whole = torch.cat([shard["tok_embeddings.weight"] for shard in shards], 1)
    for file, shard, rows in zip(files, shards, (whole[:50], whole[50:]), strict=True):
        torch.save(shard | {"tok_embeddings.weight": rows.clone(), "rope.freqs": torch.ones(4)}, file)
    params = json.loads((tmp_path / "meta" / "params.json").read_text())
    (tmp_path / "meta" / "params.json").write_text(json.dumps({"model": params | {"vocab_size": -1}}))
    assert tensors_of(tmp_path / "meta") == tensors_of(tmp_path / "hf")


def test_meta_repeats_key_value_heads_over_more_shards(tmp_path):
    model = save_hf(tmp_path / "hf", num_key_value_heads=2)
    write_model(tmp_path / "meta", replace(open_model(tmp_path / "hf"), format="meta"), WriteOptions(shards=8))
    shards = [torch.load(tmp_path / "meta" / f"consolidated.0{i}.pth", weights_only=True) for i in range(8)]
    values = [shard["layers.0.attention.wv.weight"] for shard in shards]
    heads = model.state_dict()["model.layers.0.self_attn.v_proj.weight"].split(8)
    assert all(torch.equal(value, heads[number // 4]) for number, value in enumerate(values))
    assert tensors_of(tmp_path / "meta") == tensors_of(tmp_path / "hf")


def test_a_tied_meta_file_stores_its_embedding_once(tmp_path):
    save_hf(tmp_path / "hf", tie_word_embeddings=True)
    write_model(tmp_path / "meta", replace(open_model(tmp_path / "hf"), format="meta"))
    weights = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)
    assert weights["output.weight"].data_ptr() == weights["tok_embeddings.weight"].data_ptr()
    assert read_meta(tmp_path / "meta").config.tie_word_embeddings


# ------------------------------------------------------------------------------------------------------ loading a mesh


@pytest.mark.parametrize("format", ["hf", "meta", "orbax"])
def test_a_sharded_load_reads_each_byte_once_and_only_slices(tmp_path, format):
    config = replace(PRESETS["llama-7b"], vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=2)
    config = replace(config, num_attention_heads=8, num_key_value_heads=8, head_dim=8)
    save_hf(tmp_path / "hf", vocab_size=96)
    options = WriteOptions(shards=2 if format == "meta" else 1)
    write_model(tmp_path / "model", replace(open_model(tmp_path / "hf"), format=format), options)
    checkpoint = open_model(tmp_path / "model")
    reads = []

    def spy(name, tensor):
        def read(index):
            part = tensor.read(index)
            reads.append((name, part.nbytes))
            return part

        return replace(tensor, read=read)

    watched = replace(checkpoint, tensors={name: spy(name, t) for name, t in checkpoint.tensors.items()})
    params = load_params(watched, mesh=make_mesh(data=2, fsdp=2, tensor=2))
    assert sum(size for _, size in reads) == checkpoint.nbytes
    slices = {"wq": 4, "w_down": 4, "embed": 4, "attn_norm": 1}
    for name, size in reads:
        ways = slices.get(name.rpartition(".")[2])
        assert ways is None or size * ways == checkpoint.tensors[name].nbytes
    assert_same_tree(params, load_params(checkpoint))
    assert params["layers"]["wq"].sharding.spec == PartitionSpec(None, "fsdp", "tensor")


def test_saving_gathers_shards(tmp_path):
    save_hf(tmp_path / "hf", vocab_size=96)
    config, params = load_model(tmp_path / "hf", mesh=make_mesh(fsdp=4, tensor=2))
    save_model(tmp_path / "copy", config, params)
    assert tensors_of(tmp_path / "copy") == tensors_of(tmp_path / "hf")


def test_orbax_itself_reads_our_layers(tmp_path):
    model = save_hf(tmp_path / "hf")
    write_model(tmp_path / "orbax", replace(open_model(tmp_path / "hf"), format="orbax"))
    layer = ocp.PyTreeCheckpointer().restore(tmp_path / "orbax" / "params" / "layer_00001")
    expected = jax.tree.map(lambda x: x[1], params_of(model)["layers"])
    assert_same_tree(layer, expected)


# --------------------------------------------------------------------------------------------------- files and tensors


def test_pickled_files_are_sound_zips_that_torch_loads_and_maps(tmp_path):
    random = np.random.default_rng(0)
    weights = {
        "wide": random.normal(size=(300, 7)).astype(np.float32),
        "turned": random.normal(size=(5, 6)).astype(np.float16).T,
        "brain": random.normal(size=33).astype(ml_dtypes.bfloat16),
        "double": random.normal(size=(2, 3, 4)),
    }
    path = tmp_path / "weights.pth"
    write_pickled(path, {name: from_array(array, "here") for name, array in weights.items()}, lambda count: None)
    assert zipfile.ZipFile(path).testzip() is None
    for mapped in (False, True):
        loaded = torch.load(path, mmap=mapped, weights_only=True)
        for name, array in weights.items():
            assert loaded[name].is_contiguous() and str(loaded[name].dtype) == f"torch.{array.dtype}"
            np.testing.assert_array_equal(loaded[name].double().numpy(), array.astype(np.float64))
    for name, tensor in read_pickled(path).items():
        assert tensor.dtype == weights[name].dtype
        np.testing.assert_array_equal(tensor.load(), weights[name])


def test_safetensors_files_are_read_by_safetensors(tmp_path):
    arrays_ = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.ones(3, ml_dtypes.bfloat16),
        "none": np.empty(0),
    }
    write_safetensors(
        tmp_path / "x.safetensors", {k: from_array(v, "here") for k, v in arrays_.items()}, lambda count: None
    )
    theirs = load_file(tmp_path / "x.safetensors")
    assert theirs.keys() == arrays_.keys() and theirs["a"].dtype == torch.bfloat16
    np.testing.assert_array_equal(theirs["b"].numpy(), arrays_["b"])
    for name, tensor in read_safetensors(tmp_path / "x.safetensors").items():
        np.testing.assert_array_equal(tensor.load(), arrays_[name])


@settings(max_examples=60, deadline=None)
@given(arrays(np.float16, st.tuples(st.integers(2, 9), st.integers(2, 9))), st.data())
def test_lazy_tensors_read_as_numpy_slices(array, data):
    order = np.array(data.draw(st.permutations(range(array.shape[0]))))
    cut = data.draw(st.integers(1, array.shape[1] - 1))
    tensor, expected = from_array(array, "here"), array
    tensor, expected = tensor.take(0, order), np.take(expected, order, 0)
    tensor = (
        concatenate([tensor.narrow(1, cut, array.shape[1]), tensor.narrow(1, 0, cut)], 1)
        .transposed()
        .cast(np.dtype("f4"), "w")
    )
    expected = np.roll(expected, -cut, 1).T.astype(np.float32)
    index = []
    for size in expected.shape:
        start = data.draw(st.integers(0, size - 1))
        index.append(slice(start, data.draw(st.integers(start + 1, size))))
    assert tensor.shape == expected.shape and tensor.dtype == expected.dtype
    np.testing.assert_array_equal(tensor.read(tuple(index)), expected[tuple(index)])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_large_transposes_are_copied_in_stripes(dtype):
    array = np.arange(1501 * 2003, dtype=np.uint32).astype(dtype).reshape(1501, 2003)
    copy = contiguous(array.T)
    assert copy.flags.c_contiguous and copy.dtype == array.dtype
    np.testing.assert_array_equal(copy, array.T)


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 KiB", 1536), ("300", 300), ("2mb", 2 * 10**6)])
def test_sizes_are_decimal_unless_they_say_binary(text, size):
    assert parse_size(text) == size
