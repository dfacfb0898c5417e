"""The key-value cache: what attention has seen, kept per row and updated in place.

A key of position p lies at index p, so a row's cache needs no record of order. Layers are a tuple beside unstacked
parameters and one stacked array beside stacked ones: as a scan *carry* it is updated in place, as a scan output it
would be copied. Donate the cache to the jitted function that updates it.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from model.config import LlamaConfig
from model.sharding import relaxed_sharding


class KVCache(struct.PyTreeNode):
    """Keys and values of all layers, and how much of each row is filled.

    Attributes:
        k: [L, B, K, S, d], or a tuple of L arrays [B, K, S, d].
        v: as `k`.
        lengths: int32 [B], tokens seen per row.
    """

    k: Any
    v: Any
    lengths: Array

    @property
    def capacity(self) -> int:
        """S, the number of positions there is room for."""
        return jax.tree.leaves(self.k)[0].shape[-2]

    def unstack(self) -> "KVCache":
        """Layers as a tuple."""
        return self if isinstance(self.k, tuple) else self.replace(k=tuple(self.k), v=tuple(self.v))

    def stack(self) -> "KVCache":
        """Layers as one array."""
        return self.replace(k=jnp.stack(self.k), v=jnp.stack(self.v)) if isinstance(self.k, tuple) else self


def init_cache(
    config: LlamaConfig,
    batch: int,
    max_length: int,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    layout: Literal["stacked", "per_layer"] = "stacked",
) -> KVCache:
    """An empty cache.

    Args:
        config: the shape of the model.
        batch: how many rows.
        max_length: tokens that a row has room for.
        dtype: of keys and values.
        mesh: where it lies: heads are split as the model's are, or replicated where there are too few. None for the
            default device.
        layout: that of the parameters beside it.
    """
    shape = (batch, config.num_key_value_heads, max_length, config.head_dim)

    def side() -> Any:
        if layout == "per_layer":
            return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_hidden_layers))
        return jnp.zeros((config.num_hidden_layers, *shape), dtype)

    def zeros() -> KVCache:
        return KVCache(k=side(), v=side(), lengths=jnp.zeros(batch, jnp.int32))

    if mesh is None:
        return zeros()
    axes = ("layers", None, "kv_heads", None, None)

    def lay_out(x: jax.ShapeDtypeStruct) -> NamedSharding:
        return relaxed_sharding(mesh, (None,) if x.ndim == 1 else axes[-x.ndim :], x.shape)

    return jax.jit(zeros, out_shardings=jax.tree.map(lay_out, jax.eval_shape(zeros)))()


class LayerCache(struct.PyTreeNode):
    """One layer's window on the cache during a pass.

    Attributes:
        k: all layers' [L, B, K, S, d], or the layer's own [B, K, S, d].
        v: as `k`.
        layer: int32 [], which layer of all; None where `k` is the layer's own.
        slots: int32 [rows of the batch], the cache row of each; None for the first rows.
        window: how many positions attention reads, from the first on.
    """

    k: Array
    v: Array
    layer: Array | None
    slots: Array | None
    window: int = struct.field(pytree_node=False)

    def extend(self, k: Array, v: Array, positions: Array) -> tuple[Array, Array, "LayerCache"]:
        """Writes keys and values; those at or past the capacity are dropped.

        Args:
            k: [B, T, K, d].
            v: [B, T, K, d].
            positions: int32 [B, T], where each goes.

        Returns:
            The keys and values to attend to, [B, K, window, d] in the wider of their and the cache's dtypes, and the
            cache after the write.
        """
        rows = jnp.arange(k.shape[0]) if self.slots is None else self.slots
        heads = jnp.arange(k.shape[2])
        at: Any = (rows[:, None, None], heads, positions[..., None])
        if self.layer is not None:
            at = (self.layer, *at)
        new = self.replace(
            k=self.k.at[at].set(k.astype(self.k.dtype), mode="drop"),
            v=self.v.at[at].set(v.astype(self.v.dtype), mode="drop"),
        )
        return new._read(new.k, k.dtype, len(k)), new._read(new.v, v.dtype, len(v)), new

    def _read(self, array: Array, dtype: DTypeLike, batch: int) -> Array:
        if self.layer is not None:
            array = jax.lax.dynamic_index_in_dim(array, self.layer, keepdims=False)
        if self.slots is not None:
            array = array[self.slots]
        wider = max(array.dtype, jnp.dtype(dtype), key=lambda kind: kind.itemsize)
        return array[:batch, :, : self.window].astype(wider)
