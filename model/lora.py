"""LoRA (arXiv:2106.09685): a low-rank update beside a frozen weight of any kind, and what is done with a tree of them.

Over a quantized weight this is QLoRA; over another LoRA, several adapters at once. Training splits the tree in two:
`jax.grad` with respect to the trained part is all it takes, and the base has neither gradient nor optimizer state.
"""

import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax
from jax.sharding import Mesh

from model.config import LlamaConfig
from model.errors import PunaError
from model.params import LINEARS, Params, ParamSpec, param_specs
from model.quantize import QuantizedArray, dequantize
from model.sharding import named_sharding, ways
from model.transposed import TransposedArray

# The names by which users, configs and peft call the linear weights of a layer, and the two large ones outside.
MODULES = {
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "w_gate": "mlp.gate_proj",
    "w_up": "mlp.up_proj",
    "w_down": "mlp.down_proj",
}
SAVED_MODULES = {"embed_tokens": "embed", "lm_head": "lm_head"}


@struct.dataclass
class LoraArray:
    """The weight base + scale * a @ b; with a `magnitude` (DoRA, arXiv:2402.09353), its columns rescaled to that.

    Over the embedding, whose rows are looked up, `in` is the vocabulary.

    Attributes:
        base: [..., in, out], an array, a QuantizedArray or another LoraArray.
        a: [..., in, r].
        b: [..., r, out].
        scale: float32 [...], one per layer.
        magnitude: [..., out], DoRA's norms of the columns; None for plain LoRA.
        base_square: float32 [..., out], the squared norms of the base's columns, for DoRA.
        bias: [..., out], which times `scale` is added to the output (peft's lora_bias); None for plain LoRA.
        key: [...], JAX keys of this step, which drop inputs of `a`; None for no dropout.
        ranks: the layers' own; lower ones than r are padded with zeros, and 0 is a layer without adapter.
        dropout: the rate.
    """

    base: Any
    a: Array
    b: Array
    scale: Array
    magnitude: Array | None = None
    base_square: Array | None = None
    bias: Array | None = None
    key: Array | None = None
    ranks: tuple[int, ...] = struct.field(pytree_node=False, default=())
    dropout: float = struct.field(pytree_node=False, default=0.0)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight: [..., in, out]."""
        return self.base.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the weight under the adapters."""
        return self.base.dtype


def adapted(x: Array, w: LoraArray, base: Callable[[Array], Array]) -> Array:
    """x times one adapted weight: x base + scale (x a) b, and DoRA's rescaling of it.

    The norm that DoRA divides by is a constant to the gradient, as the paper proposes (section 4.3). It comes from
    norms and inner products, so that no dense weight is ever built.

    Args:
        x: [M, in].
        w: the weight of one layer.
        base: multiplies [M, in] by `w.base`.

    Returns:
        [M, out], in the dtype that `base` gives.
    """
    dropped = x if w.key is None else _dropout(x, w.key, w.dropout)
    y = base(x)
    update = (dropped @ w.a.astype(x.dtype)) @ w.b.astype(x.dtype) * w.scale.astype(x.dtype)
    update = update.astype(y.dtype)
    if w.magnitude is None:
        return y + update
    gain = (w.magnitude / lax.stop_gradient(column_norm(w, base))).astype(y.dtype)
    return y + (gain - 1) * (y if w.key is None else base(dropped)) + gain * update


def adapted_rows(
    tokens: Array, w: LoraArray, rows: Callable[[Array], Array], product: Callable[[Array], Array]
) -> Array:
    """Rows of one adapted embedding: those of the base plus scale * a[tokens] b, and DoRA's rescaling of them.

    Args:
        tokens: int32 [...].
        w: the embedding [V, D].
        rows: looks tokens up in `w.base`.
        product: multiplies [r, V] by `w.base`; DoRA's norms need it.

    Returns:
        [..., D], in the base's dtype.
    """
    y = rows(tokens)
    a, b = jnp.take(w.a, tokens, axis=0).astype(jnp.float32), w.b.astype(jnp.float32)
    wide = y.astype(jnp.float32) + w.scale * (a @ b)
    if w.magnitude is not None:
        wide = wide * (w.magnitude / lax.stop_gradient(column_norm(w, product)))
    return wide.astype(y.dtype)


