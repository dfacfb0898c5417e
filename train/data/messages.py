"""The conversation that a record holds, in whichever of the common forms it is written.

Forms: Alpaca's (instruction, input, output, and LLaMA-Factory's system and history), ShareGPT's (conversations),
OpenAI's (messages, tools, tool_calls, weight, content in parts) and TRL's (prompt and completion, of text or of
messages). In optional keys null is as good as absent: tables write it for every key that a row lacks.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from model.chat import MESSAGE_KEYS, Message
from model.errors import PunaError
from train.data.formats import text_at
from train.data.readers import kind

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "system": "system",
}


# Keys of a record that change text or mask in other systems and have no meaning here: no record is read without them.
UNREAD_KEYS = {
    "functions": "OpenAI's older name of tools; rename it to tools",
    "chat_template_kwargs": "write what it says into the template",
    "images": "only text is read; leave such records out",
    "videos": "only text is read; leave such records out",
    "audios": "only text is read; leave such records out",
}
# Keys of a message that say whether it is trained on: OpenAI's, ms-swift's and axolotl's; and those that say more.
TRAINED_KEYS = ("weight", "loss", "train")
PARTLY_TRAINED_KEYS = ("training", "training_detail", "train_detail")


class Conversation(NamedTuple):
    """Messages in order.

    Attributes:
        messages: each with a role and content, and what other keys it had; with a key of MESSAGE_KEYS content may be
            missing or None.
        trained: for each, whether the model is to learn it if it is the assistant's.
        tools: functions that the model may call, as OpenAI's API has them.
    """

    messages: list[Message]
    trained: list[bool]
    tools: list[Mapping[str, Any]] | None = None


def conversation_of(record: Mapping[str, Any], form: str) -> Conversation:
    """The conversation that a record holds.

    Args:
        record: under our keys.
        form: a key of `formats.KEYS`, but not "text".

    Raises:
        PunaError: a key is missing or of another type than it should be, or a role is unknown.
    """
    for key, remedy in UNREAD_KEYS.items():
        if record.get(key):
            raise PunaError(f"key {key!r} is not read: {remedy}")
    check_trained(record)
    if form == "instruction":
        asked = {"role": "user", "content": text_at(record, "instruction")}
        if record.get("input") is not None:
            asked["input"] = text_at(record, "input")
        messages = [*_history(record), asked, {"role": "assistant", "content": text_at(record, "output")}]
        trained = [True] * len(messages)
    elif form == "prompt_completion":
        messages, trained = _prompt_completion(record)
    else:
        messages, trained = _turns(record, form)
    if record.get("system") is not None and (system := text_at(record, "system")):
        if messages[0]["role"] == "system":
            raise PunaError(f"key 'system': key {form!r} begins with a system message too; keep one of them")
        messages, trained = [{"role": "system", "content": system}, *messages], [True, *trained]
    return Conversation(messages, trained, _tools(record))


def _history(record: Mapping[str, Any]) -> list[Message]:
    """LLaMA-Factory's earlier exchanges: [question, answer] each."""
    messages: list[Message] = []
    pairs: list[Any] = record.get("history") or []
    for number, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise PunaError(f"history[{number}]: expected a question and an answer, both text")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


def _prompt_completion(record: Mapping[str, Any]) -> tuple[list[Message], list[bool]]:
    """A prompt and what follows it, of text or of messages; only the completion is trained (TRL's rule)."""
    if not isinstance(record.get("prompt"), list) or not isinstance(record.get("completion"), list):
        answer = {"role": "assistant", "content": text_at(record, "completion")}
        return [{"role": "user", "content": text_at(record, "prompt")}, answer], [True, True]
    (prompt, _), (completion, trained) = (_turns(record, key) for key in ("prompt", "completion"))
    return prompt + completion, [False] * len(prompt) + trained


