"""A server with the API of `infer serve`, in a thread: it serves the chat page, and answers what a test tells it to."""

import asyncio
import json
import threading
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse
from starlette.routing import Route

FILES = Path(__file__).parent.parent / "infer/page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HOLD = object()  # a stream waits here until it is released


@dataclass
class Answer:
    """What the server says to one request: a stream of pieces, or an error."""

    pieces: list = field(default_factory=list)  # text; bytes, which are sent as they are; HOLD
    status: int = 200
    message: str = ""
    finish: str | None = "stop"
    usage: dict | None = None
    error: str = ""  # at the end of the stream, instead of the finish reason
    pace: float = 0  # seconds before each piece
    gate: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))  # released once for each HOLD
    disconnected: threading.Event = field(default_factory=threading.Event)


class Stream:
    """An ASGI response that sends an answer's pieces as events, and sees when the browser goes away."""

    def __init__(self, answer: Answer):
        self.answer = answer

    def events(self):
        for piece in self.answer.pieces:
            yield {"choices": [{"delta": {"content": piece}}]} if isinstance(piece, str) else piece
        if self.answer.error:
            yield {"error": {"message": self.answer.error}}
        elif self.answer.finish:
            yield {"choices": [{"delta": {}, "finish_reason": self.answer.finish}]}
            usage = self.answer.usage or {"prompt_tokens": 7, "completion_tokens": len(self.answer.pieces)}
            yield {"choices": [], "usage": usage}

    async def __call__(self, scope, receive, send):
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        gone = asyncio.create_task(self.gone(receive))
        for event in self.events():
            if event is HOLD:
                await self.hold(gone)
                continue
            await asyncio.sleep(self.answer.pace)
            body = event if isinstance(event, bytes) else b"data: %s\n\n" % json.dumps(event).encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n" if self.answer.finish else b""})
        gone.cancel()

    async def hold(self, gone: asyncio.Task):
        released = asyncio.create_task(asyncio.to_thread(self.answer.gate.acquire))
        await asyncio.wait({released, gone}, return_when=asyncio.FIRST_COMPLETED)
        if gone.done():
            self.answer.gate.release()  # ends the thread
        await released

    async def gone(self, receive):
        while (await receive())["type"] != "http.disconnect":
            pass
        self.answer.disconnected.set()


class Server:
    """Gives the answers in turn, and keeps what was asked."""

    def __init__(self):
        self.reset()
        routes = [
            Route("/", lambda request: self.file("index.html")),
            Route("/page/{name}", lambda request: self.file(request.path_params["name"])),
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.complete, methods=["POST"]),
        ]
        config = uvicorn.Config(Starlette(routes=routes), port=0, log_level="error", ws="none", lifespan="off")
        self.uvicorn = uvicorn.Server(config)
        self.ready = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.serve()))

    def reset(self):
        self.answers: deque[Answer] = deque()
        self.requests: list[dict] = []
        self.keys: list[str | None] = []
        self.key: str | None = None

    async def serve(self):
        socket = self.uvicorn.config.bind_socket()
        self.url = f"http://127.0.0.1:{socket.getsockname()[1]}"
        self.ready.set()
        await self.uvicorn.serve(sockets=[socket])

    def __enter__(self):
        self.thread.start()
        assert self.ready.wait(30)
        return self

    def __exit__(self, *_):
        self.uvicorn.should_exit = True
        self.thread.join()

    def say(self, *pieces, **more) -> Answer:
        """Give these pieces as the next reply."""
        self.answers.append(Answer(list(pieces), **more))
        return self.answers[-1]

    def file(self, name: str):
        return FileResponse(FILES / name, headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-store"})

    def refused(self, request: Request):
        self.keys.append(request.headers.get("authorization"))
        if self.key and self.keys[-1] != f"Bearer {self.key}":
            return problem(401, "The API key is missing or wrong.")

    async def models(self, request: Request):
        entries = [{"id": "llama-3.2-1b", "max_model_len": 4096}, {"id": "poems"}]
        return self.refused(request) or JSONResponse({"object": "list", "data": entries})

    async def complete(self, request: Request):
        if refused := self.refused(request):
            return refused
        self.requests.append(await request.json())
        answer = self.answers.popleft()
        return Stream(answer) if answer.status == 200 else problem(answer.status, answer.message)


def problem(status: int, message: str) -> JSONResponse:
    headers = {"Retry-After": "3"} if status == 429 else {}
    error = {"message": message, "type": "error", "param": None, "code": None}
    return JSONResponse({"error": error}, status, headers)