def added_bias(w: Any) -> Array | None:
    """What the adapters over a weight add to its output for any input: float32 [..., out], or None for nothing."""
    if not isinstance(w, LoraArray):
        return None
    below = added_bias(w.base)
    if w.bias is None:
        return below
    own = w.scale[..., None] * w.bias.astype(jnp.float32)
    return own if below is None else below + own


def column_norm(w: LoraArray, base: Callable[[Array], Array]) -> Array:
    """The norm of each column of base + scale * a @ b, by the binomial formula.

    Args:
        w: the weight of one layer, with its `base_square`.
        base: multiplies [r, in] by `w.base`.

    Returns:
        Float32 [out].
    """
    a, b = w.a.astype(jnp.float32), w.b.astype(jnp.float32)
    cross = (base(a.T).astype(jnp.float32) * b).sum(axis=0)
    square = ((a.T @ a) @ b * b).sum(axis=0)
    base_square = jnp.asarray(w.base_square)
    return jnp.sqrt(base_square + 2 * w.scale * cross + w.scale**2 * square)


def _dropout(x: Array, key: Array, rate: float) -> Array:
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))


# ------------------------------------------------------------------------------------------------- trees with adapters


def add(
    params: Params,
    config: LlamaConfig,
    key: Array,
    *,
    rank: int = 8,
    alpha: float = 8.0,
    dropout: float = 0.0,
    targets: Sequence[str] | str = "all-linear",
    modules_to_save: Sequence[str] = (),
    rslora: bool = False,
    dora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    mesh: Mesh | None = None,
) -> tuple[LlamaConfig, Params]:
    """Puts fresh adapters over stacked parameters: a uniform as Kaiming's, b zero, so the model stays as it was.

    Args:
        key: PRNG key; each weight draws from its own, made of its name.
        alpha: the update's scale is alpha / rank.
        dropout: the rate at which inputs of an adapter are dropped in training; see `with_dropout`.
        targets: names as `q_proj`, or "all-linear"; none of them where modules_to_save alone are to train.
        modules_to_save: `embed_tokens`, `lm_head`, trained whole; this unties them.
        rslora: the scale is alpha / sqrt(rank) (arXiv:2312.03732).
        dora: adapters have DoRA's magnitudes (arXiv:2402.09353).
        rank_pattern: other ranks, by a regular expression that ends a module's name `model.layers.0.self_attn.q_proj`.
        alpha_pattern: other alphas, likewise.
        mesh: the mesh that the parameters live on, if any.

    Returns:
        The config, which says so where the embeddings were untied, and the parameters.

    Raises:
        PunaError: for a rank below 1 or above the weight's larger side, an alpha that is not finite, an unknown target
            or module, neither targets nor modules, or a pattern that matches nothing.
    """
    rank_pattern, alpha_pattern = dict(rank_pattern or {}), dict(alpha_pattern or {})
    weights = target_weights(targets)
    check_saved_modules(modules_to_save, targets)
    specs, depth = param_specs(config), config.num_hidden_layers
    modules = [f"model.layers.{i}.{MODULES[name]}" for name in weights for i in range(depth)]
    for setting, patterns in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
        for pattern in patterns:
            check_pattern(pattern, f"lora {setting}")
            if not any(_matches(pattern, module) for module in modules):
                raise PunaError(f"lora {setting}: {pattern!r} matches no adapted module; targets are {targets!r}")
    layers = dict(params["layers"])
    for name in weights:
        names = [f"model.layers.{i}.{MODULES[name]}" for i in range(depth)]
        ranks = tuple(module_value(rank_pattern, module, rank) for module in names)
        alphas = [module_value(alpha_pattern, module, alpha) for module in names]
        if min(ranks) < 1:
            raise PunaError(f"lora rank {min(ranks)} of {MODULES[name]}: an adapter's rank is at least 1")
        if max(ranks) > (size := max(specs["layers"][name].shape[1:])):
            raise PunaError(
                f"lora rank {max(ranks)} of {MODULES[name]}: more than the {size} that the weight itself has"
            )
        if not all(map(math.isfinite, alphas)):
            raise PunaError(f"lora alpha {alphas} of {MODULES[name]}: give finite numbers")
        scale = [alpha / (rank**0.5 if rslora else rank) for alpha, rank in zip(alphas, ranks, strict=True)]
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        layers[name] = _fresh(own, layers[name], ranks, scale, dropout, dora, specs["layers"][name], mesh, name)
    params = {**params, "layers": layers}
    if not modules_to_save or not config.tie_word_embeddings:
        return config, params
    return replace(config, tie_word_embeddings=False), untie(params)


