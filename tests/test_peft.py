"""Adapters come from PEFT and go back to it without a logit changing."""

import json
import re
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from converting import command  # noqa: F401
from safetensors.numpy import load_file, save_file
from small_tokenizer import small_tokenizer
from typer.testing import CliRunner

from convert import load_model, save_model
from convert.__main__ import app
from convert.adapters import apply_adapters
from convert.checkpoint import WriteOptions
from convert.merge import merge_adapters as merge_folders
from convert.peft import read_adapter, save_adapter
from convert.verify import compare
from model import LlamaConfig, forward, init_params
from model.errors import PunaError
from model.lora import LoraArray, add
from model.merge import merge
from model.quantize import dequantize
from model.tokenizer import load_tokenizer
from train.data.toy import write_tokenizer

# peft and transformers deprecate each other's names; what they warn of is not ours.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]

CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TO_NF4 = ["--to", "hf", "--quantize", "nf4"]
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 24))
SETTINGS = {
    "plain": {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 6, "lora_alpha": 5, "use_rslora": True, "target_modules": list(ALL)},
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": list(ALL)},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": list(ALL),
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.(up|down)_proj": 7},
        "alpha_pattern": {"v_proj": 3, "layers.2.mlp.gate_proj": 5},
    },
    "some layers": {"r": 4, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]},
    "some layers, dora": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1], "use_dora": True},
    "saved modules": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "saved modules alone": {
        "target_modules": peft.utils.constants.DUMMY_TARGET_MODULES,
        "modules_to_save": ["embed_tokens", "lm_head"],
    },
}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    config = replace(CONFIG, tie_word_embeddings=request.param)
    params = init_params(config, jax.random.key(0))
    save_model(folder, config, jax.tree.map(lambda x: x * 8 if x.ndim > 2 else x, params))
    return folder


def torch_model(folder):
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def torch_logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def our_logits(config, params, tokens=TOKENS):
    with jax.default_matmul_precision("highest"):
        return np.asarray(forward(params, jnp.asarray(tokens), config)[0])


