"""The state of a run: one function makes it, for real, as shapes for the planner, and as shardings.

Without [lora] everything trains and nothing is frozen; with it, the adapters train and the base is frozen, quantized
where [quantize] says so.
"""

from dataclasses import asdict, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from convert.adapters import apply_adapters
from convert.checkpoint import Checkpoint
from convert.load import load_params
from convert.source import Source, find_source
from model import lora
from model.config import LlamaConfig
from model.errors import PunaError
from model.layout import tree_shardings
from model.params import LINEARS, Params, abstract_params, init_params
from model.quantize import quantizer
from model.sharding import named_sharding
from train import master
from train.mup import scaled_start
from train.objective import BATCH_KEYS, reads_reference
from train.optim import make_optimizer
from train.preference import most_segments
from train.sections import Config, QuantizeConfig


@struct.dataclass
class TrainState:
    """What a run is at a step.

    Attributes:
        step: int32, updates so far and the index of the next batch.
        params: what is trained.
        opt_state: the optimizer's, as optax makes it over `params`.
        skipped: int32, non-finite updates in a row.
        seed: uint32, from which the step makes its own randomness (dropout).
        frozen: the base under adapters, which is neither trained nor saved; None without [lora].
        teacher: the parameters of [distill]'s model, which are not saved either; None without it.
        ema: float32, the exponential moving average of `params`, with run.ema; else None.
    """

    step: Any
    params: Any
    opt_state: Any
    skipped: Any
    seed: Any
    frozen: Any = None
    teacher: Any = None
    ema: Any = None


# --- the parameters that a run starts from


def base_params(config: Config, model: LlamaConfig, mesh: Mesh, base: Source | None) -> Params:
    """The parameters that a run starts from, read or born shard by shard, quantized as [quantize] says.

    Args:
        config: the run's.
        model: the shape of fresh weights.
        mesh: the devices to make them on.
        base: the model to read, with its adapter; None for fresh weights of run.seed.

    Raises:
        PunaError: naming what is wrong with the checkpoint's files, or a size that does not divide over the mesh.
    """
    dtype = config.model.param_dtype
    if base is None:
        fresh = init_params(model, jax.random.key(config.run.seed), dtype, mesh)
        return quantize_linears(scaled_start(config.model, model, fresh), config.quantize)
    checkpoint = base.checkpoint
    if config.lora is None:
        checkpoint = replace(checkpoint, quantized={})  # what trains is float
    params = load_params(checkpoint, dtype, mesh, wanted_quantizer(config.quantize))
    return apply_adapters(params, checkpoint.config, base.adapters, mesh)[1]


def abstract_base(config: Config, model: LlamaConfig, mesh: Mesh, base: Source | None) -> Params:
    """The shapes, dtypes and shardings of `base_params`, whose arguments these are, but for adapters.

    A base of which some is stored quantized and some in float counts as float.
    """
    wanted = config.quantize or (_stored(base.checkpoint) if base is not None and config.lora is not None else None)
    model = model if base is None else base.checkpoint.config
    floats = abstract_params(model, config.model.param_dtype)
    return _placed(jax.eval_shape(partial(quantize_linears, wanted=wanted), floats), model, mesh)


def wanted_quantizer(wanted: QuantizeConfig | None) -> Any:
    """The function from a weight to its quantized form that [quantize] asks for; None without it.

    Raises:
        PunaError: a setting that the method does not have.
    """
    return wanted and quantizer(wanted.method, wanted.block, wanted.double_quant)


def quantize_linears(params: Params, wanted: QuantizeConfig | None) -> Params:
    """Parameters whose layers' linear weights are quantized as [quantize] says; as they are without it."""
    if wanted is None:
        return params
    layers = {name: wanted_quantizer(wanted)(w) if name in LINEARS else w for name, w in params["layers"].items()}
    return {**params, "layers": layers}


def _stored(base: Checkpoint) -> QuantizeConfig | None:
    quantized = base.quantized
    if len(quantized) < len(LINEARS) * base.config.num_hidden_layers:
        return None
    like = next(iter(quantized.values())).like
    return QuantizeConfig(like.format, like.nested_absmax is not None, like.block)


def teacher_params(config: Config, mesh: Mesh) -> Params | None:
    """The parameters of distill.teacher, read shard by shard, those that are stored quantized as they are; None without
    [distill].

    Raises:
        PunaError: naming what is wrong with its files, or a size that does not divide over the mesh.
    """
    if config.distill is None:
        return None
    source = find_source(config.distill.teacher)
    params = load_params(source.checkpoint, config.model.param_dtype, mesh)
    return apply_adapters(params, source.checkpoint.config, source.adapters, mesh)[1]


