"""What turns gradients into updates: optax transformations, a schedule, and the mask of what decays.

The transformations here leave out the learning rate: the step multiplies by `schedule(step)`, so that the rate is a
function of the step alone and a resumed run, or one with another number of steps, needs nothing restored for it.
optim.optimizer = "module:function" names one that owns its rate, as optax's own do.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax import Array

from convert.names import parameters
from model.config import LlamaConfig
from model.errors import PunaError
from model.lora import check_pattern, module_value
from model.pieces import load_function
from train.sections import OptimConfig

Schedule = Callable[[Array], Array]
MUON_RMS = 0.2  # of an update of AdamW, about (arXiv:2502.16982)


def make_schedule(optim: OptimConfig, total_steps: int) -> Schedule:
    """The learning rate at every step of `total_steps`.

    After a linear warmup the rate is constant, falls linearly or as half a cosine to `min_lr_ratio` at the end, or
    (wsd, arXiv:2404.06395) stays and falls as half a cosine over the last `decay_ratio` of the steps. It is that of
    transformers' `get_*_schedule` of the same name with one more step of warmup, whose first, of rate 0, is left out.

    Returns:
        A function from a step, counted from 0 (the first update), to its rate, float32.
    """
    warmup = optim.warmup_steps or math.ceil(total_steps * optim.warmup_ratio)
    decay = max(1, math.ceil(total_steps * optim.decay_ratio))
    start = {"wsd": max(warmup, total_steps - decay)}.get(optim.lr_scheduler_type, warmup)
    shapes: dict[str, Callable[[Array], Array]] = {
        "constant": jnp.ones_like,
        "linear": lambda x: 1 - x,
        "cosine": lambda x: 0.5 * (1 + jnp.cos(jnp.pi * x)),
        "wsd": lambda x: 0.5 * (1 + jnp.cos(jnp.pi * x)),
    }
    shape, low = shapes[optim.lr_scheduler_type], optim.min_lr_ratio

    def schedule(step: Array) -> Array:
        at = jnp.asarray(step, jnp.float32)
        rising = (at + 1) / (warmup + 1)
        if optim.lr_scheduler_type == "wsd":
            rising = rising * (1 - low) + low
        done = jnp.clip((at - start) / max(1, total_steps - start), 0, 1)
        after = shape(done) * (1 - low) + low
        return optim.learning_rate * jnp.where(at < warmup, rising, after)

    return schedule


def decay_mask(params: Any) -> Any:
    """True where weight decay applies: transformers' rule, every weight but norms and biases, told by name.

    Adapters (`LoraArray` leaves and their parts) live under their weight's name and decay as it does.

    Returns:
        A tree like `params` with a bool for each array.
    """

    def decays(path: Any, leaf: Any) -> bool:
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        return not (names[-1].endswith("norm") or names[-1].startswith("b"))

    return jax.tree_util.tree_map_with_path(decays, params)


def owns_learning_rate(optim: OptimConfig) -> bool:
    """Whether the optimizer is a function of the user's, whose updates are added to the parameters as they are."""
    return ":" in optim.optimizer


def make_optimizer(
    optim: OptimConfig, schedule: Schedule | None = None, scales: Any = None
) -> optax.GradientTransformation:
    """The optimizer that [optim] names.

    adamw (arXiv:1711.05101), muon (see `scale_by_muon`) over the matrices of the layers with AdamW for the rest, or
    adafactor (arXiv:1804.04235) as transformers sets it up for a given rate: no relative step, no scaling by the
    parameter, no momentum; all without the learning rate. "module:function" is called with `optim` and `schedule`, and
    returns a transformation whose updates are added to the parameters, as optax's are.

    Args:
        optim: the settings.
        schedule: the learning rate at every step; None, where only the state's shapes matter, for a constant one.
        scales: what AdamW's updates are multiplied by, a tree of numbers like the parameters; None for 1.

    Raises:
        PunaError: there is no such function, or it gives no optax transformation.
    """
    if owns_learning_rate(optim):
        make = load_function(optim.optimizer, "optim.optimizer")
        try:
            made = make(optim, schedule or (lambda step: jnp.asarray(optim.learning_rate)))
        except TypeError as error:  # as of optax's own functions, which take a rate and not the settings
            raise PunaError(
                f'optim.optimizer is "{optim.optimizer}", which cannot be called with (optim, schedule): {error}; '
                "write a function of these two that returns an optax transformation"
            ) from error
        if not isinstance(made, optax.GradientTransformation):
            raise PunaError(
                f'optim.optimizer is "{optim.optimizer}", which returns {type(made).__name__}: return an optax '
                "transformation"
            )
        return made
    if optim.optimizer == "adafactor":
        scale = per_layer(
            optax.chain(
                optax.scale_by_factored_rms(min_dim_size_to_factor=1, decay_rate=0.8, epsilon=1e-30),
                optax.clip_by_block_rms(1.0),
            )
        )
    else:
        scale = optax.scale_by_adam(optim.adam_beta1, optim.adam_beta2, optim.adam_epsilon)
        scale = scale if scales is None else _multiplied(scale, scales)
        if optim.optimizer == "muon":
            scale = optax.chain(
                optax.masked(scale_by_muon(optim.muon_momentum), _matrices), optax.masked(scale, _others)
            )
    return optax.chain(scale, optax.add_decayed_weights(optim.weight_decay, mask=decay_mask))