def randomize(model):
    """Gives every trainable tensor numbers that show."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += noise * (0.3 if "lora_B" in name else 0.1) * (parameter.data.abs().mean() + 0.2)


@pytest.mark.parametrize("name", SETTINGS)
def test_what_peft_writes_gives_its_logits_loaded_merged_and_written_back(base, name, tmp_path):
    model = peft.get_peft_model(torch_model(base), peft.LoraConfig(task_type="CAUSAL_LM", **SETTINGS[name]))
    randomize(model)
    model.save_pretrained(tmp_path / "theirs")
    golden = torch_logits(model.eval())

    config, params = load_model(base, adapters=[tmp_path / "theirs"])
    ours = our_logits(config, params)
    np.testing.assert_allclose(ours, golden, atol=1e-4)
    assert np.abs(ours - our_logits(*load_model(base))).max() > 0.01  # the adapter does something

    merged, errors = merge(params)
    assert errors == {}
    np.testing.assert_allclose(our_logits(config, merged), ours, atol=1e-5)

    saved = SETTINGS[name].get("modules_to_save", ())
    rslora = SETTINGS[name].get("use_rslora", False)
    save_adapter(tmp_path / "ours", params, saved, rslora)
    again = peft.PeftModel.from_pretrained(torch_model(base), tmp_path / "ours").eval()
    np.testing.assert_allclose(torch_logits(again), golden, atol=1e-4)
    np.testing.assert_allclose(our_logits(*load_model(base, adapters=[tmp_path / "ours"])), ours, atol=1e-5)
    theirs = load_file(tmp_path / "theirs/adapter_model.safetensors")
    for key, tensor in load_file(tmp_path / "ours/adapter_model.safetensors").items():
        np.testing.assert_array_equal(tensor, theirs[key])


@pytest.mark.parametrize("name", ["rslora", "patterns", "dora"])
def test_what_add_makes_is_what_peft_reads(base, name, tmp_path):
    settings = {"rank": 4, "alpha": 12.0, "targets": ("q_proj", "o_proj", "down_proj")}
    settings |= {
        "rslora": {"rslora": True},
        "dora": {"dora": True},
        "patterns": {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 5.0}},
    }[name]
    config, params = load_model(base)
    plain = our_logits(config, params)
    config, params = add(params, config, jax.random.key(3), **settings)
    np.testing.assert_allclose(our_logits(config, params), plain, atol=1e-5)
    noisy = {
        key: replace(w, b=jax.random.normal(jax.random.key(5), w.b.shape) * (w.b.shape[1] > 0) * 0.2)
        if key in ("wq", "wo", "w_down")
        else w
        for key, w in params["layers"].items()
    }
    params = {**params, "layers": noisy}
    save_adapter(tmp_path / "a", params, rslora=name == "rslora")
    again = peft.PeftModel.from_pretrained(torch_model(base), tmp_path / "a").eval()
    np.testing.assert_allclose(torch_logits(again), our_logits(config, params), atol=1e-4)


def test_a_bin_file_and_two_adapters_in_order_are_those_of_peft(base, tmp_path):
    folders = []
    for i, name in enumerate(("plain", "rslora")):
        torch.manual_seed(i)
        model = peft.get_peft_model(torch_model(base), peft.LoraConfig(**SETTINGS[name]))
        randomize(model)
        model.save_pretrained(tmp_path / name, safe_serialization=False)
        tensors = peft.get_peft_model_state_dict(model)
        (tmp_path / name / "adapter_model.safetensors").unlink(missing_ok=True)
        torch.save(tensors, tmp_path / name / "adapter_model.bin")
        folders.append(tmp_path / name)
    theirs = torch_model(base)
    for folder in folders:
        theirs = peft.PeftModel.from_pretrained(theirs, folder).merge_and_unload()
    config, params = load_model(base, adapters=folders)
    np.testing.assert_allclose(our_logits(config, params), torch_logits(theirs.eval()), atol=1e-4)
    np.testing.assert_allclose(our_logits(config, merge(params)[0]), our_logits(config, params), atol=1e-5)


@pytest.mark.parametrize("save", [True, False], ids=["modules_to_save", "saved by the resize"])
def test_a_resized_vocabulary_replaces_the_base_tables(base, save, tmp_path):
    theirs = torch_model(base)
    theirs.resize_token_embeddings(101, mean_resizing=False)
    modules = ["embed_tokens", "lm_head"] if save else None
    model = peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=modules))
    randomize(model)
    model.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    tokens = np.random.default_rng(1).integers(0, 101, (2, 24))
    config, params = load_model(base, adapters=[tmp_path / "a"])
    assert config.vocab_size == 101
    np.testing.assert_allclose(our_logits(config, params, tokens), torch_logits(model.eval(), tokens), atol=1e-4)


@pytest.mark.parametrize("name", ["peft_qv_r8a16", "peft_all_r8a32_modules_to_save"])
def test_the_shared_adapters_give_their_golden_logits(data_dir, name, tmp_path):
    folder = data_dir / "stories260k-derived"
    golden = np.load(folder / name / "golden_logits.npz")
    config, params = load_model(folder / "hf_sharded", adapters=[folder / name])
    tokens = golden["ids"][None]
    np.testing.assert_allclose(our_logits(config, params, tokens)[0], golden["adapter_logits"], atol=1e-4)
    np.testing.assert_allclose(our_logits(config, merge(params)[0], tokens)[0], golden["merged_logits"], atol=1e-4)
    saved = read_adapter(folder / name).settings["modules_to_save"] or ()
    save_adapter(tmp_path / "a", params, saved)
    again = peft.PeftModel.from_pretrained(torch_model(folder / "hf_sharded"), tmp_path / "a").eval()
    np.testing.assert_allclose(torch_logits(again, tokens)[0], golden["adapter_logits"], atol=1e-4)


def test_two_adapters_with_growing_vocabularies_merge_as_peft_merges_them(base, tmp_path):
    """Chinese-Alpaca-Plus is LLaMA, then LLaMA-Plus on 49,953 tokens, then Alpaca-Plus on 49,954."""
    theirs = torch_model(base)
    for rows in (101, 102):
        theirs.resize_token_embeddings(rows, mean_resizing=False)
        settings = peft.LoraConfig(r=4, target_modules=list(ALL), modules_to_save=["embed_tokens", "lm_head"])
        model = peft.get_peft_model(theirs, settings)
        randomize(model)
        model.save_pretrained(tmp_path / f"plus{rows}")
        theirs = model.merge_and_unload()
    arguments = [str(base), str(tmp_path / "plus101"), str(tmp_path / "plus102"), str(tmp_path / "merged")]
    result = CliRunner().invoke(app, ["merge", *arguments])
    assert result.exit_code == 0, result.exception
    tokens = np.random.default_rng(1).integers(0, 102, (2, 24))
    golden = torch_logits(theirs.eval(), tokens)
    np.testing.assert_allclose(our_logits(*load_model(tmp_path / "merged"), tokens), golden, atol=1e-4)
    np.testing.assert_allclose(torch_logits(torch_model(tmp_path / "merged"), tokens), golden, atol=1e-4)
    backwards = [arguments[0], arguments[2], arguments[1], str(tmp_path / "wrong")]
    assert isinstance(CliRunner().invoke(app, ["merge", *backwards]).exception, PunaError)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_merging_into_a_quantized_base_quantizes_again_and_says_the_error(base, format, tmp_path):
    quantized = ["model", str(base), str(tmp_path / "q"), "--to", "hf", "--quantize", format]
    assert CliRunner().invoke(app, quantized).exit_code == 0
    model = peft.get_peft_model(torch_model(base), peft.LoraConfig(**SETTINGS["plain"]))
    randomize(model)
    model.save_pretrained(tmp_path / "a")
    result = CliRunner().invoke(app, ["merge", str(tmp_path / "q"), str(tmp_path / "a"), str(tmp_path / "m")])
    assert result.exit_code == 0 and "layers.0.wq: quantized again with a relative error of" in result.stderr
    in_memory, errors = merge(load_model(tmp_path / "q", adapters=[tmp_path / "a"])[1])
    again = load_model(tmp_path / "m")[1]
    assert errors.keys() == {"layers/wq", "layers/wv"}
    for name in ("wq", "wv", "wo"):
        here, there = in_memory["layers"][name], again["layers"][name]
        np.testing.assert_allclose(dequantize(here), dequantize(there), atol=1e-6)


def adapter_of(folder, config, seed, tokenizer=None, **settings):
    """Writes an adapter whose every number shows; returns its folder."""
    _, params = add(init_params(config, jax.random.key(seed)), config, jax.random.key(seed), rank=2, **settings)
    layers = {
        name: replace(w, b=jax.random.normal(jax.random.key(seed), w.b.shape) * 0.3) if isinstance(w, LoraArray) else w
        for name, w in params["layers"].items()
    }
    save_adapter(folder, {**params, "layers": layers}, settings.get("modules_to_save", ()), tokenizer=tokenizer)
    return folder


@pytest.fixture
def float_base(tmp_path):
    """CONFIG's folder, its numbers large enough to show."""
    params = init_params(CONFIG, jax.random.key(0))
    save_model(tmp_path / "base", CONFIG, jax.tree.map(lambda x: x * 8 if x.ndim > 2 else x, params))
    return tmp_path / "base"


