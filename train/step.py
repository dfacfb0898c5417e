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
from flax import struct
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from model import cpu, lora
from model.attention import ATTENTIONS
from model.config import LlamaConfig
from model.errors import PunaError
from model.llama import SPLIT_SEQUENCE, block_of, hidden
from model.params import Params
from model.pieces import load_function
from model.sharding import named_sharding
from train.adapt import abstract_parts, join
from train.config import Config
from train.loss import IGNORE_INDEX, make_loss
from train.optim import Schedule, clip, global_norm, make_optimizer

Batch = Mapping[str, Array]
Metrics = Mapping[str, Array]
BATCH_KEYS = ("tokens", "labels", "segments")


@struct.dataclass
class TrainState:
    """What a run is at a step: `params` are trained; `frozen` (the base under adapters) is not, nor is it saved.

    step: int32, updates so far and the index of the next batch. skipped: int32, non-finite updates in a row.
    seed: uint32, from which the step makes its own randomness (dropout).
    """

    step: Any
    params: Any
    opt_state: Any
    skipped: Any
    seed: Any
    frozen: Any = None


def make_objective(config: Config, model: LlamaConfig, mesh: Mesh) -> Callable[[Params, Batch], Array]:
    """`objective(params, batch)` -> float32 sum of the losses of the batch's trained tokens, with the pieces that
    [model] names in their places."""
    wanted = config.model
    keywords: dict[str, Any] = {}  # how the block computes, not what: no part of the model
    if wanted.attention == "cudnn" and (platform := mesh.devices.flat[0].platform) == cpu.PLATFORM:
        raise PunaError(f"model.attention 'cudnn' needs an NVIDIA GPU, not {platform}; choose 'xla'")
    if wanted.attention in ATTENTIONS and wanted.attention != "xla":
        keywords["attend"] = ATTENTIONS[wanted.attention]
    if config.mesh.sequence_parallel:
        keywords["residual"] = SPLIT_SEQUENCE
    block = block_of(model, **keywords)
    if wanted.loss:
        loss = load_function(wanted.loss, "model.loss")
    else:
        loss = make_loss(mesh, wanted.loss_chunk, config.optim.z_loss)

    def objective(params: Params, batch: Batch) -> Array:
        x, _ = hidden(
            params,
            batch["tokens"],
            model,
            segments=batch["segments"],  # positions follow from them: they restart at each segment
            dtype=wanted.dtype,
            block=block,
            remat=wanted.remat,
        )
        head = params["embed"].T if model.tie_word_embeddings else params["lm_head"]
        return loss(x, head, batch["labels"])

    return objective


