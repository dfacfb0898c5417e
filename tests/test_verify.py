"""`convert verify` says which tensors differ, by how much, and exits 1 exactly where they do."""

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from converting import command, save_hf  # noqa: F401
from safetensors.torch import load_file, save_file

from convert.checkpoint import WriteOptions
from convert.formats import open_model
from convert.lazy import from_array
from convert.save import write_model
from convert.verify import max_difference

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One model as HF, Meta and Orbax, and in bfloat16."""
    root = tmp_path_factory.mktemp("verify")
    save_hf(root / "hf", num_key_value_heads=4)
    source = open_model(root / "hf")
    for format in ("meta", "orbax"):
        write_model(root / format, replace(source, format=format), WriteOptions(shards=2 if format == "meta" else 1))
    half = {name: tensor.cast(np.dtype(ml_dtypes.bfloat16)) for name, tensor in source.tensors.items()}
    write_model(root / "half", replace(source, tensors=half))
    return root


@pytest.mark.parametrize("other", ["hf", "meta", "orbax"])
def test_one_model_in_two_formats_is_the_same(folders, command, other):  # noqa: F811
    code, output, _ = command("verify", folders / "hf", folders / other)
    assert code == 0 and output[-1] == "same"
    assert "21 tensors compared: largest difference 0, 0 differ" in output
    assert "logits of 32 tokens: largest difference 0" in output


def test_one_changed_weight_is_named(folders, tmp_path, command):  # noqa: F811
    save_hf(tmp_path / "changed", num_key_value_heads=4)
    path = tmp_path / "changed" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 0.5
    save_file(tensors, path, {"format": "pt"})
    code, output, errors = command("verify", folders / "hf", tmp_path / "changed")
    assert code == 1 and output[-1] == "different"
    assert output[0].startswith("tensor layers.1.w_up: largest difference 0.5 (float32 and float32)")
    assert output[1] == "21 tensors compared: largest difference 0.5, 1 differ"
    assert command("verify", folders / "hf", tmp_path / "changed", "--atol", "2")[0] == 0


def test_a_rounded_model_is_within_its_rounding(folders, command):  # noqa: F811
    code, output, _ = command("verify", folders / "hf", folders / "half", "--tokens", "0")
    assert code == 1 and "(float32 and bfloat16)" in output[0] and not any("logits" in line for line in output)
    assert command("verify", folders / "hf", folders / "half", "--tokens", "0", "--atol", str(2**-8))[0] == 0


def test_a_tied_model_equals_its_untied_copy(tmp_path, command):  # noqa: F811
    model = save_hf(tmp_path / "tied", tie_word_embeddings=True)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (tmp_path / "untied").mkdir()
    save_file(weights, tmp_path / "untied" / "model.safetensors")
    config = json.loads((tmp_path / "tied" / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "untied" / "config.json").write_text(json.dumps(config))
    code, output, _ = command("verify", tmp_path / "tied", tmp_path / "untied")
    assert code == 0 and output[0] == "config tie_word_embeddings: True and False"


def test_another_config_shows_in_the_logits(folders, tmp_path, command):  # noqa: F811
    source = open_model(folders / "hf")
    write_model(tmp_path / "out", replace(source, config=replace(source.config, rope_theta=20000.0)))
    code, output, _ = command("verify", folders / "hf", tmp_path / "out")
    assert code == 1 and output[:2] == [
        "config rope_theta: 10000.0 and 20000.0",
        "21 tensors compared: largest difference 0, 0 differ",
    ]


def test_another_shape_is_named(folders, tmp_path, command):  # noqa: F811
    save_hf(tmp_path / "deeper", num_hidden_layers=3, num_key_value_heads=8)
    code, output, _ = command("verify", folders / "hf", tmp_path / "deeper", "--tokens", "0")
    assert code == 1
    assert "tensor layers.0.wk: shapes (64, 32) and (64, 64)" in output
    assert f"tensor layers.2.wq: only in {tmp_path / 'deeper'}" in output


def test_differences_count_nan_and_infinity():
    def difference(a, b):
        return max_difference(*(from_array(np.array(x, np.float32), "here") for x in (a, b)))

    assert difference([1, np.nan, np.inf], [1, np.nan, np.inf]) == 0
    assert difference([1, np.nan, 2], [1, 3, 2]) == np.inf
    assert difference([1, np.inf], [1, -np.inf]) == np.inf
    assert difference([0.0, 2.0], [-0.0, 2.5]) == 0.5
