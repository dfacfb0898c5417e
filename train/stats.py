"""What a step does to each layer: norms of activations, of gradients and of updates, beside the step and not within it.

The program of the step is the same with them and without, so the numbers of a run do not depend on who looks.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from model import cpu
from model.capture import captured
from model.config import LlamaConfig
from model.params import Params
from model.taps import shows_parts
from train.attention import laid_out
from train.objective import Batch, as_computed, make_block
from train.optim import Schedule
from train.sections import Config
from train.state import TrainState, join
from train.step import make_advance, microbatches

KINDS = {"activation_rms": "activations", "gradient_norm": "gradients", "update_norm": "updates"}


def make_stats(
    config: Config, model: LlamaConfig, mesh: Mesh, schedule: Schedule, shardings: TrainState
) -> Callable[[TrainState, Batch], Mapping[str, Array]]:
    """The jitted `stats(state, batch)`: what the step that comes next does, without doing it; the state stays.

    Args:
        config: how to train.
        model: what is trained.
        mesh: where.
        schedule: the learning rate at a step, from 0.
        shardings: those of the state.

    Returns:
        A function that gives float32 scalars by name. "activation_rms/layers.3" is the root mean square of the residual
        stream behind layer 3 over the tokens of the batch, "activation_rms/layers.3.mlp" that of what its MLP adds, and
        so of its attention, the embedding and the final norm. "gradient_norm/layers.3" is the norm of all gradients of
        that layer's weights, before clipping, "update_norm/layers.3" that of what is added to them.

    Raises:
        PunaError: see `make_step`.
    """
    advance = make_advance(config, model, mesh, schedule, shardings)
    block = make_block(config, model, mesh)
    parts = ("", ".attention", ".mlp") if shows_parts(block) else ("",)
    names = ("embed", *(f"layers.*{part}" for part in parts), "final_norm")
    count = config.run.gradient_accumulation_steps

    def squares(params: Params, rows: Batch) -> dict[str, Array]:
        """Sums over the tokens of a microbatch, [L] of layers."""
        rows = laid_out(rows, mesh)
        is_there = rows["segments"] != 0

        def total(x: Array) -> Array:
            return jnp.sum(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1), where=is_there)

        dtype = config.model.dtype
        keywords: dict[str, Any] = {"segments": rows["segments"], "positions": rows.get("positions")}
        keywords |= {"dtype": dtype, "block": block}
        return captured(params, rows["tokens"], model, names, total, **keywords)[2]

    def stats(state: TrainState, batch: Batch) -> Mapping[str, Array]:
        new, _, grads = advance(state, batch)
        changes = jax.tree.map(lambda a, b: a.astype(jnp.float32) - b.astype(jnp.float32), new.params, state.params)
        params = as_computed(config, join(state.params, state.frozen))
        _, sums = jax.lax.scan(lambda _, rows: (None, squares(params, rows)), None, microbatches(batch, count))
        tokens = jnp.maximum(1, jnp.sum(batch["segments"] != 0))
        found: dict[str, Array] = {}
        for name, each in sums.items():
            found |= _by_layer("activation_rms", name, jnp.sqrt(each.sum(axis=0) / tokens))
        return {**found, **_norms("gradient_norm", grads), **_norms("update_norm", changes)}

    options = cpu.COMPILER_OPTIONS if mesh.devices.flat[0].platform == cpu.PLATFORM else None
    return jax.jit(stats, out_shardings=shardings.step, compiler_options=options)


def _by_layer(kind: str, name: str, values: Array) -> dict[str, Array]:
    """A scalar under its name, or those of all layers under theirs."""
    if not values.ndim:
        return {f"{kind}/{name}": values}
    return {f"{kind}/{name.replace('*', str(layer))}": value for layer, value in enumerate(values)}


def _norms(kind: str, tree: Params) -> dict[str, Array]:
    """The norms of trees like parameters, each layer's of all its arrays."""
    found: dict[str, Array] = {}
    for name, part in tree.items():
        arrays = [x.astype(jnp.float32) for x in jax.tree.leaves(part)]
        axes = [tuple(range(1, x.ndim)) if name == "layers" else None for x in arrays]
        if arrays:
            total = sum(jnp.sum(jnp.square(x), axis=axis) for x, axis in zip(arrays, axes, strict=True))
            found |= _by_layer(kind, "layers.*" if name == "layers" else name, jnp.sqrt(total))
    return found
