"""The server of `infer serve`: OpenAI's API over one engine, and a page to talk to the model.

Bad requests are refused before anything reaches the engine; a client that goes away ends its requests.
"""

import asyncio
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from infer.answers import ChatChoice, CompletionChoice, Tokens, check_ended_well, embedding, usage
from infer.body import bounded_body
from infer.host import Reply, Unavailable
from infer.metrics import Metrics
from infer.openai_api import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    NamedTool,
    TokenizeRequest,
    parse,
)
from infer.openapi import document
from infer.page import page_routes
from infer.request import Full
from infer.request import Request as EngineRequest
from infer.served import Served
from infer.tools import Form
from model.errors import PunaError

MAX_TOKENIZE = 1 << 20  # bytes of text that /tokenize takes: about a second of work
HEADERS = {  # of answers by status
    408: {"Connection": "close"},  # as with 413
    413: {"Connection": "close"},  # the body may not be read to its end: the connection is of no more use
    429: {"Retry-After": "1"},
    503: {"Retry-After": "2"},
}
Handler = Callable[[Request], Awaitable[Response]]


def make_app(served: Served, api_keys: Sequence[str] = ()) -> ASGIApp:
    """The application.

    Args:
        api_keys: one of them must come with every request but those for /health and for the page itself; none asks for
            none.
    """
    api = Api(served)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(served.host.stop)

    def route(path: str, handler: Handler, method: str = "GET") -> Route:
        return Route(path, partial(_answered, handler), methods=[method])

    routes = [
        route("/v1/models", api.models),
        route("/v1/models/{name:path}", api.model),
        route("/v1/completions", api.completions, "POST"),
        route("/v1/chat/completions", api.chat, "POST"),
        route("/v1/embeddings", api.embeddings, "POST"),
        route("/tokenize", api.tokenize, "POST"),
        route("/detokenize", api.detokenize, "POST"),
        route("/tokenizer_info", api.tokenizer_info),
        route("/health", api.health),
        route("/metrics", api.metrics_text),
        route("/openapi.json", api.openapi),
        *page_routes(),
    ]
    handlers: dict[Any, Any] = {HTTPException: _http_error, Exception: _own_fault}
    return _Locked(Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers), api_keys)


async def _answered(handler: Handler, request: Request) -> Response:
    """What the handler answers, or the error that it raises as OpenAI's clients read it."""
    try:
        return await handler(request)
    except ApiError as error:
        return _error(error)
    except PunaError as error:
        return _error(ApiError(400, str(error)))
    except Full as error:
        return _error(ApiError(429, str(error), code="queue_full"))
    except Unavailable as error:
        return _error(ApiError(503, str(error), code="unavailable"))
    except ClientDisconnect:
        return Response(status_code=499)  # nobody reads it


