"""The moving average of weights is its recurrence, and a run from another's checkpoint goes on as that one does."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert import load_model
from model import init_params
from model.errors import PunaError
from train import distributed, loop
from train.config import read_config
from train.data.toy import make_examples, write_tokenizer
from train.metrics import read_metrics
from train.step import averaged

pytestmark = pytest.mark.slow


def test_the_average_is_its_recurrence_in_float32():
    params = {"w": jnp.asarray([1.0, 3.0], jnp.bfloat16)}
    mean = averaged({"w": jnp.asarray([0.5, 0.25])}, params, 0.999)
    assert mean["w"].dtype == jnp.float32
    np.testing.assert_allclose(mean["w"], [0.999 * 0.5 + 0.001, 0.999 * 0.25 + 0.003], rtol=1e-6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`run(name, **changes)`: a small run with an average; returns what its steps logged and its folder."""
    tmp_path, patch = tmp_path_factory.mktemp("runs"), pytest.MonkeyPatch()
    write_tokenizer(tmp_path)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(example) + "\n" for example in make_examples(200)))

    def make(name: str, stop: int | None = None, optim: dict | None = None, **changes) -> tuple[dict, Path]:
        patch.setattr(distributed, "reached_preemption", lambda step: step == stop)
        folder = tmp_path / name
        sections = {
            "model": {
                "tokenizer": str(tmp_path), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 4,
            },
            "data": {"path": str(tmp_path / "train.jsonl"), "max_length": 64, "cache_dir": str(tmp_path / "cache")},
            "optim": {"learning_rate": 1e-2, "lr_scheduler_type": "constant"} | (optim or {}),
            "run": {"output_dir": str(folder), "max_steps": 8, "save_steps": 4, "ema": 0.9} | changes,
        }  # fmt: skip
        loop.train(read_config(sections))
        return {line["step"]: line for line in read_metrics(folder)}, folder

    yield make
    patch.undo()


@pytest.fixture(scope="module")
def long(run):
    """A run of eight steps, which saves two of them."""
    return run("long")


def test_the_average_of_one_step_is_between_the_fresh_weights_and_its_own(run):
    _, folder = run("one", max_steps=1)
    config, last = load_model(folder / "final")
    fresh, mean = init_params(config, jax.random.key(0)), load_model(folder / "final-ema")[1]
    expected = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, fresh, last)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), mean, expected)
    assert np.abs(np.asarray(fresh["embed"] - last["embed"])).max() > 1e-3


def test_a_run_from_a_checkpoint_is_the_rest_of_the_other(run, long):
    whole, first = long
    files = {path: path.stat().st_mtime_ns for path in (first / "checkpoints").rglob("*") if path.is_file()}
    rest, second = run("rest", from_checkpoint=str(first / "checkpoints" / "4"))
    assert list(rest) == [5, 6, 7, 8]
    for name in ("loss", "grad_norm", "learning_rate"):
        assert [line[name] for line in rest.values()] == [whole[step][name] for step in rest]
    for name in ("final", "final-ema"):
        one, other = (jax.device_get(load_model(folder / name)[1]) for folder in (first, second))
        jax.tree.map(np.testing.assert_array_equal, one, other)
    last, mean = (jax.device_get(load_model(first / name)[1]["embed"]) for name in ("final", "final-ema"))
    assert np.abs(last - mean).max() > 1e-4
    assert files == {path: path.stat().st_mtime_ns for path in (first / "checkpoints").rglob("*") if path.is_file()}


def test_a_cooldown_from_a_kept_checkpoint_resumes_as_a_run_of_its_own(run, long):
    _, first = long
    cooldown = {
        "optim": {"lr_scheduler_type": "wsd", "decay_ratio": 0.5},
        "from_checkpoint": str(first / "checkpoints/4"),
    }
    whole, _ = run("cooldown", **cooldown)
    rates = [line["learning_rate"] for line in whole.values()]
    assert list(whole) == [5, 6, 7, 8] and rates[0] == pytest.approx(1e-2) and rates == sorted(rates, reverse=True)
    assert rates[-1] < 2e-3
    with pytest.raises(SystemExit):
        run("stopped", stop=6, **cooldown)
    parts, _ = run("stopped", **cooldown)
    assert {step: line["loss"] for step, line in parts.items()} == {step: line["loss"] for step, line in whole.items()}


def test_what_is_no_checkpoint_is_refused_by_name(run, long):
    _, first = long
    with pytest.raises(PunaError, match="run.from_checkpoint .*long is no checkpoint: .*, as .*long/checkpoints/8"):
        run("second", from_checkpoint=str(first))
    with pytest.raises(PunaError, match="does not fit this configuration"):
        run("third", from_checkpoint=str(first / "checkpoints" / "4"), ema=0.0)
