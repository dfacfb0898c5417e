"""Layers go where they are asked to, byte for byte, and averages are what mergekit's formulas say, in plain numpy."""

import re
import zlib

import numpy as np
import pytest
import torch
from converting import command, save_hf, tensors_of  # noqa: F401
from safetensors.numpy import load_file, save_file

from convert import load_model
from convert.formats import open_model
from convert.surgery import parse_layers
from model.errors import PunaError

# ruff: noqa: F811
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base and two models that were trained from it."""
    folder = tmp_path_factory.mktemp("models")
    save_hf(folder / "base", **SHAPE)
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        save_hf(folder / name, **SHAPE)
        file = folder / name / "model.safetensors"
        tensors = {k: x + random.normal(0, 0.1, x.shape).astype(np.float32) for k, x in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    return folder


def numbers(folder):
    return load_file(folder / "model.safetensors")


# --- layers


@pytest.mark.parametrize(
    ("text", "layers"),
    [("0-3", [0, 1, 2, 3]), ("0,3", [0, 3]), ("0-1, 1-2", [0, 1, 1, 2]), ("3,2", [3, 2]), ("2-2", [2])],
)
def test_ranges_name_layers(text, layers):
    assert parse_layers(text, 4) == layers


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "'' is no layer"),
        ("1-", "'1-' is no layer"),
        ("2-1", "'2-1' is no layer"),
        ("0-4", "no layer 4; .* 0 to 3"),
    ],
)
def test_what_names_no_layer_is_refused(text, named):
    with pytest.raises(PunaError, match=f"--keep {text!r}: .*{named}"):
        parse_layers(text, 4)


@pytest.mark.parametrize("format", ["hf", "orbax", "nf4"])
def test_layers_are_dropped_and_repeated_byte_for_byte(folders, tmp_path, command, format):
    source, told = folders / "a", ["--to", "hf", "--quantize", "nf4"] if format == "nf4" else ["--to", format]
    assert command("model", source, tmp_path / "stored", *told)[0] == 0
    code, out, _ = command("surgery", "layers", tmp_path / "stored", tmp_path / "cut", "--keep", "1,0-1")
    assert code == 0 and out == ["num_hidden_layers 3"]
    before, after = tensors_of(tmp_path / "stored"), tensors_of(tmp_path / "cut")
    expected = {name: value for name, value in before.items() if not name.startswith("layers.")}
    for new, old in enumerate((1, 0, 1)):
        rest = [name.partition(".")[2].partition(".")[2] for name in before if name.startswith(f"layers.{old}.")]
        expected |= {f"layers.{new}.{name}": before[f"layers.{old}.{name}"] for name in rest}
    assert after == expected
    opened = open_model(tmp_path / "cut")
    assert opened.config.num_hidden_layers == 3 and bool(opened.quantized) == (format == "nf4")


# --- averages


def agreeing(updates, weights):
    """TIES' election: the updates of the sign that the weighted sum has, and the weights behind each number."""
    sign = np.where(np.sum(updates, axis=0) >= 0, 1, -1)
    same = np.sign(updates) == sign
    behind = np.sum(same * np.reshape(weights, (-1, *[1] * (updates.ndim - 1))), axis=0)
    return np.sum(np.where(same, updates, 0), axis=0), behind


def reference(method, base, a, b, weights, density, name):
    if method == "linear":
        return (weights[0] * a + weights[1] * b) / sum(weights)
    if method == "slerp":
        cosine = np.sum(a * b) / (np.sqrt(np.sum(a * a)) * np.sqrt(np.sum(b * b)))
        angle, t = np.arccos(cosine), weights[0]
        return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    updates = []
    for number, x in enumerate((a, b)):
        update = x - base
        if method == "ties":
            order = np.argsort(-np.abs(update).reshape(-1), kind="stable")
            kept = np.zeros(update.size, bool)
            kept[order[: max(1, int(density * update.size))]] = True
            update = update * kept.reshape(update.shape)
        else:
            kept = np.random.default_rng((7, zlib.crc32(name.encode()), number)).random(update.shape) < density
            update = update * kept * (np.abs(update).sum() / np.abs(update * kept).sum())
        updates.append(weights[number] * update)
    if method == "dare_linear":
        return base + sum(updates)
    total, behind = agreeing(np.array(updates), weights)
    return base + (total / np.where(behind == 0, 1, behind) if method == "ties" else total)


