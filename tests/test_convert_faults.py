"""What is wrong with a model's files, or with a request, is said in one line, and nothing is left half-written."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import jax
import numpy as np
import pytest
import torch
from converting import command, save_hf, tensors_of  # noqa: F401
from safetensors.torch import load_file, save_file

from cli import files
from cli.files import write_json
from convert import save_model
from convert.formats import open_model
from convert.load import load_params
from model import lora
from model.json_file import read_json

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A small model of transformers in several safetensors files."""
    folder = tmp_path_factory.mktemp("sharded") / "hf"
    save_hf(folder, shard_size="60KB", num_key_value_heads=4)
    return folder


@pytest.fixture
def model(sharded, tmp_path):
    """A copy of it to break."""
    return shutil.copytree(sharded, tmp_path / "model")


def change_config(folder, **changes):
    write_json(folder / "config.json", read_json(folder / "config.json") | changes)


def first_shard(folder):
    return folder / "model-00001-of-00006.safetensors"


def change_tensors(folder, change):
    """Rewrite a shard after `change(tensors)`, and the index to say what it holds now."""
    path = first_shard(folder)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    index = read_json(folder / "model.safetensors.index.json")
    weight_map = {name: file for name, file in index["weight_map"].items() if file != path.name}
    write_json(
        folder / "model.safetensors.index.json",
        index | {"weight_map": weight_map | dict.fromkeys(tensors, path.name)},
    )


def lose_shard(folder):
    first_shard(folder).unlink()
    return r"lacks model-00001-of-00006.safetensors, which model.safetensors.index.json names"


