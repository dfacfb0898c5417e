"""The requests of OpenAI's API as records: what we honour, what may be ignored, and what is refused by name.

Fields are OpenAI's (platform.openai.com/docs/api-reference); `top_k`, `min_p`, `repetition_penalty` and `ignore_eos`
are vLLM's. A field that would change the answer and is not honoured here is an error that names it.
"""

import json
import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

Text = Annotated[str, StringConstraints(strict=True)]
Token = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
Integer = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
T = TypeVar("T", bound="Record")

DEEPEST = 100  # levels of JSON: far from where Python's own recursion ends, in us or in what we call


class ApiError(Exception):
    """A request that is answered with an error: its HTTP status, and the body that OpenAI's clients understand."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code"}}`."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Record(BaseModel):
    """A part of a request: an unknown field is an error, and numbers are finite."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class StreamOptions(Record):
    """What a stream holds beside its text."""

    include_usage: bool = False
    continuous_usage_stats: Literal[False] = False


class _Ignored(Record):
    """Fields that change no answer: who asks, and how OpenAI bills and keeps it."""

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    verbosity: Literal[None] = None


class Sampled(_Ignored):
    """What `completions` and `chat/completions` share. None and absent are the same."""

    model: Text | None = None
    temperature: Number | None = Field(None, ge=0, le=2)
    top_p: Number | None = Field(None, gt=0, le=1)
    top_k: Integer | None = Field(None, ge=-1, lt=2**31)
    min_p: Number | None = Field(None, ge=0, le=1)
    repetition_penalty: Number | None = Field(None, ge=0.01, le=100)
    presence_penalty: Number | None = Field(None, ge=-2, le=2)
    frequency_penalty: Number | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100, strict=True)]] | None = Field(None, max_length=300)
    seed: Integer | None = Field(None, ge=-(2**63), lt=2**64)
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None  # OpenAI's 4 are too few for lm-eval's tasks
    n: Integer | None = Field(None, ge=1, le=8)
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: Flag | None = None
    max_tokens: Integer | None = Field(None, ge=0)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings; an empty one would end every text before it begins.

        Raises:
            ApiError: one is empty.
        """
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if "" in stops:
            raise ApiError(400, "a stop string is empty: give one with text, or leave it out", "stop")
        return stops

    def check_stream(self) -> None:
        """Raises ApiError where `stream_options` is given without `stream`."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is only for requests with stream=true", "stream_options")


class CompletionRequest(Sampled):
    """POST /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Text] | list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=256)]
    )
    echo: Flag | None = None
    logprobs: Integer | None = Field(None, ge=0, le=20)
    best_of: Integer | None = Field(None, ge=1, le=1)
    suffix: Literal[None] = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each text or token ids."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)


class TextPart(Record):
    """A part of a message's content. Only text is understood."""

    type: Literal["text"]
    text: Text


class FunctionCall(Record):
    """What an assistant's turn called: `arguments` is JSON text."""

    name: Text
    arguments: Text


class ToolCall(Record):
    """One call of an assistant's turn."""

    id: Text
    type: Literal["function"] = "function"
    function: FunctionCall
    index: Integer | None = None


class ChatMessage(Record):
    """One turn. `developer` is the newer word for `system`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart] | None = None
    name: Text | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Text | None = None
    refusal: Text | None = None
    annotations: Any = None
    audio: Literal[None] = None
    function_call: Literal[None] = None

    def message(self) -> dict[str, Any]:
        """The turn as templates read it: content as one text, arguments as values.

        Raises:
            ApiError: arguments that are no JSON, or no content where there are no calls either.
        """
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.refusal)):
            raise ApiError(400, f"a message of role {self.role} has no content: give a text", "messages")
        content = self.content if self.content is not None else ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": text}
        if self.tool_calls:
            message["tool_calls"] = [_call(call) for call in self.tool_calls]
        given = {"name": self.name, "tool_call_id": self.tool_call_id}
        return message | {key: value for key, value in given.items() if value is not None}


def _call(call: ToolCall) -> dict[str, Any]:
    try:
        arguments = parse_json(call.function.arguments)
    except ApiError as error:
        raise ApiError(400, f"the arguments of {call.function.name}: {error.message}", "messages") from None
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


class FunctionTool(Record):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: Annotated[str, StringConstraints(strict=True, pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: Flag | None = None


class Tool(Record):
    """A tool: functions are the only kind."""

    type: Literal["function"]
    function: FunctionTool


class FunctionName(Record):
    """The name of a function."""

    name: Text


class NamedTool(Record):
    """The one function that must be called."""

    type: Literal["function"]
    function: FunctionName


class JsonSchema(Record):
    """A schema that the reply must meet."""

    name: Text
    description: Text | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: Flag | None = None


class ResponseFormat(Record):
    """What form the reply has."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(Sampled):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Integer | None = Field(None, ge=1)
    logprobs: Flag | None = None
    top_logprobs: Integer | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: Flag | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None


class EmbeddingRequest(_Ignored):
    """POST /v1/embeddings."""

    model: Text | None = None
    input: (
        Text
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[Text] | list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=256)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Literal[None] = None

    @property
    def inputs(self) -> list[str | list[int]]:
        """The inputs, each text or token ids."""
        given: Any = self.input
        return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)


class TokenizeRequest(Record):
    """POST /tokenize, as vLLM has it: a text, or a conversation."""

    model: Text | None = None
    prompt: Text | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: Flag | None = None
    add_generation_prompt: bool = True


class DetokenizeRequest(Record):
    """POST /detokenize."""

    model: Text | None = None
    tokens: list[Token]


def parse_json(data: bytes | str) -> Any:
    """The value of JSON text.

    Raises:
        ApiError: no JSON, a number that is none (NaN, Infinity), nesting too deep, or text with lone surrogates.
    """
    try:
        value = json.loads(data, parse_constant=_no_number, parse_float=_finite)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise _too_deep() from None
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8") from None
    except UnicodeEncodeError:
        raise ApiError(400, "a text holds a lone surrogate, which is not Unicode text") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    level, depth = [value], 0
    while level := [item for part in level for item in _items(part)]:
        depth += 1
        if depth > DEEPEST:
            raise _too_deep()
    return value


def _items(part: Any) -> Iterable[Any]:
    """What a part of a JSON value holds."""
    return part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()


def _too_deep() -> ApiError:
    return ApiError(400, f"the JSON is nested too deeply: {DEEPEST} levels are taken")


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def parse(kind: type[T], data: bytes) -> T:
    """The request that a body holds.

    Raises:
        ApiError: not such a request; `param` names the first field that is wrong.
    """
    return validate(kind, parse_json(data))


def validate(kind: type[T], value: Any) -> T:
    """The request that a JSON value is. Raises ApiError as `parse` does."""
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        # Of a value that may be of several kinds, what is wrong with its own kind goes before that it is no other.
        first = min(
            error.errors(include_url=False, include_input=False),
            key=lambda one: (one["type"].endswith("_type"), len(one["loc"])),
        )
        field = str(first["loc"][0]) if first["loc"] else None
        place = ".".join(str(part) for part in first["loc"] if not _is_kind(part))
        unknown = first["type"] == "extra_forbidden" or first["msg"] == "Input should be None"
        reason = "not supported here" if unknown else first["msg"]
        raise ApiError(400, f"{place}: {reason}", field) from None


def _is_kind(part: int | str) -> bool:
    """Whether a part of an error's place is no field: pydantic's name of one kind of a value that may be of several."""
    return part == "str" or str(part).startswith(("constrained", "list[", "literal["))
