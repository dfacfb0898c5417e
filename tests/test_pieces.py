"""Replaced pieces: the config names them, reads them back, and refuses what is lost or has changed."""

import importlib
import json
import sys
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from configs.ablations import layer_norm, parallel_block
from model.attention import attend
from model.config import LlamaConfig
from model.errors import PunaError
from model.llama import block_of, forward
from model.params import init_params
from model.pieces import Pieces, code_fingerprint, load_function

SMALL = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32,
)  # fmt: skip
NORM = "configs.ablations.layer_norm:norm"
BLOCK = "configs.ablations.parallel_block:block"
TOKENS = np.arange(24, dtype=np.int32)[None] % 64


def logits_of(config, **keywords):
    run = jax.jit(partial(forward, **keywords), static_argnums=2)
    return np.asarray(run(init_params(config, jax.random.key(0)), TOKENS, config)[0])


def test_a_config_with_pieces_computes_what_the_functions_given_by_hand_compute():
    both = replace(SMALL, pieces=Pieces(block=BLOCK, norm=NORM))
    by_hand = partial(parallel_block.block, norm=layer_norm.norm)
    expected = logits_of(SMALL, block=by_hand, norm=layer_norm.norm)
    np.testing.assert_array_equal(logits_of(both), expected)
    assert not np.array_equal(expected, logits_of(SMALL))
    own = replace(SMALL, pieces=Pieces("model.llama:block", "model.attention:attend", "model.llama:rms_norm"))
    np.testing.assert_array_equal(logits_of(own), logits_of(SMALL))


def test_config_json_names_the_pieces_and_is_read_back():
    config = replace(SMALL, pieces=Pieces(block=BLOCK))
    written = json.loads(json.dumps(config.to_hf()))
    assert (written["architectures"], written["model_type"]) == (["PunaForCausalLM"], "puna")
    assert written["puna"] == {"block": BLOCK, "sha256": {"block": code_fingerprint(BLOCK, "block")}}
    assert LlamaConfig.from_hf(written) == config
    assert "puna" not in SMALL.to_hf() and SMALL.to_hf()["model_type"] == "llama"
    with pytest.raises(PunaError, match="model_type 'puna' is not supported"):
        LlamaConfig.from_hf({key: value for key, value in written.items() if key != "puna"})
    with pytest.raises(PunaError, match="model_type 'llama' is not supported"):
        LlamaConfig.from_hf(written | {"model_type": "llama"})
    with pytest.raises(PunaError, match="puna names mixer; the parts known here are"):
        LlamaConfig.from_hf(written | {"puna": {"mixer": BLOCK}})
    with pytest.raises(PunaError, match=f"cannot say what replaces a part .block = '{BLOCK}'"):
        config.to_meta()


def test_code_that_is_lost_or_has_changed_is_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    source = "def norm(x, weight, eps):\n    return x * weight\n"
    (tmp_path / "own_norm.py").write_text(source)
    importlib.invalidate_caches()
    written = replace(SMALL, pieces=Pieces(norm="own_norm:norm")).to_hf()
    assert LlamaConfig.from_hf(written).pieces.norm == "own_norm:norm"
    (tmp_path / "own_norm.py").write_text(source.replace("x * weight", "x + weight"))
    with pytest.raises(PunaError, match=r"puna.norm is 'own_norm:norm', whose code has changed since"):
        LlamaConfig.from_hf(written)
    written["puna"]["sha256"].pop("norm")
    assert LlamaConfig.from_hf(written).pieces.norm == "own_norm:norm"  # accepted as it is now
    (tmp_path / "own_norm.py").unlink()
    del sys.modules["own_norm"]
    with pytest.raises(PunaError, match="puna.norm is \"own_norm:norm\": No module named 'own_norm'.* PYTHONPATH"):
        LlamaConfig.from_hf(written)


def test_a_block_that_does_not_take_what_is_set_is_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "bare_block.py").write_text("def block(x, layer, config, context, cache):\n    return x, cache\n")
    importlib.invalidate_caches()
    config = replace(SMALL, pieces=Pieces(block="bare_block:block", norm=NORM))
    with pytest.raises(
        PunaError, match=r"block bare_block:block has no keyword attend \(model.attention\) and norm: give"
    ):
        block_of(config, attend=attend)


def test_the_fingerprint_covers_what_the_code_imports_and_wrappers(tmp_path, monkeypatch):
    """A wrapped function, a helper beside it and a helper of the helper; nothing that is Puna's or installed."""
    package = tmp_path / "own_pieces"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "deepest.py").write_text("SCALE = 1.0\n")
    (package / "helper.py").write_text("import numpy\nfrom .deepest import SCALE\n")
    (package / "piece.py").write_text(
        "import functools\nfrom model.llama import rms_norm\nfrom own_pieces import helper\n"
        "@functools.wraps(rms_norm)\ndef norm(x, weight, eps):\n    return rms_norm(x, weight, eps) * helper.SCALE\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = [code_fingerprint("own_pieces.piece:norm", "norm")]
    for name in ("deepest", "helper", "piece"):
        with (package / f"{name}.py").open("a") as file:
            file.write("# changed\n")
        found.append(code_fingerprint("own_pieces.piece:norm", "norm"))
    assert len(set(found)) == 4


@pytest.mark.parametrize(
    "code, word",
    [("def norm(:\n", "SyntaxError"), ("x = 1 / 0\n", "division by zero"), ("import nowhere\n", "nowhere")],
)
def test_a_module_that_fails_is_named_with_its_line(tmp_path, monkeypatch, code, word):
    (tmp_path / "failing_piece.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PunaError, match=f'model.norm is "failing_piece:norm".*{word}'):
        load_function("failing_piece:norm", "model.norm")
