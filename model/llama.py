"""LLaMA (arXiv:2302.13971, 2307.09288, 2407.21783): one forward for training, prefill, decoding, sharded or not.

Einsum letters: B batch, T queries, S keys, D model, H heads, K key-value heads, G = H / K, Q = G * T, d head_dim,
F mlp, V vocabulary, L layers. Weights are leaves of any kind that `linear` knows; nothing here asks which.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from model.attention import Mask, attend
from model.cache import KVCache, LayerCache, rows_of
from model.config import LlamaConfig
from model.errors import PunaError
from model.linear import linear, look_up
from model.params import Params
from model.pieces import checked, load_function
from model.rope import positions_of, rotate, tables
from model.sharding import constrain
from model.taps import Capture, stacked, untouched, unwatched

REPLICATED_SEQUENCE = ("batch", "tokens", None)  # whole on every device of the tensor axis
SPLIT_SEQUENCE = ("batch", "sequence", None)  # sequence parallelism (arXiv:2205.05198): norms and residuals split too


class Context(NamedTuple):
    """What all layers of one pass share.

    Attributes:
        cos: RoPE table, float32 [B, T, d/2].
        sin: RoPE table, float32 [B, T, d/2].
        mask: which keys each query may see.
        positions: int32 [B, T], where keys go in the cache.
    """

    cos: Array
    sin: Array
    mask: Mask
    positions: Array


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """RMSNorm (arXiv:1910.07467) in float32, cast back before the weight multiplies, as Meta does.

    Args:
        x: [..., D].
        weight: [D].
        eps: added to the mean square.

    Returns:
        x / sqrt(mean(x²) + eps) * weight, [..., D] in x's dtype.
    """
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return weight.astype(x.dtype) * wide.astype(x.dtype)


def mlp(x: Array, layer: Params) -> Array:
    """SwiGLU (arXiv:2002.05202): (silu(x w_gate) * (x w_up)) w_down, with biases where the layer has them.

    Args:
        x: [B, T, D].
        layer: parameters of one layer.

    Returns:
        [B, T, D].
    """
    gate = linear(x, layer["w_gate"], layer.get("b_gate"))
    up = linear(x, layer["w_up"], layer.get("b_up"))
    return linear(jax.nn.silu(gate) * up, layer["w_down"], layer.get("b_down"))


def attention(
    x: Array, layer: Params, config: LlamaConfig, context: Context, cache: LayerCache | None, attend: Callable = attend
) -> tuple[Array, LayerCache | None]:
    """Grouped-query attention (arXiv:2305.13245) with RoPE (arXiv:2104.09864).

    Args:
        x: normalized residual stream [B, T, D].
        layer: parameters of one layer.
        cache: the layer's cache, or None to attend to this pass's keys alone.
        attend: as `model.attention.attend`.

    Returns:
        [B, T, D], and the layer's cache with this pass's keys.
    """
    B, T, _ = x.shape

    def heads(weight: str, bias: str) -> Array:
        return linear(x, layer[weight], layer.get(bias)).reshape(B, T, -1, config.head_dim)

    with jax.named_scope("qkv"):
        q, k, v = heads("wq", "bq"), heads("wk", "bk"), heads("wv", "bv")
    with jax.named_scope("rope"):
        q, k = rotate(q, context.cos, context.sin), rotate(k, context.cos, context.sin)
    if cache is None:
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    else:
        k, v, cache = cache.extend(k, v, context.positions)
    with jax.named_scope("attend"):
        out = attend(q, k, v, context.mask).reshape(B, T, -1)
    with jax.named_scope("out"):
        return linear(out, layer["wo"], layer.get("bo")), cache


def block(
    x: Array,
    layer: Params,
    config: LlamaConfig,
    context: Context,
    cache: LayerCache | None,
    *,
    attend: Callable = attend,
    norm: Callable = rms_norm,
    mlp: Callable = mlp,
    residual: tuple[str | None, ...] = REPLICATED_SEQUENCE,
    tap: Callable[[str, Array], Array] = untouched,
) -> tuple[Array, LayerCache | None]:
    """One decoder layer. For a variation, pass `partial(block, attend=..., norm=..., mlp=..., residual=...)`.

    One constraint on the residual stream keeps FSDP gathering one layer's weights instead of exchanging activations.

    Args:
        x: residual stream [B, T, D].
        layer: parameters of one layer.
        cache: the layer's cache, if any.
        attend: as `model.attention.attend`.
        norm: as `rms_norm`.
        mlp: as the function `mlp`.
        residual: logical axes of the residual stream (see sharding.RULES).
        tap: is shown activations by name (see model.taps), and gives them back.

    Returns:
        The residual stream after the layer, and its cache with this pass's keys.
    """
    x = constrain(x, residual)
    with jax.named_scope("attention"):
        normed = tap("attn_norm", norm(x, layer["attn_norm"], config.rms_norm_eps))
        mixed, cache = attention(normed, layer, config, context, cache, attend)
    x = x + tap("attention", mixed)
    with jax.named_scope("mlp"):
        normed = tap("mlp_norm", norm(x, layer["mlp_norm"], config.rms_norm_eps))
        return x + tap("mlp", mlp(normed, layer)), cache


def norm_of(config: LlamaConfig) -> Callable:
    """The model's norm: `rms_norm`, or what `config.pieces` names.

    Raises:
        PunaError: there is no function of that name.
    """
    name = config.pieces.norm
    if name is None:
        return rms_norm
    call = "norm(x [..., D], weight [D], eps) -> [..., D]"
    return checked(load_function(name, "model.norm"), name, "model.norm", call, lambda x, weight, eps: x)


def block_of(config: LlamaConfig, **keywords: Any) -> Callable:
    """The model's decoder layer, as `config.pieces` names it and its parts.

    Args:
        keywords: keywords of `block` to set; a part that the config names comes before one given here.

    Returns:
        A function of (x, layer, config, context, cache), as `block`.

    Raises:
        PunaError: there is no function of a name, or the block that is named does not take one of the keywords.
    """
    pieces = config.pieces
    if pieces.norm is not None:
        keywords["norm"] = norm_of(config)
    if pieces.attention is not None:
        call = "attend(q [B, T, H, d], k [B, K, S, d], v [B, K, S, d], mask) -> [B, T, H, d]"
        own = load_function(pieces.attention, "model.attention")
        keywords["attend"] = checked(own, pieces.attention, "model.attention", call, lambda q, k, v, mask: q)
    if pieces.block is None:
        return partial(block, **keywords)
    own = load_function(pieces.block, "model.block")
    takes = inspect.signature(own).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
    if (lacking := sorted(keywords.keys() - takes.keys())) and not takes_any:
        settings = {"attend": "attend (model.attention)", "residual": "residual (mesh.sequence_parallel)"}
        lacks = " and ".join(settings.get(keyword, keyword) for keyword in lacking)
        raise PunaError(f"block {pieces.block} has no keyword {lacks}: give it one, or leave the setting out")
    call = "block(x [B, T, D], layer, config, context, cache, *, ...) -> (x [B, T, D], cache)"
    watched = checked(own, pieces.block, "model.block", call, lambda x, layer, config, context, cache: (x, cache))
    return partial(watched, **keywords)


def _is_fused_attention(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether a result is that of cuDNN's attention: as dear as a product's, and as small as its inputs."""
    return "dot_product_attention_fwd" in primitive.name


