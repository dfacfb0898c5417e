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
    """The keys and values of all layers.

    Attributes:
        k: keys, [L, B, K, S, d], or a tuple of L arrays [B, K, S, d].
        v: values, likewise.
        lengths: int32 [B], tokens seen per row.
    """

    k: Any
    v: Any
    lengths: Array

    @property
    def capacity(self) -> int:
        """S, the number of positions there is room for in each row."""
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
    """An empty cache, in the layout of the parameters beside it.

    Over a mesh, heads are split as the model's are, or replicated where there are too few.

    Args:
        batch: number of rows.
        max_length: tokens that there is room for in each row.
        dtype: of keys and values.
        mesh: the mesh that the parameters live on, if any.
        layout: "stacked", one array [L, B, K, S, d] each for keys and values; "per_layer", L arrays [B, K, S, d].
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


def rows_of(slots: Array | None, batch: int) -> Array:
    """The cache rows that a batch's rows stand for, int32 [B].

    Args:
        slots: int32 [B], any rows; int32 [], the first of B rows that follow each other, which are read as one block;
            None, the first B rows.
        batch: B.
    """
    if slots is not None and slots.ndim:
        return slots
    rows = jnp.arange(batch)
    return rows if slots is None else slots + rows


class LayerCache(struct.PyTreeNode):
    """One layer's window on the cache during a pass.

    Attributes:
        k: all layers' keys [L, B, K, S, d], or the layer's own [B, K, S, d].
        v: values, likewise.
        layer: the layer's index in k and v; None where they are its own.
        slots: the cache rows that the batch's rows stand for, as `rows_of` has them.
        window: attention reads that many positions, the first ones.
    """

    k: Array
    v: Array
    layer: Array | None
    slots: Array | None
    window: int = struct.field(pytree_node=False)

    def extend(self, k: Array, v: Array, positions: Array) -> tuple[Array, Array, "LayerCache"]:
        """Writes new keys and values into the cache.

        Args:
            k: keys [B, T, K, d].
            v: values [B, T, K, d].
            positions: int32 [B, T], where they go; those at or past the capacity are dropped.

        Returns:
            The keys and the values to attend to, [B, K, window, d] in the wider of their and the cache's dtypes, and
            the cache after the write.
        """
        rows = rows_of(self.slots, len(k))
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
        wider = max(array.dtype, jnp.dtype(dtype), key=lambda kind: kind.itemsize)
        if self.slots is None:
            return array[:batch, :, : self.window].astype(wider)
        if self.slots.ndim:
            return array[self.slots, :, : self.window].astype(wider)
        _, heads, _, width = array.shape
        return jax.lax.dynamic_slice(array, (self.slots, 0, 0, 0), (batch, heads, self.window, width)).astype(wider)
