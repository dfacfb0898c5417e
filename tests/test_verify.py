"""`convert verify` says which tensors differ, by how much, and exits 1 exactly where they do."""

import json
import shutil
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from converting import command, save_hf  # noqa: F401
from safetensors.torch import load_file, save_file
from small_tokenizer import CHATML, LLAMA3, small_tokenizer

from convert.checkpoint import WriteOptions
from convert.formats import open_model
from convert.lazy import from_array
from convert.save import write_model
from convert.verify import max_difference
from model.config import RopeScaling

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One model as HF, Meta and Orbax, and in bfloat16."""
    root = tmp_path_factory.mktemp("verify")
    save_hf(root / "hf", num_key_value_heads=4)
    source = open_model(root / "hf")
    for format in ("meta", "orbax"):
        write_model(root / format, replace(source, format=format), WriteOptions(shards=2 if format == "meta" else 1))
    half = {name: tensor.cast(np.dtype(ml_dtypes.bfloat16), name) for name, tensor in source.tensors.items()}
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
    assert code == 0 and output[0] == "config tie_word_embeddings: True and False (the tensors tell)"


def test_another_config_shows_in_the_logits(folders, tmp_path, command):  # noqa: F811
    source = open_model(folders / "hf")
    write_model(tmp_path / "out", replace(source, config=replace(source.config, rope_theta=20000.0)))
    code, output, _ = command("verify", folders / "hf", tmp_path / "out")
    assert code == 1 and output[:2] == [
        "config rope_theta: 10000.0 and 20000.0",
        "21 tensors compared: largest difference 0, 0 differ",
    ]


DYNAMIC, YARN = RopeScaling("dynamic", 2.0), RopeScaling("yarn", 4.0, 64)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"rope_theta": 20000.0}),
        ({}, {"rope_scaling": RopeScaling("linear", 2.0)}),
        ({"rope_scaling": YARN}, {"rope_scaling": replace(YARN, factor=8.0)}),
        ({"rope_scaling": DYNAMIC}, {"rope_scaling": replace(DYNAMIC, factor=3.0)}),
        ({"rope_scaling": DYNAMIC}, {"max_position_embeddings": 64}),
        ({}, {"rms_norm_eps": 1e-5}),
        ({}, {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}),
        ({}, {"bos_token_id": None}),
        ({}, {"eos_token_id": (2, 3)}),
        ({}, {"pad_token_id": 0}),
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_a_field_that_makes_another_model_fails_by_itself(folders, tmp_path, command, before, after):  # noqa: F811
    """Also where no logits are compared, and no tensor differs."""
    source = open_model(folders / "hf")
    config = replace(source.config, **before)
    write_model(tmp_path / "a", replace(source, config=config))
    write_model(tmp_path / "b", replace(source, config=replace(config, **after)))
    code, output, _ = command("verify", tmp_path / "a", tmp_path / "b", "--tokens", "0")
    assert code == 1 and output[-1] == "different"
    named = [f"config {name}: {getattr(config, name)} and {value}" for name, value in after.items()]
    assert sorted(output[: len(named)]) == sorted(named) and output[len(named)].endswith(" 0 differ")


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ({}, {"initializer_range": 0.5}, "only new parameters are drawn with it"),
        ({}, {"max_position_embeddings": 64}, "changes no logit"),
        ({"rope_scaling": YARN}, {"rope_scaling": replace(YARN, beta_fast=32.0, truncate=True)}, "the same rotations"),
    ],
    ids=["initializer_range", "max_position_embeddings", "rope_scaling"],
)
def test_a_field_that_changes_nothing_is_said(folders, tmp_path, command, before, after, why):  # noqa: F811
    source = open_model(folders / "hf")
    config = replace(source.config, **before)
    write_model(tmp_path / "a", replace(source, config=config))
    write_model(tmp_path / "b", replace(source, config=replace(config, **after)))
    code, output, _ = command("verify", tmp_path / "a", tmp_path / "b")
    ((name, value),) = after.items()
    assert (code, output[0]) == (0, f"config {name}: {getattr(config, name)} and {value} ({why})")
    assert "logits of 32 tokens: largest difference 0" in output and output[-1] == "same"


def test_what_a_format_does_not_say_is_no_difference(folders, tmp_path, command):  # noqa: F811
    source = open_model(folders / "hf")
    config = replace(source.config, eos_token_id=(2, 3), pad_token_id=0)
    write_model(tmp_path / "hf", replace(source, config=config))
    write_model(tmp_path / "meta", replace(source, config=config, format="meta"))
    code, output, _ = command("verify", tmp_path / "hf", tmp_path / "meta", "--tokens", "0")
    assert (code, output[-1]) == (0, "same")
    assert output[:2] == [
        "config eos_token_id: (2, 3) and (2,) (meta does not say it)",
        "config pad_token_id: 0 and None (meta does not say it)",
    ]


@pytest.fixture
def spoken(folders, tmp_path):
    """One model twice, each time with the same tokenizer."""
    for name in ("a", "b"):
        write_model(tmp_path / name, open_model(folders / "hf"))
        small_tokenizer(tmp_path / name, LLAMA3)
    return tmp_path / "a", tmp_path / "b"


def change_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def without_the_last_merge(folder):
    change_json(folder / "tokenizer.json", lambda spec: spec["model"]["merges"].pop())


def with_a_space_first(folder):
    change_json(folder / "tokenizer.json", lambda spec: spec["pre_tokenizer"].update(add_prefix_space=True))


def with_more_tokens(folder):
    last = {"id": 460, "content": "<more>", "special": True}
    change_json(folder / "tokenizer.json", lambda spec: spec["added_tokens"].append(last))


def with_swapped_tokens(folder):
    def swap(spec):
        vocab = spec["model"]["vocab"]
        vocab["Ā"], vocab["ā"] = vocab["ā"], vocab["Ā"]  # bytes 0 and 1

    change_json(folder / "tokenizer.json", swap)


def with_another_bos(folder):
    change_json(folder / "tokenizer_config.json", lambda config: config.update(bos_token="<s>"))


def with_another_template(folder):
    change_json(folder / "tokenizer_config.json", lambda config: config.update(chat_template=CHATML))


def with_a_template_that_reads_alike(folder):
    """Another text that writes the same."""
    same = {"chat_template": "{# by hand #}" + LLAMA3}
    change_json(folder / "tokenizer_config.json", lambda config: config.update(same))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (without_the_last_merge, ["tokenizer ids of the texts of single tokens: 1 differ (id "]),
        (
            with_a_space_first,
            ["tokenizer ids of ", "tokenizer ids of the texts of single tokens: ", "ids of a conversation by "],
        ),
        (
            with_more_tokens,
            ["tokenizer vocab_size: 460 and 461", "tokenizer special tokens: 1 differ (<more> None and 460)"],
        ),
        (with_swapped_tokens, ["tokenizer tokens: 2 differ (id ", "tokenizer ids of "]),
        (with_another_bos, ["tokenizer bos_id: ", "ids of a conversation by the chat template: "]),
        (with_another_template, ["chat template: ", "ids of a conversation by the chat template: "]),
        (with_a_template_that_reads_alike, ["chat template: "]),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_difference_of_tokenizers_fails_by_itself(spoken, command, change, named):  # noqa: F811
    first, second = spoken
    code, output, _ = command("verify", first, second, "--tokens", "0")
    assert (code, output[-2:]) == (0, ["tokenizers compared: 0 differences", "same"])
    change(second)
    code, output, _ = command("verify", first, second, "--tokens", "0")
    assert code == 1 and output[-1] == "different" and output[0].endswith(" 0 differ")
    lines = output[1:-2]
    assert lines and all(any(line.startswith(start) for start in named) for line in lines), lines
    assert all(any(line.startswith(start) for line in lines) for start in named), lines


def test_a_tokenizer_on_one_side_only_is_said(spoken, command):  # noqa: F811
    first, second = spoken
    (second / "tokenizer.json").unlink()
    code, output, _ = command("verify", second, first, "--tokens", "0")
    assert (code, output[-2:]) == (0, [f"tokenizer: only in {first}, not compared", "same"])


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


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ({"do_sample": True, "temperature": 0.6}, "generation_config temperature: None and 0.6"),
        ({"eos_token_id": [2, 5]}, "generation_config eos_token_id: [2] and [2, 5]"),
        ({"pad_token_id": 0}, "generation_config pad_token_id: None and [0]"),
        ({"top_k": 40}, "generation_config top_k: None and 40"),
        ({"suppress_tokens": [3]}, "generation_config suppress_tokens: None and [3]"),
        ({"max_new_tokens": 9, "temperature": 1.0, "bos_token_id": 1, "transformers_version": "5"}, None),
        ({"eos_token_id": [2], "num_beams": 1, "use_cache": False}, None),
    ],
)
def test_how_two_models_ask_to_be_sampled_and_to_stop(folders, tmp_path, command, said, line):  # noqa: F811
    shutil.copytree(folders / "hf", tmp_path / "other")
    file = tmp_path / "other" / "generation_config.json"
    file.write_text(json.dumps(said))
    code, output, _ = command("verify", folders / "hf", tmp_path / "other", "--tokens", "0")
    assert (code, line is None or line in output) == (int(line is not None), True)
    file.unlink()  # where the file says nothing, config.json does
    assert command("verify", folders / "hf", tmp_path / "other", "--tokens", "0")[0] == 0
