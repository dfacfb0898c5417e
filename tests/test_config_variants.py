"""Every configuration of the Hub's LLaMAs gives transformers' logits, or is refused by name."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from config_variants import TINY, VARIANTS
from reference import hf_logits
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from convert import load_model
from convert.formats import open_model
from model.errors import PunaError
from model.llama import forward

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).parent.parent
# Longer than the original contexts: every stretching of RoPE shows. Dynamic RoPE is compared within its context.
TOKENS = np.random.default_rng(0).integers(0, 96, (1, 48))


def lay(folder, variant):
    """The config.json of a variant, as text that nothing has read."""
    said = {key: value for key, value in (TINY | variant.config).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(said))


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if not variant.refused])
def test_a_config_gives_transformers_logits(name, tmp_path, capsys):
    variant = VARIANTS[name]
    lay(tmp_path, variant)
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path), dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 + (weight.ndim == 1))
    tensors = {key: value for key, value in theirs.state_dict().items() if key != "lm_head.weight"}
    if not theirs.config.tie_word_embeddings:
        tensors["lm_head.weight"] = theirs.lm_head.weight.data
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config, params = load_model(tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith(f"{tmp_path / 'config.json'}: ") for line in lines)
    assert bool(lines) == bool(variant.said) and variant.said in "".join(lines)
    with jax.default_matmul_precision("highest"):
        ours = jax.jit(forward, static_argnums=2)(params, TOKENS, config)[0]
    np.testing.assert_allclose(ours, hf_logits(theirs, TOKENS), atol=1e-4)


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.refused])
def test_a_config_that_is_not_understood_is_refused(name, tmp_path):
    lay(tmp_path, VARIANTS[name])
    save_file({"model.norm.weight": torch.zeros(32)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(PunaError, match=VARIANTS[name].refused):
        open_model(tmp_path)


def test_the_document_shows_the_table():
    """docs/conversion.md, of which each row is a variant here."""
    page = (ROOT / "docs/conversion.md").read_text(encoding="utf-8")
    rows = [f"| {name} | {variant.outcome} |" for name, variant in VARIANTS.items()]
    shown = page.partition("| config | here |\n| --- | --- |\n")[2].partition("\n\n")[0]
    assert shown.splitlines() == rows
