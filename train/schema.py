"""TOML tables onto nested frozen dataclasses and back: every unknown key and every wrong type is collected by name.

What a setting means is said once, under "Attributes:" in the docstring of its dataclass, with its source in brackets at
the end where that is not this project; `settings` reads it from there.
"""

import inspect
import json
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, Literal, NamedTuple

from cli.files import at_home
from model.errors import PunaError
from train.hints import meant

PathText = Annotated[str, "a path, or something that may be one"]  # `~` at its start is the home folder


def read(cls: Any, table: dict[str, Any]) -> Any:
    """The record that a parsed TOML table means.

    Args:
        cls: a frozen dataclass, whose fields may be dataclasses.
        table: as tomllib gives it.

    Raises:
        PunaError: naming everything that is wrong with it.
    """
    reader = _Reader([setting.name for setting in settings(cls)])
    record = reader.table(cls, table, "")
    if reader.problems:
        raise PunaError("; ".join(reader.problems))
    return record


class _Reader:
    """Converts values to the types of their fields; `problems` collects what could not be, in words."""

    def __init__(self, known: list[str]) -> None:
        self.known = known
        self.problems: list[str] = []

    def table(self, cls: Any, table: dict[str, Any], where: str) -> Any:
        hints = typing.get_type_hints(cls, include_extras=True)
        unknown = [key for key in table if key not in hints]
        sections = [name for name in self.known if "." not in name]
        for key in unknown:
            is_section = not where and isinstance(table[key], dict)
            self.problems.append(not_a_setting(f"{where}{key}", sections if is_section else self.known))
        given = {key: self.value(hints[key], table[key], f"{where}{key}") for key in table if key in hints}
        for f in fields(cls):
            if f.default is MISSING and f.default_factory is MISSING and f.name not in given:
                self.problems.append(f"{where}{f.name} is missing; give it a value")
        return None if self.problems else cls(**given)

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


class Setting(NamedTuple):
    """One thing that can be set, or a section of them.

    Attributes:
        name: with its section, as "optim.learning_rate"; in tables of a list, as "data.path[].weight".
        type: in words.
        default: as TOML; "" for none, None for a setting that must be given and for a section.
        meaning: in words.
        source: the paper or the system that it is from.
    """

    name: str
    type: str
    default: str | None
    meaning: str
    source: str


def settings(cls: Any, where: str = "") -> Iterator[Setting]:
    """Everything that can be set in a dataclass and in those that it holds, in order.

    Args:
        cls: the dataclass.
        where: what its names begin with.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    meanings = _meanings(cls)
    for f in fields(cls):
        hint, name = hints[f.name], f"{where}{f.name}"
        inner = next(filter(is_dataclass, _choices(hint)), None)
        if inner is not None:
            text = inspect.cleandoc(inner.__doc__ or "").partition("\n\n")[0]
            yield Setting(name, "a section", None, text.partition(": ")[2] or text, "")
            yield from settings(inner, f"{name}.")
            continue
        meaning, source = meanings.get(f.name, ("", ""))
        if f.default is MISSING and f.default_factory is MISSING:
            default = None
        else:
            value = f.default_factory() if f.default_factory is not MISSING else f.default
            default = "" if value is None else _toml(value)
        yield Setting(name, _said(hint), default, meaning, source)
        for listed in (item for choice in _choices(hint) for item in _choices((typing.get_args(choice) or [None])[0])):
            if is_dataclass(listed):
                yield from settings(listed, f"{name}[].")


def _meanings(cls: Any) -> dict[str, tuple[str, str]]:
    """What the docstring of a dataclass says of each attribute: its meaning, and whence it is."""
    text = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2]
    found = {}
    for entry in re.split(r"\n(?=    \w)", f"\n{text}")[1:]:
        name, _, rest = " ".join(entry.split()).partition(": ")
        meaning, source = re.fullmatch(r"(.*?)(?: \[([^][]+)\])?", rest).groups()  # type: ignore[union-attr]
        found[name] = meaning, source or "Puna"
    return found


def not_a_setting(name: str, known: Sequence[str]) -> str:
    """In words that there is no setting of a name, and which was meant.

    Args:
        name: as it was written.
        known: the names of all settings.
    """
    found = meant(re.sub(r"\[\d+\]", "[]", name), known)
    return f"{name} is not a setting; " + (
        f"did you mean {found}?" if found else "`python -m train settings` lists what there is"
    )


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
