"""Weights in bfloat16: roundings are right in the mean and the same on every mesh; a step is optax's in float32."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from convert import manifest
from model import LlamaConfig, init_params, make_mesh
from train import cost, distributed, loop, master
from train.config import load_config, read_config
from train.data.toy import make_examples, write_tokenizer
from train.metrics import read_metrics
from train.optim import decay_mask, make_schedule
from train.sections import Config
from train.state import abstract_batch, abstract_state, init_state, shardings_of
from train.step import make_advance

ROOT = Path(__file__).parent.parent
SMALL = LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=32,
)  # fmt: skip


def numbers(*shape: int) -> np.ndarray:
    """Float32 of all sizes, of both signs."""
    random = np.random.default_rng(0)
    return (random.standard_normal(shape) * 2.0 ** random.integers(-30, 30, shape)).astype(np.float32)


def around(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bfloat16 numbers next to x towards 0 and away from it, by ml_dtypes; both are x where that is one."""
    nearest = x.astype(ml_dtypes.bfloat16)
    is_beyond = np.abs(nearest.astype(np.float32)) > np.abs(x)
    low = np.where(is_beyond, np.nextafter(nearest, ml_dtypes.bfloat16(0)), nearest)
    away = np.copysign(np.inf, x).astype(low.dtype)
    return low, np.where(low.astype(np.float32) == x, low, np.nextafter(low, away))


def test_a_rounding_is_one_of_the_two_numbers_around_and_right_in_the_mean():
    x, count = numbers(4, 3, 8), 4000
    words = jax.random.bits(jax.random.key(1), (count, 2), jnp.uint32)
    drawn = np.asarray(jax.jit(jax.vmap(partial(master.round_at_random, jnp.asarray(x))))(words)).astype(np.float64)
    low, high = (np.asarray(side).astype(np.float64) for side in around(x))
    assert ((drawn == low) | (drawn == high)).all()
    part = (x - low) / (high - low)  # how often it should be the one away from 0
    error = np.abs((drawn == high).mean(axis=0) - part)
    assert (error < 5 * np.sqrt(part * (1 - part) / count) + 2**-16).all()
    assert np.abs(np.corrcoef((drawn == high).reshape(count, -1).T)[np.triu_indices(96, 1)]).max() < 6 / count**0.5


def test_what_bfloat16_can_tell_stays_and_what_is_not_finite_too():
    exact = numbers(64).astype(ml_dtypes.bfloat16).astype(np.float32)
    given = np.concatenate([exact, np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 2.0**127], np.float32)])
    given = np.append(given, np.array([0xFFFFFFFF, 0x7FFFFFFF], np.uint32).view(np.float32))  # NaNs of all ones
    for seed in range(20):
        rounded = master.round_at_random(jnp.asarray(given), jnp.array([seed, 7], jnp.uint32))
        np.testing.assert_array_equal(np.asarray(rounded).astype(np.float32), given)


def test_roundings_are_the_same_on_every_mesh_and_other_ones_for_every_array_and_step():
    x = jnp.asarray(numbers(4, 16, 8))
    rounded = jax.jit(master.round_at_random, static_argnums=2)
    alone = np.asarray(rounded(x, jnp.array([1, 2], jnp.uint32), 0))
    for sizes in ((8, 1), (2, 4)):
        mesh = make_mesh(data=1, fsdp=sizes[0], tensor=sizes[1])
        spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor")))
        np.testing.assert_array_equal(np.asarray(rounded(spread, jnp.array([1, 2], jnp.uint32), 0)), alone)
    others = [
        rounded(x, jnp.array(words, jnp.uint32), number) for words, number in (((1, 3), 0), ((2, 2), 0), ((1, 2), 1))
    ]
    for other in others:
        assert 0.2 < (np.asarray(other) != alone).mean() < 0.8
    layers = rounded(jnp.broadcast_to(x[:1], x.shape), jnp.array([1, 2], jnp.uint32), 0)
    assert len({np.asarray(layer).tobytes() for layer in layers}) == 4


