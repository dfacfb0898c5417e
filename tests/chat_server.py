"""A server of OpenAI's chat completions that answers as a function says."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@contextmanager
def chat_server(
    reply: Callable[[dict[str, Any]], str], dies_after: int | None = None, finish: str = "stop"
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yields the URL, and the bodies of all requests as they come.

    Args:
        reply: the answer to a request's body.
        dies_after: requests that are answered; the next ones fail.
        finish: the finish_reason of every answer.
    """
    asked: list[dict[str, Any]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format, *arguments):
            pass

        def send(self, status, value):
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            model = {"id": "wise", "object": "model", "created": 0, "owned_by": "x"}
            self.send(200, {"object": "list", "data": [model]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                asked.append(body)
                dead = dies_after is not None and len(asked) > dies_after
            if dead:
                self.send(400, {"error": {"message": "no credit left"}})
                return
            message = {"role": "assistant", "content": reply(body)}
            self.send(200, {
                "id": "1", "object": "chat.completion", "created": 0, "model": "wise",
                "choices": [{"index": 0, "message": message, "finish_reason": finish}],
                "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
            })  # fmt: skip

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
