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
_GETS = ("/v1/models", "/tokenizer_info", "/health", "/metrics", "/openapi.json")
_ERRORS = {
    "400": "The request is wrong.",
    "401": "The API key is missing or wrong.",
    "404": "No such model.",
    "408": "It took too long.",
    "413": "The body is too large.",
    "429": "The queue is full.",
    "503": "The model is not ready.",
}


def document() -> dict[str, Any]:
    """OpenAPI 3.1 of all routes but the page's."""
    _, schemas = models_json_schema(
        [(record, "validation") for record in _POSTS.values()], ref_template="#/components/schemas/{model}"
    )
    error = {"type": "object", "required": ["error"], "properties": {"error": {"type": "object"}}}
    schemas["$defs"]["Error"] = error
    wrong = {
        code: {"description": text, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
        for code, text in _ERRORS.items()
    }
    paths: dict[str, Any] = {path: {"get": {"responses": {"200": {"description": "OK"}, **wrong}}} for path in _GETS}
    for path, record in _POSTS.items():
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{record.__name__}"}}}
        body = {"required": True, "content": content}
        paths[path] = {"post": {"requestBody": body, "responses": {"200": {"description": "OK"}, **wrong}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Puna", "version": "1"},
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }
