"""The parameter table: every weight's shape, logical axes and initializer, in one place.

From it come initialization, abstract trees, shardings, counts, the decay mask and the converters' shape checks.
Linear weights are stored `[in, out]`, stacked over layers as `[layers, in, out]`, with RoPE in Hugging Face's
half-split layout, so that a conversion is a transpose.
"""

import zlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh
from jax.typing import DTypeLike

from model.config import LlamaConfig
from model.sharding import named_sharding

Params = dict[str, Any]

LINEARS = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")


class ParamSpec(NamedTuple):
    """One weight.

    Attributes:
        shape: with the layers first where they are stacked.
        axes: the logical name of each axis; see sharding.RULES.
        init: how it starts.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: str


def param_specs(config: LlamaConfig) -> Params:
    """The tree of `ParamSpec`s of a stacked LLaMA; `lm_head` is absent where embeddings are tied."""
    c = config
    L, V, D, F = c.num_hidden_layers, c.vocab_size, c.hidden_size, c.intermediate_size
    Q, KV = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim

    def matrix(n_in: int, n_out: int, *axes: str) -> ParamSpec:
        return ParamSpec((L, n_in, n_out), ("layers", *axes), "normal")

    def vector(n: int, axis: str, init: str) -> ParamSpec:
        return ParamSpec((L, n), ("layers", axis), init)

    layers = {
        "attn_norm": vector(D, "norm", "ones"),
        "wq": matrix(D, Q, "embed", "heads"),
        "wk": matrix(D, KV, "embed", "kv_heads"),
        "wv": matrix(D, KV, "embed", "kv_heads"),
        "wo": matrix(Q, D, "heads", "embed"),
        "mlp_norm": vector(D, "norm", "ones"),
        "w_gate": matrix(D, F, "embed", "mlp"),
        "w_up": matrix(D, F, "embed", "mlp"),
        "w_down": matrix(F, D, "mlp", "embed"),
    }
    if c.attention_bias:
        layers |= {
            "bq": vector(Q, "heads", "zeros"),
            "bk": vector(KV, "kv_heads", "zeros"),
            "bv": vector(KV, "kv_heads", "zeros"),
            "bo": vector(D, "norm", "zeros"),
        }
    if c.mlp_bias:
        layers |= {
            "b_gate": vector(F, "mlp", "zeros"),
            "b_up": vector(F, "mlp", "zeros"),
            "b_down": vector(D, "norm", "zeros"),
        }
    specs: Params = {
        "embed": ParamSpec((V, D), ("vocab", "embed"), "normal"),
        "layers": layers,
        "final_norm": ParamSpec((D,), ("norm",), "ones"),
    }
    if not c.tie_word_embeddings:
        specs["lm_head"] = ParamSpec((D, V), ("embed", "vocab"), "normal")
    return specs


def map_specs(function: Any, config: LlamaConfig) -> Params:
    """Applies a function to every row of the table.

    Args:
        function: of (name, spec); `name` is slash-joined, as in `layers/wq`.

    Returns:
        The tree of what it gives.
    """

    def apply(path: Any, spec: ParamSpec) -> Any:
        return function("/".join(entry.key for entry in path), spec)

    return jax.tree_util.tree_map_with_path(apply, param_specs(config), is_leaf=lambda x: isinstance(x, ParamSpec))


def init_params(config: LlamaConfig, key: Array, dtype: DTypeLike = jnp.float32, mesh: Mesh | None = None) -> Params:
    """Fresh parameters, born sharded over `mesh` where one is given; the numbers do not depend on the mesh.

    Args:
        key: PRNG key; each weight draws from its own, made of its name.

    Returns:
        Stacked parameters.

    Raises:
        PunaError: an axis does not divide over `mesh`.
    """

    def init(key: Array) -> Params:
        def one(name: str, spec: ParamSpec) -> Array:
            if spec.init != "normal":
                return jnp.full(spec.shape, 1.0 if spec.init == "ones" else 0.0, dtype)
            # A key made from the name: adding or removing a weight leaves every other as it was.
            own = jax.random.fold_in(key, zlib.crc32(name.encode()))
            return (jax.random.normal(own, spec.shape, jnp.float32) * config.initializer_range).astype(dtype)

        return map_specs(one, config)

    return jax.jit(init, out_shardings=None if mesh is None else param_shardings(config, mesh))(key)


def param_shardings(config: LlamaConfig, mesh: Mesh) -> Params:
    """The `NamedSharding` of every parameter.

    Raises:
        PunaError: an axis does not divide over `mesh`.
    """
    return map_specs(lambda name, spec: named_sharding(mesh, spec.axes, spec.shape, name), config)


def abstract_params(config: LlamaConfig, dtype: DTypeLike = jnp.float32, mesh: Mesh | None = None) -> Params:
    """The tree of `ShapeDtypeStruct`s: what the parameters would be, without any memory for them.

    Raises:
        PunaError: an axis does not divide over `mesh`.
    """

    def one(name: str, spec: ParamSpec) -> jax.ShapeDtypeStruct:
        sharding = None if mesh is None else named_sharding(mesh, spec.axes, spec.shape, name)
        return jax.ShapeDtypeStruct(spec.shape, dtype, sharding=sharding)

    return map_specs(one, config)


def param_count(config: LlamaConfig) -> int:
    """Number of weights, tied embeddings counted once."""
    return sum(x.size for x in jax.tree.leaves(abstract_params(config)))


def unstack(params: Params, form: Callable[[Params], Params] = lambda layer: layer) -> Params:
    """Layers as a tuple; unstacked ones stay.

    The form for decoding, where slicing stacked weights would copy them at every token.

    Args:
        form: makes each layer's parameters of those that were sliced out.
    """
    if isinstance(params["layers"], tuple):
        return params
    depth = jax.tree.leaves(params["layers"])[0].shape[0]
    return {**params, "layers": tuple(_layer(params["layers"], i, form) for i in range(depth))}


@partial(jax.jit, static_argnames="form")  # one program for all layers
def _layer(layers: Params, i: int, form: Callable[[Params], Params]) -> Params:
    return form(jax.tree.map(lambda x: x[i], layers))


def stack(params: Params) -> Params:
    """Layers stacked along a leading axis: the form for training, where one `lax.scan` runs over them."""
    if not isinstance(params["layers"], tuple):
        return params
    return {**params, "layers": jax.tree.map(lambda *xs: jnp.stack(xs), *params["layers"])}