def abstract_teacher(config: Config, mesh: Mesh) -> Params | None:
    """The shapes, dtypes and shardings of `teacher_params`, as of a model of floats without adapters."""
    if config.distill is None:
        return None
    model = find_source(config.distill.teacher).checkpoint.config
    return _placed(abstract_params(model, config.model.param_dtype), model, mesh)


# --- the state


def make_state(config: Config, model: LlamaConfig, params: Params) -> TrainState:
    """The state at step 0.

    Args:
        config: the run's.
        model: the config of `params`.
        params: the base; under [lora] it is frozen, and the adapters over it train, fresh ones where it has none.

    Raises:
        PunaError: adapters that do not fit the model.
    """
    trained, frozen = params, None
    if config.lora is not None:
        adapted = _with_dropout_rate(params, config.lora.dropout)
        if adapted is None:
            _, adapted = lora.add(params, model, jax.random.key(config.run.seed), **asdict(config.lora))
        trained, frozen = lora.split(adapted, config.lora.modules_to_save)
    return TrainState(
        step=jnp.int32(0),
        params=trained,
        opt_state=master.init(config.optim.master, make_optimizer(config.optim).init, trained),
        skipped=jnp.int32(0),
        seed=jnp.uint32(config.run.seed),
        frozen=frozen,
        ema=jax.tree.map(lambda x: jnp.array(x, jnp.float32), trained) if config.run.ema else None,
    )


def _with_dropout_rate(params: Params, rate: float) -> Params | None:
    """The parameters, whose adapters drop inputs at this rate; None where they have no adapters."""

    def give(leaf: Any) -> Any:
        return replace(leaf, dropout=rate) if isinstance(leaf, lora.LoraArray) else leaf

    leaves = jax.tree.leaves(params, is_leaf=lora.is_weight)
    if not any(isinstance(leaf, lora.LoraArray) for leaf in leaves):
        return None
    return jax.tree.map(give, params, is_leaf=lora.is_weight)


def abstract_state(config: Config, model: LlamaConfig, mesh: Mesh, base: Source | None = None) -> TrainState:
    """The state as shapes, dtypes and shardings, without memory: what is born, restored and planned.

    Args:
        config: the run's.
        model: the shape of fresh weights.
        mesh: the devices of the state.
        base: the model that the run starts from, whose own config then counts.

    Raises:
        PunaError: see `state_like`.
    """
    own = model if base is None else base.checkpoint.config
    return state_like(config, own, abstract_base(config, model, mesh, base), mesh)


def state_like(config: Config, model: LlamaConfig, params: Params, mesh: Mesh) -> TrainState:
    """The abstract state of a run over given base parameters.

    Args:
        config: the run's.
        model: the config of `params`.
        params: arrays, or their shapes.
        mesh: the devices of the state.

    Raises:
        PunaError: an array of the optimizer's state for which there is no rule, a size that does not divide over the
            mesh, or optim.offload on devices without host memory.
    """
    shapes = jax.eval_shape(partial(make_state, config, model), params)
    whole = join(shapes.params, shapes.frozen)
    is_untied = config.lora is not None and bool(config.lora.modules_to_save)
    whole = _placed(whole, replace(model, tie_word_embeddings=False) if is_untied else model, mesh)
    trained, frozen = (whole, None) if config.lora is None else lora.split(whole, config.lora.modules_to_save)
    scalar = NamedSharding(mesh, PartitionSpec())
    kind = _offload_kind(mesh) if config.optim.offload else None

    def number(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=scalar)

    return TrainState(
        step=number(shapes.step),
        params=trained,
        opt_state=_like_params(shapes.opt_state, trained, mesh, kind),
        skipped=number(shapes.skipped),
        seed=number(shapes.seed),
        frozen=frozen,
        ema=jax.tree.map(_as_float32, trained) if config.run.ema else None,
    )


def _as_float32(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding)


def init_state(config: Config, model: LlamaConfig, params: Params, abstract: TrainState) -> TrainState:
    """The state at step 0, on its devices.

    Args:
        config: the run's.
        model: the config of `params`.
        params: the base. They are donated: they live on in the state.
        abstract: the state that `state_like` gives for them.
    """
    make = jax.jit(partial(make_state, config, model), out_shardings=shardings_of(abstract), donate_argnums=0)
    return make(params)