def _turns(record: Mapping[str, Any], key: str) -> tuple[list[Message], list[bool]]:
    """The messages under a key, and which of them are trained."""
    turns = record.get(key)
    if not isinstance(turns, list) or not turns:
        found = "is missing" if key not in record else f"expected a list with messages, got {kind(turns)}"
        raise PunaError(f"key {key!r}: {found if turns != [] else 'the list is empty'}")
    messages, trained = [], []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise PunaError(f"{key}[{number}]: expected an object, got {kind(turn)}")
        if _is_absent(turn):
            continue
        try:
            messages.append(_shared_gpt(turn) if key == "conversations" else _message(turn))
            trained.append(_is_trained(turn))
        except PunaError as error:
            raise PunaError(f"{key}[{number}]: {error}") from None
    if not messages:
        raise PunaError(f"key {key!r}: there is no message but a system's of null")
    return messages, trained


def _is_absent(turn: Mapping[str, Any]) -> bool:
    """Whether a turn is the system message that a conversation does not have, as some data sets write it."""
    own = [("role", "content"), ("from", "value")]
    return any(turn.get(role) == "system" and turn.get(text, "") is None for role, text in own)


def _shared_gpt(turn: Mapping[str, Any]) -> Message:
    role, text = text_at(turn, "from"), text_at(turn, "value")
    if role not in ROLES:
        raise PunaError(f"role {role!r} is unknown; it must be one of {', '.join(ROLES)}")
    return {"role": ROLES[role], "content": text}


def _message(turn: Mapping[str, Any]) -> Message:
    extras = {key: value for key, value in turn.items() if key not in _OWN_KEYS and value is not None}
    extras = {key: value for key, value in extras.items() if value or key not in MESSAGE_KEYS}
    role, content = text_at(turn, "role"), turn.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, number) for number, part in enumerate(content))
    elif content is not None or not (extras.keys() & {"tool_calls", "function_call"}):
        content = text_at(turn, "content")
    return {"role": role, **({"content": content} if "content" in turn else {}), **extras}


_OWN_KEYS = ("role", "content", "input", *TRAINED_KEYS)


def _part(part: Any, number: int) -> str:
    """The text of one part of a message's content."""
    if not isinstance(part, dict) or part.get("type") != "text":
        said = repr(part.get("type")) if isinstance(part, dict) else kind(part)
        raise PunaError(f"content[{number}]: is {said}; only parts of type 'text' are read")
    return text_at(part, "text")


def _is_trained(turn: Mapping[str, Any]) -> bool:
    """Whether a message is to be learned, if it is the assistant's, or a record: it is, where no key says otherwise."""
    for key in PARTLY_TRAINED_KEYS:
        if turn.get(key) is not None:
            raise PunaError(f"key {key!r} is not read: say 'weight': 0 of messages that are not to be trained on")
    said = {key: turn[key] for key in TRAINED_KEYS if turn.get(key) is not None}
    for key, value in said.items():
        if value not in (0, 1) or isinstance(value, bool) != (key != "weight"):
            known = "0 (not trained on) and 1" if key == "weight" else "false (not trained on) and true"
            raise PunaError(f"key {key!r} is {value!r}: only {known} are known")
    return all(value != 0 for value in said.values())


def check_trained(record: Mapping[str, Any]) -> None:
    """Raises PunaError where a record says that it is not, or partly, to be trained on."""
    if not _is_trained(record):
        raise PunaError("is not to be trained on, by its own word: leave the record out")


def answered(message: Message) -> list[str]:
    """What a template must write of an assistant's message: its texts, and the names of the functions that it calls."""
    called = [*(message.get("tool_calls") or []), message.get("function_call")]
    functions = [call.get("function", call) for call in called if isinstance(call, dict)]
    texts = [message.get(key) for key in ("reasoning_content", "thinking", "content")]
    texts += [function.get("name") for function in functions if isinstance(function, dict)]
    return [text.strip() for text in texts if isinstance(text, str)]


def _tools(record: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    """The functions under "tools", which some data sets hold as JSON text."""
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            raise PunaError("key 'tools': is text that is not JSON") from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise PunaError(f"key 'tools': expected a list of objects, got {kind(tools)}")
    return tools or None
