"""Who answers in a conversation: a model that this process runs. (`endpoint.py` has a server's.)"""

import bisect
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from infer.engine import Engine
from infer.load import LONGEST
from infer.request import Request
from infer.sample import Sampling
from model.chat import TEMPLATES, Message, Template, encode_prompt, get_template, stop_ids
from model.config import LlamaConfig
from model.errors import JobFailed, PunaError
from model.tokenizer import Tokenizer

REPLY = 512  # tokens, where nothing is said

Note = Callable[[str], None]  # shows a line beside the conversation


class Speaker(Protocol):
    """What answers messages. `template` is the name of the conversation template that it writes them with, if any."""

    @property
    def template(self) -> str | None: ...

    def reply(self, messages: Sequence[Message], attempt: int = 0) -> Generator[str, None, bool]:
        """The answer to the last message, piece by piece; closing the generator stops it.

        Args:
            messages: system (perhaps), user and assistant in turn, user.
            attempt: how often this answer was given before: another seed each time.

        Returns:
            Whether the answer was cut off because it had as many tokens as an answer may have.

        Raises:
            PunaError: the messages cannot be answered, or no longer.
        """
        ...

    def with_template(self, name: str) -> "Speaker":
        """The same with another template. Raises PunaError where it cannot be used."""
        ...


def choose_template(name: str | None, tokenizer: Tokenizer, system: str | None = None) -> str:
    """The name of the template to use: `name`, or the checkpoint's own where none is given.

    Raises:
        PunaError: there is none, or it cannot be written with this tokenizer and system message.
    """
    if name is None and tokenizer.chat_template is None:
        raise PunaError(
            f"this model brings no chat template: name the one it was trained with by --template, one of "
            f"{', '.join(TEMPLATES)}, or a path to a .jinja file"
        )
    name = name or "chat_template"
    first = [] if system is None else [{"role": "system", "content": system}]
    try:
        encode_prompt([*first, {"role": "user", "content": "?"}], get_template(name, tokenizer), tokenizer)
    except (OSError, UnicodeDecodeError) as error:
        raise PunaError(f"template {name} cannot be read: {error}") from None
    return name


def room(config: LlamaConfig, context: int | None, max_new_tokens: int | None) -> tuple[int, int]:
    """The context, and the most tokens of a reply in it, that a conversation gets where they are None.

    Raises:
        PunaError: a context that the model has not, or no room in it for a prompt.
    """
    most = config.max_position_embeddings
    if context is not None and not 2 <= context <= most:
        raise PunaError(f"--context is {context}: give a number from 2 to {most} (max_position_embeddings)")
    context = context or min(most, LONGEST)
    new = max_new_tokens if max_new_tokens is not None else min(REPLY, context // 2)
    if not 0 < new < context:
        raise PunaError(f"max_new_tokens is {new}: give a number above 0 and below the context of {context}")
    return context, new


def fit(
    messages: Sequence[Message], template: Template, tokenizer: Tokenizer, room: int
) -> tuple[list[int], int] | None:
    """The prompt of the latest exchanges that fit, and how many older ones are left out.

    Args:
        messages: system (perhaps), user and assistant in turn, user; the system message stays.
        room: most tokens of the prompt.

    Returns:
        None where the last message does not fit even alone.
    """
    first = int(messages[0]["role"] == "system")
    exchanges = (len(messages) - first) // 2

    def prompt(left_out: int) -> list[int]:
        return encode_prompt([*messages[:first], *messages[first + 2 * left_out :]], template, tokenizer)

    left_out = bisect.bisect_left(range(exchanges), True, key=lambda count: len(prompt(count)) <= room)
    ids = prompt(left_out)
    return (ids, left_out) if len(ids) <= room else None


@dataclass(frozen=True)
class LocalModel:
    """A model that `engine` runs, in another thread (see `running`).

    Args:
        template: the name of the conversation template.
        sampling: how tokens are chosen; attempt n at an answer adds n to its seed.
        max_new_tokens: most tokens of an answer.
        eos_ids: tokens that end a text, beside the template's.
        note: hears when exchanges are left out of a prompt.
    """

    engine: Engine
    tokenizer: Tokenizer
    template: str
    sampling: Sampling
    max_new_tokens: int
    eos_ids: Sequence[int]
    note: Note

    def with_template(self, name: str) -> "LocalModel":
        """The same with another template. Raises PunaError where it cannot be used."""
        return replace(self, template=choose_template(name, self.tokenizer))

    def reply(self, messages: Sequence[Message], attempt: int = 0) -> Generator[str, None, bool]:
        """The answer without white space at its ends. The oldest exchanges that do not fit are left out, aloud."""
        template = get_template(self.template, self.tokenizer)
        fitting = fit(messages, template, self.tokenizer, self.engine.length - self.max_new_tokens)
        if fitting is None:
            system = messages[:1] if messages[0]["role"] == "system" else []
            alone = encode_prompt([*system, messages[-1]], template, self.tokenizer)
            raise PunaError(
                f"the message is too long: with the system message and the template it has {len(alone)} tokens, and "
                f"max_new_tokens is {self.max_new_tokens}, together more than the context of {self.engine.length}"
            )
        prompt, left_out = fitting
        if left_out:
            self.note(f"context of {self.engine.length} tokens: the {left_out} oldest exchanges are left out")
        seed = (self.sampling.seed + attempt) % 2**63
        request = Request(
            prompt,
            self.max_new_tokens,
            replace(self.sampling, seed=seed),
            stop_ids=tuple(dict.fromkeys((*stop_ids(template, self.tokenizer), *self.eos_ids))),
            stop=template.stop,
        )
        ended: list[str | None] = []
        yield from stripped(self._pieces(request, ended.append))
        return ended == ["length"]

    def _pieces(self, request: Request, end: Callable[[str | None], None]) -> Generator[str]:
        """The text of a request as it comes; `end` hears why it ended. The engine's thread sends what there is so far
        after every token."""
        sent: queue.SimpleQueue[tuple[str, str | None]] = queue.SimpleQueue()
        progress = self.engine.submit(request, lambda progress: sent.put((progress.text, progress.finish)))
        shown, finish = 0, None
        try:
            while finish is None:
                text, finish = sent.get()
                yield text[shown:]
                shown = len(text)
        finally:
            progress.cancel()
            while progress.finish is None:  # its row is free for the next request then
                sent.get()
        if progress.error is not None:
            raise JobFailed(f"the model failed: {type(progress.error).__name__}: {progress.error}")
        end(progress.finish)


def stripped(pieces: Iterable[str]) -> Iterator[str]:
    """The pieces of a text without the white space at its ends: templates write their own there."""
    held = None
    for piece in pieces:
        piece = piece.lstrip() if held is None else held + piece
        text = piece.rstrip()
        if text:
            held = piece[len(text) :]
            yield text
        elif held is not None:
            held = piece


@contextmanager
def running(engine: Engine) -> Iterator[None]:
    """Runs `engine` in a thread of its own: an interrupt of this thread never falls into the middle of a step."""
    stopping = threading.Event()
    thread = threading.Thread(target=engine.run, args=(stopping,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()
