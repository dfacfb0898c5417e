"""A conversation: a system message and exchanges of a question and its answer, and the file that holds them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cli.files import atomic_path, write_json
from model.chat import Message
from model.errors import PunaError
from model.json_file import read_json


class Exchange(NamedTuple):
    """What the user wrote, and what the assistant answered."""

    user: str
    assistant: str


@dataclass(frozen=True)
class Conversation:
    """Exchanges under a system message, if any, and the name of the template that they were written with, if any."""

    system: str | None = None
    exchanges: tuple[Exchange, ...] = ()
    template: str | None = None

    def asking(self, user: str) -> list[Message]:
        """The messages that ask for an answer to `user`, the whole conversation before it."""
        return [*_system(self.system), *_turns(self.exchanges), {"role": "user", "content": user}]

    def save(self, path: Path) -> None:
        """Writes it to the file `path` as JSON, complete or not at all: {"template", "system", "messages"}.

        Raises:
            PunaError: `path` is anything but a saved conversation, which alone is replaced, or cannot be written.
        """
        try:
            if path.is_symlink() or path.exists():
                _check_replaceable(path)
            with atomic_path(path, overwrite=True) as temporary:
                write_json(
                    temporary,
                    {"template": self.template, "system": self.system, "messages": _turns(self.exchanges)},
                )
        except OSError as error:
            raise PunaError(f"{path}: {error.strerror}") from None


def load_conversation(path: Path) -> Conversation:
    """The conversation that `Conversation.save` wrote to `path`, or that was written by hand in its form.

    Raises:
        PunaError: there is none, or it is not in that form.
    """
    try:
        said = read_json(path)
    except OSError as error:
        raise PunaError(f"{path}: {error.strerror}") from None
    if unknown := said.keys() - {"template", "system", "messages"}:
        raise PunaError(f"{path} holds {sorted(unknown)}: a conversation has template, system and messages alone")
    messages = said.get("messages")
    if not isinstance(messages, list) or len(messages) % 2:
        raise PunaError(f"{path}: messages is no list of complete exchanges, each a question and its answer")
    contents = [
        _content(path, number, message, ("assistant", "user")[number % 2]) for number, message in enumerate(messages, 1)
    ]
    return Conversation(
        system=_optional(path, "system", said.get("system")),
        exchanges=tuple(map(Exchange, contents[::2], contents[1::2])),
        template=_optional(path, "template", said.get("template")),
    )


def _system(system: str | None) -> list[Message]:
    return [] if system is None else [{"role": "system", "content": system}]


def _turns(exchanges: Sequence[Exchange]) -> list[Message]:
    return [
        message
        for exchange in exchanges
        for message in (
            {"role": "user", "content": exchange.user},
            {"role": "assistant", "content": exchange.assistant},
        )
    ]


def _check_replaceable(path: Path) -> None:
    try:
        load_conversation(path)
    except PunaError:
        raise PunaError(f"{path} exists and is no saved conversation: give another file") from None


def _content(path: Path, number: int, message: Any, role: str) -> str:
    if not isinstance(message, dict) or message.keys() != {"role", "content"} or message["role"] != role:
        raise PunaError(f"{path}: message {number} has not the form {{role, content}} with the role {role}")
    content = _optional(path, f"the content of message {number}", message["content"])
    if content is None:
        raise PunaError(f"{path}: the content of message {number} is null: give a text")
    return content


def _optional(path: Path, name: str, value: Any) -> str | None:
    if value is not None and not (isinstance(value, str) and is_unicode(value)):
        raise PunaError(f"{path}: {name} is no Unicode text")
    return value


def is_unicode(text: str) -> bool:
    """Whether `text` can be written as UTF-8: it holds no lone surrogate, as bytes that are no UTF-8 are read as."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)
