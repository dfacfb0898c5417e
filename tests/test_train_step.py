"""The step follows transformers + torch, and is the same on every mesh, in every cut of the batch, packed or not."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from reference import params_of
from transformers import LlamaForCausalLM

from convert import load_model
from model.config import LlamaConfig
from model.errors import PunaError
from model.params import init_params
from model.pieces import Pieces
from model.sharding import make_mesh
from train.config import read_config
from train.loss import IGNORE_INDEX
from train.objective import make_objective
from train.optim import make_schedule
from train.sections import Config
from train.start import model_of
from train.state import TrainState, abstract_batch, abstract_state, init_state, shardings_of
from train.step import make_step

pytestmark = pytest.mark.slow

SMALL = LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=4,
)
BATCH, LENGTH = 8, 24


def config_of(**sections) -> Config:
    data = {"path": "unread", "max_length": LENGTH}
    optim = {"learning_rate": 1e-3, "weight_decay": 0.1, "warmup_steps": 2}
    return read_config(
        {
            "model": sections.get("model", {}),
            "data": data | sections.get("data", {}),
            "optim": optim | sections.get("optim", {}),
            "mesh": sections.get("mesh", {}),
            "run": {"batch_size": BATCH} | sections.get("run", {}),
            **({"lora": sections["lora"]} if "lora" in sections else {}),
        }
    )


def mesh_of(data: int, fsdp: int, tensor: int):
    return make_mesh(data, fsdp, tensor, devices=jax.devices()[: data * fsdp * tensor])


def start(config: Config, model: LlamaConfig, mesh, params=None, steps: int = 20):
    abstract = abstract_state(config, model, mesh)
    params = init_params(model, jax.random.key(0)) if params is None else params
    params = jax.tree.map(jnp.copy, jax.device_put(params, shardings_of(abstract.params)))  # the state takes them
    state = init_state(config, model, params, abstract)
    return state, make_step(config, model, mesh, make_schedule(config.optim, steps), shardings_of(abstract))


def make_rows(seed: int, vocab: int = SMALL.vocab_size, batch: int = BATCH, length: int = LENGTH) -> dict:
    """A packed batch whose rows differ widely in how many tokens they train, down to none."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, vocab, (batch, length), dtype=np.int32)
    segments = np.sort(random.integers(1, 4, (batch, length), dtype=np.int32), axis=1)
    segments[0, length // 2 :] = 0
    last = np.append(segments[:, 1:] != segments[:, :-1], np.ones((batch, 1), bool), axis=1)
    masked = random.random((batch, length)) < np.linspace(0, 1, batch)[:, None]
    labels = np.where(last | masked | (segments == 0), IGNORE_INDEX, np.roll(tokens, -1, axis=1))
    return {"tokens": tokens, "labels": labels.astype(np.int32), "segments": segments}


def curve(config: Config, sizes: tuple[int, int, int], steps: int) -> tuple[np.ndarray, TrainState]:
    """Losses and gradient norms of `steps` steps on one mesh [steps, 2], and the state after them."""
    mesh = mesh_of(*sizes)
    state, step = start(config, SMALL, mesh)
    shapes = abstract_batch(config, mesh)
    seen = []
    for number in range(steps):
        state, metrics = step(state, {k: jax.device_put(v, shapes[k].sharding) for k, v in make_rows(number).items()})
        seen.append((metrics["loss"], metrics["grad_norm"]))
    return np.array(jax.device_get(seen)), state


@pytest.fixture(scope="module")
def alone() -> np.ndarray:
    return curve(config_of(), (1, 1, 1), 20)[0]


@pytest.mark.parametrize(
    ("sizes", "sections"),
    [
        pytest.param((8, 1, 1), {}, marks=pytest.mark.slow),
        pytest.param((1, 8, 1), {}, marks=pytest.mark.slow),
        pytest.param((4, 2, 1), {}, marks=pytest.mark.slow),
        pytest.param((1, 4, 2), {}, marks=pytest.mark.slow),
        ((2, 2, 2), {}),
        pytest.param((2, 2, 2), {"mesh": {"sequence_parallel": True, "tensor": 2}}, marks=pytest.mark.slow),
        pytest.param((2, 2, 2), {"model": {"remat": "full", "loss_chunk": 16}}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_mesh_gives_the_same_curve(alone, sizes, sections):
    losses = curve(config_of(**sections), sizes, 20)[0][:, 0]
    np.testing.assert_allclose(losses[0], alone[0, 0], rtol=1e-6)
    np.testing.assert_allclose(losses, alone[:, 0], rtol=1e-5)


@pytest.mark.parametrize(("count", "sizes"), [(2, (1, 1, 1)), (8, (1, 1, 1)), (4, (1, 2, 1))], ids=str)
def test_accumulation_is_the_big_batch(alone, count, sizes):
    split = curve(config_of(run={"gradient_accumulation_steps": count}), sizes, 3)[0]
    np.testing.assert_allclose(split, alone[:3], rtol=1e-6)


def test_a_batch_filled_up_with_empty_rows_is_the_smaller_batch():
    """As at the end of an epoch: of four microbatches one has no row at all."""
    config, smaller = config_of(run={"gradient_accumulation_steps": 4}), config_of(run={"batch_size": 3})
    rows = make_rows(0)
    padded = {name: values.copy() for name, values in rows.items()}
    padded["tokens"][3:], padded["labels"][3:], padded["segments"][3:] = 0, IGNORE_INDEX, 0
    seen = []
    for each, batch in ((config, padded), (smaller, {name: values[:3] for name, values in rows.items()})):
        mesh = mesh_of(1, 1, 1)
        state, step = start(each, SMALL, mesh)
        state, metrics = step(state, jax.device_put(batch))
        seen.append((metrics, state.opt_state))
    (metrics, moments), (expected, expected_moments) = jax.device_get(seen)
    for name in ("num_tokens", "trained_tokens", "skipped", "learning_rate"):
        assert metrics[name] == expected[name]
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), moments, expected_moments)


def test_packed_is_unpacked():
    loss = make_objective(config_of(), SMALL, mesh_of(1, 1, 1)).loss
    objective = jax.jit(lambda params, rows: loss(params, rows, rows)[0])
    params = init_params(SMALL, jax.random.key(0))
    packed = make_rows(0)
    rows = []
    for row in range(BATCH):
        for segment in range(1, 4):
            held = packed["segments"][row] == segment
            pad = (0, LENGTH - held.sum())
            rows.append(
                {
                    "tokens": np.pad(packed["tokens"][row][held], pad),
                    "labels": np.pad(packed["labels"][row][held], pad, constant_values=IGNORE_INDEX),
                    "segments": np.pad(np.ones(held.sum(), np.int32), pad),
                }
            )
    unpacked = {key: np.stack([row[key] for row in rows]) for key in packed}
    np.testing.assert_allclose(objective(params, packed), objective(params, unpacked), rtol=1e-6)


def test_ten_steps_follow_transformers_and_torch(data_dir):
    folder = data_dir / "stories260k-derived" / "hf_sharded"
    model, params = load_model(folder)
    config = config_of(optim={"learning_rate": 3e-4, "max_grad_norm": 1.0}, data={"max_length": 64})
    state, step = start(config, model, mesh_of(1, 1, 1), params, steps=10)
    rows = make_rows(0, model.vocab_size, 4, 64)
    rows["segments"] = np.ones_like(rows["segments"])
    rows["labels"] = np.where(rows["labels"] == IGNORE_INDEX, IGNORE_INDEX, np.roll(rows["tokens"], -1, axis=1))

    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    decayed = [p for name, p in reference.named_parameters() if "norm" not in name]
    others = [p for name, p in reference.named_parameters() if "norm" in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.999), eps=1e-8)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 3, 11)
    optimizer.step()
    schedule.step()  # its first step has rate 0
    tokens = torch.tensor(rows["tokens"]).long()
    labels = torch.tensor(np.roll(rows["labels"], 1, axis=1)).long()  # transformers shifts them back
    labels[:, 0] = IGNORE_INDEX

    for number in range(10):
        state, metrics = step(state, rows)
        loss = reference(tokens, labels=labels).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        np.testing.assert_allclose(metrics["loss"], loss.item(), rtol=1e-4, err_msg=f"loss of step {number}")
        np.testing.assert_allclose(metrics["grad_norm"], norm.item(), rtol=1e-4, err_msg=f"norm of step {number}")
        np.testing.assert_allclose(metrics["learning_rate"], schedule.get_last_lr()[0], rtol=1e-5, atol=1e-9)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    ends = params_of(reference)
    jax.tree.map(lambda own, other: np.testing.assert_allclose(own, other, atol=2e-5), state.params, ends)


