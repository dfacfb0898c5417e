"""The two programs of `infer chat`: a conversation in the terminal, and one in a pipe, with the same commands.

Replies go to stdout, everything else to stderr.
"""

import os
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import platformdirs
from prompt_toolkit import PromptSession
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output.defaults import create_output
from rich.console import Console
from rich.text import Text

from infer.conversation import Conversation, Exchange, is_unicode, load_conversation
from infer.speaker import Speaker
from model.errors import PunaError

HELP = """\
!!reset        forget the conversation; the system message stays
!!remove       forget the last exchange
!!regen        ask for the last reply again, with another seed
!!save FILE    write the conversation to FILE as JSON; only a saved conversation is replaced
!!load FILE    go on with the conversation in FILE
!!system TEXT  set the system message; without TEXT there is none
!!help         these lines
!!exit         leave, as Ctrl-D does
A message of several lines: Alt+Enter (or Esc, then Enter) begins a new line, and so does Enter after a backslash.
Ctrl-C stops a reply and keeps what came. A line that begins with a space is a message, whatever follows.\
"""

# What could move the cursor or give the terminal orders, in a text that others wrote.
_CONTROLS = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0)], "\ufffd") | {10: "\n", 9: "\t", 13: ""}


def note(line: str) -> None:
    """Shows a line beside the conversation."""
    Console(stderr=True).print(Text(line.translate(_CONTROLS)), style="dim", soft_wrap=True)


class Chat:
    """A conversation with `speaker`, and what the user does with it; `write` shows a piece of a reply."""

    def __init__(self, speaker: Speaker, conversation: Conversation, write: Callable[[str], None]):
        self.speaker, self.conversation, self.write = speaker, conversation, write
        self._attempt = 0  # at the last reply; 0 is the first
        self._commands: dict[str, Callable[[str], None]] = {
            "reset": self._reset,
            "remove": self._remove,
            "regen": self._regenerate,
            "save": self._save,
            "load": self._load,
            "system": self._set_system,
            "help": lambda text: note(HELP),
        }

    def take(self, line: str) -> None:
        """Does what `line` says: a command, or a message to answer. An empty line says nothing.

        Raises:
            PunaError: it cannot be done, or the reply broke off; the conversation is as before.
            KeyboardInterrupt: before any of the reply came; the conversation is as before.
        """
        if not is_unicode(line):
            raise PunaError("the line is no UTF-8 text")
        if not line.startswith("!!"):
            if line.strip():
                self._answer(self.conversation, line.strip(), 0)
            return
        name, text = (*line[2:].split(maxsplit=1), "", "")[:2]
        if name not in self._commands:
            raise PunaError(f"!!{name} is no command: !!help lists them")
        self._commands[name](text.strip())

    def _answer(self, before: Conversation, user: str, attempt: int) -> None:
        """Asks for the reply to `user` that follows `before`; an interrupted one is kept as far as it came."""
        pieces: list[str] = []
        is_cut_off = False

        def written(reply: Generator[str, None, bool]) -> Iterator[str]:
            nonlocal is_cut_off
            is_cut_off = yield from reply

        try:
            with closing(self.speaker.reply(before.asking(user), attempt)) as reply:
                for piece in written(reply):
                    pieces.append(piece)
                    self.write(piece)
        except KeyboardInterrupt:
            if not pieces:
                raise
        except PunaError:
            if pieces:
                self.write("\n")
            raise
        self.write("\n")
        if is_cut_off:
            note("the reply was cut off: it has the most tokens that one may have (--max-new-tokens)")
        exchange = Exchange(user, "".join(pieces))
        self.conversation, self._attempt = replace(before, exchanges=(*before.exchanges, exchange)), attempt

    def _reset(self, text: str) -> None:
        self.conversation, self._attempt = replace(self.conversation, exchanges=()), 0

    def _remove(self, text: str) -> None:
        self.conversation, self._attempt = self._without_last(), 0

    def _regenerate(self, text: str) -> None:
        before = self._without_last()
        self._answer(before, self.conversation.exchanges[-1].user, self._attempt + 1)

    def _without_last(self) -> Conversation:
        if not self.conversation.exchanges:
            raise PunaError("the conversation is empty: write a message first")
        return replace(self.conversation, exchanges=self.conversation.exchanges[:-1])

    def _save(self, text: str) -> None:
        path = _path("save", text)
        self.conversation.save(path)
        note(f"{path}: {len(self.conversation.exchanges)} exchanges written")

    def _load(self, text: str) -> None:
        path = _path("load", text)
        loaded = load_conversation(path)
        if loaded.template is not None:
            self.speaker = self.speaker.with_template(loaded.template)
        self.conversation, self._attempt = replace(loaded, template=self.speaker.template or loaded.template), 0
        note(f"{path}: {len(loaded.exchanges)} exchanges read")

    def _set_system(self, text: str) -> None:
        self.conversation = replace(self.conversation, system=text or None)


