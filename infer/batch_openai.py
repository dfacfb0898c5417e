"""The body of a request of OpenAI's API, as far as a batch supports it. A field that would act and is not supported is
refused by name."""

import json
from typing import Any, NamedTuple

from model.chat import Message
from model.errors import PunaError

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

_SAMPLED = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "top_k")
_WHOLE = ("top_k", "max_tokens", "max_completion_tokens", "seed", "n")
_IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}  # change no answer


class BadBody(PunaError):
    """A body that cannot be met; `param` is its field."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class Body(NamedTuple):
    """What a body asks for: to continue `messages` or `prompt`, with sampling settings by the names of `Sampling`."""

    messages: list[Message] | None
    prompt: str | None
    sampling: dict[str, Any]
    max_new_tokens: int | None
    stop: tuple[str, ...]


def read_body(url: str, body: Any) -> Body:
    """What the body of a request asks for. A field that is null counts as absent.

    Raises:
        BadBody: a field that is wrong, or that would act and is not supported.
    """
    if not isinstance(body, dict):
        raise BadBody(f"the body is {shown(body)}: give an object")
    body = {key: value for key, value in body.items() if value is not None and key not in _IGNORED}
    content = "messages" if url == CHAT else "prompt"
    known = {content, "model", "stream", "stop", "logit_bias", *_SAMPLED, *_WHOLE}
    for key, value in body.items():
        if key not in known or (key == "max_completion_tokens" and url != CHAT):
            raise BadBody(f"{key} is not supported in a batch: remove it", key)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if (key in _SAMPLED and not number) or (key in _WHOLE and not (number and isinstance(value, int))):
            raise BadBody(f"{key} is {shown(value)}: give a {'whole ' if key in _WHOLE else ''}number", key)
        if number and abs(value) >= 2**64:
            raise BadBody(f"{key} is {shown(value)}: give a smaller number", key)
    for key, only in (("n", 1), ("stream", False)):
        if body.get(key, only) != only:
            raise BadBody(f"{key} is {shown(body[key])}: a batch supports {shown(only)} alone", key)
    if content not in body:
        raise BadBody(f"{content} is missing", content)
    own = {name: body[name] for name in _SAMPLED if name in body}
    if own.get("top_k") == -1:  # vLLM's word for all tokens
        own["top_k"] = 0
    if "seed" in body:
        own["seed"] = body["seed"] % 2**63
    if "logit_bias" in body:
        own["logit_bias"] = _read_bias(body["logit_bias"])
    stop = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop", [])
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise BadBody(f"stop is {shown(stop)}: give text, or a list of texts", "stop")
    if url == COMPLETIONS and not isinstance(body["prompt"], str):
        raise BadBody(f"prompt is {shown(body['prompt'])}: a batch supports one text alone", "prompt")
    messages = _read_messages(body["messages"]) if url == CHAT else None
    new = body.get("max_completion_tokens", body.get("max_tokens"))
    if new is not None and new < 1:
        raise BadBody(f"max_tokens is {new}: give a number above 0", "max_tokens")
    return Body(messages, body.get("prompt"), own, new, tuple(stop))


def _read_bias(given: Any) -> tuple[tuple[int, float], ...]:
    if not isinstance(given, dict) or not all(
        key.isdecimal() and isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 100
        for key, value in given.items()
    ):
        raise BadBody(
            f"logit_bias is {shown(given)}: give an object of token ids with numbers from -100 to 100", "logit_bias"
        )
    return tuple((int(key), float(value)) for key, value in given.items())


def _read_messages(given: Any) -> list[Message]:
    if not isinstance(given, list) or not given:
        raise BadBody(f"messages is {shown(given)}: give a list of one message or more", "messages")
    messages = []
    for number, message in enumerate(given):
        place = f"messages.{number}"
        if not isinstance(message, dict) or message.get("role") not in ("system", "developer", "user", "assistant"):
            raise BadBody(
                f"{place} is {shown(message)}: give a role (system, user or assistant) and content", "messages"
            )
        unknown = [
            key for key, value in message.items() if key not in ("role", "content", "name") and value is not None
        ]
        if unknown:
            raise BadBody(f"{place}.{unknown[0]} is not supported in a batch: remove it", "messages")
        role = "system" if message["role"] == "developer" else message["role"]
        messages.append({"role": role, "content": _read_content(message.get("content"), place)})
    return messages


def _read_content(content: Any, place: str) -> str:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts
    ):
        raise BadBody(f"{place}.content is {shown(content)}: give text", "messages")
    return "".join(part["text"] for part in parts)


def shown(value: Any) -> str:
    """A value as an error shows it: its JSON, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
