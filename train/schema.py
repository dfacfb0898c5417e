"""TOML tables onto nested frozen dataclasses and back: every unknown key and every wrong type is collected by name."""

import difflib
import json
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, Literal

from cli.files import at_home
from model.errors import PunaError

PathText = Annotated[str, "a path, or something that may be one"]  # `~` at its start is the home folder


def read(cls: Any, table: dict[str, Any]) -> Any:
    """The record that a parsed TOML table means.

    Args:
        cls: a frozen dataclass, whose fields may be dataclasses.
        table: as tomllib gives it.

    Raises:
        PunaError: naming everything that is wrong with it.
    """
    reader = _Reader(tuple(_settings(cls)))
    record = reader.table(cls, table, "")
    if reader.problems:
        raise PunaError("; ".join(reader.problems))
    return record


class _Reader:
    """Converts values to the types of their fields; `problems` collects what could not be, in words."""

    def __init__(self, known: tuple[str, ...]) -> None:
        self.known = known
        self.problems: list[str] = []

    def table(self, cls: Any, table: dict[str, Any], where: str) -> Any:
        hints = typing.get_type_hints(cls, include_extras=True)
        unknown = [key for key in table if key not in hints]
        self.problems += [
            f"{where}{key} is not a setting; did you mean {self.nearest(key, where, hints)}?" for key in unknown
        ]
        given = {key: self.value(hints[key], table[key], f"{where}{key}") for key in table if key in hints}
        for f in fields(cls):
            if f.default is MISSING and f.default_factory is MISSING and f.name not in given:
                self.problems.append(f"{where}{f.name} is missing; give it a value")
        return None if self.problems else cls(**given)

    def nearest(self, key: str, where: str, hints: dict[str, Any]) -> str:
        """The known setting nearest to `key`: of the same name in another section, else the likest in this one."""
        same = [name for name in self.known if name.rpartition(".")[2] == key]
        return same[0] if same else where + difflib.get_close_matches(key, hints, n=1, cutoff=0.0)[0]

    def value(self, hint: Any, value: Any, where: str) -> Any:
        for choice in _choices(hint):
            if (converted := self.convert(choice, value, where)) is not _FAILED:
                return converted
        self.problems.append(f"{where} is {json.dumps(value, default=str)}; it must be {_said(hint)}")
        return None

    def convert(self, hint: Any, value: Any, where: str) -> Any:
        """`value` as `hint`, or `_FAILED`; a table or a list reports what is wrong inside it by itself."""
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if hint is Any:
            return value
        if origin is Annotated:
            return (
                str(at_home(value))
                if type(value) is str and value.startswith("~")
                else self.convert(args[0], value, where)
            )
        if is_dataclass(hint) and isinstance(value, dict):
            return self.table(hint, value, f"{where}.")
        if origin is tuple and isinstance(value, list):
            return tuple(self.value(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        if origin is dict and isinstance(value, dict):
            return {key: self.value(args[1], item, f"{where}.{key}") for key, item in value.items()}
        if origin is Literal:
            return value if value in args else _FAILED
        if hint is float and type(value) is int:
            return float(value)
        return value if type(value) is hint else _FAILED


_FAILED = object()


def _settings(cls: Any, where: str = "") -> Iterator[str]:
    """The dotted names of everything that can be set."""
    for name, hint in typing.get_type_hints(cls).items():
        inner = [choice for choice in _choices(hint) if is_dataclass(choice)]
        yield f"{where}{name}"
        for choice in inner:
            yield from _settings(choice, f"{where}{name}.")


def _choices(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _said(hint: Any) -> str:
    """A type in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _said(args[0])
    if origin is Literal:
        return "one of " + ", ".join(json.dumps(arg) for arg in args)
    if origin is tuple:
        return f"a list, each item {_said(args[0])}"
    if origin is dict or is_dataclass(hint):
        return "a table"
    if len(choices := [c for c in _choices(hint) if c is not types.NoneType]) > 1 or choices[0] is not hint:
        return " or ".join(map(_said, choices))
    return {int: "an integer", float: "a number", bool: "true or false", str: "a string"}[hint]


def dump(config: Any) -> str:
    """The TOML text that `read` reads back to the same Config; settings that are None are left out."""
    lines: list[str] = []
    for section in fields(config):
        if (value := getattr(config, section.name)) is not None:
            lines += [f"[{section.name}]", *(f"{k} = {_toml(v)}" for k, v in _items(value)), ""]
    return "\n".join(lines)


def _items(record: Any) -> Iterator[tuple[str, Any]]:
    for f in fields(record):
        if (value := getattr(record, f.name)) is not None:
            yield f.name, value


def _toml(value: Any) -> str:
    if is_dataclass(value):
        return "{" + ", ".join(f"{k} = {_toml(v)}" for k, v in _items(value)) + "}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)


def flat(record: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """The settings of a dataclass and those in it, by dotted name; what is None is left out.

    Args:
        record: the dataclass.
        where: what the names begin with, as "run.".

    Yields:
        Pairs of a name and its value, as ("run.seed", 0).
    """
    for name, value in _items(record):
        if is_dataclass(value):
            yield from flat(value, f"{where}{name}.")
        else:
            yield f"{where}{name}", value
