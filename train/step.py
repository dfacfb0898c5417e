"""One training step, the same on one device and on thousands: gradients of a sum, divided once by the tokens trained.

A batch is a dict of int32 [B, T] arrays (tokens, labels, segments). It is cut into microbatches whose losses are
*summed*; one division by the number of trained tokens in the whole batch makes accumulation, data parallelism and one
big batch the same thing, token for token.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from model import cpu
from model.config import LlamaConfig
from model.params import Params
from train import master
from train.data.encode import IGNORE_INDEX
from train.mup import update_scales
from train.objective import Batch, make_objective
from train.optim import (
    Schedule,
    clip,
    global_norm,
    make_optimizer,
    may_overflow,
    owns_learning_rate,
    rate_scales,
    stays_finite,
)
from train.sections import Config, OptimConfig
from train.state import TrainState, join

Metrics = Mapping[str, Array]


def make_step(
    config: Config,
    model: LlamaConfig,
    mesh: Mesh,
    schedule: Schedule,
    shardings: TrainState,
    row_segments: int | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted training step; the state that it is given is donated.

    A step whose loss, gradient norm or new parameters are not finite leaves parameters and optimizer as they were and
    counts itself in `skipped`.

    Args:
        config: how to train.
        model: what is trained.
        mesh: where.
        schedule: the learning rate at a step, from 0.
        shardings: those of the state, before and after.
        row_segments: as in `make_objective`.

    Returns:
        `step(state, batch) -> (state, metrics)` for a batch [B, T]. Metrics are scalars: loss (mean over trained
        tokens, or over preferences), grad_norm (before clipping), learning_rate, num_tokens (not padding),
        trained_tokens, skipped, and the means of what else the objective knows.

    Raises:
        PunaError: a function that the config names is not there, or see `make_objective`.
    """
    advance = make_advance(config, model, mesh, schedule, shardings, row_segments)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return advance(state, batch)[:2]

    options = cpu.COMPILER_OPTIONS if mesh.devices.flat[0].platform == cpu.PLATFORM else None
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, shardings.step), compiler_options=options)


def make_advance(
    config: Config,
    model: LlamaConfig,
    mesh: Mesh,
    schedule: Schedule,
    shardings: TrainState,
    row_segments: int | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics, Params]]:
    """What `make_step` compiles, which returns the gradients before clipping too. See there."""
    objective = make_objective(config, model, mesh, row_segments)
    optimizer = make_optimizer(config.optim, schedule, update_scales(config.model, model))
    on_device = jax.tree.map(lambda s: s.with_memory_kind("device"), shardings.opt_state)
    offload = config.optim.offload

    def advance(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics, Params]:
        opt_state = jax.device_put(state.opt_state, on_device) if offload else state.opt_state
        trained_tokens = jnp.sum(batch["labels"] != IGNORE_INDEX)
        key = jax.random.fold_in(jax.random.key(state.seed), state.step)

        def microbatch(trained: Params, rows: Batch, key: Array) -> tuple[Array, Metrics]:
            return objective.loss(join(trained, state.frozen, key), rows, batch, state.teacher)

        (total, known), sums = accumulate(microbatch, state.params, batch, key, config.run.gradient_accumulation_steps)
        per_unit = 1 / jnp.maximum(objective.units(batch), 1)
        loss = total * per_unit
        grads = jax.tree.map(lambda g, p: (g * per_unit).astype(p.dtype), sums, state.params)
        norm = global_norm(grads)
        rate = schedule(state.step)
        clipped = clip(grads, norm, config.optim.max_grad_norm)
        move = partial(moved, config.optim, model, optimizer, rate)
        params, new_opt_state = master.updated(config.optim.master, move, clipped, opt_state, state.params, key)

        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        if may_overflow(config.optim):
            finite &= stays_finite(params, state.params)
        keep = partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
        skipped = jnp.where(finite, 0, state.skipped + 1)
        metrics = {
            "loss": loss,
            **{name: value * per_unit for name, value in known.items()},
            "learning_rate": rate,
            "grad_norm": norm,
            "num_tokens": jnp.sum(batch["segments"] != 0),
            "trained_tokens": trained_tokens,
            "skipped": skipped,
        }
        kept = keep(params, state.params)
        new = replace(
            state,
            step=state.step + 1,
            params=kept,
            opt_state=keep(new_opt_state, opt_state),
            skipped=skipped,
            ema=None if state.ema is None else averaged(state.ema, kept, config.run.ema),
        )
        return new, metrics, grads

    return advance


