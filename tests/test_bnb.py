"""bitsandbytes' codes and scales, bit for bit; its checkpoints read, and ours read by it."""

import json
import shutil
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from convert import load_model, save_model
from convert.__main__ import app
from convert.formats import open_model
from convert.load import load_params
from model import LlamaConfig, forward, init_params
from model.errors import PunaError
from model.params import LINEARS
from model.quantize import QuantizedArray, dequantize, dynamic_map, quantize, quantizer

# peft, transformers and bitsandbytes deprecate each other's names; what they warn of is not ours.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=172,  # rows of 172: blocks of 64 run over their ends
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 24))


# --------------------------------------------------------------------------------------------------------------- codes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("double", [False, True])
def test_nf4_is_the_goldens_bit_for_bit(data_dir, double, dtype):
    goldens = load_file(data_dir / "stories260k-derived/bnb/nf4_int8_golden.safetensors")
    np.testing.assert_array_equal(dynamic_map(), goldens["dynamic_map_8bit"])
    weights = stories_weights(data_dir)
    names = sorted({key.split("|")[0] for key in goldens if "|" in key})
    assert any(weights[name].shape[1] % 64 for name in names)
    for name in names:
        prefix = f"{name}|{'f32' if dtype == 'float32' else 'bf16'}|dq{int(double)}|"
        q = quantize(jnp.asarray(weights[name]).astype(dtype).T, "nf4", double=double)
        np.testing.assert_array_equal(np.asarray(q.codes).reshape(-1, 1), goldens[f"{prefix}packed"])
        np.testing.assert_array_equal(np.asarray(q.absmax).reshape(-1), goldens[f"{prefix}absmax"])
        if double:
            np.testing.assert_array_equal(q.nested_absmax, goldens[f"{prefix}nested_absmax"])
            np.testing.assert_array_equal(q.offset, goldens[f"{prefix}offset"][0])
        np.testing.assert_array_equal(np.asarray(dequantize(q).T, np.float32), goldens[f"{prefix}dequant"])


def test_int8_is_the_goldens_bit_for_bit(data_dir):
    goldens = load_file(data_dir / "stories260k-derived/bnb/nf4_int8_golden.safetensors")
    for name, weight in stories_weights(data_dir).items():
        if f"{name}|int8|CB" in goldens:
            q = quantize(jnp.asarray(weight).T, "int8")
            np.testing.assert_array_equal(q.codes, goldens[f"{name}|int8|CB"])
            np.testing.assert_array_equal(q.absmax, goldens[f"{name}|int8|SCB"])
            np.testing.assert_array_equal(dequantize(q).T, goldens[f"{name}|int8|dequant"])