def _path(command: str, text: str) -> Path:
    if not text or "\0" in text:
        raise PunaError(f"!!{command} names no file: give one")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # no such user's home
        raise PunaError(f"!!{command} {text}: {error}") from None


def converse(chat: Chat, read: Callable[[str], str]) -> bool:
    """Takes the lines that `read` gives until it raises EOFError, or a line says !!exit.

    Args:
        read: the next line, beginning from the text that it is given: what was refused is there to be changed.

    Returns:
        Whether every line was done.
    """
    done, again = True, ""
    while True:
        try:
            before, again = again, ""
            line = read(before)
            if line.rstrip() == "!!exit":
                return done
            again = "" if line.startswith("!!") else line
            chat.take(line)
            again = ""
        except EOFError:
            return done
        except KeyboardInterrupt:
            done = False
        except PunaError as error:
            note(f"error: {error}")
            done = False


# --- in a pipe


def in_pipe(chat: Chat) -> bool:
    """Takes the lines of stdin, UTF-8; a line that ends with a backslash goes on in the next.

    Returns:
        Whether every line was done.
    """
    lines = iter(sys.stdin.buffer)

    def read(default: str) -> str:
        text = _next_line(lines)
        while text.endswith("\\"):
            text = f"{text[:-1]}\n{_next_line(lines, last='')}"
        return text

    return converse(chat, read)


def _next_line(lines: Iterator[bytes], last: str | None = None) -> str:
    line = next(lines, None)
    if line is not None:
        return line.decode("utf-8", "surrogateescape").rstrip("\r\n")
    if last is None:
        raise EOFError
    return last


def to_pipe(piece: str) -> None:
    """Shows a piece of a reply as it is."""
    print(piece, end="", flush=True)


# --- in the terminal


def in_terminal(chat: Chat) -> None:
    """Takes what is typed. Ctrl-C stops a reply, or empties the input line; Ctrl-D leaves."""
    keys = KeyBindings()
    keys.add("enter", filter=has_focus(DEFAULT_BUFFER))(_enter)
    keys.add("escape", "enter", filter=has_focus(DEFAULT_BUFFER))(_new_line)
    session: PromptSession[str] = PromptSession(
        "> ",
        multiline=True,
        key_bindings=keys,
        history=_history(),
        prompt_continuation="  ",
        output=create_output(always_prefer_tty=True),
    )
    with _keyboard_interrupts():
        converse(chat, lambda default: session.prompt(default=default))


def to_terminal(piece: str) -> None:
    """Shows a piece of a reply, without what would give the terminal orders."""
    to_pipe(piece.translate(_CONTROLS))


def _enter(event: KeyPressEvent) -> None:
    """Sends the message; after a backslash at its end, begins a new line in its place."""
    buffer = event.current_buffer
    if buffer.text.endswith("\\") and buffer.document.is_cursor_at_the_end:
        buffer.delete_before_cursor()
        buffer.insert_text("\n")
    else:
        buffer.validate_and_handle()


def _new_line(event: KeyPressEvent) -> None:
    event.current_buffer.insert_text("\n")


class _Inputs(FileHistory):
    """What was typed, in a file; a disk that takes no more of it stops nobody."""

    def store_string(self, string: str) -> None:
        try:
            super().store_string(string)
        except OSError as error:
            note(f"{self.filename!s} was not written: {error.strerror}")


def _history() -> History:
    """The inputs of earlier conversations, which only the user may read."""
    path = platformdirs.user_state_path("puna") / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError as error:
        note(f"inputs are not kept for the next time: {path}: {error.strerror}")
        return InMemoryHistory()
    return _Inputs(path)


@contextmanager
def _keyboard_interrupts() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, whatever it does elsewhere."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