def target_weights(targets: Sequence[str] | str) -> list[str]:
    """Our names of the weights that `targets` name, as `wq` for `q_proj`.

    Raises:
        PunaError: for a name that is no linear of a LLaMA.
    """
    if targets == "all-linear":
        return list(LINEARS)
    targets = [targets] if isinstance(targets, str) else list(targets)
    names = {module.split(".")[1]: ours for ours, module in MODULES.items()}
    if not names.keys() >= set(targets):
        raise PunaError(f"lora targets {targets}: choose from {', '.join(names)}, or all-linear")
    return [names[target] for target in dict.fromkeys(targets)]


def check_saved_modules(modules: Sequence[str], targets: Sequence[str] | str) -> None:
    """Raises PunaError for a module that cannot be trained whole beside adapters, or where nothing would train."""
    if not modules and not targets:
        raise PunaError("lora targets and modules_to_save are both empty, so nothing trains: name some of either")
    if unknown := [module for module in modules if module not in SAVED_MODULES]:
        raise PunaError(f"lora modules_to_save: {', '.join(unknown)}; choose from {', '.join(SAVED_MODULES)}")


def _matches(pattern: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def check_pattern(pattern: str, setting: str, is_whole: bool = False) -> None:
    """Raises PunaError, naming the setting, for a pattern that is no regular expression: of the end of a module's name,
    or of the whole."""
    try:
        re.compile(pattern if is_whole else rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise PunaError(f"{setting}: {pattern!r} is no regular expression: {error}") from None


def module_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern, a regular expression, that ends the name `module`, as peft chooses it."""
    return next((value for pattern, value in patterns.items() if _matches(pattern, module)), default)


def _fresh(
    key: Array,
    base: Any,
    ranks: tuple[int, ...],
    scale: list[float],
    dropout: float,
    dora: bool,
    spec: ParamSpec,
    mesh: Mesh | None,
    name: str,
) -> LoraArray:
    L, n_in, n_out = base.shape
    r, bound = max(ranks), n_in**-0.5
    a = jax.random.uniform(key, (L, n_in, r), jnp.float32, -bound, bound)
    a = jnp.where(jnp.arange(r) < jnp.array(ranks)[:, None, None], a, 0)
    w = LoraArray(base, a, jnp.zeros((L, r, n_out)), jnp.array(scale, jnp.float32), ranks=ranks, dropout=dropout)
    return on_mesh(with_magnitude(w, None) if dora else w, spec.axes, mesh, name)


def on_mesh(w: LoraArray, axes: Sequence[str], mesh: Mesh | None, name: str) -> LoraArray:
    """The adapter of weight `name`, whose dimensions mean `axes`, on the devices of its base; the base is not moved."""
    if mesh is None:
        return w
    where = lora_shardings(w, axes, mesh, f"layers/{name}", None)
    return replace(jax.device_put(replace(w, base=None), where), base=w.base)


def with_magnitude(w: LoraArray, magnitude: Array | None) -> LoraArray:
    """The adapter, of one layer or stacked, as DoRA with that magnitude [..., out]; None is the norms of the base."""
    square = _column_squares(w.base) if w.a.ndim == 2 else jax.jit(lambda base: lax.map(_column_squares, base))(w.base)
    return replace(w, magnitude=jnp.sqrt(square) if magnitude is None else magnitude, base_square=square)


@jax.jit
def _column_squares(base: Any) -> Array:
    return jnp.square(dense(base)).sum(axis=0)


def untie(params: Params) -> Params:
    """Tied parameters with a head of its own, equal to the embedding; the config must say so too."""
    return {**params, "lm_head": jnp.array(params["embed"].T)}


def split(params: Params, modules_to_save: Sequence[str] = ()) -> tuple[Params, Params]:
    """Parameters as two trees of the same shape, None where the other has the array. The outermost adapters train.

    Args:
        modules_to_save: `embed_tokens`, `lm_head`: those that are trained whole.

    Returns:
        The trained tree and the frozen one.
    """
    saved = {SAVED_MODULES[module] for module in modules_to_save}

    def trained(path: Any, leaf: Any) -> Any:
        if isinstance(leaf, LoraArray):
            return replace(leaf, base=None, scale=None, base_square=None, key=None)
        return leaf if path[0].key in saved else None

    def frozen(path: Any, leaf: Any) -> Any:
        if isinstance(leaf, LoraArray):
            return replace(leaf, a=None, b=None, magnitude=None, bias=None)
        return None if path[0].key in saved else leaf

    each = partial(jax.tree_util.tree_map_with_path, is_leaf=is_weight)
    return each(trained, params), each(frozen, params)


def join(trained: Params, frozen: Params) -> Params:
    """The parameters that `split` took apart."""

    def both(new: Any, old: Any) -> Any:
        if isinstance(new, LoraArray):
            return replace(old, a=new.a, b=new.b, magnitude=new.magnitude, bias=new.bias)
        return old if new is None else new

    return jax.tree.map(both, trained, frozen, is_leaf=lambda node: node is None or isinstance(node, LoraArray))


def bases(params: Params) -> Params:
    """The parameters without any adapter."""

    def base(leaf: Any) -> Any:
        return base(leaf.base) if isinstance(leaf, LoraArray) else leaf

    return jax.tree.map(base, params, is_leaf=is_weight)


def with_dropout(params: Params, key: Array) -> Params:
    """Gives every adapter that has a dropout rate its keys for one step, one per layer, from the step's `key`."""

    def give(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, LoraArray) or not leaf.dropout:
            return leaf
        own = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        return replace(leaf, key=own if leaf.a.ndim == 2 else jax.random.split(own, len(leaf.a)))

    return jax.tree_util.tree_map_with_path(give, params, is_leaf=is_weight)


def is_weight(node: Any) -> bool:
    """Whether a node of a tree of parameters is one weight, of a kind that has several arrays."""
    return isinstance(node, (LoraArray, QuantizedArray))


def dense(w: Any) -> Array:
    """The float32 weight [..., in, out] that any kind stands for."""
    match w:
        case QuantizedArray():
            return dequantize(w, jnp.float32)
        case TransposedArray():
            return w.rows.T.astype(jnp.float32)
        case LoraArray():
            update = jnp.matmul(w.a.astype(jnp.float32), w.b.astype(jnp.float32), precision="highest")
            full = dense(w.base) + w.scale[..., None, None] * update
            if w.magnitude is None:
                return full
            return full * (w.magnitude / jnp.linalg.norm(full, axis=-2))[..., None, :]
        case _:
            return w.astype(jnp.float32)


# ------------------------------------------------------------------------------------------------------------ sharding


def lora_shardings(w: LoraArray, axes: Sequence[str | None], mesh: Mesh, name: str, base: Any) -> LoraArray:
    """The `NamedSharding` of every leaf beside the base's: a and b are split as the weight's sides, if they divide."""
    *lead, in_axis, out_axis = axes

    def place(x: Array | None, *last: str | None) -> Any:
        if x is None:
            return None
        sides = zip(last, x.shape[len(lead) :], strict=True)
        fits = [axis if size % ways(mesh, axis) == 0 else None for axis, size in sides]
        return named_sharding(mesh, (*lead, *fits), x.shape, name)

    return replace(
        w,
        base=base,
        a=place(w.a, in_axis, None),
        b=place(w.b, None, out_axis),
        scale=place(w.scale),
        magnitude=place(w.magnitude, out_axis),
        base_square=place(w.base_square, out_axis),
        bias=place(w.bias, out_axis),
        key=place(w.key),
    )
