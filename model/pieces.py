"""Parts of a LLaMA that other functions replace, by name, so that a model says of itself what it is.

An ablation names a function, as "my_module:block". The name is part of the model's config: whatever is trained with the
function is exported, read back and run with it, and plain LLaMA readers refuse it.
"""

import ast
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
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
    def from_hf(cls, said: dict[str, Any], where: str = "config.json") -> "Pieces":
        """Reads the `puna` object of a config.json.

        Args:
            said: the object.
            where: what messages call the file.

        Raises:
            PunaError: a part that is not known, a function that is not found, or whose code has changed since.
        """
        known = {f.name for f in fields(cls)}
        names = {part: name for part, name in said.items() if part != SHA256}
        if unknown := sorted(names.keys() - known):
            raise PunaError(f"{where}: puna names {', '.join(unknown)}; the parts known here are {', '.join(known)}")
        for part, name in names.items():
            found, expected = code_fingerprint(name, f"{where}: puna.{part}"), said.get(SHA256, {}).get(part)
            if expected not in (None, found):
                raise PunaError(
                    f"{where}: puna.{part} is {name!r}, whose code has changed since the model was written: take "
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
        setting: what gave the name, for the message.

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
    except Exception as error:  # whatever the user's module does when it is imported
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = (
            f"{error.filename}:{error.lineno}" if isinstance(error, SyntaxError) else f"{place.filename}:{place.lineno}"
        )
        raise PunaError(f'{setting} is "{name}", which fails at {where}: {type(error).__name__}: {error}') from error


def checked(
    own: Callable[..., Any], name: str, setting: str, call: str, wanted: Callable[..., Any]
) -> Callable[..., Any]:
    """A function of the user's, whose faults are said in one line while it is traced.

    Args:
        own: the function.
        name: its name, as "module:function".
        setting: what gave the name.
        call: how it is called and what it is to return, in words.
        wanted: of the positional arguments, what has the structure, shapes and dtypes of the result.

    Returns:
        The same function, which raises PunaError where `own` does not take its arguments, fails, or returns something
        else.
    """
    begin = f'{setting} is "{name}", which is called as {call}'

    @functools.wraps(own)
    def function(*args: Any, **keywords: Any) -> Any:
        try:
            inspect.signature(own).bind(*args, **keywords)
        except TypeError as error:
            raise PunaError(f"{begin}, and does not take that: {error}") from None
        except ValueError:  # of a function without a signature
            pass
        try:
            result = own(*args, **keywords)
        except PunaError:
            raise
        except Exception as error:  # whatever the user's function does
            place = traceback.extract_tb(error.__traceback__)[-1]
            said = " ".join(str(error).split())[:300]
            raise PunaError(
                f"{begin}, and fails at {place.filename}:{place.lineno}: {type(error).__name__}: {said}"
            ) from error
        expected, found = _shapes(wanted(*args)), _shapes(result)
        if expected != found:
            raise PunaError(f"{begin}, here {_in_words(expected)}; it returned {_in_words(found)}")
        return result

    return function


def _shapes(result: Any) -> Any:
    """What can be compared of a result: structure, shapes and dtypes."""
    if type(result) is tuple:
        return tuple(map(_shapes, result))
    shape, dtype = getattr(result, "shape", None), getattr(result, "dtype", None)
    return type(result).__name__ if shape is None else f"{dtype}{list(shape)}"


def _in_words(shapes: Any) -> str:
    return f"({', '.join(map(_in_words, shapes))})" if isinstance(shapes, tuple) else str(shapes)


def code_fingerprint(name: str, setting: str) -> str:
    """The SHA-256 of the source that the function "module:function" comes from, in hexadecimal.

    That is the module's file, the one that defines the function, and every file of the same project that they import.
    Puna's own files and installed packages are not of it.

    Args:
        setting: what gave the name, for the message.

    Raises:
        PunaError: there is no such function, or its source is not to be had.
    """
    function = load_function(name, setting)
    module = name.partition(":")[0]
    files: dict[str, bytes] = {}
    try:
        files[module] = _source(module)
        _add_imports(module, _folder(module), files)
        defined = getattr(function, "__module__", module)
        if defined != module and defined.partition(".")[0] not in _OURS:
            files[defined] = _source(defined)
            _add_imports(defined, _folder(module), files)
    except (TypeError, OSError, SyntaxError):
        raise PunaError(
            f'{setting} is "{name}", whose source is not to be had: give a function of a .py file'
        ) from None
    sums = [hashlib.sha256(files[key]).hexdigest() for key in sorted(files)]
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()


_OURS = ("model", "cli", "convert", "infer", "train")


def _source(module: str) -> bytes:
    return Path(inspect.getfile(sys.modules[module])).read_bytes()


def _folder(module: str) -> Path:
    """The folder from which the project's modules are imported."""
    path = Path(inspect.getfile(sys.modules[module])).resolve()
    return path.parents[module.count(".") + (path.name == "__init__.py")]


def _add_imports(module: str, folder: Path, files: dict[str, bytes]) -> None:
    """Adds to `files` the modules below `folder` that the file of `module` imports, and those that they import."""
    is_package = hasattr(sys.modules[module], "__path__")
    package = module if is_package else module.rpartition(".")[0]
    wanted: set[str] = set()
    for node in ast.walk(ast.parse(files[module])):
        if isinstance(node, ast.Import):
            wanted |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            wanted |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    for found in sorted(wanted - files.keys()):
        file = getattr(sys.modules.get(found), "__file__", None)
        if file is None or not file.endswith(".py") or found.partition(".")[0] in _OURS:
            continue
        if Path(file).resolve().is_relative_to(folder) and "site-packages" not in Path(file).parts:
            files[found] = _source(found)
            _add_imports(found, folder, files)
