"""muP is table 8 of Tensor Programs V with its factors inside the weights, and at the base width it is nothing."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_train_step import config_of, make_rows

from model import LlamaConfig, forward, init_params, make_mesh
from model.errors import PunaError
from train.check_mup import at_width, check_mup, growth, widths_of
from train.config import read_config
from train.data.toy import make_examples, write_tokenizer
from train.mup import factors, scaled_start
from train.objective import make_objective
from train.optim import make_schedule
from train.state import abstract_state, base_params, init_state, shardings_of
from train.step import make_step

WIDE = LlamaConfig(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, attention_bias=True,
)  # fmt: skip
RATE, STEPS = 1e-2, 4


def settings(**model):
    optim = {"learning_rate": RATE, "weight_decay": 0.0, "warmup_steps": 0, "lr_scheduler_type": "constant"}
    return config_of(model=model, optim=optim | {"adam_epsilon": 1e-30, "max_grad_norm": 0.0})


def trained(config, model):
    mesh = make_mesh(devices=jax.devices()[:1])
    abstract = abstract_state(config, model, mesh)
    state = init_state(config, model, base_params(config, model, mesh, None), abstract)
    step = make_step(config, model, mesh, make_schedule(config.optim, STEPS), shardings_of(abstract))
    for number in range(STEPS):
        state, _ = step(state, jax.tree.map(jnp.asarray, make_rows(number)))
    return state.params


@pytest.mark.slow
def test_it_is_table_8_with_its_factors_inside_the_weights():
    """Width and heads four times the base's, so that factors are powers of two and rounding is the same."""
    config = settings(parametrization="mup", mup_base_hidden_size=8, mup_base_head_dim=4)
    params = trained(config, WIDE)

    forward_factor = {"lm_head": 1 / 4, "wq": 1 / 2, "bq": 1 / 2}  # 1 / r; scores over the width of a head
    hidden = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")

    def by_name(of):
        return jax.tree_util.tree_map_with_path(lambda path, x: of(path[-1].key, x), params)

    def applied(tree):
        return jax.tree_util.tree_map_with_path(lambda path, x: x * forward_factor.get(path[-1].key, 1), tree)

    theirs = init_params(WIDE, jax.random.key(config.run.seed))
    deviations = by_name(lambda name, x: 1 / 2 if name in hidden else 1)  # the root of the variance 1 / r
    theirs = jax.tree.map(jnp.multiply, theirs, deviations)
    rates = by_name(lambda name, x: 1 / 4 if name in hidden else 1)
    objective = make_objective(config, WIDE, make_mesh(devices=jax.devices()[:1]))
    adam = optax.scale_by_adam(0.9, 0.999, 1e-30)
    state = adam.init(theirs)

    @jax.jit
    def step(theirs, state, rows):
        loss = lambda tree: objective.loss(applied(tree), rows, rows)[0] / objective.units(rows)  # noqa: E731
        updates, state = adam.update(jax.grad(loss)(theirs), state)
        return jax.tree.map(lambda p, u, by: p - RATE * by * u, theirs, updates, rates), state

    for number in range(STEPS):
        theirs, state = step(theirs, state, jax.tree.map(jnp.asarray, make_rows(number)))
    for (path, ours), other in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(applied(theirs)), strict=True
    ):
        if path[-1].key != "bk":  # it shifts all scores of a query: its gradient is rounding alone
            np.testing.assert_allclose(ours, other, rtol=1e-4, atol=1e-4 * np.abs(other).max(), err_msg=str(path))
    tokens = jnp.asarray(make_rows(9)["tokens"])
    ours, expected = (jax.jit(forward, static_argnums=2)(p, tokens, WIDE)[0] for p in (params, applied(theirs)))
    np.testing.assert_allclose(ours, expected, atol=1e-4)


@pytest.mark.slow
def test_at_the_base_width_it_is_the_usual_run_bit_for_bit():
    own = settings(parametrization="mup", mup_base_hidden_size=32)
    jax.tree.map(np.testing.assert_array_equal, trained(own, WIDE), trained(settings(), WIDE))


def test_factors_and_what_has_none():
    config = settings(parametrization="mup", mup_base_hidden_size=8)
    found = factors(config.model, WIDE)
    assert found["w_up"] == (0.5, 0.25) == found["wq"] and found["lm_head"] == (0.25, 0.25)  # head_dim is the base's
    assert factors(settings().model, WIDE) is None
    params = {"lm_head": 1}
    assert scaled_start(settings().model, WIDE, params) is params
    with pytest.raises(
        PunaError, match="scales the head and not the embedding, .* set model.tie_word_embeddings = fal"
    ):
        factors(config.model, LlamaConfig(tie_word_embeddings=True))
    for sections, said in (
        ({"optim": {"optimizer": "muon"}}, "optim.optimizer is 'muon', and model.parametrization 'mup' is for 'adamw'"),
        ({"lora": {}}, r"\[lora\] trains adapters"),
    ):
        with pytest.raises(PunaError, match=said):
            read_config({"data": {"path": "x"}, "model": {"parametrization": "mup"}} | sections)


@pytest.mark.slow
def test_activations_of_wide_models_move_as_far_as_those_of_narrow_ones_or_the_check_fails(tmp_path, monkeypatch):
    monkeypatch.setattr("train.check_mup.mesh_of", lambda config: make_mesh(devices=jax.devices()[:1]))
    write_tokenizer(tmp_path)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(example) + "\n" for example in make_examples(60)))
    for parametrization, steady in (("mup", True), ("standard", False)):
        dims = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        base = {"mup_base_hidden_size": 16} if parametrization == "mup" else {}
        config = read_config(
            {
                "model": dims | base | {"tokenizer": str(tmp_path), "parametrization": parametrization},
                "data": {"path": str(tmp_path / "train.jsonl"), "max_length": 32, "cache_dir": str(tmp_path / "cache")},
                "optim": {"learning_rate": 3e-3},
            }
        )
        table, is_steady = check_mup(config, [16, 128], 3, tmp_path / "check.png")
        assert is_steady == steady
        growths = [float(cell) for cell in table.columns[3].cells]
        assert growths[-1] == pytest.approx(0 if steady else 1, abs=0.3)  # of the logits: as width to the power of 0, 1
        assert (tmp_path / "check.png").read_bytes().startswith(b"\x89PNG")


def test_widths_that_cannot_be_compared_are_refused():
    config = settings(parametrization="mup", mup_base_hidden_size=8)
    assert at_width(config, WIDE, 64).num_attention_heads == 4
    by_heads = settings(parametrization="mup", mup_base_head_dim=4)
    assert at_width(by_heads, WIDE, 64).head_dim == 32 and at_width(by_heads, WIDE, 64).num_attention_heads == 2
    with pytest.raises(
        PunaError, match="--widths 48: num_key_value_heads is 1 at model.hidden_size 32, and would be 1.5"
    ):
        at_width(config, WIDE, 48)
    with pytest.raises(PunaError, match="--widths 64,x: 'x' is no width"):
        widths_of("64,x")
    with pytest.raises(PunaError, match="check-mup compares widths: give two or more to --widths"):
        check_mup(config, [64, 64], 1, Path("unwritten.png"))
    assert growth({2: 1.0, 4: 4.0, 8: 16.0}) == pytest.approx(2)
