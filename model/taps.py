"""Activations by name, as a pass makes them: what `hidden` hands over where it is asked to, and no cost where not."""

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from model.errors import PunaError

# Of a layer: what its two norms give, what attention and the MLP add to the residual stream; and that stream itself.
PARTS = ("attn_norm", "attention", "mlp_norm", "mlp", "")
_NAME = re.compile(r"embed|final_norm|layers\.(\d+|\*)(?:\.(\w+))?")


def untouched(name: str, x: Array) -> Array:
    """What `block` hands its activations to where nobody asks for them: gives them back."""
    return x


class Capture:
    """Collects activations of one pass, while it is traced.

    Args:
        names: "embed", "final_norm"; "layers.3" is the residual stream behind layer 3, "layers.3.mlp" one of its PARTS,
            and "layers.*.mlp" that of all layers, stacked. Of scanned layers a part is kept of all if it is of one.
        reduce: a function from an activation [B, T, D] to what is kept of it; None keeps all.

    Attributes:
        found: the activations by name, once the pass is traced.

    Raises:
        PunaError: a name of nothing.
    """

    def __init__(self, names: Sequence[str], reduce: Callable[[Array], Any] | None = None) -> None:
        self.names, self._reduce = tuple(names), reduce or (lambda x: x)
        self.found: dict[str, Any] = {}
        self._parts: dict[str, tuple[str, str]] = {}  # name: the layer and its part
        for name in self.names:
            match = _NAME.fullmatch(name)
            if match is None or (match[2] or "") not in PARTS:
                known = ", ".join(f"layers.3.{part}" for part in PARTS[:-1])
                raise PunaError(
                    f"{name!r} names no activation; give embed, final_norm, layers.3, {known}, or a * for 3"
                )
            if match[1] is not None:
                self._parts[name] = match[1], match[2] or ""

    def keep(self, name: str, x: Array) -> None:
        """Takes an activation outside of the layers."""
        if name in self.names:
            self.found[name] = self._reduce(x)

    def watched(self, block: Callable[..., Any]) -> Callable[..., Any]:
        """A decoder layer that returns what is wanted of it as a third result, by part.

        Raises:
            PunaError: the block does not show its parts.
        """
        wanted = {part for _, part in self._parts.values()}
        if (inner := sorted(wanted - {""})) and not shows_parts(block):
            raise PunaError(f"{inner[0]} of a layer cannot be captured: this block has no keyword tap; give it one")

        def call(x: Array, *rest: Any) -> tuple[Array, Any, dict[str, Any]]:
            seen: dict[str, Any] = {}

            def tap(part: str, x: Array) -> Array:
                if part in wanted:
                    seen[part] = self._reduce(x)
                return x

            x, cache = block(x, *rest, **({"tap": tap} if inner else {}))
            tap("", x)
            return x, cache, seen

        return call

    def keep_layers(self, seen: dict[str, Any], depth: int) -> None:
        """Takes the parts of all layers, stacked.

        Raises:
            PunaError: a name is of a layer that there is not, or of a part that the block did not show.
        """
        for name, (layer, part) in self._parts.items():
            if part not in seen:
                raise PunaError(f"{name} cannot be captured: the block does not show it (its keyword tap)")
            if layer == "*":
                self.found[name] = seen[part]
            elif int(layer) < depth:
                self.found[name] = jax.tree.map(lambda x, i=int(layer): x[i], seen[part])
            else:
                raise PunaError(f"{name}: the model has the layers 0 to {depth - 1}")


def shows_parts(block: Callable[..., Any]) -> bool:
    """Whether a decoder layer takes the keyword tap."""
    parameters = inspect.signature(block).parameters.values()
    return any(each.name == "tap" or each.kind is each.VAR_KEYWORD for each in parameters)


def unwatched(block: Callable[..., Any]) -> Callable[..., Any]:
    """A decoder layer of which nothing is wanted."""
    return lambda *given: (*block(*given), {})


def stacked(seen: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The parts of layers that were run one by one, as a scan would give them."""
    return jax.tree.map(lambda *each: jnp.stack(each), *seen)