def moved(
    optim: OptimConfig,
    model: LlamaConfig,
    optimizer: optax.GradientTransformation,
    rate: Array,
    grads: Params,
    opt_state: Any,
    params: Params,
) -> tuple[Params, Any]:
    """The parameters and the optimizer's state after an update, not yet rounded to a parameter's dtype."""
    updates, new = optimizer.update(grads, opt_state, params)
    if owns_learning_rate(optim):
        applied: Any = optax.apply_updates(params, updates)
        return applied, new
    if (scales := rate_scales(optim, model, params)) is not None:
        updates = jax.tree.map(jnp.multiply, updates, scales)
    return jax.tree.map(lambda p, u: p - rate * u, params, updates), new


def averaged(ema: Params, params: Params, decay: float) -> Params:
    """The exponential moving average of parameters after one more step; float32."""
    return jax.tree.map(lambda mean, p: decay * mean + (1 - decay) * p.astype(jnp.float32), ema, params)


def make_evaluation(
    config: Config, model: LlamaConfig, mesh: Mesh, row_segments: int | None = None
) -> Callable[[TrainState, Batch], tuple[Metrics, Array]]:
    """The jitted `evaluate(state, batch)` for a batch [B, T]: without dropout, and the state is not donated.

    Args:
        config: how to compute.
        model: what is evaluated.
        mesh: where.
        row_segments: as in `make_objective`.

    Returns:
        A function that gives sums over the batch's trained tokens, or preferences, by name: "loss", float32, and what
        else the objective knows; and their number, int32.

    Raises:
        PunaError: see `make_objective`.
    """
    objective = make_objective(config, model, mesh, row_segments)

    def evaluate(state: TrainState, batch: Batch) -> tuple[Metrics, Array]:
        total, known = objective.loss(join(state.params, state.frozen), batch, batch, state.teacher)
        return {"loss": total, **known}, objective.units(batch)

    return jax.jit(evaluate, out_shardings=NamedSharding(mesh, PartitionSpec()))


def accumulate(
    objective: Callable[[Params, Batch, Array], tuple[Array, Metrics]],
    params: Params,
    batch: Batch,
    key: Array,
    count: int,
) -> tuple[tuple[Array, Metrics], Params]:
    """The sums of an objective over microbatches, and the gradient of the first of them.

    Microbatch i takes every count-th row from i on, so that no row leaves its device, and a key of its own.

    Args:
        objective: `objective(params, rows, key)` -> a float32 scalar, and others by name.
        params: the tree to differentiate for.
        batch: arrays [B, T]; B is divisible by `count`.
        key: what the microbatches' keys are split from.
        count: the number of microbatches.

    Returns:
        The sums, and gradients like `params`: added in float32, or as they come where there is one microbatch.
    """
    gradients = jax.value_and_grad(objective, has_aux=True)
    if count == 1:
        return gradients(params, batch, key)

    def add(sums: Any, each: tuple[Batch, Array]) -> tuple[Any, Metrics]:
        (loss, known), grads = gradients(params, *each)
        return jax.tree.map(jnp.add, sums, (loss, grads)), known

    zeros = jnp.zeros(()), jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
    (loss, grads), known = jax.lax.scan(add, zeros, (microbatches(batch, count), jax.random.split(key, count)))
    return (loss, {name: values.sum() for name, values in known.items()}), grads


def microbatches(batch: Batch, count: int) -> Batch:
    """Arrays [B, ...] as [count, B / count, ...]: each every count-th row, so that no row leaves its device."""

    def cut(x: Array) -> Array:
        return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(cut, dict(batch))
