"""Several adapters over one base in one batch: each row names the one that it uses.

All adapters of a weight lie side by side, so that a batch takes two dense products whatever its rows ask for; a mask
keeps each row to its own (as S-LoRA, arXiv:2311.03285, batches them, but without a gather).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from model.errors import PunaError
from model.lora import LoraArray, added_bias, column_norm
from model.params import Params

_WHOLE = (
    "an adapter brings whole weights (modules_to_save, trainable tokens, biases), and adapters side by side share one "
    "base: merge it into a model of its own"
)


@struct.dataclass
class SelectedLora:
    """One weight with n adapters over it, of rank r at most.

    Attributes:
        base: [in, out], of any kind without adapters.
        a: [in, n * r].
        b: [n * r, out], with the adapters' scales in it.
        gain: [n, out], DoRA's factors on the columns, ones for plain LoRA; None where no adapter is DoRA.
        bias: [n, out], with the adapters' scales in it; None where no adapter has one.
        index: int32 [B], which adapter each row of the batch uses, -1 none.
        rank: r.
    """

    base: Any
    a: Array
    b: Array
    gain: Array | None
    bias: Array | None
    index: Array
    rank: int = struct.field(pytree_node=False, default=0)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight: [in, out]."""
        return self.base.shape


def selected(x: Array, w: SelectedLora, base: Callable[[Array], Array]) -> Array:
    """x times the weight of each row's adapter.

    Args:
        x: [M, in]: B rows of M / B tokens.
        base: multiplies [M, in] by `w.base`.

    Returns:
        [M, out].
    """
    index = jnp.repeat(w.index, len(x) // len(w.index), total_repeat_length=len(x))[:, None]
    own = jnp.arange(w.a.shape[1]) // w.rank == index
    y = base(x)
    y = y + (jnp.where(own, x @ w.a.astype(x.dtype), 0) @ w.b.astype(x.dtype)).astype(y.dtype)
    if w.gain is None:
        return y
    return jnp.where(index < 0, y, y * w.gain[index[:, 0]].astype(y.dtype))


def selected_rows(tokens: Array, w: SelectedLora, rows: Callable[[Array], Array]) -> Array:
    """Rows of an embedding under each row's adapter.

    Args:
        tokens: int32 [B, T].
        w: the embedding [V, D].
        rows: looks tokens up in `w.base`.

    Returns:
        [B, T, D], in the base's dtype.
    """
    y, index = rows(tokens), w.index[:, None, None]
    own = jnp.arange(w.a.shape[1]) // w.rank == index
    a = jnp.where(own, jnp.take(w.a, tokens, axis=0).astype(jnp.float32), 0)
    wide = y.astype(jnp.float32) + a @ w.b.astype(jnp.float32)
    if w.gain is not None:
        wide = jnp.where(index < 0, wide, wide * w.gain[w.index][:, None])
    return wide.astype(y.dtype)


def selected_bias(w: SelectedLora, count: int) -> Array | None:
    """What each row's adapter adds to the output, [count, out]; None where none adds anything.

    Args:
        count: the rows of x: B rows of count / B tokens.
    """
    if w.bias is None:
        return None
    index = jnp.repeat(w.index, count // len(w.index), total_repeat_length=count)
    return jnp.where(index[:, None] < 0, 0, w.bias[index])


def side_by_side(trees: Sequence[Params], product: Callable[[Array, Any], Array]) -> Params:
    """Per-layer parameters of one base under different adapters, as one tree in which no row uses any (see `select`).

    Args:
        trees: as the parameters of each adapter alone; tree i brings adapter i.
        product: multiplies [M, in] by a base weight -> [M, out]; DoRA's norms need it.

    Every row starts without an adapter: see `select`.

    Args:
        product: multiplies [M, in] by a base weight (DoRA's norms need it).

    Raises:
        PunaError: trees that differ in more than single adapters over linear weights.
    """

    def one(*leaves: Any) -> Any:
        found = [leaf for leaf in leaves if isinstance(leaf, LoraArray)]
        if not found:
            if not all(leaf is leaves[0] or _equal(leaf, leaves[0]) for leaf in leaves):
                raise PunaError(_WHOLE)
            return leaves[0]
        if any(isinstance(leaf.base, LoraArray) for leaf in found):
            raise PunaError("adapters beside each other are single ones: merge those that lie over one another first")
        base, rank = found[0].base, max(leaf.a.shape[-1] for leaf in found)
        under = [leaf.base if isinstance(leaf, LoraArray) else leaf for leaf in leaves]
        if not all(leaf is base or _equal(leaf, base) for leaf in under):
            raise PunaError(_WHOLE)
        n_in, n_out = found[0].shape
        biases = [added_bias(leaf) for leaf in leaves]
        has_bias = any(bias is not None for bias in biases)
        bias = jnp.stack([jnp.zeros(n_out) if bias is None else bias for bias in biases]) if has_bias else None
        a, b, gain = [], [], []
        for leaf in leaves:
            if not isinstance(leaf, LoraArray):
                a.append(jnp.zeros((n_in, rank)))
                b.append(jnp.zeros((rank, n_out)))
                gain.append(jnp.ones(n_out))
                continue
            missing = rank - leaf.a.shape[-1]
            a.append(jnp.pad(leaf.a, ((0, 0), (0, missing))))
            b.append(jnp.pad(leaf.b * leaf.scale, ((0, missing), (0, 0))))
            is_dora = leaf.magnitude is not None
            norm = column_norm(leaf, lambda x: product(x, base)) if is_dora else 1.0
            gain.append(jnp.asarray(leaf.magnitude) / norm if is_dora else jnp.ones(n_out))
        has_gain = any(leaf.magnitude is not None for leaf in found)
        return SelectedLora(
            base, jnp.concatenate(a, axis=1), jnp.concatenate(b, axis=0), jnp.stack(gain) if has_gain else None,
            bias, jnp.full(1, -1, jnp.int32), rank,
        )  # fmt: skip

    return jax.tree.map(one, *trees, is_leaf=lambda node: not isinstance(node, (dict, tuple)))


def _equal(a: Any, b: Any) -> bool:
    """Whether two leaves of any kind hold the same numbers."""
    one, other = jax.tree.leaves(a), jax.tree.leaves(b)
    return (
        type(a) is type(b)
        and len(one) == len(other)
        and all(bool(jnp.array_equal(x, y)) for x, y in zip(one, other, strict=True))
    )


def select(params: Params, index: Array) -> Params:
    """The parameters for a batch whose row i uses adapter `index[i]`.

    Args:
        params: as `side_by_side` makes them.
        index: int32 [B], -1 for none.
    """

    def choose(leaf: Any) -> Any:
        return replace(leaf, index=index) if isinstance(leaf, SelectedLora) else leaf

    return jax.tree.map(choose, params, is_leaf=lambda node: isinstance(node, SelectedLora))
