"""Everything about a format comes from its row: a new one is found, read, written, merged into and named by --help."""

import importlib
import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from converting import command, save_hf, tensors_of  # noqa: F401
from typer.testing import CliRunner

import convert.__main__
from convert import load_model, save_model
from convert.checkpoint import Checkpoint, WriteOptions
from convert.formats import FORMATS, FileFormat, check_options, open_model
from convert.lazy import from_array
from convert.load import load_params
from convert.merge import merge_adapters
from convert.peft import save_adapter
from convert.save import write_model
from model import LlamaConfig, lora
from model.errors import PunaError
from model.params import init_params

TINY = LlamaConfig(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=64,
)


def read(folder):
    config = LlamaConfig.from_hf(json.loads((folder / "toy.json").read_text()))
    arrays = np.load(folder / "weights.toy.npz")
    return Checkpoint(config, {name: from_array(arrays[name], "toy") for name in arrays}, folder, "toy")


def write(folder, checkpoint, options):
    (folder / "toy.json").write_text(json.dumps(checkpoint.config.to_hf()))
    tensors = checkpoint.as_floats(options.dtype).tensors
    np.savez(folder / "weights.toy.npz", **{name: tensor.load() for name, tensor in tensors.items()})


@pytest.fixture
def toy(monkeypatch):
    row = FileFormat("arrays of NumPy", ("*.toy.npz",), "toy.json", read, write, frozenset({"dtype"}))
    monkeypatch.setitem(FORMATS, "toy", row)
    yield importlib.reload(convert.__main__)
    monkeypatch.undo()
    importlib.reload(convert.__main__)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "hf"
    save_model(folder, TINY, init_params(TINY, jax.random.key(0)))
    return folder


@pytest.fixture
def adapter(model, tmp_path):
    config, params = lora.add(load_params(open_model(model)), TINY, jax.random.key(1), rank=2, targets=["q_proj"])
    w = params["layers"]["wq"]
    layers = {**params["layers"], "wq": replace(w, b=jax.random.normal(jax.random.key(2), w.b.shape))}
    save_adapter(tmp_path / "adapter", {**params, "layers": layers})
    return tmp_path / "adapter"


@pytest.mark.slow
def test_a_row_makes_a_format(toy, model, adapter, tmp_path):
    def run(*arguments):
        result = CliRunner().invoke(toy.app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.exception
        return " ".join(result.output.split())

    assert "toy, arrays of NumPy" in run("model", "--help") and "toy, arrays of NumPy" in run("merge", "--help")
    run("model", model, tmp_path / "toy", "--to", "toy")
    assert open_model(tmp_path / "toy").format == "toy" and tensors_of(tmp_path / "toy") == tensors_of(model)
    run("model", tmp_path / "toy", tmp_path / "back", "--to", "hf")
    assert tensors_of(tmp_path / "back") == tensors_of(model)
    assert "format toy" in run("inspect", tmp_path / "toy") and "same" in run("verify", model, tmp_path / "toy")
    for format in ("toy", "hf"):
        run("merge", model, adapter, tmp_path / f"merged_{format}", "--to", format)
    assert tensors_of(tmp_path / "merged_toy") == tensors_of(tmp_path / "merged_hf") != tensors_of(model)
    save_model(tmp_path / "saved", *load_model(tmp_path / "toy"), format="toy")
    assert tensors_of(tmp_path / "saved") == tensors_of(model)


def test_detection_speaks_of_every_row(toy, model, tmp_path):
    with pytest.raises(PunaError, match=r"holds no model\*\.safetensors, .*consolidated.*, .*\*\.gguf or \*\.toy\.npz"):
        open_model(tmp_path)
    (tmp_path / "toy.json").touch()
    with pytest.raises(PunaError, match=r"has toy\.json and no \*\.toy\.npz: the weights are missing"):
        open_model(tmp_path)
    (tmp_path / "a.toy.npz").touch()
    (tmp_path / "consolidated.00.pth").touch()
    with pytest.raises(PunaError, match=r"several formats: consolidated.00.pth \(meta\), a.toy.npz \(toy\)"):
        open_model(tmp_path)


def test_an_option_that_the_format_does_not_read_is_refused_by_name(toy):
    given = {"quantize": "int8", "block": 32, "double_quant": True, "max_shard_size": 10, "shards": 2}
    for name, value in given.items():
        readers = [format for format, row in FORMATS.items() if name in row.options]
        for format in FORMATS.keys() - readers:
            said = " or ".join(f"format='{reader}'" for reader in readers)
            with pytest.raises(PunaError, match=f"{name}={value!r} is no option of format='{format}'.* choose {said}"):
                check_options(format, WriteOptions(**{name: value}))
        for format in readers:
            check_options(format, WriteOptions(**{name: value}))
    with pytest.raises(PunaError, match="format='gguf' has no quantize='nf4'; choose int8 or int4"):
        check_options("gguf", WriteOptions(quantize="nf4"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--to", "hf", "--shards", "2"], "--shards 2 is no option of --to hf: leave it out, or choose --to meta"),
        (["--to", "meta", "--max-shard-size", "5GB"], "--max-shard-size 5000000000 is no option of --to meta"),
        (["--to", "orbax", "--quantize", "nf4"], "leave it out, or choose --to hf or --to gguf"),
        (["--to", "hf", "--block", "32"], "--block 32 says how to quantize: give quantize too"),
        (["--to", "hf", "--double-quant"], "--double-quant says how to quantize"),
    ],
    ids=str,
)
def test_a_command_says_it_with_its_flags(model, tmp_path, command, arguments, said):  # noqa: F811
    code, output, errors = command("model", model, tmp_path / "out", *arguments)
    assert (code, output, len(errors)) == (2, [], 1) and said in errors[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_adapters_merge_into_gguf(model, adapter, tmp_path, command):  # noqa: F811
    """As they merge into a folder that is then converted."""
    assert command("merge", model, adapter, tmp_path / "merged.gguf", "--to", "gguf")[0] == 0
    merge_adapters(model, [adapter], tmp_path / "merged")
    write_model(tmp_path / "converted.gguf", replace(open_model(tmp_path / "merged"), format="gguf"))
    assert tensors_of(tmp_path / "merged.gguf") == tensors_of(tmp_path / "converted.gguf") != tensors_of(model)
    assert command("merge", model, adapter, tmp_path / "half.gguf", "--to", "gguf", "--dtype", "float16")[0] == 0
    assert (tmp_path / "half.gguf").stat().st_size < (tmp_path / "merged.gguf").stat().st_size


def test_parameters_in_memory_are_saved_as_gguf(model, tmp_path):
    save_model(tmp_path / "a.gguf", *load_model(model), format="gguf")
    assert tensors_of(tmp_path / "a.gguf") == tensors_of(model)


@pytest.mark.parametrize("where", ["convert.hf.from_foreign", "convert.names.parameters", "convert.names.check_shape"])
def test_a_fault_of_our_own_is_not_said_to_be_the_files(model, command, monkeypatch, where):  # noqa: F811
    """It keeps its traceback, and Python's exit code for one, which is 1."""

    def broken(*arguments):
        raise AttributeError("a fault of ours")

    monkeypatch.setattr(where, broken)
    with pytest.raises(AttributeError, match="a fault of ours"):
        command("inspect", model)