def truncate(folder):
    data = first_shard(folder).read_bytes()
    first_shard(folder).write_bytes(data[: len(data) // 2])
    return r"model-00001-of-00006.safetensors is truncated: .* ends at byte [\d,]+ of [\d,]+"


def truncate_header(folder):
    first_shard(folder).write_bytes(b"\x10")
    return "model-00001-of-00006.safetensors is truncated or not a safetensors file: 1 bytes"


def reshape(folder):
    change_tensors(folder, lambda tensors: tensors.update({"model.embed_tokens.weight": torch.zeros(99, 63)}))
    return r"model.embed_tokens.weight has shape \(99, 63\); the config says \(99, 64\)"


def add_tensor(folder):
    change_tensors(folder, lambda tensors: tensors.update(extra=torch.zeros(3)))
    return r"has unknown 1 tensor \(extra\)"


def drop_tensor(folder):
    change_tensors(folder, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    return r"lacks 1 tensor \(model.embed_tokens.weight\)"


def drop_index_entry(folder):
    index = read_json(folder / "model.safetensors.index.json")
    del index["weight_map"]["model.embed_tokens.weight"]
    write_json(folder / "model.safetensors.index.json", index)
    return "index.json does not list model.embed_tokens.weight, which model-0000.-of-00006.safetensors holds"


def misplace_index_entry(folder):
    index = read_json(folder / "model.safetensors.index.json")
    index["weight_map"]["nothing"] = first_shard(folder).name
    write_json(folder / "model.safetensors.index.json", index)
    return "places nothing in model-00001-of-00006.safetensors, which does not hold it"


def unknown_rope(folder):
    change_config(folder, rope_scaling={"rope_type": "spiral", "factor": 2.0}, rope_parameters=None)
    return "rope_type 'spiral' is not supported"


def experts(folder):
    change_config(folder, num_local_experts=8)
    return "unknown active field num_local_experts = 8"


def another_architecture(folder):
    change_config(folder, model_type="mixtral")
    return "model_type 'mixtral' is not supported"


def deeper_config(folder):
    change_config(folder, num_hidden_layers=3)
    return r"lacks 9 tensors \(model.layers.2.input_layernorm.weight, .* and 1 more\)"


def two_formats(folder):
    (folder / "consolidated.00.pth").touch()
    return r"holds models of several formats: .*\(hf\), consolidated.00.pth \(meta\)"


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()
    return "model holds no model"


def no_config(folder):
    (folder / "config.json").unlink()
    return "config.json is missing"


def broken_config(folder):
    (folder / "config.json").write_text("{")
    return "config.json is not valid JSON"


def integers(folder):
    change_tensors(folder, lambda tensors: tensors.update({"model.embed_tokens.weight": torch.zeros(99, 64).int()}))
    return "model.embed_tokens.weight has dtype int32"


def garbage_pickle(folder):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK not really")
    return "pytorch_model.bin is truncated or no file of PyTorch weights"


def pickle_weights(folder, weights):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save(weights, folder / "pytorch_model.bin")


def nested_pickle(folder):
    pickle_weights(folder, {"state_dict": {"lm_head.weight": torch.zeros(99, 64)}, "epoch": 3})
    return r"'state_dict' is a dict, no tensor; .* take them out: torch.save\(torch.load\('pytorch_model.bin'\)\['sta"


def pickled_list(folder):
    pickle_weights(folder, [torch.zeros(3)])
    return "holds a list, no dict of tensors by name"


def pickled_float8(folder):
    pickle_weights(folder, {"lm_head.weight": torch.zeros(99, 64).to(torch.float8_e4m3fn)})
    return "lm_head.weight has dtype float8_e4m3fn; weights are float64, float32"


def huge_header(folder):
    with first_shard(folder).open("wb") as file:  # sparse: no byte of it is on the disk
        file.write((3 << 30).to_bytes(8, "little"))
        file.truncate(4 << 30)
    return "model-00001-of-00006.safetensors is truncated or not a safetensors file"


def unknown_quantization(folder):
    change_config(folder, quantization_config={"bits": 4, "group_size": 64})
    return "quantized by a method that quant_method does not name are not read .*: give the unquantized model"


@pytest.mark.parametrize(
    "break_it",
    [
        nested_pickle,
        pickled_list,
        pickled_float8,
        huge_header,
        unknown_quantization,
        lose_shard,
        truncate,
        truncate_header,
        reshape,
        add_tensor,
        drop_tensor,
        drop_index_entry,
        misplace_index_entry,
        unknown_rope,
        experts,
        another_architecture,
        deeper_config,
        two_formats,
        empty,
        no_config,
        broken_config,
        integers,
        garbage_pickle,
    ],
)
def test_a_fault_is_one_line_exit_2_and_no_output(model, tmp_path, command, break_it):  # noqa: F811
    message = break_it(model)
    code, output, errors = command("model", model, tmp_path / "out", "--to", "orbax")
    assert (code, output) == (2, []) and len(errors) == 1
    assert errors[0].startswith("error: ") and re.search(message, errors[0]), errors
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.fixture
def meta(sharded, tmp_path):
    config, params = open_model(sharded).config, load_params(open_model(sharded))
    save_model(tmp_path / "model", config, params, "meta", shards=4)
    return tmp_path / "model"


def lose_meta_shard(folder):
    (folder / "consolidated.02.pth").unlink()
    return "lacks consolidated.02.pth: fetch the missing shard"


def lose_last_meta_shard(folder):
    (folder / "consolidated.03.pth").unlink()
    return "is a consolidated.*.pth missing"


def no_params(folder):
    (folder / "params.json").unlink()
    return "params.json is missing"


def foreign_meta_tensor(folder):
    path = folder / "consolidated.01.pth"
    torch.save(torch.load(path) | {"vision.weight": torch.zeros(2)}, path)
    return r"consolidated.01.pth has unknown 1 tensor \(vision.weight\)"


def flat_meta_tensor(folder):
    path = folder / "consolidated.01.pth"
    torch.save(torch.load(path) | {"layers.0.attention.wo.weight": torch.zeros(2)}, path)
    return "layers.0.attention.wo.weight has not 2 axes in every shard"


@pytest.mark.parametrize(
    "break_it", [lose_meta_shard, lose_last_meta_shard, no_params, foreign_meta_tensor, flat_meta_tensor]
)
def test_a_fault_of_metas_files(meta, tmp_path, command, break_it):  # noqa: F811
    message = break_it(meta)
    code, _, errors = command("inspect", meta)
    assert code == 2 and len(errors) == 1
    assert re.search(message, errors[0]), errors


def lose_layer(folder):
    shutil.rmtree(folder / "params" / "layer_00001")
    return "layer_00001 is missing"


def extra_layer(folder):
    shutil.copytree(folder / "params" / "layer_00001", folder / "params" / "layer_00002")
    return "has unknown layer_00002"


def damage_layer(folder):
    shutil.rmtree(folder / "params" / "layer_00001" / "d")
    return "layer_00001 is no complete Orbax tree"


@pytest.mark.parametrize("break_it", [lose_layer, extra_layer, damage_layer])
def test_a_fault_of_orbax_files(sharded, tmp_path, command, break_it):  # noqa: F811
    config, params = open_model(sharded).config, load_params(open_model(sharded))
    save_model(tmp_path / "model", config, params, "orbax")
    message = break_it(tmp_path / "model")
    code, _, errors = command("model", tmp_path / "model", tmp_path / "out", "--to", "hf")
    assert code == 2 and errors[-1].startswith("error: ")
    assert re.search(message, errors[-1]), errors
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "tf"], "--to tf is not known; choose hf, orbax, meta or gguf"),
        (["--to", "hf", "--dtype", "int3"], "--dtype int3 is not known; choose float32, bfloat16, float16"),
        (["--to", "hf", "--max-shard-size", "huge"], "--max-shard-size 'huge' is no size"),
        (["--to", "meta", "--shards", "3"], "--shards 3: tok_embeddings.weight has 64 .* do not divide"),
    ],
)
def test_a_wrong_request(sharded, tmp_path, command, arguments, message):  # noqa: F811
    code, output, errors = command("model", sharded, tmp_path / "out", *arguments)
    assert (code, output, len(errors)) == (2, [], 1)
    assert re.search(message, errors[0]), errors
    assert list(tmp_path.iterdir()) == []


