"""Every adapter that peft can write gives peft's logits, loaded and merged, or is refused by name."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from adapter_variants import QV, VARIANTS
from safetensors.numpy import load_file, save_file

from convert import load_model, save_model
from convert.adapters import apply_adapters
from convert.merge import merge_adapters
from convert.peft import save_adapter
from model import LlamaConfig, forward, init_params
from model.errors import PunaError
from model.lora import SAVED_MODULES

# peft and transformers deprecate each other's names and warn of what a variant is about; none of it is ours.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

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
