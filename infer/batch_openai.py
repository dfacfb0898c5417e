"""The body of a request of OpenAI's API, as far as a batch supports it: one text without tools, scores or a form."""

import json
from typing import Any, NamedTuple

from infer.openai_api import ApiError, ChatRequest, CompletionRequest, Sampled, validate
from model.chat import Message
from model.errors import PunaError

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"

_SAMPLED = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
_UNSUPPORTED = (
    *("tools", "tool_choice", "response_format", "logprobs", "top_logprobs", "echo", "stream", "stream_options"),
    *("ignore_eos", "modalities"),
)


# What changes an answer where a body has it, and nothing in lines of other kinds.
ACTING = {*ChatRequest.model_fields, *CompletionRequest.model_fields, "max_new_tokens", "min_new_tokens", "system"} - {
    *("model", "prompt", "messages", "user", "metadata", "store"),
}  # fmt: skip


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
    try:
        request = validate(ChatRequest if url == CHAT else CompletionRequest, body)
        return Body(_messages(request), _prompt(request), _sampling(request), _most(request), request.stops)
    except ApiError as error:
        raise BadBody(error.message, error.param) from None


def _messages(request: Sampled) -> list[Message] | None:
    for name in _UNSUPPORTED:
        if getattr(request, name, None) not in (None, False):
            raise BadBody(f"{name} is not supported in a batch: remove it", name)
    if request.n not in (None, 1):
        raise BadBody(f"n is {request.n}: a batch supports 1 alone", "n")
    if not isinstance(request, ChatRequest):
        return None
    for message in request.messages:
        if message.role == "tool" or message.tool_calls is not None:
            raise BadBody("messages with tools are not supported in a batch: remove them", "messages")
    return [message.message() for message in request.messages]


def _prompt(request: Sampled) -> str | None:
    if not isinstance(request, CompletionRequest):
        return None
    if not isinstance(request.prompt, str):
        raise BadBody("prompt is a list: a batch supports one text alone", "prompt")
    return request.prompt


def _sampling(request: Sampled) -> dict[str, Any]:
    own = {name: getattr(request, name) for name in _SAMPLED if getattr(request, name) is not None}
    if request.top_k is not None:
        own["top_k"] = max(request.top_k, 0)  # -1 is vLLM's word for all tokens
    if request.seed is not None:
        own["seed"] = request.seed % 2**63
    if request.logit_bias is not None:
        if not all(key.isdecimal() for key in request.logit_bias):
            raise BadBody("the keys of logit_bias are token ids", "logit_bias")
        own["logit_bias"] = tuple((int(key), value) for key, value in request.logit_bias.items())
    return own


def _most(request: Sampled) -> int | None:
    chat = request.max_completion_tokens if isinstance(request, ChatRequest) else None
    most = request.max_tokens if chat is None else chat
    if most == 0:
        raise BadBody("max_tokens is 0: give a number above 0", "max_tokens")
    return most


def shown(value: Any) -> str:
    """A value as an error shows it: its JSON, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."