def test_what_meta_cannot_say_is_refused(tmp_path, command):  # noqa: F811
    save_hf(tmp_path / "hf", attention_bias=True)
    code, _, errors = command("model", tmp_path / "hf", tmp_path / "out", "--to", "meta")
    assert code == 2 and "attention_bias = True cannot be written as Meta's params.json" in errors[-1]


def test_an_existing_destination_needs_overwrite(sharded, tmp_path, command):  # noqa: F811
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    code, _, errors = command("model", sharded, tmp_path / "out", "--to", "hf")
    assert code == 2 and "exists" in errors[0] and "--overwrite" in errors[0] and len(errors) == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]
    assert command("model", sharded, tmp_path / "out", "--to", "hf", "--overwrite")[0] == 0
    assert tensors_of(tmp_path / "out") == tensors_of(sharded) and not (tmp_path / "out" / "precious").exists()


def test_a_destination_that_is_or_holds_the_source_is_refused(model, tmp_path, command):  # noqa: F811
    (tmp_path / "link").symlink_to(model)
    gguf = tmp_path / "x.gguf"
    assert command("model", model, gguf, "--to", "gguf")[0] == 0
    before = {path: path.stat().st_size for path in tmp_path.rglob("*")}
    for source, destination in ((model, model), (model, tmp_path), (tmp_path / "link", model), (gguf, tmp_path)):
        code, _, errors = command("model", source, destination, "--to", "hf", "--overwrite")
        assert code == 2 and len(errors) == 1 and f"is or holds {source}" in errors[0]
    code, _, errors = command("model", gguf, gguf, "--to", "gguf", "--dtype", "float16", "--overwrite")
    assert code == 2 and len(errors) == 1 and f"is or holds {gguf}" in errors[0]
    assert {path: path.stat().st_size for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    "header",
    [[], {"a": {}}, {"a": {"dtype": "F32", "shape": None, "data_offsets": [0, 4]}}, {"a": {"data_offsets": ["0", 4]}}],
    ids=str,
)
def test_a_header_that_is_json_and_no_header(model, command, header):  # noqa: F811
    text = json.dumps(header).encode()
    first_shard(model).write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    code, _, errors = command("inspect", model)
    assert code == 2 and len(errors) == 1
    assert f"{first_shard(model)} is damaged, or says something no such model says" in errors[0]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere/at/all", "nowhere/at/all: no such folder, and no Hub id of the form org/name"),
        (ROOT / "README.md", "README.md is a file: give the folder that holds the model"),
    ],
)
def test_a_model_that_is_not_there(command, path, message):  # noqa: F811
    code, _, errors = command("inspect", path)
    assert code == 2 and len(errors) == 1 and message in errors[0]


def test_a_disk_too_small_is_found_out_before_writing(sharded, tmp_path, command, monkeypatch):  # noqa: F811
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    code, _, errors = command("model", sharded, tmp_path / "out", "--to", "hf")
    assert code == 1 and "bytes and its disk has 1 free" in errors[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT], ids=errno.errorcode.get)
def test_a_disk_that_fails_while_written_is_no_wrong_request(sharded, tmp_path, command, monkeypatch, number):  # noqa: F811
    def load(self):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("convert.lazy.LazyTensor.load", load)
    code, _, errors = command("model", sharded, tmp_path / "out", "--to", "hf")
    assert code == 1 and errors[-1] == f"error: {os.strerror(number)}: {tmp_path / 'out'}"
    assert list(tmp_path.iterdir()) == []