REMAT: dict[str, Callable[[Callable], Callable]] = {
    "none": lambda f: f,
    "dots": lambda f: jax.checkpoint(
        f,
        prevent_cse=False,
        policy=jax.checkpoint_policies.save_from_both_policies(
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _is_fused_attention
        ),
    ),
    "full": lambda f: jax.checkpoint(f, prevent_cse=False),
}


def hidden(
    params: Params,
    tokens: Array,
    config: LlamaConfig,
    *,
    positions: Array | None = None,
    segments: Array | None = None,
    cache: KVCache | None = None,
    slots: Array | None = None,
    window: int | None = None,
    dtype: DTypeLike | None = None,
    block: Callable | None = None,
    norm: Callable | None = None,
    remat: str = "none",
    capture: Capture | None = None,
) -> tuple[Array, KVCache | None]:
    """Runs all layers and the final norm.

    A token id of `vocab_size` or above gives NaN, not another token.

    Args:
        params: stacked or unstacked.
        tokens: int32 [B, T].
        positions: int32 [B, T]; None continues each row's cache, or counts from 0, anew at each segment.
        segments: int32 [B, T]; 0 is padding, equal non-zero segments attend to each other. With a cache, 0 marks tokens
            that are not there: they are not written.
        cache: keys and values of earlier passes; None to attend to this pass's alone.
        slots: the cache's rows that the batch's rows stand for, int32 [B]; int32 [], the first of B that follow each
            other; None for the first B.
        window: attention reads that many positions of the cache, the first ones; None for all.
        dtype: what is computed in; None for the embedding's.
        block: the decoder layer, as a function; None for that of the config's `pieces`.
        norm: the final norm, as a function; None for that of the config's `pieces`.
        remat: none, dots or full, what the backward pass recomputes.
        capture: collects activations; see `model.capture.captured`.

    Returns:
        The normalized residual stream [B, T, D], and the cache with this pass's keys.

    Raises:
        PunaError: for an unknown remat, for a function that `pieces` names and is not found, and for a cache that
            reaches beyond the original context of a model with dynamic RoPE (its frequencies would have changed under
            the keys already written).
    """
    if remat not in REMAT:
        raise PunaError(f"remat {remat!r} is not known; choose {', '.join(REMAT)}")
    block, norm = block or block_of(config), norm or norm_of(config)
    seeing = unwatched(block) if capture is None else capture.watched(block)
    if cache is not None:
        _refuse_dynamic(config, cache)
    capacity = None if cache is None else cache.capacity
    rows = rows_of(slots, len(tokens))
    lengths = None if cache is None else cache.lengths[rows]
    where = _positions(tokens, positions, segments, lengths, capacity)
    if cache is None:
        mask = Mask(positions, positions, segments, segments)
    else:
        mask = Mask(q_positions=where)
    cos, sin = tables(config, where, segments if cache is None else None)
    context = Context(cos, sin, mask, where)

    def layer_step(x: Array, layer: Params, cache: LayerCache | None) -> tuple[Array, LayerCache | None, dict]:
        return seeing(x, layer, config, context, cache)

    step = REMAT[remat](layer_step)
    with jax.named_scope("embed"):
        x = look_up(params["embed"], tokens)
        x = constrain(x if dtype is None else x.astype(dtype), REPLICATED_SEQUENCE)
    embedded = x
    if isinstance(params["layers"], tuple):
        x, cache, parts = _loop(step, x, params["layers"], cache, slots, window)
    else:
        x, cache, parts = _scan(step, x, params["layers"], cache, slots, window)
    if cache is not None:
        seen = jnp.where(where < cache.capacity, where + 1, 0).max(axis=1)
        cache = cache.replace(lengths=cache.lengths.at[rows].max(seen, mode="drop"))
    with jax.named_scope("final_norm"):
        normed = norm(x, params["final_norm"], config.rms_norm_eps)
    if capture is not None:
        capture.keep("embed", embedded)
        capture.keep_layers(parts, config.num_hidden_layers)
        capture.keep("final_norm", normed)
    return normed, cache