def test_several_adapters_into_a_quantized_base_quantize_it_once(float_base, tmp_path):
    assert CliRunner().invoke(app, ["model", str(float_base), str(tmp_path / "q"), *TO_NF4]).exit_code == 0
    adapters = [adapter_of(tmp_path / f"a{seed}", CONFIG, seed, targets=["q_proj"]) for seed in (1, 2)]
    said = merge_folders(tmp_path / "q", adapters, tmp_path / "m")
    in_memory, errors = merge(load_model(tmp_path / "q", adapters=adapters)[1])
    np.testing.assert_allclose(
        dequantize(load_model(tmp_path / "m")[1]["layers"]["wq"]), dequantize(in_memory["layers"]["wq"]), atol=1e-6
    )
    assert max(said.values()) == pytest.approx(errors["layers/wq"], rel=1e-5)


def test_a_merge_to_a_wider_dtype_rounds_nothing(float_base, tmp_path):
    """Of an update that bfloat16 would round away."""
    config, params = load_model(float_base, dtype=jnp.bfloat16)
    save_model(tmp_path / "half", config, params)
    adapter = adapter_of(tmp_path / "a", CONFIG, 1, targets=["v_proj"], alpha=0.01)
    merge_folders(tmp_path / "half", [adapter], tmp_path / "m", options=WriteOptions(dtype="float32"))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    expected, _ = merge(apply_adapters(wide, config, [adapter])[1])
    found = load_model(tmp_path / "m")[1]
    np.testing.assert_array_equal(found["layers"]["wv"], expected["layers"]["wv"])
    assert (np.asarray(found["layers"]["wv"]) != np.asarray(wide["layers"]["wv"])).mean() > 0.9


