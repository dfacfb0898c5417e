"""Which weights a Hugging Face folder gives where several lie in it: transformers' choice, said in one line."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
import torch
from converting import save_hf
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from cli import said
from convert.formats import open_model
from convert.safetensor import read_safetensors
from convert.weight_files import read_weights
from model.errors import PunaError

EMBED = "model.embed_tokens.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three models of other numbers: in one file, in shards, and pickled."""
    folder = tmp_path_factory.mktemp("made")
    for seed, options in enumerate(({}, {"shard_size": "60KB"}, {"pickled": True})):
        model = save_hf(folder / str(seed), num_key_value_heads=4, **options)
        assert model.config.vocab_size == 99
        for path in (folder / str(seed)).glob("*.safetensors"):
            tensors = load_file(path)
            if EMBED in tensors:
                save_file(tensors | {EMBED: tensors[EMBED] + seed}, path, {"format": "pt"})
    weights = torch.load(folder / "2" / "pytorch_model.bin")
    torch.save(weights | {EMBED: weights[EMBED] + 2}, folder / "2" / "pytorch_model.bin")
    return folder


@pytest.fixture
def together(made, tmp_path):
    """Lays the files of several of them in one folder."""

    def together(*names):
        for name in names:
            shutil.copytree(made / name, tmp_path / "model", dirs_exist_ok=True)
        return tmp_path / "model"

    return together


def theirs(folder):
    return LlamaForCausalLM.from_pretrained(folder).state_dict()[EMBED].numpy()


@pytest.mark.parametrize(
    ("names", "taken", "left"),
    [
        ("01", "model.safetensors", "model.safetensors.index.json beside it is not"),
        ("02", "model.safetensors", "pytorch_model.bin beside it is not"),
        ("12", INDEX, "pytorch_model.bin beside it is not"),
        ("012", "model.safetensors", "model.safetensors.index.json, pytorch_model.bin beside it are not"),
        ("0", None, None),
        ("1", None, None),
        ("2", None, None),
    ],
)
def test_of_several_weights_transformers_choice_is_taken_and_said(together, capsys, names, taken, left):
    folder = together(*names)
    (folder / "model.fp16.safetensors").write_bytes(b"a variant, which nobody reads")
    (folder / "model.safetensors.index.fp16.json").write_text("{}")
    np.testing.assert_array_equal(open_model(folder).tensors["embed"].load(), theirs(folder))
    lines = capsys.readouterr().err.splitlines()
    said = [] if taken is None else [f"{folder}: {taken} is read, as transformers does; {left}"]
    assert [line for line in lines if "is read" in line] == said


def test_an_index_of_the_one_file_is_no_other_source(together, capsys):
    folder = together("0")
    names = load_file(folder / "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    open_model(folder)
    assert "is read" not in capsys.readouterr().err


def test_mistrals_files_beside_the_model_are_said(together, capsys):
    folder = together("0")
    (folder / "consolidated.safetensors").touch()
    (folder / "params.json").write_text("{}")
    open_model(folder)
    assert "consolidated.safetensors, params.json beside it are not" in capsys.readouterr().err


def index_of(folder):
    return json.loads((folder / INDEX).read_text())


@pytest.mark.parametrize("place", ["/etc/weights.safetensors", "../0/model.safetensors", "a/../../x.safetensors"])
def test_an_index_names_no_file_outside_its_folder(together, place):
    folder = together("1")
    index = index_of(folder)
    index["weight_map"][EMBED] = place
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(PunaError, match=f"{INDEX} names .*, outside its folder"):
        read_weights(folder)


def test_an_index_may_name_a_file_in_a_folder_below_and_list_what_is_computed(together):
    folder = together("1")
    index = index_of(folder)
    moved = index["weight_map"][EMBED]
    (folder / "below").mkdir()
    (folder / moved).rename(folder / "below" / moved)
    placed = {name: f"below/{moved}" if file == moved else file for name, file in index["weight_map"].items()}
    placed["model.layers.0.self_attn.rotary_emb.inv_freq"] = f"below/{moved}"
    (folder / INDEX).write_text(json.dumps(index | {"weight_map": placed}))
    np.testing.assert_array_equal(open_model(folder).tensors["embed"].load(), theirs(folder))
    with pytest.raises(PunaError, match="places lm_head.weight in "):
        (folder / INDEX).write_text(json.dumps({"weight_map": placed | {"lm_head.weight": f"below/{moved}"}}))
        read_weights(folder)


def test_shards_without_their_index_are_all_there_or_named(together):
    folder = together("1")
    (folder / INDEX).unlink()
    assert read_weights(folder).keys() == load_file_keys(folder)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(PunaError, match=r"holds \d+ of \d+ shards, as model-00001-of-0000\d.safetensors"):
        read_weights(folder)


def load_file_keys(folder):
    return {name for path in folder.glob("model-*.safetensors") for name in load_file(path)}


def test_a_variant_alone_and_an_adapter_beside_a_model_are_named(together):
    folder = together("0")
    (folder / "adapter_config.json").write_text("{}")
    open_model(folder)  # settings without weights are nobody's adapter
    (folder / "adapter_model.safetensors").touch()
    with pytest.raises(PunaError, match="holds a model .model.safetensors. and an adapter"):
        open_model(folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    with pytest.raises(PunaError, match="model.fp16.safetensors is a variant; give it the name without"):
        open_model(folder)


def test_a_line_is_said_once(capsys):
    for _ in range(2):
        said.say_once("once and no more")
    assert capsys.readouterr().err == "once and no more\n"


HEADER_FAULTS = {
    "overlap": lambda header: header["b"].update(data_offsets=header["a"]["data_offsets"]),
    "negative": lambda header: header["a"].update(data_offsets=[-8, 8]),
    "gap": lambda header: header["a"].update(data_offsets=[8, 24]),
    "left over": lambda header: header.pop("b"),
}


@pytest.mark.parametrize("fault", HEADER_FAULTS)
def test_tensors_that_do_not_fill_their_file_are_refused_as_the_library_refuses_them(tmp_path, fault):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({name: np.arange(4, dtype=np.float32) for name in "abc"}, path)
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    HEADER_FAULTS[fault](header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    with pytest.raises(safetensors.SafetensorError):
        safetensors.safe_open(path, "np")
    with pytest.raises(PunaError, match="x.safetensors is damaged"):
        read_safetensors(path)
