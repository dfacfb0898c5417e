"""Parts of a LLaMA that other functions replace, by name, so that a model says of itself what it is.

An ablation names a function, as "my_module:block". The name is part of the model's config: whatever is trained with the
function is exported, read back and run with it, and plain LLaMA readers refuse it.
"""

import hashlib
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from model.errors import PunaError

SHA256 = "sha256"  # under the `puna` key: the code of each piece as it was when the model was written


@dataclass(frozen=True)
class Pieces:
    """The replaced parts, each as "module:function"; None is LLaMA's own.

    Attributes:
        block: one decoder layer, as `model.llama.block`.
        attention: as `model.attention.attend`.
        norm: every norm, as `model.llama.rms_norm`.
    """

    block: str | None = None
    attention: str | None = None
    norm: str | None = None

    def names(self) -> dict[str, str]:
        """The pieces that are replaced: which part, and by what."""
        return {f.name: name for f in fields(self) if (name := getattr(self, f.name)) is not None}

    def __bool__(self) -> bool:
        return bool(self.names())

    @classmethod
    def from_hf(cls, said: dict[str, Any]) -> "Pieces":
        """Reads the `puna` object of a config.json.

        Raises:
            PunaError: a part that is not known, a function that is not found, or whose code has changed since.
        """
        known = {f.name for f in fields(cls)}
        names = {part: name for part, name in said.items() if part != SHA256}
        if unknown := sorted(names.keys() - known):
            raise PunaError(
                f"config.json: puna names {', '.join(unknown)}; the parts known here are {', '.join(known)}"
            )
        for part, name in names.items():
            found, expected = code_fingerprint(name, f"config.json: puna.{part}"), said.get(SHA256, {}).get(part)
            if expected not in (None, found):
                raise PunaError(
                    f"config.json: puna.{part} is {name!r}, whose code has changed since the model was written: take "
                    f"it back, or remove {part} from puna.{SHA256} to use the code as it is now"
                )
        return cls(**names)

    def to_hf(self) -> dict[str, Any]:
        """The `puna` object of a config.json: the names, and the SHA-256 of the code of each.

        Raises:
            PunaError: a function is not found, or its source is not to be had.
        """
        names = self.names()
        return {**names, SHA256: {part: code_fingerprint(name, part) for part, name in names.items()}}


def load_function(name: str, setting: str) -> Callable[..., Any]:
    """The function that "module:function" names.

    Args:
        name: the module, as `import` takes it, and the function in it.
        setting: what named it, for the error.

    Raises:
        PunaError: there is none.
    """
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise PunaError(
            f'{setting} is "{name}": {error}; write "module:function", and start from the folder that holds the module '
            "or put it on PYTHONPATH"
        ) from None


def code_fingerprint(name: str, setting: str) -> str:
    """The SHA-256 of the source file in which the function "module:function" is defined, in hexadecimal.

    Args:
        name: as `load_function` takes it.
        setting: what named it, for the error.

    Raises:
        PunaError: there is no such function, or its source is not to be had.
    """
    function = load_function(name, setting)
    try:
        return hashlib.sha256(Path(inspect.getfile(inspect.unwrap(function))).read_bytes()).hexdigest()
    except (TypeError, OSError):
        raise PunaError(
            f'{setting} is "{name}", whose source is not to be had: give a function of a .py file'
        ) from None
