"""Schedules, decay and Adafactor are transformers'; clipping is torch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers import optimization
from transformers.trainer_pt_utils import get_parameter_names

from convert.names import parameters
from model.config import LlamaConfig
from model.errors import PunaError
from model.params import init_params
from train.config import OptimConfig
from train.optim import clip, decay_mask, global_norm, make_optimizer, make_schedule

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