def config_of(kept: str, **sections) -> Config:
    return read_config(
        {
            "model": {"param_dtype": "bfloat16", "dtype": "bfloat16"},
            "data": {"path": "unread", "max_length": 16},
            "optim": {"learning_rate": 1e-3, "weight_decay": 0.1, "master": kept, "max_grad_norm": 0.0},
            "run": {"batch_size": 4},
            **sections,
        }
    )


def rows_of(config, mesh, seed: int):
    tokens = np.random.default_rng(seed).integers(1, 64, (4, 17)).astype(np.int32)
    rows = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "segments": np.ones((4, 16), np.int32)}
    return jax.device_put(rows, shardings_of(abstract_batch(config, mesh)))


def stepped(config: Config):
    """The state before each of three steps and after it, and the gradients of the step."""
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    abstract = abstract_state(config, SMALL, mesh)
    state = init_state(config, SMALL, init_params(SMALL, jax.random.key(0), jnp.bfloat16, mesh), abstract)
    advance = jax.jit(make_advance(config, SMALL, mesh, make_schedule(config.optim, 10), shardings_of(abstract)))
    for seed in range(3):
        new, metrics, grads = advance(state, rows_of(config, mesh, seed))
        yield state, new, grads, float(metrics["learning_rate"])
        state = new


def optax_step(grads, moments, params, rate: float):
    """What optax's AdamW makes of a step whose gradients, moments and weights are taken as float32."""
    wide = partial(jax.tree.map, lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x)
    theirs = optax.adamw(rate, weight_decay=0.1, mask=decay_mask)
    state = (wide(moments), *theirs.init(wide(params))[1:])
    updates, (moments, *_) = theirs.update(wide(grads), state, wide(params))
    return optax.apply_updates(wide(params), updates), moments


@pytest.mark.slow
def test_a_float32_master_is_updated_as_by_optax_and_the_weights_are_its_rounding():
    for state, new, grads, rate in stepped(config_of("float32")):
        assert {x.dtype for x in jax.tree.leaves(new.params)} == {jnp.dtype(jnp.bfloat16)}
        expected, moments = optax_step(grads, state.opt_state.inner[0], state.opt_state.master, rate)
        close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9)
        jax.tree.map(close, (new.opt_state.master, new.opt_state.inner[0]), (expected, moments))
        nearest = jax.tree.map(lambda x: x.astype(jnp.bfloat16), new.opt_state.master)
        jax.tree.map(np.testing.assert_array_equal, new.params, nearest)


@pytest.mark.slow
def test_stochastic_rounding_is_of_what_optax_makes_in_float32():
    """Of weights and both moments: each number is one of those next to optax's, and often not the nearest."""
    for state, new, grads, rate in stepped(config_of("stochastic")):
        expected = optax_step(grads, state.opt_state[0], state.params, rate)
        found = new.params, new.opt_state[0]
        assert {x.dtype for x in jax.tree.leaves(found) if x.ndim} == {jnp.dtype(jnp.bfloat16)}
        others = total = 0
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            if not x.ndim:
                assert x == y
                continue
            x, y = np.asarray(x), np.asarray(y)
            margin = np.abs(y) * 1e-5  # XLA and optax alone may differ in the last bits of float32
            low, high = around(np.abs(y) - margin)[0], around(np.abs(y) + margin)[1]
            assert ((np.abs(x) >= low) & (np.abs(x) <= high)).all()
            others += (x != y.astype(ml_dtypes.bfloat16)).sum()
            total += x.size
        assert 0.1 < others / total < 0.4


