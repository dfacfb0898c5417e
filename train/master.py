"""How weights that are kept in bfloat16 take updates smaller than they can tell: optim.master.

A bfloat16 number has 8 bits: rounded to the nearest, an update below 1/512 of a weight is lost, and so is what one step
adds to a mean of squares with adam_beta2 = 0.999. Either a float32 copy takes the updates, or they are rounded at
random, up as often as makes the mean right (arXiv:1502.02551; of training, arXiv:2010.06192). Arrays in float32, as
adapters are, are left alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from model.errors import PunaError

MASTERS = ("stochastic", "float32", "none")
_BITS = 0x9E3779B9  # folded into the step's key, from which dropout draws too

Update = Callable[[Any, Any, Any], tuple[Any, Any]]


class Mastered(NamedTuple):
    """The optimizer's state with optim.master = "float32".

    Attributes:
        master: float32 copies of the parameters in bfloat16; None for the others.
        inner: the optimizer's own state, float32 too.
    """

    master: Any
    inner: Any


def check_master(master: str, param_dtype: str, trains_adapters_alone: bool) -> None:
    """Refuses a setting of optim.master that changes nothing; the default says nothing.

    Raises:
        PunaError: naming the setting that is in its way.
    """
    if master == MASTERS[0]:
        return
    if param_dtype != "bfloat16":
        raise PunaError(
            f"optim.master is {master!r}, which nothing reads with model.param_dtype = {param_dtype!r}: leave it out, "
            "or change model.param_dtype"
        )
    if trains_adapters_alone:
        raise PunaError(
            f"optim.master is {master!r}, which nothing reads with lora.modules_to_save = (), as adapters are float32: "
            "leave it out, or change lora.modules_to_save"
        )


def describe_master(master: str, parameters: int, optimizer: int) -> str:
    """What a plan says of the setting and of its alternative.

    Args:
        master: the setting.
        parameters: bytes of the weights in bfloat16.
        optimizer: bytes of the optimizer's state, the copies too.
    """
    if master == "float32":
        less = (2 * parameters + optimizer) / 2 / 2**30
        return f'optim.master = "float32": a copy and the optimizer are float32; "stochastic" takes {less:.2f} GiB less'
    more = (2 * parameters + optimizer) / 2**30
    how = "rounded at random" if master == "stochastic" else "rounded to the nearest, which loses small updates"
    return f'optim.master = "{master}": weights and optimizer are bfloat16, {how}; "float32" takes {more:.2f} GiB more'


def init(master: str, make: Callable[[Any], Any], params: Any) -> Any:
    """The optimizer's state over `params`.

    Args:
        master: the setting.
        make: the optimizer's own init.
        params: what trains.
    """
    if master != "float32" or not _any_narrow(params):
        return make(params)
    copies = jax.tree.map(lambda p: p.astype(jnp.float32) if _is_narrow(p) else None, params)
    return Mastered(copies, make(_widened(params)))


def updated(master: str, update: Update, grads: Any, opt_state: Any, params: Any, key: Array) -> tuple[Any, Any]:
    """The parameters and the optimizer's state after a step.

    Args:
        master: the setting.
        update: of (grads, opt_state, params), in any dtype: the new parameters in float32, or as they come, and the
            new state.
        grads: like `params`.
        opt_state: what `init` gave, or this function at the step before.
        params: what trains.
        key: the step's, from which the roundings come.
    """
    if isinstance(opt_state, Mastered):
        held = jax.tree.map(lambda p, copy: p if copy is None else copy, params, opt_state.master)
        new, inner = update(_widened(grads), opt_state.inner, held)
        copies = jax.tree.map(lambda copy, p: copy if _is_narrow(p) else None, new, params)
        return _nearest(new, params), Mastered(copies, inner)
    if master == "stochastic" and _any_narrow((params, opt_state)):
        new = update(_widened(grads), _widened(opt_state), _widened(params))
        return _rounded(new, (params, opt_state), key)
    new, state = update(grads, opt_state, params)
    return _nearest(new, params), state


def round_at_random(x: Array, words: Array, number: int = 0) -> Array:
    """`x` in bfloat16: one of the two numbers around it, the nearer one more often, so that the mean is `x`.

    What bfloat16 can tell stays as it is, and so does what is not finite.

    Args:
        x: float32.
        words: uint32 [2], from which the roundings come.
        number: of `x` among the arrays that share `words`.
    """
    raw = lax.bitcast_convert_type(x, jnp.uint32) + (_bits(x.shape, words, number) >> 16)
    rounded = lax.bitcast_convert_type((raw >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def _bits(shape: tuple[int, ...], words: Array, number: int) -> Array:
    """Random uint32 of each place of an array: a hash of its indices, whichever device holds them.

    MurmurHash3's last steps, once an axis: less work for each number than the 20 rounds of jax.random's Threefry.
    """
    bits = _mixed(words[0] ^ jnp.uint32(number))
    for axis in range(len(shape)):
        index = lax.broadcasted_iota(jnp.uint32, tuple(n if i == axis else 1 for i, n in enumerate(shape)), axis)
        bits = _mixed((bits + words[1]) ^ index)
    return jnp.broadcast_to(bits, shape)


def _mixed(bits: Array) -> Array:
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


def _rounded(new: Any, like: Any, key: Array) -> Any:
    """A tree in the dtypes of another, what that has in bfloat16 rounded at random."""
    words = jax.random.key_data(jax.random.fold_in(key, _BITS)).astype(jnp.uint32)
    leaves, structure = jax.tree.flatten(like)
    rounded = [
        round_at_random(x, words, number) if _is_narrow(old) and not _is_narrow(x) else x.astype(old.dtype)
        for number, (x, old) in enumerate(zip(structure.flatten_up_to(new), leaves, strict=True))
    ]
    return jax.tree.unflatten(structure, rounded)


def _nearest(new: Any, params: Any) -> Any:
    return jax.tree.map(lambda x, p: x.astype(p.dtype), new, params)


def _widened(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32) if _is_narrow(x) else x, tree)


def _any_narrow(tree: Any) -> bool:
    return any(map(_is_narrow, jax.tree.leaves(tree)))


def _is_narrow(x: Any) -> bool:
    return x.dtype == jnp.bfloat16