def head_of(params: Params, config: LlamaConfig) -> Any:
    """The head [D, V], of any kind: a weight of its own, or the embedding's transpose where the two are tied."""
    is_tied = config.tie_word_embeddings and "lm_head" not in params
    return params["embed"].T if is_tied else params["lm_head"]


def logits(params: Params, x: Array, config: LlamaConfig) -> Array:
    """The head's product with the final residual stream.

    `per_layer` gives tied parameters a head, which shares the embedding's memory.

    Args:
        x: normalized residual stream [..., D], as `hidden` returns it.

    Returns:
        Float32 [..., V].
    """
    with jax.named_scope("head"):
        return linear(x, head_of(params, config), out_dtype=jnp.float32)


def forward(params: Params, tokens: Array, config: LlamaConfig, **keywords: Any) -> tuple[Array, KVCache | None]:
    """Tokens to logits.

    Args:
        tokens: int32 [B, T].
        keywords: those of `hidden`.

    Returns:
        Logits float32 [B, T, V], and the cache (None where none was given).

    Raises:
        PunaError: as `hidden`.
    """
    x, cache = hidden(params, tokens, config, **keywords)
    return logits(params, x, config), cache


def _positions(
    tokens: Array, positions: Array | None, segments: Array | None, lengths: Array | None, capacity: int | None
) -> Array:
    """The position of every token, int32 [B, T]; those that a cache must not keep lie at its capacity."""
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if capacity is None or lengths is None:
        if positions is not None or segments is None:
            return index if positions is None else jnp.broadcast_to(positions, tokens.shape)
        return positions_of(segments)
    if segments is None:
        return lengths[:, None] + index if positions is None else jnp.broadcast_to(positions, tokens.shape)
    real = segments != 0
    if positions is None:
        positions = lengths[:, None] + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
    return jnp.where(real, positions, capacity)


