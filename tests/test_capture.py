"""Named activations are those of transformers' modules, change no number, and leave no trace where nobody asks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from reference import config_of, hf_config, hf_model, params_of

from model import captured, hidden, init_cache, unstack
from model.errors import PunaError
from model.llama import attention, mlp, rms_norm
from model.sharding import constrain

NAMES = (
    "embed",
    "layers.0",
    "layers.1.mlp",
    "layers.1.mlp_norm",
    "layers.0.attention",
    "layers.0.attn_norm",
    "final_norm",
)
TOKENS = np.random.default_rng(0).integers(0, 99, (2, 12), dtype=np.int32)


@pytest.fixture(scope="module")
def theirs():
    return hf_model(hf_config())


@pytest.fixture(scope="module")
def modules(theirs):
    """What modules of transformers put out, by our names of it."""
    model, seen = theirs.model, {}
    watched = {
        "embed": model.embed_tokens,
        "layers.0": model.layers[0],
        "layers.0.attn_norm": model.layers[0].input_layernorm,
        "layers.0.attention": model.layers[0].self_attn,
        "layers.1.mlp_norm": model.layers[1].post_attention_layernorm,
        "layers.1.mlp": model.layers[1].mlp,
        "final_norm": model.norm,
    }

    def keep(name, module, given, output):
        seen[name] = (output[0] if isinstance(output, tuple) else output).detach().numpy()

    hooks = [module.register_forward_hook(partial(keep, name)) for name, module in watched.items()]
    with torch.no_grad():
        theirs(torch.tensor(TOKENS).long())
    for hook in hooks:
        hook.remove()
    return seen


def passes(theirs):
    """The ways of one pass: stacked layers, unstacked ones, with a cache, recomputed."""
    config, params = config_of(theirs), params_of(theirs)
    apart = unstack(params)
    return config, {
        "scanned": (params, {}),
        "looped": (apart, {}),
        "cached": (params, {"cache": init_cache(config, 2, 16, jnp.float32)}),
        "recomputed": (params, {"remat": "full"}),
    }


@pytest.mark.parametrize("way", ["scanned", "looped", "cached", "recomputed"])
def test_activations_are_those_of_transformers_and_the_pass_stays_as_it_is(theirs, modules, way):
    config, ways = passes(theirs)
    params, keywords = ways[way]
    with jax.default_matmul_precision("highest"):
        plain = jax.jit(lambda p: hidden(p, TOKENS, config, **keywords)[0])(params)
        x, cache, found = jax.jit(lambda p: captured(p, TOKENS, config, NAMES, **keywords))(params)
    np.testing.assert_array_equal(x, plain)
    assert found.keys() == modules.keys() == set(NAMES) and (cache is None) == (way != "cached")
    for name in NAMES:
        np.testing.assert_allclose(found[name], modules[name], atol=1e-4, err_msg=name)


def test_all_layers_at_once_and_what_is_kept_of_them(theirs):
    config, params = config_of(theirs), params_of(theirs)
    whole = captured(params, TOKENS, config, ["layers.*.mlp", "layers.1.mlp", "layers.*"])[2]
    assert whole["layers.*.mlp"].shape == (2, *TOKENS.shape, 64)
    np.testing.assert_array_equal(whole["layers.*.mlp"][1], whole["layers.1.mlp"])
    parts = captured(params, TOKENS, config, ["layers.*.mlp", "embed"], jnp.max)[2]
    np.testing.assert_allclose(parts["layers.*.mlp"], whole["layers.*.mlp"].max(axis=(1, 2, 3)), rtol=1e-6)
    assert parts["embed"].shape == ()


def untapped(x, layer, config, context, cache):
    """The block as the papers have it, without a place to look at it."""
    x = constrain(x, ("batch", None, None))
    with jax.named_scope("attention"):
        normed = rms_norm(x, layer["attn_norm"], config.rms_norm_eps)
        mixed, cache = attention(normed, layer, config, context, cache)
    x = x + mixed
    with jax.named_scope("mlp"):
        return x + mlp(rms_norm(x, layer["mlp_norm"], config.rms_norm_eps), layer), cache


@pytest.mark.parametrize("way", ["scanned", "looped", "cached", "recomputed"])
def test_the_program_is_the_same_where_nothing_is_captured(theirs, way):
    config, ways = passes(theirs)
    params, keywords = ways[way]

    def text(block):
        return jax.jit(lambda p: hidden(p, TOKENS, config, block=block, **keywords)).lower(params).as_text()

    assert text(None) == text(untapped)


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (["layer.1"], "'layer.1' names no activation; give embed, final_norm, layers.3, layers.3.attn_norm"),
        (["layers.1.gate"], "'layers.1.gate' names no activation"),
        (["layers.2.mlp"], "layers.2.mlp: the model has the layers 0 to 1"),
    ],
)
def test_a_name_of_nothing_is_refused(theirs, names, named):
    with pytest.raises(PunaError, match=named):
        captured(params_of(theirs), TOKENS, config_of(theirs), names)


def test_a_block_of_ones_own_shows_what_it_takes_a_tap_for(theirs):
    config, params = config_of(theirs), params_of(theirs)
    x, _, found = captured(params, TOKENS, config, ["layers.1"], block=untapped)
    np.testing.assert_array_equal(x, hidden(params, TOKENS, config)[0])
    with pytest.raises(PunaError, match="mlp of a layer cannot be captured: this block has no keyword tap"):
        captured(params, TOKENS, config, ["layers.1.mlp"], block=untapped)
    with pytest.raises(PunaError, match="layers.1.mlp cannot be captured: the block does not show it"):
        captured(params, TOKENS, config, ["layers.1.mlp"], block=lambda *given, tap: untapped(*given))
