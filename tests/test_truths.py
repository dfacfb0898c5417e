"""Truths that cross rooms: a real trained LLaMA, its published words, from every format to the last logit."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from convert import load_model, save_model
from infer.__main__ import app as infer
from model import forward
from model.tokenizer import load_tokenizer


@pytest.fixture(scope="module", params=["hf", "meta", "orbax"])
def story_model(request, tmp_path_factory):
    """The trained stories260K as Hugging Face shards, as Meta wrote it, and as an Orbax copy, each with a tokenizer."""
    data = request.getfixturevalue("data_dir")
    derived, folder = data / "stories260k-derived", tmp_path_factory.mktemp(request.param) / "model"
    if request.param == "orbax":
        config, params = load_model(derived / "hf_sharded")
        save_model(folder, config, params, format="orbax", tokenizer=load_tokenizer(derived / "hf_sharded"))
    else:
        shutil.copytree(derived / {"hf": "hf_sharded", "meta": "meta_mp1"}[request.param], folder)
        folder.chmod(0o755)
        shutil.copyfile(data / "stories260k" / "tokenizer.model", folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def golden(data_dir):
    return json.loads((data_dir / "stories260k" / "golden_stories260K.json").read_text())


@pytest.mark.slow
def test_it_writes_the_published_text(story_model, golden, data_dir):
    ids = golden["greedy_ids"]
    options = ["--prompt", "", "--max-new-tokens", str(len(ids) - 1), "--temperature", "0"]
    result = CliRunner().invoke(infer, ["generate", str(story_model), *options], catch_exceptions=False)
    tokenizer = load_tokenizer(story_model)
    assert result.stdout == tokenizer.decode(ids) + "\n"
    published = (data_dir / "stories260k" / "stories260K.md").read_text().split("-t 0.0\n")[1]
    assert published.startswith(tokenizer.decode(ids))
    assert tokenizer.encode(result.stdout[:-1], add_bos=True) == ids


def test_logits_are_transformers(story_model, data_dir):
    golden = np.load(data_dir / "stories260k-derived" / "hf_logits_201x512.npz")
    config, params = load_model(story_model)
    with jax.default_matmul_precision("highest"):
        ours, _ = jax.jit(forward, static_argnums=2)(params, jnp.asarray(golden["ids"])[None], config)
    np.testing.assert_allclose(ours[0], golden["logits"], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_mean_negative_log_likelihood_of_five_stories(story_model, golden, data_dir):
    text = (data_dir / "stories260k" / "tinystories_sample.txt").read_text()
    stories = [story["ids"] for story in golden["tinystories"]]
    config, params = load_model(story_model)
    run = jax.jit(forward, static_argnums=2)
    losses = []
    for ids in stories:
        logits, _ = run(params, jnp.asarray(ids)[None, :-1], config)
        chosen = jnp.take_along_axis(logits[0], jnp.asarray(ids)[1:, None], axis=1)[:, 0]
        losses.append(float((jax.nn.logsumexp(logits[0], axis=-1) - chosen).mean()))
    np.testing.assert_allclose(losses, [story["mean_nll"] for story in golden["tinystories"]], atol=1e-4)
    assert abs(np.average(losses, weights=[len(ids) - 1 for ids in stories]) - 1.266) < 0.001
    tokenizer = load_tokenizer(story_model)
    assert all(tokenizer.decode(ids) in text.replace("\n", "") or tokenizer.decode(ids) in text for ids in stories)