def test_a_step_that_is_not_finite_changes_nothing():
    config = config_of()
    mesh = mesh_of(1, 1, 1)
    params = init_params(SMALL, jax.random.key(0))
    params["embed"] = params["embed"].at[5].set(jnp.nan)
    state, step = start(config, SMALL, mesh, params)
    before = jax.device_get((state.params, state.opt_state))
    good, bad = make_rows(0), make_rows(1)
    good["tokens"] = np.where(good["tokens"] == 5, 6, good["tokens"])
    good["labels"] = np.where(good["labels"] == 5, 6, good["labels"])
    bad["tokens"][0, 0] = 5
    for number in (1, 2):
        state, metrics = step(state, bad)
        assert metrics["skipped"] == number and not jnp.isfinite(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get((state.params, state.opt_state)))
    state, metrics = step(state, good)
    assert metrics["skipped"] == 0 and jnp.isfinite(metrics["loss"]) and state.step == 3
    assert jnp.any(state.params["final_norm"] != before[0]["final_norm"])


@pytest.mark.parametrize(
    "optim",
    [
        {"optimizer": "test_train_step:to_infinity"},
        {"learning_rate": 1e38, "weight_decay": 1e3},
        {"learning_rate": 1e3, "weight_decay": 1e38},
        {"optimizer": "adafactor", "learning_rate": 3e38},
    ],
    ids=str,
)
def test_an_update_that_would_ruin_the_weights_changes_nothing(optim):
    config = config_of(optim=optim | {"warmup_steps": 0})
    state, step = start(config, SMALL, mesh_of(1, 1, 1))
    before = jax.device_get((state.params, state.opt_state))
    state, metrics = step(state, make_rows(0))
    assert metrics["skipped"] == 1 and jnp.isfinite(metrics["loss"]) and jnp.isfinite(metrics["grad_norm"])
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get((state.params, state.opt_state)))


