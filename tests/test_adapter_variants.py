"""Every adapter that peft can write gives peft's logits, loaded and merged, or is refused by name."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from adapter_variants import QV, VARIANTS
from converting import command  # noqa: F401
from safetensors.numpy import load_file, save_file

from convert import load_model, save_model
from convert.adapters import apply_adapters
from convert.merge import merge_adapters
from convert.peft import save_adapter
from model import LlamaConfig, forward, init_params, make_mesh
from model.errors import PunaError
from model.layout import per_layer
from model.linear import product
from model.lora import SAVED_MODULES
from model.merge import merge
from model.selected import select, side_by_side

# peft and transformers deprecate each other's names and warn of what a variant is about; none of it is ours.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).parent.parent
BIASED = {"attention_bias": True, "mlp_bias": True}
BASES = {"untied": {}, "tied": {"tie_word_embeddings": True}, "biased": BIASED}
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """By name: the folder, transformers' model, and our config and parameters."""
    found = {}
    for name, said in BASES.items():
        config = LlamaConfig(vocab_size=96, num_hidden_layers=3, max_position_embeddings=64, **SHAPE, **said)
        folder = tmp_path_factory.mktemp("bases") / name
        rng = np.random.default_rng(0)
        drawn = jax.tree.map(
            lambda x, rng=rng: x + rng.normal(0, 0.1, x.shape).astype(np.float32),
            init_params(config, jax.random.key(0)),
        )
        save_model(folder, config, drawn)
        theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        found[name] = (folder, theirs, *load_model(folder))
    return found


def written(variant, model, folder):
    """The variant's adapter as peft writes it, of numbers that show, then edited."""
    torch.manual_seed(0)
    model = copy.deepcopy(model)
    if variant.rows:
        model.resize_token_embeddings(variant.rows, mean_resizing=False)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 12, "target_modules": QV, **variant.config}
    )
    adapted = peft.get_peft_model(model, config)
    for part, parameter in adapted.named_parameters():
        if parameter.requires_grad or "lora_" in part:
            parameter.data += torch.randn(parameter.shape) * 0.1
    adapted.save_pretrained(folder, save_embedding_layers=True if variant.rows else "auto")
    tensors = load_file(folder / "adapter_model.safetensors")
    variant.edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = json.loads((folder / "adapter_config.json").read_text()) | variant.raw
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def theirs(model, folder, tokens, rows):
    """The logits of a fresh base with the adapter as peft loads it."""
    model = copy.deepcopy(model)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(model, folder).eval()(torch.tensor(tokens)).logits.numpy()


def ours(config, params, tokens):
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(forward, static_argnums=2)(params, jnp.asarray(tokens), config)[0])


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if not variant.refused])
def test_an_adapter_gives_pefts_logits_loaded_and_merged(name, bases, tmp_path):
    """And written back, where it is in the adapter: the biases of a base (bias: all) and a grown base are not."""
    variant = VARIANTS[name]
    folder, model, config, params = bases[variant.base]
    written(variant, model, tmp_path / "a")
    tokens = np.arange(variant.rows or 96)[None]
    golden = theirs(model, tmp_path / "a", tokens, variant.rows)
    after, adapted = apply_adapters(params, config, [tmp_path / "a"])
    np.testing.assert_allclose(ours(after, adapted, tokens), golden, atol=1e-4)
    if not variant.rows:
        assert np.abs(golden - ours(config, params, tokens)).max() > 0.01  # the adapter does something
        if "bias" not in variant.config:
            save_adapter(tmp_path / "b", adapted, whole_modules(variant, adapted), "use_rslora" in variant.config)
            np.testing.assert_allclose(theirs(model, tmp_path / "b", tokens, 0), golden, atol=1e-4)
    if variant.unmergeable:
        with pytest.raises(PunaError, match=variant.unmergeable):
            merge_adapters(folder, [tmp_path / "a"], tmp_path / "m")
        return
    merge_adapters(folder, [tmp_path / "a"], tmp_path / "m")
    np.testing.assert_allclose(ours(*load_model(tmp_path / "m"), tokens), golden, atol=1e-4)