@pytest.mark.parametrize(
    ("method", "weights", "density"),
    [
        ("linear", (1.0, 1.0), 1.0),
        ("linear", (0.25, 0.5), 1.0),
        ("slerp", (0.3,), 1.0),
        ("ties", (0.6, 0.3), 0.4),
        ("dare_linear", (0.6, 0.3), 0.4),
        ("dare_ties", (0.6, 0.3), 0.4),
    ],
)
def test_an_average_is_the_formula(folders, tmp_path, command, method, weights, density):
    told = [] if method in ("linear", "slerp") else ["--base", folders / "base", "--density", density, "--seed", 7]
    told += [part for weight in weights for part in ("--weight", weight)]
    models = (folders / "a", folders / "b", tmp_path / "mean")
    code, _, err = command("surgery", "average", *models, "--method", method, *told)
    assert code == 0, err
    written = open_model(tmp_path / "mean").tensors
    base, a, b = (open_model(folders / name).tensors for name in ("base", "a", "b"))
    assert written.keys() == base.keys()
    for name, found in written.items():
        wide = [tensor[name].load().astype(np.float64) for tensor in (base, a, b)]
        np.testing.assert_allclose(found.load(), reference(method, *wide, weights, density, name), rtol=1e-5, atol=1e-6)
    load_model(tmp_path / "mean")


def test_equal_models_are_their_average_and_the_dtype_stays(tmp_path, command):
    for name in ("a", "b"):
        save_hf(tmp_path / name, dtype=torch.bfloat16, **SHAPE)
    for number, method in enumerate(("linear", "slerp")):
        models = (tmp_path / "a", tmp_path / "b", tmp_path / str(number))
        assert command("surgery", "average", *models, "--method", method)[0] == 0
        assert tensors_of(tmp_path / str(number)) == tensors_of(tmp_path / "a")
    shared = (tmp_path / "a", tmp_path / "b", tmp_path / "ties", "--base", tmp_path / "a")
    assert command("surgery", "average", *shared, "--method", "ties")[0] == 0
    assert tensors_of(tmp_path / "ties") == tensors_of(tmp_path / "a")


@pytest.mark.parametrize(
    ("told", "named"),
    [
        (["--method", "mean"], "--method 'mean' is not known; choose linear"),
        (["--method", "ties"], "--method ties needs --base"),
        (["--base", "base"], "--method linear has no --base"),
        (["--weight", "1"], "1 times --weight for 2 models"),
        (["--weight", "1", "--weight", "-1"], "add up to 0"),
        (["--method", "slerp", "--weight", "1", "--weight", "1"], "2 models and 2 weights are given"),
        (["--density", "0.5"], "--density is 0.5, which nothing reads with --method linear"),
        (["--method", "ties", "--base", "base", "--density", "0"], "--density is 0.0; it must be above 0"),
    ],
    ids=str,
)
def test_what_does_not_go_with_the_method_is_refused(folders, tmp_path, command, told, named):
    told = [folders / "base" if part == "base" else part for part in told]
    code, _, err = command("surgery", "average", folders / "a", folders / "b", tmp_path / "mean", *told)
    assert code == 2 and re.search(named, " ".join(err)), err
    assert not (tmp_path / "mean").exists()


def test_models_of_other_shapes_are_refused_by_name(folders, tmp_path, command):
    save_hf(tmp_path / "larger", **SHAPE | {"intermediate_size": 64})
    code, _, err = command("surgery", "average", folders / "a", tmp_path / "larger", tmp_path / "mean")
    assert code == 2 and "larger: intermediate_size is 64, and 48 in " in " ".join(err)