@pytest.mark.soak
def test_a_run_with_stochastic_rounding_is_resumed_bit_for_bit(tmp_path, monkeypatch):
    write_tokenizer(tmp_path)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(each) + "\n" for each in make_examples(100)))
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    data = {"path": str(tmp_path / "train.jsonl"), "max_length": 32, "cache_dir": str(tmp_path / "cache")}

    def run(name: str, stop: int | None = None) -> tuple[list, dict]:
        monkeypatch.setattr(distributed, "reached_preemption", lambda step: step == stop)
        sections = {
            "model": small | {"tokenizer": str(tmp_path), "param_dtype": "bfloat16"},
            "data": data,
            "optim": {"learning_rate": 1e-2},
            "run": {"output_dir": str(tmp_path / name), "max_steps": 5, "save_steps": 0},
        }
        loop.train(read_config(sections))
        arrays = manifest.read(tmp_path / name / "checkpoints" / "5")["arrays"]
        kept = {each: array["fingerprint"] for each, array in arrays.items()}
        return [line["loss"] for line in read_metrics(tmp_path / name)], kept

    with pytest.raises(SystemExit):
        run("parts", stop=3)
    assert run("parts") == run("whole")


def test_a_plan_says_what_is_kept_and_what_the_other_choice_takes():
    """The figures are the difference of the two states."""
    mesh, held, said = make_mesh(fsdp=8), {}, {}
    for kept in ("stochastic", "float32", "none"):
        state = abstract_state(config_of(kept), replace(SMALL, vocab_size=2**20, hidden_size=64), mesh)
        sizes = cost.shard_bytes(state.params), cost.shard_bytes(state.opt_state)
        held[kept], said[kept] = sum(sizes), master.describe_master(kept, *sizes)
    apart = held["float32"] - held["stochastic"]
    assert apart == pytest.approx(4 * sizes[0], abs=8) and held["none"] == held["stochastic"]  # 8 bytes a weight
    assert said["stochastic"].endswith(f'rounded at random; "float32" takes {apart / 2**30:.2f} GiB more')
    assert said["float32"].endswith(f'"stochastic" takes {apart / 2**30:.2f} GiB less') and "0.13" in said["float32"]
    assert "loses small updates" in said["none"]


# The losses that docs/low-precision.md shows.

TINY = ("alpaca-tiny", "vicuna-tiny", "wizardlm-tiny")
BFLOAT16 = ("model.dtype=bfloat16", "model.param_dtype=bfloat16")


@pytest.mark.soak
@pytest.mark.parametrize("name", TINY)
def test_stochastic_rounding_reaches_the_loss_of_float32(name, tmp_path, monkeypatch):
    """Of held-out rows, within 1 %, for weights and optimizer in bfloat16 from the start; the nearest ends higher."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(distributed, "reached_preemption", lambda step: False)
    wide = held_out(name, tmp_path / "wide", "model.dtype=float32")
    found = {kept: held_out(name, tmp_path / kept, *BFLOAT16, f"optim.master={kept}") for kept in master.MASTERS}
    print(name, f"float32 {wide:.4f}", *(f"{kept} {loss:.4f}" for kept, loss in found.items()))
    assert abs(found["stochastic"] / wide - 1) < 0.01 and abs(found["float32"] / wide - 1) < 0.01
    assert found["none"] > max(found["stochastic"], found["float32"])


@pytest.mark.soak
@pytest.mark.parametrize("name", TINY)
def test_a_run_in_8_bit_floats_reaches_the_loss_of_float32(name, tmp_path, monkeypatch):
    """Of held-out rows, within 1 %. The losses that docs/low-precision.md shows."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(distributed, "reached_preemption", lambda step: False)
    small = held_out(name, tmp_path / "fp8", "model.dtype=bfloat16", "model.matmul=fp8")
    wide = held_out(name, tmp_path / "wide", "model.dtype=float32")
    print(name, f"float32 {wide:.4f} fp8 {small:.4f}")
    assert abs(small / wide - 1) < 0.01


def held_out(name: str, folder: Path, *overrides: str) -> float:
    """The last held-out loss of a run of configs/NAME.toml, in the root and with no signal to hear of."""
    settings = ["run.eval_steps=0", f"run.output_dir={folder}", *overrides]
    loop.train(load_config(ROOT / "configs" / f"{name}.toml", settings))
    return read_metrics(folder)[-1]["eval_loss"]