def test_a_merge_to_metas_shards_is_the_merge(float_base, tmp_path):
    adapter = adapter_of(tmp_path / "a", CONFIG, 1)
    merge_folders(float_base, [adapter], tmp_path / "hf")
    merge_folders(float_base, [adapter], tmp_path / "meta", format="meta", options=WriteOptions(shards=2))
    assert len(list((tmp_path / "meta").glob("consolidated.*.pth"))) == 2
    assert compare(tmp_path / "hf", tmp_path / "meta")


def test_a_tokenizer_with_more_tokens_than_rows_gives_the_model_new_ones(float_base, tmp_path):
    write_tokenizer(tmp_path)
    adapter = adapter_of(tmp_path / "a", CONFIG, 1, load_tokenizer(tmp_path))
    merge_folders(float_base, [adapter], tmp_path / "m")
    config, params = load_model(tmp_path / "m")
    assert config.vocab_size == load_tokenizer(tmp_path / "m").vocab_size == 260 == len(params["embed"])
    np.testing.assert_allclose(params["embed"][96:], params["embed"][:96].mean(axis=0)[None].repeat(164, 0), atol=1e-6)


def test_a_tokenizer_beside_a_plain_adapter_does_not_refuse_the_tables_of_the_next(float_base, tmp_path):
    """Its tokens get rows at the end, when all tables have come."""
    write_tokenizer(tmp_path)
    first = adapter_of(tmp_path / "a1", CONFIG, 1, load_tokenizer(tmp_path), targets=["q_proj"])
    saved = {"modules_to_save": ["embed_tokens", "lm_head"], "targets": ["q_proj"]}
    second = adapter_of(tmp_path / "a2", CONFIG, 2, **saved)
    merge_folders(float_base, [first, second], tmp_path / "m")
    config, params = load_model(tmp_path / "m")
    assert config.vocab_size == 260
    np.testing.assert_array_equal(params["embed"][:96], read_adapter(second).saved["embed"].load())


def test_a_grown_vocabulary_with_a_smaller_tokenizer_is_refused(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "more").mkdir()
    more = load_tokenizer(small_tokenizer(tmp_path / "more"))
    save_model(tmp_path / "base", CONFIG, init_params(CONFIG, jax.random.key(0)), tokenizer=more)
    grown = replace(CONFIG, vocab_size=101)
    saved = {"modules_to_save": ["embed_tokens", "lm_head"], "targets": ["q_proj"]}
    adapter = adapter_of(tmp_path / "a", grown, 1, load_tokenizer(tmp_path), **saved)
    with pytest.raises(
        PunaError, match=r"a grew the vocabulary, and its tokenizer has fewer tokens than that of .*base"
    ):
        merge_folders(tmp_path / "base", [adapter], tmp_path / "m")


def test_tables_padded_beyond_the_tokenizer_merge(tmp_path):
    """What `vocab resize --multiple` and training with saved modules leave."""
    write_tokenizer(tmp_path)
    config, tokenizer = replace(CONFIG, vocab_size=320), load_tokenizer(tmp_path)
    save_model(tmp_path / "base", config, init_params(config, jax.random.key(0)), tokenizer=tokenizer)
    saved = {"modules_to_save": ["embed_tokens", "lm_head"], "targets": ["q_proj"]}
    adapter = adapter_of(tmp_path / "a", config, 1, tokenizer, **saved)
    merge_folders(tmp_path / "base", [adapter], tmp_path / "m")
    config, params = load_model(tmp_path / "m")
    assert config.vocab_size == 320
    np.testing.assert_array_equal(params["embed"], read_adapter(adapter).saved["embed"].load())