def test_adapters_are_not_saved_as_a_model(sharded, tmp_path):
    checkpoint = open_model(sharded)
    config, params = lora.add(load_params(checkpoint), checkpoint.config, jax.random.key(0), targets=["q_proj"])
    with pytest.raises(ValueError, match="layers.0.wq is a LoraArray: merge adapters"):
        save_model(tmp_path / "out", config, params)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["hf", "orbax", "meta"])
def test_an_interrupted_conversion_leaves_nothing(sharded, tmp_path, command, monkeypatch, format):  # noqa: F811
    """The signal comes from inside the third tensor's read, as Ctrl-C half-way would."""
    reads = []

    def interrupted(self):
        reads.append(self)
        if len(reads) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return self.read(tuple(slice(0, size) for size in self.shape))

    monkeypatch.setattr("convert.lazy.LazyTensor.load", interrupted)
    code, _, errors = command("model", sharded, tmp_path / "out", "--to", format)
    assert code == 130 and errors[-1] == "interrupted by SIGINT: unfinished output was removed"
    assert list(tmp_path.iterdir()) == []


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's HTTP interface as a download needs, over the folder `root`."""

    root: Path
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        headers, body = {}, b'{"error": "not found"}'
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/tiny"):
            files = [str(file.relative_to(self.root)) for file in self.root.rglob("*") if file.is_file()]
            tree = [{"type": "file", "path": file, "size": 1, "oid": "0"} for file in files]
            info = {"id": "org/tiny", "sha": "0" * 40, "siblings": [{"rfilename": file} for file in files]}
            body = json.dumps(tree if "/tree/" in path else info).encode()
        elif path.startswith("/org/tiny/resolve/"):
            body = (self.root / path.split("/", 5)[5]).read_bytes()
            headers = {"ETag": f'"{abs(hash(body))}"', "X-Repo-Commit": "0" * 40}
        self.send_response(200 if headers or path.startswith("/api/models/org/tiny") else 404)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.mark.slow
def test_a_hub_id_is_downloaded(sharded, tmp_path):
    Hub.root = shutil.copytree(sharded, tmp_path / "hub")
    (Hub.root / "pytorch_model.bin").write_bytes(b"the same again, not wanted")
    (Hub.root / "original").mkdir()
    (Hub.root / "original" / "consolidated.00.pth").write_bytes(b"nor this")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    environment = os.environ | {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "JAX_PLATFORMS": "cpu",
    }

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "convert", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
        )

    done = run("model", "org/tiny@main", str(tmp_path / "out"), "--to", "hf")
    assert done.returncode == 0, done.stderr
    assert tensors_of(tmp_path / "out") == tensors_of(sharded)
    fetched = {path.name for path in (tmp_path / "home").rglob("snapshots/*/*")}
    assert "config.json" in fetched and not fetched & {"pytorch_model.bin", "consolidated.00.pth"}
    failed = run("inspect", "org/huge")
    server.shutdown()
    server.server_close()
    assert failed.returncode == 2 and failed.stdout == ""
    assert failed.stderr.startswith("error: org/huge is no local folder, and the Hub did not give it: ")
    assert len(failed.stderr.splitlines()) == 1


def test_pickled_weights_without_torch_name_the_extra(tmp_path, command, monkeypatch):  # noqa: F811
    save_hf(tmp_path, pickled=True)
    monkeypatch.setitem(sys.modules, "torch", None)
    code, _, errors = command("inspect", tmp_path)
    assert code == 2 and "pytorch_model.bin needs PyTorch: pip install 'puna[torch]'" in errors[0]


def test_inspect_prints_what_is_there(sharded, command):  # noqa: F811
    code, output, _ = command("inspect", sharded)
    said = dict(line.split(maxsplit=1) for line in output)
    parameters = sum(np.prod(tensor.shape) for tensor in open_model(sharded).tensors.values())
    assert code == 0 and said["format"] == "hf" and said["num_key_value_heads"] == "4"
    assert said["parameters"] == f"{parameters:,}" and said["bytes"] == f"{parameters * 4:,}"
    assert said["dtypes"] == "float32 (21 tensors)"
    digest = subprocess.run(["sha256sum", first_shard(sharded)], capture_output=True, text=True).stdout.split()[0]
    assert said[first_shard(sharded).name].endswith(digest)
