"""Who answers in a conversation: a server that speaks OpenAI's API."""

import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast
from urllib.parse import urlsplit

import httpx
import openai

from model.chat import Message
from model.errors import JobFailed, PunaError

_BEYOND_OPENAI = ("top_k", "min_p", "repetition_penalty")  # what vLLM, llama.cpp and others read beside its own


class Endpoint:
    """The model `model` of the server that `client` reaches.

    Args:
        settings: what every request says beside the messages, as `chat.completions.create` takes it. Attempt n at an
            answer adds n to its `seed`; without one the server draws its own.
    """

    template = None  # the server has its own

    def __init__(self, client: openai.OpenAI, model: str, settings: Mapping[str, Any]):
        self.client, self.model, self.settings = client, model, settings

    def with_template(self, name: str) -> "Endpoint":
        """The same: a server writes messages as it does."""
        return self

    def reply(self, messages: Sequence[Message], attempt: int = 0) -> Generator[str, None, bool]:
        """The answer to the last message as it comes, and then whether it was cut off at the most tokens."""
        settings = dict(self.settings)
        if "seed" in settings:
            settings["seed"] += attempt
        finish = None
        with one_line(self.client):
            asked = cast(Any, list(messages))
            with self.client.chat.completions.create(
                model=self.model, messages=asked, stream=True, **settings
            ) as stream:
                for chunk in stream:
                    for choice in chunk.choices:
                        finish = choice.finish_reason or finish
                        if choice.delta.content:  # a lone surrogate is no text
                            yield choice.delta.content.encode(errors="replace").decode()
        if finish is None:
            raise JobFailed(f"{self.client.base_url}: the reply broke off")
        return finish == "length"

    def complete(self, messages: Sequence[Message], attempt: int = 0) -> tuple[str, list[int], str]:
        """The whole answer to the last message, how many tokens the server read and wrote for it (0 if unsaid), and
        why it ended, as "stop" or "length".

        Raises:
            JobFailed: the server cannot be asked, or does not answer.
        """
        settings = dict(self.settings)
        if "seed" in settings:
            settings["seed"] += attempt
        with one_line(self.client):
            asked = cast(Any, list(messages))
            found = self.client.chat.completions.create(model=self.model, messages=asked, **settings)
            if not found.choices:
                raise ValueError("an answer without choices")
            usage, choice = found.usage, found.choices[0]
            counts = [0, 0] if usage is None else [usage.prompt_tokens, usage.completion_tokens]
            return choice.message.content or "", counts, choice.finish_reason or "stop"


@contextmanager
def connect(
    url: str, model: str | None, api_key: str | None, max_tokens: int | None, sampling: Mapping[str, Any]
) -> Iterator[Endpoint]:
    """The endpoint at `url`, with the only model that it has where none is named.

    Args:
        url: as OpenAI's clients take it, ending in /v1; that is added to a URL without a path.
        api_key: else the environment variable OPENAI_API_KEY has it; a server that wants one refuses when there is
            none.
        max_tokens: most tokens of a reply; the server's number where it is None.
        sampling: settings by name; those that are None are not sent.

    Raises:
        PunaError: no URL, or a model must be named.
        JobFailed: the server cannot be asked.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise PunaError(f"--endpoint {url} is no URL: give one as http://localhost:8000/v1")
    key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
    if not (key.isascii() and key.isprintable()):
        raise PunaError("the API key holds characters that no key has: give it as the server's owner did")
    base = url.rstrip("/") if parts.path.strip("/") else f"{url.rstrip('/')}/v1"
    given = {name: value for name, value in {**sampling, "max_tokens": max_tokens}.items() if value is not None}
    settings = {name: value for name, value in given.items() if name not in _BEYOND_OPENAI}
    settings["extra_body"] = {name: value for name, value in given.items() if name in _BEYOND_OPENAI}
    with openai.OpenAI(base_url=base, api_key=key) as client:
        yield Endpoint(client, model or _only_model(client), settings)


def _only_model(client: openai.OpenAI) -> str:
    with one_line(client):
        models = sorted(model.id for model in client.models.list())
    if len(models) != 1:
        there = f"has {len(models)} models ({', '.join(models)})" if models else "names no model"
        raise PunaError(f"{client.base_url} {there}: name one with --model")
    return models[0]


@contextmanager
def one_line(client: openai.OpenAI) -> Iterator[None]:
    """Errors of the client, and of the connection while a reply streams, as one line for people."""
    try:
        yield
    except (openai.OpenAIError, httpx.HTTPError, ValueError) as error:
        raise JobFailed(f"{client.base_url}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    body = getattr(error, "body", None)
    said = body.get("message") if isinstance(body, dict) else None
    if isinstance(error, openai.APIStatusError):
        said = f"{error.status_code} {error.response.reason_phrase}: {said or error.message}"
    elif isinstance(error, openai.APIConnectionError):
        said = f"no connection: {error.__cause__ or error.message}"
    return " ".join(str(said or error or type(error).__name__).split())
