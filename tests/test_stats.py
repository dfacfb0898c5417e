"""The norms that a run logs of its layers are those of its gradients and updates, and looking changes no number."""

import json

import jax
import numpy as np
import pytest
from test_train_step import SMALL, config_of, make_rows, start

from model import captured, make_mesh
from train import distributed, loop
from train.config import read_config
from train.data.toy import make_examples, write_tokenizer
from train.metrics import read_metrics
from train.objective import make_objective
from train.optim import make_schedule
from train.plot_stats import plot_stats
from train.state import abstract_batch, abstract_state, shardings_of
from train.stats import make_stats

pytestmark = pytest.mark.slow


def norm_of(tree, layer=None) -> float:
    chosen = jax.tree.leaves(tree) if layer is None else [x[layer] for x in jax.tree.leaves(tree)]
    return float(np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in chosen)))


def test_the_norms_are_those_of_the_step_that_follows():
    config, mesh = config_of(run={"gradient_accumulation_steps": 2}), make_mesh(2, 2, 1, context=2)
    state, step = start(config, SMALL, mesh)
    places = shardings_of(abstract_state(config, SMALL, mesh))
    stats = make_stats(config, SMALL, mesh, make_schedule(config.optim, 20), places)
    shapes, plain = abstract_batch(config, mesh), make_rows(0)
    rows = {name: jax.device_put(values, shapes[name].sharding) for name, values in plain.items()}
    found = jax.device_get(stats(state, rows))

    before = jax.device_get(state.params)
    objective = make_objective(config, SMALL, mesh)
    gradients = jax.jit(jax.grad(lambda p: objective.loss(p, rows, rows)[0] / objective.units(rows)))(state.params)
    names = ("embed", "layers.*", "layers.*.attention", "layers.*.mlp", "final_norm")
    seen = captured(state.params, rows["tokens"], SMALL, names, segments=rows["segments"])[2]
    after = jax.device_get(step(state, rows)[0].params)
    changes = jax.tree.map(lambda a, b: a - b, after, before)
    there = plain["segments"] != 0
    expected = {}
    for kind, tree in (("gradient_norm", gradients), ("update_norm", changes)):
        expected |= {f"{kind}/{name}": norm_of(part) for name, part in tree.items() if name != "layers"}
        expected |= {f"{kind}/layers.{i}": norm_of(tree["layers"], i) for i in range(SMALL.num_hidden_layers)}
    for name, x in jax.device_get(seen).items():
        for i, each in enumerate(x if "*" in name else x[None]):
            rms = np.sqrt(np.mean(np.square(each[there])))
            expected[f"activation_rms/{name.replace('*', str(i))}"] = rms
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, err_msg=name)


def test_a_run_that_looks_is_the_run_that_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "reached_preemption", lambda step: False)
    write_tokenizer(tmp_path)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(example) + "\n" for example in make_examples(80)))
    lines = {}
    for every in (0, 3):
        config = read_config(
            {
                "model": {
                    "tokenizer": str(tmp_path),
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                },
                "data": {"path": str(tmp_path / "train.jsonl"), "max_length": 64, "cache_dir": str(tmp_path / "cache")},
                "run": {
                    "output_dir": str(tmp_path / str(every)),
                    "max_steps": 7,
                    "stats_steps": every,
                    "logging_steps": 2,
                },
                "lora": {"rank": 4},
            }
        )
        loop.train(config)
        lines[every] = read_metrics(tmp_path / str(every))
    plain = {line["step"]: (line["loss"], line["grad_norm"]) for line in lines[0]}
    looked = {line["step"]: (line["loss"], line["grad_norm"]) for line in lines[3]}
    assert list(looked) == [2, 3, 4, 6] and plain == {step: looked[step] for step in plain}
    for line in lines[3]:
        norms = {name: value for name, value in line.items() if name.startswith("gradient_norm/")}
        assert norms.keys() == (
            {"gradient_norm/layers.0", "gradient_norm/layers.1"} if line["step"] % 3 == 0 else set()
        )
        if norms:
            np.testing.assert_allclose(np.sqrt(sum(np.square(list(norms.values())))), line["grad_norm"], rtol=1e-5)
    assert (tmp_path / "3" / "layer_stats.png").stat().st_size > 1000
    assert not (tmp_path / "0" / "layer_stats.png").exists() and not plot_stats(tmp_path / "0", tmp_path / "none.png")