def to_infinity(optim, schedule):
    return optax.stateless(lambda updates, params: jax.tree.map(lambda x: x * jnp.inf, updates))


def test_offloaded_optimizer_state_is_the_same_bit_for_bit():
    here, there = (curve(config_of(optim={"offload": offload}), (1, 1, 1), 3) for offload in (False, True))
    np.testing.assert_array_equal(here[0], there[0])
    assert {x.sharding.memory_kind for x in jax.tree.leaves(there[1].opt_state)} == {"pinned_host"}


def test_bfloat16_weights_train():
    config = config_of(model={"dtype": "bfloat16", "param_dtype": "bfloat16"})
    mesh = mesh_of(1, 1, 1)
    state, step = start(config, SMALL, mesh, init_params(SMALL, jax.random.key(0), jnp.bfloat16))
    first = last = None
    for _ in range(20):
        state, metrics = step(state, make_rows(0))
        first, last = first or float(metrics["loss"]), float(metrics["loss"])
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
    assert first and last and last < first - 0.05


@pytest.fixture(scope="module")
def fsdp_step() -> str:
    """The optimized HLO of a step over eight-way FSDP."""
    config, mesh = config_of(), mesh_of(1, 8, 1)
    abstract = abstract_state(config, SMALL, mesh)
    step = make_step(config, SMALL, mesh, make_schedule(config.optim, 20), shardings_of(abstract))
    return step.lower(abstract, abstract_batch(config, mesh)).compile().as_text()


def test_fsdp_gathers_single_layers(fsdp_step):
    """Seven weights of one layer forward and seven backward; outside the loops the embedding and the head."""
    shapes = re.findall(r"= \w+\[([\d,]*)\][^=]* all-gather\(", fsdp_step)
    sizes = [int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes]
    L, D, V, F = SMALL.num_hidden_layers, SMALL.hidden_size, SMALL.vocab_size, SMALL.intermediate_size
    weights = 2 * D * D + 2 * D * D // 2 + 3 * D * F
    assert max(sizes) <= max(D * V, D * F) < L * D * F
    layers = sum(sizes) - sum(size for size in sizes if size == D * V)
    assert layers == 2 * weights
    assert sizes.count(D * V) <= 3


def test_nothing_in_the_fsdp_state_is_whole(fsdp_step):
    """No array of a layer stack's full size exists on a device."""
    L, D, F = SMALL.num_hidden_layers, SMALL.hidden_size, SMALL.intermediate_size
    assert f"f32[{L},{D},{F}]" not in fsdp_step and f"f32[{L},{F},{D}]" not in fsdp_step


def test_a_batch_that_does_not_divide_is_named():
    with pytest.raises(PunaError, match=r"run.batch_size 8 in 4 microbatches .* 4 devices"):
        abstract_batch(config_of(run={"gradient_accumulation_steps": 4}), mesh_of(1, 4, 1))


def test_pieces_are_replaced_by_name():
    named = {"block": "test_train_step:skip", "loss": "test_train_step:count"}
    objective = make_objective(config_of(model=named), replace(SMALL, pieces=Pieces(named["block"])), mesh_of(1, 1, 1))
    rows = make_rows(0)
    total, _ = objective.loss(init_params(SMALL, jax.random.key(0)), rows, rows)
    assert total == objective.units(rows) == (rows["labels"] != IGNORE_INDEX).sum()
    for setting in ("block", "norm", "attention"):
        config = config_of(model={setting: "test_train_step:absent", "preset": "llama-7b"})
        with pytest.raises(PunaError, match=f'model.{setting} is "test_train_step:absent"'):
            model_of(config)
    with pytest.raises(PunaError, match='model.loss is "test_train_step:absent"'):
        make_objective(config_of(model={"loss": "test_train_step:absent"}), SMALL, mesh_of(1, 1, 1))


def skip(x, layer, config, context, cache):
    return x, cache


def count(x, head, targets):
    return jnp.sum(targets != IGNORE_INDEX, dtype=jnp.float32)
