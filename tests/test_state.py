"""The state of a run: one constructor, rules for the optimizer's arrays, and steps that move nothing by themselves."""

import gzip
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from convert import formats
from model import LlamaConfig, init_params, make_mesh
from model.errors import PunaError
from train import distributed, loop
from train.config import load_config, read_config
from train.objective import make_objective
from train.optim import make_schedule
from train.state import abstract_batch, abstract_state, init_state, shardings_of
from train.step import make_step

ROOT = Path(__file__).parent.parent
SMALL = LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=32,
)  # fmt: skip


def config_of(**sections):
    base = {"data": {"path": "unread", "max_length": 16}, "run": {"batch_size": 4}, "optim": {"learning_rate": 1e-2}}
    return read_config({key: base.get(key, {}) | sections.get(key, {}) for key in base.keys() | sections.keys()})


def rows_of(config, mesh, seed=0):
    tokens = np.random.default_rng(seed).integers(1, 64, (4, 17)).astype(np.int32)
    rows = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "segments": np.ones((4, 16), np.int32)}
    return jax.device_put(rows, shardings_of(abstract_batch(config, mesh)))


def started(config, mesh):
    params = init_params(SMALL, jax.random.key(0), mesh=mesh)
    abstract = abstract_state(config, SMALL, mesh)
    step = make_step(config, SMALL, mesh, make_schedule(config.optim, 10), shardings_of(abstract))
    return init_state(config, SMALL, params, abstract), step


def lion(optim, schedule):
    return optax.lion(schedule, b1=0.9, b2=0.99, weight_decay=optim.weight_decay)


def shapeless(optim, schedule):
    """Keeps an array of no parameter's shape."""
    return optax.GradientTransformation(lambda params: {"odd": jnp.zeros((7, 5))}, lambda u, state, params: (u, state))


@pytest.mark.slow
def test_an_optimizer_of_ones_own_owns_its_learning_rate():
    own = {"optimizer": "test_state:lion", "weight_decay": 0.1, "warmup_steps": 2, "max_grad_norm": 0.0}
    config = config_of(optim=own)
    mesh = make_mesh(fsdp=4, tensor=2)
    state, step = started(config, mesh)
    schedule = make_schedule(config.optim, 10)
    ours = optax.lion(schedule, b1=0.9, b2=0.99, weight_decay=0.1)
    params = init_params(SMALL, jax.random.key(0), mesh=mesh)
    own_state, objective = ours.init(params), make_objective(config, SMALL, mesh)
    gradients = jax.jit(jax.grad(lambda params, rows: objective.loss(params, rows, rows)[0]))
    for seed in range(3):
        rows = rows_of(config, mesh, seed)
        state, metrics = step(state, rows)
        grads = jax.tree.map(lambda g: g / (4 * 16), gradients(params, rows))
        updates, own_state = ours.update(grads, own_state, params)
        params = optax.apply_updates(params, updates)
        assert float(metrics["learning_rate"]) == float(schedule(seed))
    for ours_, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(ours_, theirs, atol=1e-6)
    momentum = state.opt_state[0].mu["layers"]["wq"]
    assert momentum.sharding == state.params["layers"]["wq"].sharding


def test_state_that_belongs_to_no_parameter_is_refused_and_small_statistics_are_replicated():
    mesh = make_mesh(fsdp=8)
    config = config_of(optim={"optimizer": "test_state:shapeless"})
    with pytest.raises(PunaError, match=r"optim.optimizer: its state \['odd'\] of shape \(7, 5\) is no parameter's"):
        abstract_state(config, SMALL, mesh)
    state = abstract_state(config_of(optim={"optimizer": "adafactor"}), SMALL, mesh)
    assert {x.sharding.spec for x in jax.tree.leaves(state.opt_state) if x.ndim > 2} <= {PartitionSpec()}
    adam = abstract_state(config_of(), SMALL, mesh).opt_state[0].mu["layers"]["w_up"]
    assert adam.sharding.spec == PartitionSpec(None, ("fsdp",), None)


def test_a_step_moves_nothing_between_host_and_devices_by_itself():
    config, mesh = config_of(), make_mesh(fsdp=4, tensor=2)
    state, step = started(config, mesh)
    rows = [rows_of(config, mesh, seed) for seed in range(4)]
    state, _ = step(state, rows[0])
    with jax.transfer_guard("disallow"):
        for batch in rows[1:]:
            state, metrics = step(state, batch)
        loss = jax.device_get(metrics["loss"])
    assert np.isfinite(loss)


def test_each_part_of_a_step_has_its_name_in_traces():
    config, mesh = config_of(), make_mesh(fsdp=8)
    abstract = abstract_state(config_of(run={"batch_size": 8}), SMALL, mesh)
    step = make_step(config, SMALL, mesh, make_schedule(config.optim, 10), shardings_of(abstract))
    text = step.lower(abstract, abstract_batch(config_of(run={"batch_size": 8}), mesh)).as_text(debug_info=True)
    for name in ("embed", "attention", "qkv", "rope", "attend", "out", "mlp", "final_norm", "loss"):
        assert f"/{name}/" in text or f"({name})" in text, name


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "reached_preemption", lambda step: False)
    monkeypatch.chdir(ROOT)
    few = ["run.save_steps=2", "run.batch_size=8", "optim.warmup_steps=1", "run.eval_steps=0"]

    def run(*overrides, name="run"):
        loop.train(load_config(ROOT / "configs" / "tiny.toml", [*few, f"run.output_dir={tmp_path / name}", *overrides]))
        return tmp_path / name

    return run


@pytest.mark.slow
def test_profile_steps_are_traced(tiny):
    folder = tiny("run.max_steps=4", "run.profile_steps=[2, 3]") / "profile"
    assert list(folder.rglob("*.xplane.pb"))
    (trace,) = folder.rglob("perfetto_trace.json.gz")
    names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert any(name and name.startswith("train") for name in names)
    with pytest.raises(PunaError, match="run.profile_steps is .3, 2.; give a first and a last step"):
        tiny("run.max_steps=4", "run.profile_steps=[3, 2]")


@pytest.mark.slow
def test_a_checkpoint_is_opened_once_and_changed_code_is_refused(tiny, tmp_path, monkeypatch):
    base = tiny("run.max_steps=2", name="base") / "final"
    opened, real = [], formats.open_model
    monkeypatch.setattr("convert.source.open_model", lambda path: opened.append(path) or real(path))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_loss.py").write_text("def loss(x, head, targets):\n    return (x**2).sum()\n")
    tiny("run.max_steps=2", f"model.path={base}", "lora.rank=2", "model.loss=own_loss:loss", name="tuned")
    assert opened == [str(base)]
    (tmp_path / "own_loss.py").write_text("def loss(x, head, targets):\n    return (x**4).sum()\n")
    with pytest.raises(PunaError, match="holds a run on other code: what model.loss names has changed since"):
        tiny("run.max_steps=4", f"model.path={base}", "lora.rank=2", "model.loss=own_loss:loss", name="tuned")
