"""The activations of a pass, by name."""

from collections.abc import Callable, Sequence
from typing import Any

from jax import Array

from model.cache import KVCache
from model.config import LlamaConfig
from model.llama import hidden
from model.params import Params
from model.taps import Capture


def captured(
    params: Params,
    tokens: Array,
    config: LlamaConfig,
    names: Sequence[str],
    reduce: Callable[[Array], Any] | None = None,
    **keywords: Any,
) -> tuple[Array, KVCache | None, dict[str, Any]]:
    """What `hidden` gives, and activations of the pass by name.

    Args:
        tokens: int32 [B, T].
        names: as "layers.3.mlp" or "layers.*"; see `model.taps.Capture`.
        reduce: what is kept of an activation [B, T, D]; None keeps all.
        keywords: those of `hidden`.

    Returns:
        The two results of `hidden`, and the activations.

    Raises:
        PunaError: as `hidden`; a name of nothing, or of a part that the model's block does not show.
    """
    capture = Capture(names, reduce)
    x, cache = hidden(params, tokens, config, capture=capture, **keywords)
    return x, cache, capture.found