@pytest.mark.parametrize("shape", [(64, 128), (30, 172), (33, 14), (256, 1024)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("double", [False, True])
def test_nf4_is_the_librarys_bit_for_bit(shape, dtype, double):
    w = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(getattr(torch, dtype))
    bnb = import_module("bitsandbytes.functional")  # here: it takes seconds, and every pytest imports this file
    packed, state = bnb.quantize_4bit(w, blocksize=64, compress_statistics=double, quant_type="nf4")
    q = quantize(jnp.asarray(w.float().numpy()).astype(dtype).T, "nf4", double=double)
    size = w.numel()
    np.testing.assert_array_equal(np.asarray(q.codes).reshape(-1)[: size // 2], packed.numpy().reshape(-1))
    np.testing.assert_array_equal(np.asarray(q.absmax).reshape(-1)[: -(-size // 64)], state.absmax.numpy())
    if double:
        assert float(q.offset) == state.offset.item()
        np.testing.assert_array_equal(q.nested_absmax, state.state2.absmax.numpy())
    theirs = bnb.dequantize_4bit(packed, state).float().numpy()
    np.testing.assert_array_equal(np.asarray(dequantize(q).T, np.float32), theirs)


def stories_weights(data_dir):
    weights = {}
    for file in sorted((data_dir / "stories260k-derived/hf_sharded").glob("*.safetensors")):
        weights |= load_file(file)
    return weights


# --------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "model"
    params = init_params(CONFIG, jax.random.key(0))
    save_model(folder, CONFIG, jax.tree.map(lambda x: x * 5 if x.ndim > 2 else x, params))
    return folder


THEIR_SETTINGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "nf4 double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "int8": {"load_in_8bit": True},
}


def load_torch(folder, **keywords):
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, **keywords).eval()
    for module in model.modules():  # where the processor multiplies bfloat16, bitsandbytes would round to it
        module.support_avx512bf16_for_cpu = False
    return model


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.float().numpy()


def our_logits(config, params):
    with jax.default_matmul_precision("highest"):
        return np.asarray(forward(params, jnp.asarray(TOKENS), config)[0])


def float_model(folder):
    """What the quantized folder stands for, with float weights, in transformers."""
    config, params = load_model(folder, dtype=jnp.float32)
    assert not any(isinstance(params["layers"][name], QuantizedArray) for name in LINEARS)
    return config, params


@pytest.mark.parametrize("name", THEIR_SETTINGS)
def test_a_checkpoint_that_bitsandbytes_saves_loads_and_ours_loads_in_it(plain, name, tmp_path):
    settings = transformers.BitsAndBytesConfig(**THEIR_SETTINGS[name])
    theirs = load_torch(plain, quantization_config=settings, device_map="cpu")
    theirs.save_pretrained(tmp_path / "theirs")
    config, params = load_model(tmp_path / "theirs")
    assert all(isinstance(params["layers"][key], QuantizedArray) for key in LINEARS)
    ours = our_logits(config, params)
    np.testing.assert_allclose(our_logits(*float_model(tmp_path / "theirs")), ours, atol=1e-4)
    if name != "int8":  # LLM.int8 rounds activations too: there only the weights can agree
        np.testing.assert_allclose(ours, torch_logits(theirs), atol=1e-4)

    assert CliRunner().invoke(app, command(plain, tmp_path / "ours", name)).exit_code == 0
    mine, theirs_ = load_file(tmp_path / "ours/model.safetensors"), load_file(tmp_path / "theirs/model.safetensors")
    assert mine.keys() == theirs_.keys()
    for key, tensor in theirs_.items():
        if "quant_state" in key:
            assert json.loads(mine[key].tobytes()) == json.loads(tensor.tobytes())
        else:
            np.testing.assert_array_equal(mine[key].reshape(-1), tensor.reshape(-1), err_msg=key)
    again = load_torch(tmp_path / "ours", device_map="cpu")
    np.testing.assert_array_equal(torch_logits(again), torch_logits(theirs))


def test_weights_that_some_layers_keep_in_float(plain, tmp_path):
    """As in checkpoints that quantize layer by layer what bears it: what is quantized stays so on disk."""
    kept = ["lm_head", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    settings = transformers.BitsAndBytesConfig(**THEIR_SETTINGS["nf4"], llm_int8_skip_modules=kept)
    theirs = load_torch(plain, quantization_config=settings, device_map="cpu")
    theirs.save_pretrained(tmp_path / "theirs")
    config, params = load_model(tmp_path / "theirs")
    floats = {name for name in LINEARS if not isinstance(params["layers"][name], QuantizedArray)}
    assert floats == {"wq", "w_down"}
    np.testing.assert_allclose(our_logits(config, params), torch_logits(theirs), atol=1e-4)
    arguments = ["model", str(tmp_path / "theirs"), str(tmp_path / "ours"), "--to", "hf"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    said = json.loads((tmp_path / "ours/config.json").read_text())["quantization_config"]
    assert sorted(said["llm_int8_skip_modules"]) == sorted(kept)
    again = load_torch(tmp_path / "ours", device_map="cpu")
    np.testing.assert_array_equal(torch_logits(again), torch_logits(theirs))


def test_a_dtype_is_that_of_the_floats_beside_quantized_weights(plain, tmp_path):
    assert CliRunner().invoke(app, command(plain, tmp_path / "q", "nf4 double")).exit_code == 0
    params = load_params(open_model(tmp_path / "q"), jnp.bfloat16)
    assert all(isinstance(params["layers"][name], QuantizedArray) for name in LINEARS)
    assert params["embed"].dtype == params["layers"]["attn_norm"].dtype == jnp.bfloat16


def test_sizes_are_those_of_quantized_weights(plain, tmp_path):
    assert CliRunner().invoke(app, command(plain, tmp_path / "q", "nf4 double")).exit_code == 0
    nbytes = sum(x.nbytes for x in jax.tree.leaves(load_model(tmp_path / "q")[1]))
    assert open_model(tmp_path / "q").nbytes == nbytes
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "q")])
    assert f"bytes                   {nbytes:,}\n" in result.output
    assert "nf4 in blocks of 64, double (14 tensors), float32 (7 tensors)" in result.output


@pytest.mark.parametrize("block", [32, 128])
def test_int4_in_groups_is_written_and_read(plain, block, tmp_path):
    arguments = [*command(plain, tmp_path / "q", "int4"), "--block", str(block)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    params = load_model(tmp_path / "q")[1]
    loaded = load_model(plain, quantize=quantizer("int4", block))[1]
    for name in LINEARS:
        assert params["layers"][name].block == block
        np.testing.assert_array_equal(dequantize(params["layers"][name]), dequantize(loaded["layers"][name]))
    wrong = CliRunner().invoke(app, [*command(plain, tmp_path / "w", "nf4"), "--block", "32"]).exception
    assert isinstance(wrong, PunaError) and "quantize nf4 has no blocks of 32" in str(wrong)


def command(source, destination, name):
    double = "--double-quant" if name.endswith("double") else "--no-double-quant"
    return ["model", str(source), str(destination), "--to", "hf", "--quantize", name.split()[0], double]


@pytest.mark.parametrize("name", ["nf4", "nf4 double", "int8", "int4"])
def test_a_quantized_folder_saves_and_reloads_without_requantizing(plain, name, tmp_path):
    assert CliRunner().invoke(app, command(plain, tmp_path / "q", name)).exit_code == 0
    config, params = load_model(tmp_path / "q")
    save_model(tmp_path / "again", config, params)
    assert (tmp_path / "q/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()
    loaded = load_model(plain, quantize=lambda w: quantize(w, name.split()[0], double=name.endswith("double")))[1]
    for key in LINEARS:
        same = jax.tree.map(np.array_equal, params["layers"][key], loaded["layers"][key])
        assert all(jax.tree.leaves(same)), key
    assert loaded["embed"].dtype == jnp.float32


def test_other_quantizations_are_refused_by_name(plain, tmp_path):
    assert CliRunner().invoke(app, command(plain, tmp_path / "q", "nf4")).exit_code == 0
    file = tmp_path / "q/config.json"
    config = json.loads(file.read_text())
    for change, said in [
        ({"quant_method": "gptq", "bits": 4}, "quantized by gptq are not read"),
        ({"bnb_4bit_quant_type": "fp4"}, "fp4"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage"),
        ({"brand_new": True}, "brand_new, which Puna does not know"),
    ]:
        wrong = config | {"quantization_config": config["quantization_config"] | change}
        file.write_text(json.dumps(wrong))
        with pytest.raises(PunaError, match=said):
            load_model(tmp_path / "q")


@pytest.mark.parametrize("damage", ["table", "absmax", "state", "shape", "type", "garbage", "more", "nan"])
def test_damaged_quantized_tensors_are_refused_by_name(plain, damage, tmp_path):
    assert CliRunner().invoke(app, command(plain, tmp_path / "q", "nf4")).exit_code == 0
    file = tmp_path / "q/model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.down_proj.weight"
    if damage == "table":
        tensors[f"{name}.quant_map"] = tensors[f"{name}.quant_map"] + 1
    elif damage == "absmax":
        tensors[f"{name}.absmax"] = tensors[f"{name}.absmax"][:-1]
    elif damage == "more":
        tensors[f"{name}.more"] = np.zeros(1, np.float32)
    elif damage == "nan":
        tensors[f"{name}.absmax"] = tensors[f"{name}.absmax"] * np.nan
    elif damage in ("type", "garbage"):
        state = tensors[f"{name}.quant_state.bitsandbytes__nf4"].tobytes()
        state = state.replace(b'"nf4"', b'"fp4"') if damage == "type" else b"\xff" * len(state)
        tensors[f"{name}.quant_state.bitsandbytes__nf4"] = np.frombuffer(state, np.uint8)
    elif damage == "state":
        del tensors[f"{name}.quant_state.bitsandbytes__nf4"]
    else:
        tensors[name] = tensors[name][:-1]
    save_file(tensors, file)
    with pytest.raises(PunaError, match={"garbage": "q is damaged", "nan": "NaN"}.get(damage, "down_proj")):
        load_model(tmp_path / "q")


def test_int8_weights_in_a_gpus_layout_are_refused(plain, tmp_path):
    """bitsandbytes permutes their bytes there, and refuses to load them itself."""
    assert CliRunner().invoke(app, command(plain, tmp_path / "q", "int8")).exit_code == 0
    tensors = load_file(tmp_path / "q/model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight_format"] = np.array(1, np.uint8)
    save_file(tensors, tmp_path / "q/model.safetensors")
    with pytest.raises(PunaError, match="down_proj.weight lies in a layout of GPUs"):
        open_model(tmp_path / "q")


@pytest.mark.parametrize("name", ["nf4", "int8", "int4"])
def test_numbers_that_are_none_are_not_quantized(plain, name, tmp_path):
    broken = shutil.copytree(plain, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][3, 5] = np.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    result = CliRunner().invoke(app, command(broken, tmp_path / "q", name))
    assert isinstance(result.exception, PunaError) and "NaN" in str(result.exception)
    assert not (tmp_path / "q").exists()


def test_quantizing_to_another_format_than_hf_is_refused(plain, tmp_path):
    arguments = ["model", str(plain), str(tmp_path / "m"), "--to", "meta", "--quantize", "nf4"]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, PunaError) and "format='hf'" in str(result.exception)
    assert not (tmp_path / "m").exists()
