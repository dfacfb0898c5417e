"""Schedules, decay and Adafactor are transformers'; clipping is torch's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
import torch
import transformers
from transformers import optimization
from transformers.trainer_pt_utils import get_parameter_names

from convert.names import parameters
from model.config import LlamaConfig
from model.errors import PunaError
from model.params import init_params
from model.sharding import make_mesh
from train.data import DataConfig
from train.optim import clip, decay_mask, global_norm, make_optimizer, make_schedule, rate_scales
from train.sections import Config, ModelConfig, OptimConfig
from train.state import abstract_state, shardings_of

STEPS, WARMUP = 40, 4


def reference(name: str, **specific) -> list[float]:
    """The rates that a transformers schedule gives to the first updates after the one of rate 0, and past the end."""
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([param], lr=0.5)
    schedule = transformers.get_scheduler(name, optimizer, WARMUP + 1, STEPS + 1, scheduler_specific_kwargs=specific)
    rates = []
    for _ in range(STEPS + 1):
        optimizer.step()
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    return rates


@pytest.mark.parametrize(
    ("ours", "theirs", "specific"),
    [
        ({"lr_scheduler_type": "constant"}, "constant_with_warmup", {}),
        ({"lr_scheduler_type": "linear"}, "linear", {}),
        ({"lr_scheduler_type": "cosine"}, "cosine", {}),
        ({"lr_scheduler_type": "cosine", "min_lr_ratio": 0.1}, "cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ({"lr_scheduler_type": "wsd", "decay_ratio": 0.25}, "warmup_stable_decay", {"num_decay_steps": 10}),
        (
            {"lr_scheduler_type": "wsd", "decay_ratio": 0.25, "min_lr_ratio": 0.1},
            "warmup_stable_decay",
            {"num_decay_steps": 10, "min_lr_ratio": 0.1},
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("warmup", [{"warmup_steps": WARMUP}, {"warmup_ratio": (WARMUP - 0.5) / STEPS}], ids=str)
def test_schedules_are_those_of_transformers(ours, theirs, specific, warmup):
    schedule = make_schedule(OptimConfig(learning_rate=0.5, **ours, **warmup), STEPS)
    rates = [float(schedule(jnp.int32(step))) for step in range(STEPS + 1)]
    assert rates[0] > 0
    np.testing.assert_allclose(rates, reference(theirs, **specific), rtol=1e-6, atol=1e-7)


def test_decay_follows_the_rule_of_transformers():
    sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = LlamaConfig(**sizes, attention_bias=True, mlp_bias=True)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, attention_bias=True, mlp_bias=True))
    forbidden = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    decayed = set(get_parameter_names(theirs, [torch.nn.LayerNorm], forbidden))

    mask = decay_mask(init_params(config, jax.random.key(0)))
    named = {name: value for name, value in mask.items() if name != "layers"}
    named |= {f"layers.0.{name}": value for name, value in mask["layers"].items()}
    assert {param.hf for param in parameters(config) if named[param.name]} == decayed


@pytest.mark.slow
def test_adafactor_is_that_of_transformers():
    shapes = {"layers": {"w": (3, 6, 4), "norm": (3, 6)}, "head": (6, 10)}
    keys = iter(jax.random.split(jax.random.key(0), 100))

    def draw() -> dict:
        return jax.tree.map(lambda s: jax.random.normal(next(keys), s), shapes, is_leaf=lambda s: isinstance(s, tuple))

    params = draw()
    theirs = [torch.nn.Parameter(torch.tensor(np.asarray(x))) for layer in range(3) for x in _layer(params, layer)]
    decays = [p for p in theirs if p.ndim > 1]
    groups = [{"params": decays}, {"params": [p for p in theirs if p.ndim == 1], "weight_decay": 0.0}]
    settings = dict(lr=0.01, weight_decay=0.1, scale_parameter=False, relative_step=False)
    reference = optimization.Adafactor(groups, **settings)
    ours = make_optimizer(OptimConfig(optimizer="adafactor", weight_decay=0.1))
    state, update = ours.init(params), jax.jit(ours.update)
    for _ in range(5):
        grads = draw()
        for layer in range(3):
            for param, grad in zip(theirs[3 * layer : 3 * layer + 3], _layer(grads, layer), strict=True):
                param.grad = None if layer and param.shape == (6, 10) else torch.tensor(np.asarray(grad))
        reference.step()
        updates, state = update(grads, state, params)
        params = jax.tree.map(lambda p, u: p - 0.01 * u, params, updates)
    for layer in range(3):
        for param, own in zip(theirs[3 * layer : 3 * layer + 3], _layer(params, layer), strict=True):
            if not (layer and param.shape == (6, 10)):
                np.testing.assert_allclose(own, param.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_muon_is_that_of_optax_matrix_by_matrix():
    """Theirs of layers that are not stacked, with AdamW for what is no matrix of a layer."""
    keys = iter(jax.random.split(jax.random.key(0), 100))
    shapes = {"layers": {"wide": (3, 6, 10), "tall": (3, 8, 4), "norm": (3, 6)}, "embed": (12, 6), "final_norm": (6,)}

    def draw() -> dict:
        return jax.tree.map(lambda s: jax.random.normal(next(keys), s), shapes, is_leaf=lambda s: isinstance(s, tuple))

    def unstacked(tree: dict) -> dict:
        layers = {f"{i}.{name}": x[i] for name, x in tree["layers"].items() for i in range(3)}
        return {**layers, "embed": tree["embed"], "final_norm": tree["final_norm"]}

    params = draw()
    apart = unstacked(params)
    matrices = {name: x.ndim == 2 and name != "embed" for name, x in apart.items()}
    axes = {name: optax.contrib.MuonDimensionNumbers() if is_one else None for name, is_one in matrices.items()}
    muon = optax.contrib.muon(
        0.01, beta=0.9, weight_decay=0.1, consistent_rms=0.2, muon_weight_dimension_numbers=axes
    )  # fmt: skip
    decays = {name: "norm" not in name for name in apart}
    adamw = optax.adamw(0.01, b2=0.95, weight_decay=0.1, mask=decays)  # theirs would be with Nesterov's momentum
    ours = make_optimizer(OptimConfig(optimizer="muon", weight_decay=0.1, muon_momentum=0.9, adam_beta2=0.95))
    state, update = ours.init(params), jax.jit(ours.update)
    their_states = {theirs: theirs.init(apart) for theirs in (muon, adamw)}
    for _ in range(4):
        grads = draw()
        updates, state = update(grads, state, params)
        moved = {}
        for theirs in (muon, adamw):
            moved[theirs], their_states[theirs] = theirs.update(unstacked(grads), their_states[theirs], apart)
        for name, x in unstacked(updates).items():
            expected = moved[muon if matrices[name] else adamw][name]
            np.testing.assert_allclose(-0.01 * x, expected, rtol=1e-4, atol=1e-6, err_msg=name)
        params = jax.tree.map(lambda p, u: p - 0.01 * u, params, updates)
        apart = unstacked(params)
    plain, tree = make_optimizer(OptimConfig(optimizer="muon")), draw()
    first = plain.update(tree, plain.init(tree), tree)[0]["layers"]["tall"][0]
    values = np.linalg.svd(np.asarray(first), compute_uv=False)
    assert np.all((values > 0.5 * 0.2 * 8**0.5) & (values < 1.3 * 0.2 * 8**0.5))  # nearly orthogonal


def test_muon_over_a_mesh_is_that_of_one_device():
    model = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    mesh = make_mesh(2, 2, 2)
    config = Config(ModelConfig(), DataConfig(path="x"), OptimConfig(optimizer="muon"))
    abstract = abstract_state(config, model, mesh)
    params, grads = (init_params(model, jax.random.key(seed)) for seed in (0, 1))
    muon = make_optimizer(config.optim)
    alone = jax.jit(muon.update)(grads, muon.init(params), params)
    places = shardings_of(abstract.params), shardings_of(abstract.opt_state)
    held = jax.device_put(muon.init(params), places[1])
    sharded = jax.jit(muon.update, out_shardings=places)(
        jax.device_put(grads, places[0]), held, jax.device_put(params, places[0])
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), sharded, alone)
    assert sharded[0]["layers"]["wq"].sharding == abstract.params["layers"]["wq"].sharding


def test_a_pattern_scales_the_rate_of_the_modules_that_it_ends():
    model = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2)
    params = init_params(model, jax.random.key(0))
    optim = OptimConfig(learning_rate_pattern={r"layers\.1\..*": 0.0, "[qk]_proj": 0.5, "lm_head": 2.0})
    scales = rate_scales(optim, model, params)
    assert jax.tree.structure(scales) == jax.tree.structure(params)
    assert scales["lm_head"] == 2.0 and scales["embed"] == scales["final_norm"] == 1.0
    assert scales["layers"]["wq"].reshape(-1).tolist() == [0.5, 0.0, 0.5]
    assert scales["layers"]["mlp_norm"].shape == (3, 1) and scales["layers"]["wo"].reshape(-1).tolist() == [1, 0, 1]
    assert rate_scales(OptimConfig(), model, params) is None
    for pattern, named in (
        ("q_porj", "'q_porj' matches no module that is trained"),
        ("(", r"optim.learning_rate_pattern: '\(' is no"),
    ):
        with pytest.raises(PunaError, match=named):
            rate_scales(OptimConfig(learning_rate_pattern={pattern: 2.0}), model, params)


def _layer(tree: dict, layer: int) -> list:
    return [tree["layers"]["w"][layer], tree["layers"]["norm"][layer], tree["head"]]


@pytest.mark.parametrize("most", [0.5, 100.0])
def test_clipping_is_that_of_torch(most):
    grads = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.array([-2.0])}
    theirs = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(1))]
    for param, grad in zip(theirs, grads.values(), strict=True):
        param.grad = torch.tensor(np.asarray(grad))
    norm = torch.nn.utils.clip_grad_norm_(theirs, most)
    np.testing.assert_allclose(global_norm(grads), norm.item(), rtol=1e-6)
    for ours, param in zip(clip(grads, global_norm(grads), most).values(), theirs, strict=True):
        np.testing.assert_allclose(ours, param.grad.numpy(), rtol=1e-6)
    assert clip(grads, global_norm(grads), 0.0) is grads


def gives_three(optim, schedule):
    return 3


@pytest.mark.parametrize(
    "name, word", [("optax:sgd", "cannot be called with"), ("test_optim:gives_three", "returns int")]
)
def test_an_optimizer_that_is_none_is_named(name, word):
    with pytest.raises(PunaError, match=f'optim.optimizer is "{name}", which {word}'):
        make_optimizer(OptimConfig(optimizer=name))
