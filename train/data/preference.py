"""A preferred and a rejected answer to one prompt, in the forms of TRL and of Anthropic's HH, as prompt and completion.

Each pair becomes two records of the format prompt_completion, which are written and masked as any such record is.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

from model.errors import PunaError
from train.data.messages import ROLES
from train.data.readers import kind

Record = Mapping[str, Any]

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ANSWER = "\n\nAssistant:"
_OWN_KEYS = ("prompt", "chosen", "rejected", "completion")


def as_pair(record: Record, as_text: bool = False) -> tuple[Record, Record]:
    """The records of the chosen and of the rejected answer, each with its prompt and its completion.

    Both answers are text, or both are messages. Without a prompt of their kind they hold it themselves: it is what
    both begin with (TRL's rule), whole messages of messages; each keeps at least one message as its completion.

    Args:
        record: under our keys.
        as_text: a transcript of Anthropic's HH ("\\n\\nHuman: ...\\n\\nAssistant: ...") stays the text that it is, and
            its completions begin behind the last "Assistant:" that both share; else it becomes messages.

    Raises:
        PunaError: an answer is missing or of another kind than the other, or messages have no prompt in common.
    """
    for key in ("chosen", "rejected"):
        if record.get(key) is None:
            raise PunaError(f"key {key!r} is missing; the record has {', '.join(map(repr, record)) or 'no keys'}")
    chosen: Any = record["chosen"]
    rejected: Any = record["rejected"]
    prompt: Any = record.get("prompt")
    if type(chosen) is not type(rejected) or not isinstance(chosen, str | list):
        given = f"{kind(chosen)} and {kind(rejected)}"
        raise PunaError(f"keys 'chosen' and 'rejected': expected two texts or two lists, got {given}")
    if prompt is not None and not isinstance(prompt, str | list):
        raise PunaError(f"key 'prompt': expected text or a list with messages, got {kind(prompt)}")
    if isinstance(chosen, str) and isinstance(prompt, list):
        raise PunaError("key 'prompt' is a list, and 'chosen' and 'rejected' are text: give all three as one kind")
    if type(prompt) is not type(chosen):  # a text beside whole conversations is their first message again
        if isinstance(chosen, str) and not as_text and _TURN.match(chosen) and _TURN.match(rejected):
            chosen, rejected = _messages(chosen), _messages(rejected)
        shared = _shared_messages(chosen, rejected) if isinstance(chosen, list) else _shared_text(chosen, rejected)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    rest = {key: value for key, value in record.items() if key not in _OWN_KEYS}
    return {**rest, "prompt": prompt, "completion": chosen}, {**rest, "prompt": prompt, "completion": rejected}


def _shared_text(chosen: str, rejected: str) -> int:
    """How many characters are the prompt of both."""
    shared = os.path.commonprefix([chosen, rejected])
    if _TURN.match(chosen) and (last := shared.rfind(_ANSWER)) >= 0:
        return last + len(_ANSWER)
    return len(shared) - shared.endswith(" ")  # the blank before a word is part of the word


def _shared_messages(chosen: list[Any], rejected: list[Any]) -> int:
    """How many messages are the prompt of both."""
    most = min(len(chosen), len(rejected)) - 1
    shared = next((i for i in range(most) if chosen[i] != rejected[i]), most)
    if shared < 1:
        raise PunaError(
            "keys 'chosen' and 'rejected' begin with no message in common, which would be their prompt: give it under "
            "the key 'prompt'"
        )
    return shared


def _messages(transcript: str) -> list[dict[str, str]]:
    """The messages of a transcript; turns of one speaker that follow each other are one."""
    _, *parts = _TURN.split(transcript)
    messages: list[dict[str, str]] = []
    for speaker, text in zip(parts[::2], parts[1::2], strict=True):
        role = ROLES[speaker.lower()]
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n\n{text.strip()}"
        else:
            messages.append({"role": role, "content": text.strip()})
    return messages