def join(trained: Any, frozen: Any, key: Array | None = None) -> Params:
    """The parameters that a step computes with.

    Args:
        trained: a state's `params`.
        frozen: the same state's; None where all are trained.
        key: what this step's dropout comes from; None for no dropout.
    """
    if frozen is None:
        return trained
    params = lora.join(trained, frozen)
    return params if key is None else lora.with_dropout(params, key)


def shardings_of(tree: Any) -> Any:
    """The sharding of every array of a tree."""
    return jax.tree.map(lambda x: x.sharding, tree)


def abstract_batch(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and the shardings of one batch: int32 [B, T] under the names in BATCH_KEYS, and float32 [B, S] under
    "reference" where preferences are compared with one.

    Raises:
        PunaError: its microbatches do not divide over the mesh.
    """
    run = config.run
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if run.batch_size // run.gradient_accumulation_steps % ways:
        raise PunaError(
            f"run.batch_size {run.batch_size} in {run.gradient_accumulation_steps} microbatches "
            f"(run.gradient_accumulation_steps) does not divide over {ways} devices (mesh data x fsdp)"
        )
    parts = mesh.shape["context"]
    if parts > 1 and config.data.max_length % (2 * parts):
        raise PunaError(
            f"data.max_length {config.data.max_length} does not divide into two blocks for each part of mesh.context "
            f"{parts}: choose a multiple of {2 * parts}"
        )
    shape = (run.batch_size, config.data.max_length)
    sharding = named_sharding(mesh, ("batch", None), shape, "batch")
    batch = {key: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding) for key in BATCH_KEYS}
    if reads_reference(config):
        segments = most_segments(config.data.max_length, config.data.packing)
        batch["reference"] = jax.ShapeDtypeStruct((run.batch_size, segments), jnp.float32, sharding=sharding)
    return batch


def _placed(shapes: Params, model: LlamaConfig, mesh: Mesh) -> Params:
    """Shapes with the shardings that the table gives their weights."""
    where = tree_shardings(shapes, model, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)


def _like_params(opt_state: Any, params: Any, mesh: Mesh, kind: str | None) -> Any:
    """Lays out every array of the optimizer's state.

    As the parameter of its name where it has its shape. Replicated where it is small by nature: counts and
    placeholders (a number, or one for each layer), and statistics of a parameter's sides (Adafactor's rows and columns,
    whose shape is the parameter's without some of its dimensions).
    """
    known = {_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    layers = {x.shape[0] for path, x in jax.tree_util.tree_leaves_with_path(params) if _name(path)[0] == "layers"}
    replicated = NamedSharding(mesh, PartitionSpec())

    def lay(path: Any, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        own = known.get(_name(path))
        if own is not None and own.shape == x.shape:
            sharding = own.sharding
        elif x.size in {1, *layers} or (own is not None and _is_side_of(x.shape, own.shape)):
            sharding = replicated
        else:
            whose = "no parameter's" if own is None else f"a parameter's of shape {own.shape}"
            raise PunaError(
                f"optim.optimizer: its state {jax.tree_util.keystr(path)} of shape {x.shape} is {whose}, and there "
                "is no rule for such a shape: give it the parameter's, or add a rule to train/state.py"
            )
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.with_memory_kind(kind) if kind else sharding)

    return jax.tree_util.tree_map_with_path(lay, opt_state)


def _is_side_of(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether `shape` is `whole` without some of its dimensions."""
    left = iter(whole)
    return len(shape) < len(whole) and all(size in left for size in shape)


def _name(path: Any) -> tuple[Any, ...]:
    """A leaf's dict keys and whatever follows the last of them, which is the same in parameters and in their state."""
    keys = [i for i, entry in enumerate(path) if isinstance(entry, jax.tree_util.DictKey)]
    last = keys[-1] + 1 if keys else len(path)
    names = tuple(path[i].key for i in keys)
    return *names, *path[last:]


def _offload_kind(mesh: Mesh) -> str:
    """The memory kind of the host. Raises PunaError on devices that cannot keep a step's arguments there."""
    device = mesh.devices.flat[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if kinds and "pinned_host" not in kinds:  # a device that is only compiled for has none, and stands for one with
        raise PunaError(f"optim.offload: {device.device_kind} has no pinned_host memory; set it to false")
    return "pinned_host"