def make_step(
    config: Config, model: LlamaConfig, mesh: Mesh, schedule: Schedule, shardings: TrainState
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted `step(state, batch) -> (state, metrics)`; the state is donated.

    A step whose loss or gradient norm is not finite leaves parameters and optimizer as they were and counts itself in
    `skipped`. Metrics: loss (mean over trained tokens), grad_norm (before clipping), learning_rate, num_tokens (not
    padding), trained_tokens, skipped.
    """
    objective, optimizer = make_objective(config, model, mesh), make_optimizer(config.optim)
    on_device = jax.tree.map(lambda s: s.with_memory_kind("device"), shardings.opt_state)
    offload = config.optim.offload

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        opt_state = jax.device_put(state.opt_state, on_device) if offload else state.opt_state
        trained_tokens = jnp.sum(batch["labels"] != IGNORE_INDEX)
        key = jax.random.fold_in(jax.random.key(state.seed), state.step)

        def microbatch(trained: Params, rows: Batch, key: Array) -> Array:
            return objective(join(trained, state.frozen, key), rows)

        total, sums = accumulate(microbatch, state.params, batch, key, config.run.gradient_accumulation_steps)
        per_token = 1 / jnp.maximum(trained_tokens, 1)
        loss = total * per_token
        grads = jax.tree.map(lambda g, p: (g * per_token).astype(p.dtype), sums, state.params)
        norm = global_norm(grads)
        rate = schedule(state.step)
        grads = clip(grads, norm, config.optim.max_grad_norm)
        updates, new_opt_state = optimizer.update(grads, opt_state, state.params)
        params = jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), state.params, updates)

        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        keep = partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
        skipped = jnp.where(finite, 0, state.skipped + 1)
        metrics = {
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": norm,
            "num_tokens": jnp.sum(batch["segments"] != 0),
            "trained_tokens": trained_tokens,
            "skipped": skipped,
        }
        new = replace(
            state,
            step=state.step + 1,
            params=keep(params, state.params),
            opt_state=keep(new_opt_state, opt_state),
            skipped=skipped,
        )
        return new, metrics

    options = cpu.COMPILER_OPTIONS if mesh.devices.flat[0].platform == cpu.PLATFORM else None
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, shardings.step), compiler_options=options)


def make_evaluation(
    config: Config, model: LlamaConfig, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[Array, Array]]:
    """The jitted `evaluate(state, batch)` -> sum of the losses of the trained tokens, and how many there are."""
    objective = make_objective(config, model, mesh)

    def evaluate(state: TrainState, batch: Batch) -> tuple[Array, Array]:
        params = state.params if state.frozen is None else lora.join(state.params, state.frozen)
        return objective(params, batch), jnp.sum(batch["labels"] != IGNORE_INDEX)

    return jax.jit(evaluate, out_shardings=NamedSharding(mesh, PartitionSpec()))


def accumulate(
    objective: Callable[[Params, Batch, Array], Array], params: Params, batch: Batch, key: Array, count: int
) -> tuple[Array, Params]:
    """The sum over `count` microbatches of `objective(params, rows, key)`, and its gradients, summed in float32.

    Microbatch i takes every count-th row from i on, so that no row leaves its device, and a key of its own.
    """
    gradients = jax.value_and_grad(objective)
    if count == 1:
        return gradients(params, batch, key)

    def cut(x: Array) -> Array:
        return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)

    def add(sums: Any, each: tuple[Batch, Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, gradients(params, *each)), None

    zeros = jnp.zeros(()), jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
    return jax.lax.scan(add, zeros, (jax.tree.map(cut, dict(batch)), jax.random.split(key, count)))[0]


def abstract_state(config: Config, model: LlamaConfig, mesh: Mesh) -> TrainState:
    """The state as shapes, dtypes and shardings, without memory: what is born, restored and planned."""
    return state_of(config, *abstract_parts(config, model, mesh), mesh)


def state_of(config: Config, params: Any, frozen: Any, mesh: Mesh) -> TrainState:
    """The abstract state of a run that trains `params` (arrays or their shapes) beside `frozen`."""
    params, frozen = jax.tree.map(_abstract, (params, frozen))
    opt_state = jax.eval_shape(make_optimizer(config.optim).init, params)
    kind = _offload_kind(mesh) if config.optim.offload else None
    scalar = NamedSharding(mesh, PartitionSpec())

    def number(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((), dtype, sharding=scalar)

    return TrainState(
        step=number(jnp.int32),
        params=params,
        opt_state=_like_params(opt_state, params, mesh, kind),
        skipped=number(jnp.int32),
        seed=number(jnp.uint32),
        frozen=frozen,
    )


def init_state(config: Config, abstract: TrainState, params: Any, frozen: Any = None) -> TrainState:
    """Step 0 of a run that trains `params` beside `frozen`; the optimizer state is born as `abstract` lays it out."""
    shardings = shardings_of(abstract)
    opt_state = jax.jit(make_optimizer(config.optim).init, out_shardings=shardings.opt_state)(params)
    numbers = jnp.int32(0), jnp.int32(0), jnp.uint32(config.run.seed)
    step, skipped, seed = jax.device_put(numbers, (shardings.step, shardings.skipped, shardings.seed))
    return TrainState(step=step, params=params, opt_state=opt_state, skipped=skipped, seed=seed, frozen=frozen)


def shardings_of(tree: Any) -> Any:
    """The sharding of every array of a tree."""
    return jax.tree.map(lambda x: x.sharding, tree)


def abstract_batch(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and shardings of one batch. Raises PunaError where its microbatches do not divide over the mesh."""
    run = config.run
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if run.batch_size // run.gradient_accumulation_steps % ways:
        raise PunaError(
            f"run.batch_size {run.batch_size} in {run.gradient_accumulation_steps} microbatches "
            f"(run.gradient_accumulation_steps) does not divide over {ways} devices (mesh data x fsdp)"
        )
    shape = (run.batch_size, config.data.max_length)
    sharding = named_sharding(mesh, ("batch", None), shape, "batch")
    return {key: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding) for key in BATCH_KEYS}


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _like_params(opt_state: Any, params: Any, mesh: Mesh, kind: str | None) -> Any:
    """Lays out every array of the optimizer state as the parameter of its name and shape; the others are replicated."""
    known = {_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}

    def lay(path: Any, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        own = known.get(_name(path))
        sharding = own.sharding if own is not None and own.shape == x.shape else NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.with_memory_kind(kind) if kind else sharding)

    return jax.tree_util.tree_map_with_path(lay, opt_state)


def _name(path: Any) -> tuple[Any, ...]:
    """A leaf's dict keys and whatever follows the last of them, which is the same in parameters and in their state."""
    keys = [i for i, entry in enumerate(path) if isinstance(entry, jax.tree_util.DictKey)]
    last = keys[-1] + 1 if keys else len(path)
    return *(path[i] for i in keys), *path[last:]


def _offload_kind(mesh: Mesh) -> str:
    """The memory kind of the host. Raises PunaError on devices that cannot keep a step's arguments there."""
    device = mesh.devices.flat[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if "pinned_host" not in kinds:
        raise PunaError(f"optim.offload: {device.device_kind} has no pinned_host memory; set it to false")
    return "pinned_host"