def whole_modules(variant, params):
    """The modules to write whole: those that came so, and the tables of which some rows are new."""
    tables = ("embed_tokens", "lm_head") if "trainable_token_indices" in variant.config else ()
    arrays = [table for table in tables if isinstance(params.get(SAVED_MODULES[table]), jax.Array)]
    return [*variant.config.get("modules_to_save", ()), *arrays]


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.refused])
def test_an_adapter_that_is_not_understood_is_refused(name, bases, tmp_path):
    variant = VARIANTS[name]
    folder, model, config, params = bases[variant.base]
    written(variant, model, tmp_path / "a")
    with pytest.raises(PunaError, match=variant.refused):
        apply_adapters(params, config, [tmp_path / "a"])
    with pytest.raises(PunaError, match=variant.refused):
        merge_adapters(folder, [tmp_path / "a"], tmp_path / "m")
    assert not (tmp_path / "m").exists()


# What lies otherwise in memory: layer by layer for decoding, and over the devices of a mesh.
FORMS = [
    "LoRA on embed_tokens, tied",
    "LoRA on lm_head, tied",
    "DoRA on embed_tokens",
    "DoRA on lm_head",
    "trainable_token_indices, tied",
    "trainable_token_indices of both",
    "trainable_token_indices, resized, tied",
    "lora_bias",
    "bias: all, with lora_bias",
    "modules_to_save: model.embed_tokens, tied",
    "modules_to_save: both, resized, tied",
    "modules_to_save: norm",
    "modules_to_save: one linear map",
    "modules_to_save: mlp",
]


@pytest.mark.parametrize("name", FORMS)
def test_an_adapter_is_the_same_in_every_layout(name, bases, tmp_path):
    variant = VARIANTS[name]
    folder, model, config, params = bases[variant.base]
    written(variant, model, tmp_path / "a")
    tokens = np.arange(variant.rows or 96)[None]
    expected = ours(*apply_adapters(params, config, [tmp_path / "a"]), tokens)
    decoding = load_model(folder, adapters=[tmp_path / "a"], layout="per_layer")
    np.testing.assert_allclose(ours(*decoding, tokens), expected, atol=1e-4)
    if not variant.rows:  # 101 rows do not divide over two devices
        mesh = make_mesh(tensor=2, devices=jax.devices()[:2])
        np.testing.assert_allclose(
            ours(*load_model(folder, mesh=mesh, adapters=[tmp_path / "a"]), tokens), expected, atol=1e-4
        )


BESIDE = [
    "LoRA on embed_tokens",
    "DoRA on embed_tokens",
    "LoRA on lm_head",
    "lora_bias on lm_head",
    "lora_bias",
    "use_dora",
]


def test_adapters_of_every_kind_stand_side_by_side(bases, tmp_path):
    """Each row of a batch uses its own, and the last one none."""
    folder, model, config, params = bases["untied"]
    for i, name in enumerate(BESIDE):
        written(VARIANTS[name], model, tmp_path / str(i))
    decoding = per_layer(params)
    trees = [apply_adapters(decoding, config, [tmp_path / str(i)])[1] for i in range(len(BESIDE))]
    both = select(side_by_side(trees, product), jnp.array([*range(len(BESIDE)), -1]))
    tokens = np.arange(40)[None]
    together = ours(config, both, tokens.repeat(len(BESIDE) + 1, axis=0))
    for i, row in enumerate(together):
        alone = apply_adapters(params, config, [tmp_path / str(i)] if i < len(BESIDE) else [])
        np.testing.assert_allclose(row, ours(*alone, tokens)[0], atol=1e-4)


@pytest.mark.parametrize("name", ["trainable_token_indices", "modules_to_save: norm", "modules_to_save: both"])
def test_an_adapter_with_whole_weights_stands_beside_no_other(name, bases, tmp_path):
    _, model, config, params = bases["untied"]
    written(VARIANTS[name], model, tmp_path / "a")
    trees = [per_layer(params), apply_adapters(per_layer(params), config, [tmp_path / "a"])[1]]
    with pytest.raises(PunaError, match="an adapter brings whole weights .*merge it into a model of its own"):
        side_by_side(trees, product)