def _multiplied(transformation: optax.GradientTransformation, scales: Any) -> optax.GradientTransformation:
    """A transformation whose updates are multiplied by a tree of numbers, with the same state."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        updates, state = transformation.update(updates, state, params)
        return jax.tree.map(lambda u, by: (u * by).astype(u.dtype), updates, scales), state

    return optax.GradientTransformation(transformation.init, update)


def scale_by_muon(momentum: float) -> optax.GradientTransformation:
    """Muon, as optax has it, of matrices [L, in, out]: each layer's update is made orthogonal.

    It is scaled to the root mean square that AdamW's updates have, so that both share a learning rate and a weight
    decay (arXiv:2502.16982).

    Args:
        momentum: how much of the mean of gradients stays at a step.
    """
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    inner = optax.contrib.scale_by_muon(
        beta=momentum, weight_dimension_numbers=lambda tree: jax.tree.map(lambda x: axes, tree)
    )

    def init(params: Any) -> Any:
        state: Any = inner.init(params)
        return state._replace(ns_coeffs=())  # constants: no part of what is saved

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        constants: Any = inner.init({})
        updates, state = inner.update(updates, state._replace(ns_coeffs=constants.ns_coeffs), params)
        updates = jax.tree.map(lambda u: MUON_RMS * math.sqrt(max(u.shape[1:])) * u, updates)
        return updates, state._replace(ns_coeffs=())

    return optax.GradientTransformation(init, update)


def _matrices(params: Any) -> Any:
    """True for the matrices of the layers, which Muon is for; not for the embedding, the head, norms and biases."""

    def is_matrix(path: Any, leaf: Any) -> bool:
        return path[0].key == "layers" and leaf.ndim == 3

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def _others(params: Any) -> Any:
    return jax.tree.map(lambda is_matrix: not is_matrix, _matrices(params))


def rate_scales(optim: OptimConfig, model: LlamaConfig, params: Any) -> Any:
    """What optim.learning_rate_pattern multiplies the learning rate of each weight by.

    Args:
        optim: the settings.
        model: whose weights they are.
        params: the tree that is trained.

    Returns:
        A tree like `params` of numbers, [L, 1, ...] for layers; None where all of them are 1.

    Raises:
        PunaError: a pattern is no regular expression, or matches no weight that is trained.
    """
    if not (patterns := optim.learning_rate_pattern):
        return None
    for pattern in patterns:
        check_pattern(pattern, "optim.learning_rate_pattern")
    modules = {each.name: each.hf.removesuffix(".weight").removesuffix(".bias") for each in parameters(model)}
    matched: set[str] = set()

    def scale(name: str) -> float:
        module = modules[name]
        matched.update(pattern for pattern in patterns if module_value({pattern: True}, module, False))
        return module_value(patterns, module, 1.0)

    def each(path: Any, leaf: Any) -> Any:
        if path[0].key != "layers":
            return scale(path[0].key)
        values = [scale(f"layers.{layer}.{path[1].key}") for layer in range(leaf.shape[0])]
        return np.array(values, np.float32).reshape(-1, *[1] * (leaf.ndim - 1))

    scales = jax.tree_util.tree_map_with_path(each, params)
    if unmatched := [pattern for pattern in patterns if pattern not in matched]:
        raise PunaError(
            f"optim.learning_rate_pattern {unmatched[0]!r} matches no module that is trained; modules are named as "
            "model.layers.0.self_attn.q_proj"
        )
    return scales


def per_layer(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """Lets a transformation that looks at whole tensors see one layer at a time, though layers are stacked.

    Returns:
        A transformation whose state is the layers' (with a leading axis L throughout), under the parameters' own key
        "layers", and the rest's.
    """

    def divide(tree: Any) -> tuple[Any, Any]:
        return tree["layers"], {name: value for name, value in tree.items() if name != "layers"}

    def join(layers: Any, rest: Any) -> Any:
        return {**rest, "layers": layers}

    def init(params: Any) -> Any:
        layers, rest = divide(params)
        return {"layers": jax.vmap(transformation.init)(layers)}, transformation.init(rest)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        (layers, rest), (p_layers, p_rest) = divide(updates), divide(params)
        layers, layers_state = jax.vmap(transformation.update)(layers, state[0]["layers"], p_layers)
        rest, rest_state = transformation.update(rest, state[1], p_rest)
        return join(layers, rest), ({"layers": layers_state}, rest_state)

    return optax.GradientTransformation(init, update)


def global_norm(tree: Any) -> Array:
    """The Euclidean norm of all leaves together, in float32: optax's would square 16-bit gradients in their dtype."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))


def may_overflow(optim: OptimConfig) -> bool:
    """Whether finite gradients and finite parameters can become parameters that are not.

    Adam's update is at most its mean gradient divided by epsilon, and gradients whose norm is finite in float32 are
    below 1.9e19. So with usual settings they cannot, and the step need not read every new parameter once more.
    """
    usual = optim.optimizer == "adamw" and optim.adam_epsilon >= 1e-15 and not optim.learning_rate_pattern
    return not (usual and optim.learning_rate <= 1 and optim.learning_rate * optim.weight_decay <= 1)


def stays_finite(new: Any, old: Any) -> Array:
    """Whether every number of every leaf that was finite still is: bool []."""
    same = jax.tree.map(lambda after, before: jnp.all(jnp.isfinite(after) | ~jnp.isfinite(before)), new, old)
    return jnp.stack(jax.tree.leaves(same)).all()


def clip(grads: Any, norm: Array, max_norm: float) -> Any:
    """Gradients scaled so that their global norm is at most `max_norm`. The 1e-6 is torch's `clip_grad_norm_`.

    Args:
        grads: the tree of gradients.
        norm: its global norm, float32.
        max_norm: 0 leaves the gradients as they are.
    """
    if not max_norm:
        return grads
    factor = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda g: (g * factor).astype(g.dtype), grads)