def _error(error: ApiError, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(error.body(), error.status, headers or HEADERS.get(error.status))


async def _http_error(_: Request, error: HTTPException) -> Response:
    return _error(ApiError(error.status_code, str(error.detail)), dict(error.headers or {}))


async def _own_fault(_: Request, error: Exception) -> Response:
    return _error(ApiError(500, "the server failed on this request; its log says why"))


class _Locked:
    """The application behind API keys, told from all others in a time that does not depend on them."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]):
        self._app, self._keys = app, [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._keys and not self._is_open(scope["path"]) and not self._knows(scope):
            error = ApiError(
                401, "the API key is missing or wrong: send Authorization: Bearer KEY", code="invalid_api_key"
            )
            await _error(error, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        return path in ("/health", "/") or path.startswith("/page/")

    def _knows(self, scope: Scope) -> bool:
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        fits = [hmac.compare_digest(given, key) for key in self._keys]  # all of them, whichever fits
        return scheme.lower() == b"bearer" and any(fits)  # schemes are of either case: RFC 9110, section 11.1


class Api:
    """The routes: each takes a request and gives its answer, or raises what `_answered` knows."""

    def __init__(self, served: Served):
        self.served, self.tokens, self.metrics = served, Tokens(served.tokenizer), Metrics(served.host)
        self._started = int(time.time())

    # --- what makes text

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        body = parse(CompletionRequest, await bounded_body(request))
        asked = await asyncio.to_thread(self.served.completions, body)
        replies = self._submit(asked)
        n = body.n or 1
        prompts = [prompt for prompt in body.prompts for _ in range(n)]
        echoes = [self._echo(prompt) if body.echo else None for prompt in prompts]
        choices = [
            CompletionChoice(index, reply.progress, self.tokens, echo, body.logprobs)
            for index, (reply, echo) in enumerate(zip(replies, echoes, strict=True))
        ]
        about = self._about("cmpl", "text_completion", body.model)
        if body.stream:
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            return self._stream(about, replies, choices, [], include_usage)
        await self._all(request, replies)
        whole = [choice.delta(last=True) for choice in choices]
        return JSONResponse(about | {"choices": whole, "usage": usage([reply.progress for reply in replies])})

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body = parse(ChatRequest, await bounded_body(request))
        asked = await asyncio.to_thread(self.served.chat, body)
        replies = self._submit(asked)
        about = self._about("chatcmpl", "chat.completion", body.model)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        form = self._form(body)
        choices = [
            ChatChoice(index, reply.progress, self.tokens, logprobs, form, about["id"])
            for index, reply in enumerate(replies)
        ]
        if body.stream:
            about |= {"object": "chat.completion.chunk"}
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            return self._stream(about, replies, choices, [choice.opening() for choice in choices], include_usage)
        await self._all(request, replies)
        whole = [choice.whole() for choice in choices]
        return JSONResponse(about | {"choices": whole, "usage": usage([reply.progress for reply in replies])})

    async def embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings: the last token's state after the final norm, at length 1."""
        body = parse(EmbeddingRequest, await bounded_body(request))
        replies = self._submit(await asyncio.to_thread(self.served.embeddings, body))
        await self._all(request, replies)
        data = []
        for index, reply in enumerate(replies):
            assert reply.progress.embedding is not None
            data.append(embedding(index, reply.progress.embedding, body.encoding_format))
        tokens = sum(len(reply.progress.request.prompt) for reply in replies)
        counts = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": body.model or self.served.name, "usage": counts})

    def _form(self, body: ChatRequest) -> Form | None:
        """How calls are read in the reply; one that had to be made is the whole of it."""
        form = self.served.form
        if not body.tools or body.tool_choice == "none" or form is None:
            return None
        forced = body.tool_choice == "required" or isinstance(body.tool_choice, NamedTool)
        return Form("", "", form.key) if forced else form

    def _echo(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else self.served.tokenizer.decode(prompt)

    def _about(self, prefix: str, kind: str, model: str | None) -> dict[str, Any]:
        return {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": model or self.served.name,
        }

    def _submit(self, requests: Sequence[EngineRequest]) -> list[Reply]:
        """All of them, or none."""
        most = self.served.host.engine.queue
        if len(requests) > most:  # which 429 would have the client try again for ever
            raise ApiError(400, f"{len(requests)} texts are asked for at once; at most {most} are taken: ask for fewer")
        replies: list[Reply] = []
        try:
            for request in requests:
                replies.append(self.served.host.submit(request))
        except BaseException:
            for reply in replies:
                reply.progress.cancel()
            raise
        return replies

    async def _all(self, request: Request, replies: Sequence[Reply]) -> None:
        """Waits for all replies; ends them if the client goes away first."""

        async def finish() -> None:
            for reply in replies:
                await reply.finished()

        tasks = [asyncio.ensure_future(finish()), asyncio.ensure_future(_gone(request))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0] not in done:
                raise ClientDisconnect
            await tasks[0]
        finally:
            for reply in replies:
                reply.progress.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for reply in replies:
            self.metrics.observe(reply)
            check_ended_well(reply.progress)

    def _stream(
        self,
        about: dict[str, Any],
        replies: Sequence[Reply],
        choices: Sequence[CompletionChoice] | Sequence[ChatChoice],
        first: Sequence[dict[str, Any]],
        include_usage: bool,
    ) -> Response:
        """Server-sent events: each piece of each choice as it comes, the usage, and `[DONE]`."""

        async def events() -> AsyncIterator[str]:
            try:
                for piece in first:
                    yield _event(about | {"choices": [piece]})
                async for index in _merged(replies):
                    progress = replies[index].progress
                    ended = progress.finish is not None
                    if ended:
                        self.metrics.observe(replies[index])
                        check_ended_well(progress)
                    piece = choices[index].delta(ended)
                    if piece is not None:
                        yield _event(about | {"choices": [piece]})
                if include_usage:
                    counts = usage([reply.progress for reply in replies])
                    yield _event(about | {"choices": [], "usage": counts})
                yield "data: [DONE]\n\n"
            except ApiError as error:
                yield _event(error.body())
            finally:
                for reply in replies:
                    reply.progress.cancel()

        return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    # --- what tells about the model

    async def models(self, _: Request) -> Response:
        """GET /v1/models: the model and its adapters."""
        names = [self.served.name, *self.served.adapters]
        return JSONResponse({"object": "list", "data": [self._card(name) for name in names]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        name = request.path_params["name"]
        self.served.adapter(name)
        return JSONResponse(self._card(name))

    def _card(self, name: str) -> dict[str, Any]:
        parent = None if name == self.served.name else self.served.name
        about = {"id": name, "object": "model", "created": self._started, "owned_by": "puna"}
        return about | {"root": name, "parent": parent, "max_model_len": self.served.context}

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize. A text that is one special token's name gives that token, as evaluation tools expect."""
        body = parse(TokenizeRequest, await bounded_body(request))
        self.served.adapter(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give prompt or messages, one of them", "prompt")
        tokenizer = self.served.tokenizer
        if body.messages is not None:
            ids = await asyncio.to_thread(
                self.served.chat_ids, body.messages, add_generation_prompt=body.add_generation_prompt
            )
        else:
            assert body.prompt is not None
            if (size := len(body.prompt.encode(errors="surrogatepass"))) > MAX_TOKENIZE:
                raise ApiError(
                    400, f"prompt has {size:,} bytes; at most {MAX_TOKENIZE:,} at once: send parts", "prompt"
                )
            special = tokenizer.special_id(body.prompt)
            add_bos = body.add_special_tokens is not False and tokenizer.adds_bos
            ids = [special] if special is not None else await asyncio.to_thread(tokenizer.encode, body.prompt, add_bos)
        return JSONResponse({"count": len(ids), "max_model_len": self.served.context, "tokens": ids})

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize: the text of token ids, special ones by name."""
        body = parse(DetokenizeRequest, await bounded_body(request))
        self.served.adapter(body.model)
        return JSONResponse({"prompt": self.served.tokenizer.decode(body.tokens, skip_special=False)})

    async def tokenizer_info(self, _: Request) -> Response:
        """GET /tokenizer_info, as vLLM has it."""
        tokenizer = self.served.tokenizer
        names = {id: text for text, id in tokenizer.special_tokens.items()}
        roles = {f"{role}_token": getattr(tokenizer, f"{role}_id") for role in ("bos", "eos", "unk", "pad")}
        about: dict[str, Any] = {role: None if id is None else names.get(id) for role, id in roles.items()}
        about |= {
            "chat_template": tokenizer.chat_template,
            "vocab_size": tokenizer.vocab_size,
            "add_bos_token": tokenizer.adds_bos,
        }
        return JSONResponse(about | {"tokenizer_class": "puna", "model_max_length": self.served.context})

    async def health(self, _: Request) -> Response:
        """GET /health: 200 where requests are taken, else 503."""
        state = self.served.host.state
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    async def metrics_text(self, _: Request) -> Response:
        """GET /metrics, for Prometheus."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def openapi(self, _: Request) -> Response:
        """GET /openapi.json."""
        return JSONResponse(document())


async def _gone(request: Request) -> None:
    """Returns when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _merged(replies: Sequence[Reply]) -> AsyncIterator[int]:
    """The index of a reply, whenever there is more of it, until all have ended."""
    news: asyncio.Queue[int | None] = asyncio.Queue()

    async def follow(index: int, reply: Reply) -> None:
        async for _ in reply.updates():
            news.put_nowait(index)
        news.put_nowait(None)

    tasks = [asyncio.ensure_future(follow(index, reply)) for index, reply in enumerate(replies)]
    ended, told = 0, set()
    try:
        while ended < len(tasks):
            index = await news.get()
            if index is None:
                ended += 1
            elif index not in told:  # an update seen late may find the end that a later one tells of
                if replies[index].progress.finish is not None:
                    told.add(index)
                yield index
    finally:
        for task in tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, allow_nan=False)}\n\n"