def _refuse_dynamic(config: LlamaConfig, cache: KVCache) -> None:
    scaling, original = config.rope_scaling, config.max_position_embeddings
    if scaling is not None and scaling.rope_type == "dynamic" and cache.capacity > original:
        raise PunaError(
            f"a cache of {cache.capacity} positions reaches beyond the original context of {original}, where "
            f"rope_type 'dynamic' changes the frequencies of keys already cached; make it {original} or shorter"
        )


def _loop(
    step: Callable, x: Array, layers: tuple[Params, ...], cache: KVCache | None, slots: Array | None, window: int | None
) -> tuple[Array, KVCache | None, dict[str, Any]]:
    """Runs unstacked layers: no weight is sliced, each layer's cache is an array of its own."""
    parts = []
    if cache is None:
        for layer in layers:
            x, _, seen = step(x, layer, None)
            parts.append(seen)
        return x, None, stacked(parts)
    cache = cache.unstack()
    ks, vs = [], []
    for layer, k, v in zip(layers, cache.k, cache.v, strict=True):
        x, new, seen = step(x, layer, LayerCache(k, v, None, slots, window or cache.capacity))
        ks.append(new.k)
        vs.append(new.v)
        parts.append(seen)
    return x, cache.replace(k=tuple(ks), v=tuple(vs)), stacked(parts)


def _scan(
    step: Callable, x: Array, layers: Params, cache: KVCache | None, slots: Array | None, window: int | None
) -> tuple[Array, KVCache | None, dict[str, Any]]:
    """Runs stacked layers as one scan; the cache is carried, never an output."""
    if cache is None:
        x, seen = jax.lax.scan(lambda x, layer: step(x, layer, None)[::2], x, layers)
        return x, None, seen
    cache = cache.stack()
    extent = window or cache.capacity

    def body(carry: tuple[Array, Array, Array], scanned: tuple[Params, Array]) -> tuple[Any, dict[str, Any]]:
        (x, k, v), (layer, index) = carry, scanned
        x, new, seen = step(x, layer, LayerCache(k, v, index, slots, extent))
        return (x, new.k, new.v), seen

    indices = jnp.arange(cache.k.shape[0])
    (x, k, v), seen = jax.lax.scan(body, (x, cache.k, cache.v), (layers, indices))
    return x, cache.replace(k=k, v=v), seen
