"""A number that is finite before a conversion is finite after it, or the conversion says which one it lost."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import peft
import pytest
import torch
import transformers
from converting import command, save_hf, tensors_of  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file, save_file
from small_tokenizer import small_tokenizer

from convert import load_model
from convert.lazy import all_finite, narrowed
from convert.peft import save_adapter
from model import lora
from model.errors import PunaError

DOWN = "model.layers.1.mlp.down_proj.weight"
FORMATS = ("hf", "orbax", "meta", "gguf")
SHAPE = {"num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 320, "intermediate_size": 128}


@pytest.fixture
def spoiled(tmp_path):
    """A folder with some numbers of one weight replaced."""

    def spoiled(*numbers, dtype=torch.float32):
        folder = tmp_path / "source"
        save_hf(folder, dtype=dtype, **SHAPE)
        small_tokenizer(folder)
        tensors = load_file(folder / "model.safetensors")
        tensors[DOWN].view(-1)[: len(numbers)] = torch.tensor(numbers).to(dtype)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return spoiled


def place(tmp_path, format):
    return tmp_path / ("model.gguf" if format == "gguf" else format)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_overflow_is_refused_by_name_unless_it_is_allowed(spoiled, command, tmp_path, format, dtype):  # noqa: F811
    source, out = spoiled(-1e6, 70000.0, 65504.0, dtype=dtype), place(tmp_path, format)
    arguments = ("model", source, out, "--to", format, "--dtype", "float16")
    code, _, (*_, line) = command(*arguments)
    lost = 2 if dtype == torch.float32 else 3  # 65504 is 65536 in bfloat16
    assert code == 2 and f"holds {lost} numbers beyond float16, whose largest is 65504; the largest is " in line
    assert ("ffn_down" in line or "layers.1.w_down" in line) and "--allow-overflow" in line and not out.exists()
    assert command(*arguments, "--allow-overflow")[0] == 0
    _, dtype_name, data = tensors_of(out)["layers.1.w_down"]
    assert dtype_name == "float16" and np.isinf(np.frombuffer(data, np.float16)).sum() == lost


@pytest.mark.parametrize("format", FORMATS)
def test_numbers_that_are_not_finite_are_said_once_and_carried(spoiled, command, tmp_path, format):  # noqa: F811
    source, out = spoiled(float("nan"), float("inf"), -float("inf")), place(tmp_path, format)
    code, _, lines = command("model", source, out, "--to", format, "--dtype", "float16")
    held = "layers.1.w_down holds NaN or infinite numbers, which are written as they are"
    assert code == 0 and [line for line in lines if "NaN" in line] == [f"{source / 'model.safetensors'}: {held}"]
    array = np.frombuffer(tensors_of(out)["layers.1.w_down"][2], np.float16)
    assert [int(test(array).sum()) for test in (np.isnan, np.isposinf, np.isneginf)] == [1, 1, 1]


def test_in_quantized_gguf_their_blocks_are_nan(spoiled, command, tmp_path):  # noqa: F811
    source, out = spoiled(float("nan"), 1.0, -float("inf")), tmp_path / "m.gguf"
    code, _, lines = command("model", source, out, "--to", "gguf", "--quantize", "int8")
    held = "layers.1.w_down holds NaN or infinite numbers, which make NaN of the block of 32 that each is quantized in"
    assert code == 0 and [line for line in lines if "NaN" in line] == [f"{source / 'model.safetensors'}: {held}"]
    array = np.frombuffer(tensors_of(out)["layers.1.w_down"][2], np.float32).reshape(128, 64).T
    assert np.isnan(array[0, :32]).all() and np.isfinite(array).sum() == array.size - 32


@pytest.mark.parametrize("type", ["int8", "int4"])
def test_a_quantized_block_beyond_float16_is_refused_unless_allowed(spoiled, command, tmp_path, type):  # noqa: F811
    source, out = spoiled(1e9, float("nan")), tmp_path / "m.gguf"
    arguments = ("model", spoiled_again(source), out, "--to", "gguf", "--quantize", type)
    code, _, lines = command(*arguments)
    assert code == 2 and "has 1 blocks of numbers beyond float16" in lines[-1] and "--allow-overflow" in lines[-1]
    assert command(*arguments, "--allow-overflow")[0] == 0


def spoiled_again(source):
    """With a NaN in another block."""
    tensors = load_file(source / "model.safetensors")
    tensors[DOWN].view(-1)[:2] = torch.tensor([1e9, 1.0])
    tensors[DOWN].view(-1)[40] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    return source


def test_loading_in_a_narrower_dtype_is_refused_too(spoiled):
    source = spoiled(1e5)
    for layout in ("stacked", "per_layer"):
        with pytest.raises(PunaError, match=r"layers.1.w_down holds 1 numbers beyond float16.* the largest is 100000"):
            load_model(source, dtype="float16", layout=layout)


def test_a_sum_that_overflows_is_refused_too(spoiled, command, tmp_path):  # noqa: F811
    base, adapter, out = spoiled(dtype=torch.float16), tmp_path / "adapter", tmp_path / "merged"
    config, params = load_model(base)
    _, adapted = lora.add(params, config, jax.random.key(0), rank=2, alpha=2, targets=["down_proj"])
    layer = adapted["layers"]["w_down"]
    a, b = jnp.zeros_like(layer.a).at[1, 0, 0].set(300.0), jnp.zeros_like(layer.b).at[1, 0, 0].set(300.0)
    save_adapter(adapter, adapted | {"layers": adapted["layers"] | {"w_down": layer.replace(a=a, b=b)}})
    code, _, (*_, line) = command("merge", base, adapter, out)
    assert code == 2 and "layers.1.w_down holds 1 numbers beyond float16" in line and not out.exists()
    assert command("merge", base, adapter, out, "--allow-overflow")[0] == 0
    theirs = peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM.from_pretrained(base), adapter)
    theirs = theirs.merge_and_unload().state_dict()[DOWN].numpy()
    ours = load_file(out / "model.safetensors")[DOWN].numpy()
    np.testing.assert_array_equal(ours, theirs)
    assert np.isinf(ours).sum() == 1


SIXTEEN = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(SIXTEEN)),
    arrays(np.float32, (7,), elements=st.floats(width=32) | st.sampled_from([65504.0, 65520.0, 65519.99, 3.4e38])),
)
def test_a_narrowed_array_is_torchs_or_refused(name, array):
    theirs = torch.from_numpy(array).to(getattr(torch, name))
    lost = (torch.isfinite(torch.from_numpy(array)) & ~torch.isfinite(theirs)).sum()
    allowed = narrowed(array, SIXTEEN[name], "w", "file", allow_overflow=True)
    np.testing.assert_array_equal(allowed.astype(np.float32), theirs.float().numpy())
    assert all_finite(allowed) == bool(torch.isfinite(theirs).all())
    if lost:
        with pytest.raises(PunaError, match=f"^file: w holds {lost} numbers beyond {name}"):
            narrowed(array, SIXTEEN[name], "w", "file")
    else:
        refused = narrowed(array, SIXTEEN[name], "w", "file").astype(np.float32)  # NumPy knows a NaN in float32
        np.testing.assert_array_equal(refused, allowed.astype(np.float32))