def test_a_forgotten_destination_replaces_no_adapter(float_base, tmp_path):
    adapters = [str(adapter_of(tmp_path / f"a{seed}", CONFIG, seed)) for seed in (1, 2)]
    result = CliRunner().invoke(app, ["merge", str(float_base), *adapters, "--overwrite"])
    assert isinstance(result.exception, PunaError) and "a2 holds an adapter" in str(result.exception)
    assert read_adapter(adapters[1]).factors


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def adapter(tmp_path):
    """A small adapter for CONFIG, written by us."""
    config, params = add(init_params(CONFIG, jax.random.key(0)), CONFIG, jax.random.key(1), targets=["q_proj"], rank=2)
    save_adapter(tmp_path / "adapter", params)
    return tmp_path / "adapter"


def change(folder, edit=None, **settings):
    """Edits the tensors of an adapter folder in place, and its settings."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    if edit is not None:
        edit(tensors)
    save_file(tensors, file)
    said = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(said | settings))


A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
BROKEN = {
    "nan": (lambda t: t[A].__setitem__((0, 0), np.nan), {}, "NaN or infinite"),
    "rank 0": (
        lambda t: t.update({A: t[A][:0], A.replace("_A", "_B"): np.zeros((32, 0), np.float32)}),
        {"r": 0},
        "rank",
    ),
    "other rank": (None, {"r": 3}, "rank"),
    "half": (lambda t: t.pop(A), {}, "lora_A"),
    "layer 01": (
        lambda t: t.update({k.replace(".1.", ".01."): t.pop(k) for k in list(t) if ".1." in k}),
        {},
        "layers.01",
    ),
    "unknown tensor": (lambda t: t.update({A.replace("q_proj", "x_proj"): t[A]}), {}, "x_proj"),
    "another base": (lambda t: t.update({A: np.zeros((2, 40), np.float32)}), {}, "another base"),
    "more layers": (
        lambda t: t.update({k.replace(".1.", ".7."): t[k] for k in list(t) if ".1." in k}),
        {},
        "another base",
    ),
    "fewer rows": (
        lambda t: t.update({"base_model.model.model.embed_tokens.weight": np.zeros((90, 32), np.float32)}),
        {},
        "embed",
    ),
    "bias": (None, {"bias": "some"}, "bias"),
    "pissa": (None, {"init_lora_weights": "pissa_niter_16"}, "pissa"),
    "unsupported": (None, {"use_qalora": True}, "use_qalora"),
    "alpha nan": (None, {"lora_alpha": float("nan")}, "lora_alpha of .*q_proj is nan"),
    "alpha of a pattern": (None, {"alpha_pattern": {"q_proj": None}}, "lora_alpha of .*q_proj is None"),
    "alpha text": (None, {"lora_alpha": "8"}, "lora_alpha of .*q_proj is '8'"),
    "no expression": (None, {"rank_pattern": {"(": 4}}, r"config.json: rank_pattern: '\(' is no regular expression"),
    "targets that are no expression": (
        None,
        {"target_modules": "*q_proj"},
        r"target_modules: '\*q_proj' is no regular exp",
    ),
    "targets that are no names": (None, {"target_modules": {"q_proj": 1}}, "target_modules is .* expected a list"),
    "modules_to_save that are one text": (None, {"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head': exp"),
    "no part of a model": (None, {"puna": {}}, "puna names no part of a model: remove it"),
    "another pattern": (
        None,
        {"layers_to_transform": [0, 1, 2], "layers_pattern": "h"},
        "adapter of model.layers.0.self_attn.q_proj",
    ),
    "patterns that are none": (None, {"rank_pattern": "x"}, "rank_pattern is 'x': expected patterns of names"),
    "modules that are none": (None, {"modules_to_save": 5}, "modules_to_save is 5: expected a list of names"),
    "no second axis": (lambda t: t.update({A.replace("_A", "_B"): np.zeros(2, np.float32)}), {}, "adapter is damaged"),
    "no second axis of A": (lambda t: t.update({A: np.zeros(2, np.float32)}), {}, "adapter is damaged"),
    "dropout text": (None, {"lora_dropout": "0.1"}, "lora_dropout '0.1' is no number"),
    "not a target": (None, {"target_modules": ["v_proj"]}, "adapter of model.layers.0.self_attn.q_proj"),
    "excluded": (None, {"exclude_modules": ["q_proj"]}, "adapter of model.layers.0.self_attn.q_proj"),
    "another layer": (None, {"layers_to_transform": [0, 2]}, "adapter of model.layers.1.self_attn.q_proj"),
    "lost module": (None, {"modules_to_save": ["lm_head"]}, "lacks the lm_head"),
    "another method": (None, {"peft_type": "IA3"}, "IA3"),
    "dora without magnitude": (None, {"use_dora": True}, "use_dora"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_wrong_adapter_is_refused_by_name(adapter, name, command, tmp_path):  # noqa: F811
    """Loaded, and merged by the command: one line, exit code 2, and nothing written."""
    edit, settings, said = BROKEN[name]
    change(adapter, edit, **settings)
    params = init_params(CONFIG, jax.random.key(0))
    with pytest.raises(PunaError, match=said):
        apply_adapters(params, CONFIG, [adapter])
    save_model(tmp_path / "base", CONFIG, params)
    before = sorted(tmp_path.iterdir())
    code, out, err = command("merge", tmp_path / "base", adapter, tmp_path / "merged")
    assert code == 2 and not out and len(err) == 1 and re.search(said, err[0]), err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("shape", [(1,), (31,), (2, 16), ()])
def test_magnitudes_of_another_shape_are_refused(adapter, shape):
    """peft refuses them too; one would be used for all outputs."""
    extra = {A.replace("lora_A.weight", "lora_magnitude_vector"): np.ones(shape, np.float32)}
    extra |= {name.replace(".1.", f".{i}."): x for i in (0, 2) for name, x in extra.items()}
    change(adapter, lambda tensors: tensors.update(extra), use_dora=True)
    with pytest.raises(PunaError, match=r"q_proj has \(.*\) magnitudes for 32 outputs"):
        apply_adapters(init_params(CONFIG, jax.random.key(0)), CONFIG, [adapter])


@pytest.mark.parametrize(
    "settings",
    [
        {"layers_to_transform": []},
        {"layers_to_transform": [0, 1, 2], "layers_pattern": "layers"},
        {"target_modules": "All-Linear"},
        {"target_modules": r".*\.self_attn\.[qv]_proj"},
        {"target_modules": r"(?i).*\.SELF_ATTN\.[qv]_proj"},
        {"target_modules": [f"model.layers.{i}.self_attn.q_proj" for i in range(3)], "layers_to_transform": 1},
    ],
    ids=str,
)
def test_the_ways_that_peft_names_modules_are_understood(adapter, settings):
    """peft's own rule says of each that q_proj is adapted in every layer."""
    change(adapter, **settings)
    theirs = peft.LoraConfig.from_pretrained(str(adapter))
    for factors in read_adapter(adapter).factors:
        module = f"model.{factors.replace('wq', 'self_attn.q_proj')}"
        all_linear = str(theirs.target_modules).lower() == "all-linear"
        assert all_linear or peft.tuners.tuners_utils.check_target_module_exists(theirs, module)
    assert len(read_adapter(adapter).factors) == 3


def test_modules_that_the_settings_name_and_no_tensor_adapts_are_said(adapter, caplog):
    change(adapter, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".2." in name])
    apply_adapters(init_params(CONFIG, jax.random.key(0)), CONFIG, [adapter])
    assert [record.getMessage() for record in caplog.records] == [
        f"{adapter} holds no adapter of model.layers.2.self_attn.q_proj, which its target_modules names: "
        "the base is used there as it is"
    ]


def test_a_truncated_or_missing_file_is_refused(adapter):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(PunaError, match="adapter_model.safetensors"):
        read_adapter(adapter)
    file.unlink()
    with pytest.raises(PunaError, match="adapter_model"):
        read_adapter(adapter)
    shutil.rmtree(adapter)
    with pytest.raises(PunaError, match="adapter_config.json"):
        read_adapter(adapter)


def test_null_and_published_settings_are_accepted(adapter, data_dir):
    for file in [*(data_dir / "peft-config").glob("*.json"), *(data_dir / "hf-config").glob("*lora*.json")]:
        settings = json.loads(file.read_text())
        change(adapter, **settings | {"r": 2, "future_setting": None})
        assert read_adapter(adapter).factors
