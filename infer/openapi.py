"""The OpenAPI document of the server, from the records of its requests."""

from typing import Any

from pydantic.json_schema import models_json_schema

from infer.openai_api import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    Record,
    TokenizeRequest,
)

_POSTS: dict[str, type[Record]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
_ERRORS = {
    "400": "The request is wrong.",
    "401": "The API key is missing or wrong.",
    "404": "No such model.",
    "408": "It took too long.",
    "413": "The body is too large.",
    "429": "The queue is full.",
    "500": "The server failed on this request.",
    "503": "The model is not ready.",
}


def _object(**fields: Any) -> dict[str, Any]:
    """An object that has all of `fields`."""
    return {"type": "object", "required": list(fields), "properties": fields}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


_TEXT, _COUNT, _ANY, _MAYBE = {"type": "string"}, {"type": "integer", "minimum": 0}, {}, {"type": ["object", "null"]}
_USAGE = _object(prompt_tokens=_COUNT, total_tokens=_COUNT)
_GENERATED = _USAGE | {"required": ["prompt_tokens", "completion_tokens", "total_tokens"]}
_STATUS = _object(status={"enum": ["loading", "ready", "recovering", "stopping"]})
_CARD = _object(id=_TEXT, object={"const": "model"}, created=_COUNT, owned_by=_TEXT, max_model_len=_COUNT)


def _made(kind: str, reasons: list[str], **fields: Any) -> dict[str, Any]:
    """An answer whose choices each have `fields`."""
    choice = _object(index=_COUNT, logprobs=_MAYBE, finish_reason={"enum": reasons}, **fields)
    return _object(
        id=_TEXT, object={"const": kind}, created=_COUNT, model=_TEXT, choices=_list(choice), usage=_GENERATED
    )  # fmt: skip


_MESSAGE = _object(role={"const": "assistant"}, content={"type": ["string", "null"]})
_VECTOR = {"type": ["array", "string"], "items": {"type": "number"}}
_ANSWERS: dict[str, dict[str, Any]] = {
    "/v1/completions": _made("text_completion", ["stop", "length"], text=_TEXT),
    "/v1/chat/completions": _made("chat.completion", ["stop", "length", "tool_calls"], message=_MESSAGE),
    "/v1/embeddings": _object(
        object={"const": "list"}, model=_TEXT, usage=_USAGE, data=_list(_object(index=_COUNT, embedding=_VECTOR))
    ),
    "/v1/models": _object(object={"const": "list"}, data=_list(_CARD)),
    "/v1/models/{name}": _CARD,
    "/tokenize": _object(count=_COUNT, max_model_len=_COUNT, tokens=_list(_COUNT)),
    "/detokenize": _object(prompt=_TEXT),
    "/tokenizer_info": _object(vocab_size=_COUNT, model_max_length=_COUNT, bos_token=_ANY, eos_token=_ANY),
    "/health": _STATUS,
    "/metrics": _TEXT,
    "/openapi.json": _object(openapi=_TEXT, info=_ANY, paths=_ANY),
}
_STREAMED = ("/v1/completions", "/v1/chat/completions")


def document() -> dict[str, Any]:
    """OpenAPI 3.1 of all routes but the page's."""
    _, schemas = models_json_schema(
        [(record, "validation") for record in _POSTS.values()], ref_template="#/components/schemas/{model}"
    )
    about = _object(message=_TEXT, type=_TEXT, param={"type": ["string", "null"]}, code={"type": ["string", "null"]})
    schemas["$defs"]["Error"] = _object(error=about)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Puna", "version": "1"},
        "paths": {path: _operation(path) for path in _ANSWERS},
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(path: str) -> dict[str, Any]:
    """What a route takes and answers."""
    kind = "text/plain" if path == "/metrics" else "application/json"
    content = {kind: {"schema": _ANSWERS[path]}}
    if path in _STREAMED:
        content["text/event-stream"] = {}  # OpenAPI 3.1 has no word for what each event holds
    wrong = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    responses = {code: {"description": text, "content": wrong} for code, text in _ERRORS.items()}
    responses["200"] = {"description": "OK", "content": content}
    if path == "/health":
        responses["503"] = {"description": _ERRORS["503"], "content": content}
    operation: dict[str, Any] = {"responses": responses}
    if path in _POSTS:
        schema = {"$ref": f"#/components/schemas/{_POSTS[path].__name__}"}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        return {"post": operation}
    if "{name}" in path:
        operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": _TEXT}]
    return {"get": operation}