def test_over_quantized_weights_it_is_pefts_over_what_they_stand_for(bases, tmp_path, command):  # noqa: F811
    folder, _, config, _ = bases["untied"]
    assert command("model", folder, tmp_path / "q", "--to", "hf", "--quantize", "nf4")[0] == 0
    save_model(tmp_path / "floats", *load_model(tmp_path / "q", dtype="float32"))
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "floats", dtype=torch.float32).eval()
    tokens = np.arange(96)[None]
    for name in ("LoRA on lm_head", "lora_bias", "modules_to_save: mlp", "modules_to_save: one linear map"):
        place = tmp_path / name.replace(":", "")
        written(VARIANTS[name], model, place)
        golden = theirs(model, place, tokens, 0)
        loaded = load_model(tmp_path / "q", adapters=[place], layout="per_layer")
        np.testing.assert_allclose(ours(*loaded, tokens), golden, atol=1e-4)
    with pytest.raises(PunaError, match=r"replaces wk in layers \[1\] of a quantized base, .*: merge it into the base"):
        load_model(tmp_path / "q", adapters=[place])
    assert any(
        "layers.1.wk: quantized again" in line for line in command("merge", tmp_path / "q", place, tmp_path / "m")[2]
    )


def test_merged_in_memory_as_on_disk(bases, tmp_path):
    """With biases, which the config must then say."""
    folder, model, config, params = bases["untied"]
    written(VARIANTS["lora_bias"], model, tmp_path / "a")
    merged, _ = merge(apply_adapters(params, config, [tmp_path / "a"])[1])
    with pytest.raises(PunaError, match="the parameters hold b_down, .*, and the config says none"):
        save_model(tmp_path / "b", config, merged)
    merge_adapters(folder, [tmp_path / "a"], tmp_path / "m")
    said, expected = load_model(tmp_path / "m")
    assert said == replace(config, attention_bias=True, mlp_bias=True)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), merged, expected)


def test_several_adapters_in_order_are_pefts_merged_one_after_the_other(bases, tmp_path):
    """Among them tables over tables, and rows and biases over what came before."""
    folder, model, config, params = bases["tied"]
    names = ["LoRA on embed_tokens, tied", "lora_bias", "use_dora", "trainable_token_indices of lm_head"]
    chain = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, tie_word_embeddings=False).eval()
    chain.lm_head.weight.data = model.model.embed_tokens.weight.data.clone()
    for i, name in enumerate(names):
        written(VARIANTS[name]._replace(config=VARIANTS[name].config | {"lora_bias": False}), chain, tmp_path / str(i))
        chain = peft.PeftModel.from_pretrained(chain, tmp_path / str(i)).merge_and_unload()
    folders = [tmp_path / str(i) for i in range(len(names))]
    tokens = np.arange(96)[None]
    with torch.no_grad():
        golden = chain.eval()(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(ours(*apply_adapters(params, config, folders), tokens), golden, atol=1e-4)
    merge_adapters(folder, folders, tmp_path / "m")
    np.testing.assert_allclose(ours(*load_model(tmp_path / "m"), tokens), golden, atol=1e-4)


def test_a_hub_id_names_a_base_and_an_adapter(bases, tmp_path, command, monkeypatch):  # noqa: F811
    """Both lie in the Hub's cache, as a download leaves them, and nothing is asked of the network."""
    folder, model, config, params = bases["untied"]
    written(VARIANTS["LoRA on lm_head"], model, tmp_path / "a")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name, source in (("org/base", folder), ("org/poet", tmp_path / "a")):
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(source, repository / "snapshots" / ("0" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
    tokens = np.arange(96)[None]
    expected = ours(*apply_adapters(params, config, [tmp_path / "a"]), tokens)
    np.testing.assert_array_equal(ours(*load_model("org/base", adapters=["org/poet@main"]), tokens), expected)
    code, _, err = command("merge", "org/base", "org/poet", tmp_path / "m")
    assert code == 0, err
    np.testing.assert_allclose(ours(*load_model(tmp_path / "m"), tokens), expected, atol=1e-4)
    code, _, err = command("merge", "org/base", "org/none", tmp_path / "n")
    assert code == 2 and err[0].startswith("error: org/none is no local folder, and the Hub did not give it: ")


def test_the_document_shows_the_table():
    """docs/conversion.md, of which each row is a variant here."""
    page = (ROOT / "docs/conversion.md").read_text(encoding="utf-8")
    rows = [f"| {name} | {variant.base} | {variant.outcome} |" for name, variant in VARIANTS.items()]
    shown = page.partition("| adapter | base | here |\n| --- | --- | --- |\n")[2].partition("\n\n")[0]
    assert shown.splitlines() == rows
