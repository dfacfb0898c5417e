"""The application of `infer serve` without a server: over an engine that steps when the test says so."""

import asyncio
import json
import threading
import time
from dataclasses import replace

import pytest
from serving import chat_model
from test_server import until

from convert import load_model
from infer.engine import Engine
from infer.host import Host
from infer.openai_api import ChatRequest, CompletionRequest, EmbeddingRequest, parse
from infer.serve import engine_host
from infer.served import Served
from infer.server import MAX_TOKENIZE, make_app
from model.chat import get_template
from model.layout import per_layer
from model.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow
CONTEXT = 128
CHAT = [{"role": "user", "content": "Hi there"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return chat_model(tmp_path_factory.mktemp("served"), CONTEXT)


def scope(path):
    return {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
        "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "scheme": "http", "headers": [], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip


def post(served, path, body):
    """The status and the JSON that a POST is answered with; a body of None never comes."""
    sent = []

    async def receive():
        if body is None:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    async def send(message):
        sent.append(message)

    asyncio.run(make_app(served)(scope(path), receive, send))
    return sent[0]["status"], json.loads(b"".join(message["body"] for message in sent[1:]))


@pytest.fixture(scope="module")
def stepped(model):
    """The application over an engine that steps when the test says so."""
    config, params = load_model(model)
    tokenizer = load_tokenizer(model)
    engine = Engine(per_layer(params), config, tokenizer, rows=2, length=CONTEXT)
    host = Host(lambda stopping: engine)
    host._engine = engine  # without the thread that would step
    template = get_template("chat_template", tokenizer)
    return engine, Served("model", host, tokenizer, config.vocab_size, CONTEXT, (), template=template)


def test_a_host_that_is_told_to_end_compiles_no_further(stepped, monkeypatch):
    engine, _ = stepped
    begun, may_go_on, compiled = threading.Event(), threading.Event(), []

    def copy(*rows):
        begun.set()
        may_go_on.wait()

    monkeypatch.setattr(engine._device, "copy", copy)  # the first program
    monkeypatch.setattr(engine._device, "decode", compiled.append)
    host = engine_host(lambda: engine)
    host.start()
    begun.wait()
    stopper = threading.Thread(target=host.stop)
    stopper.start()
    until(host._stopping.is_set)
    may_go_on.set()
    stopper.join()
    assert not host._thread.is_alive() and host.error is None and host.state == "loading" and compiled == []


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_that_leaves_frees_its_rows_within_two_steps(stepped, path, stream, n):
    engine, served = stepped
    asked = {"prompt": "Hello"} if path == "/v1/completions" else {"messages": CHAT}
    body = json.dumps(asked | {"max_tokens": 90, "ignore_eos": True, "stream": stream, "n": n}).encode()

    async def visit():
        left, sent = asyncio.Event(), []
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive():
            for message in messages:
                return message
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        task = asyncio.ensure_future(make_app(served)(scope(path), receive, send))
        while engine.waiting < n:
            await asyncio.sleep(0.001)
        for _ in range(8):
            engine.step()
            await asyncio.sleep(0)
        assert engine.running == min(n, 2) and engine.waiting == n - min(n, 2)
        assert stream == any(b'"choices"' in message.get("body", b"") for message in sent)
        left.set()
        await task
        cancelled = engine.counts.finished["cancelled"]
        for _ in range(2):
            engine.step()
        assert engine.running == engine.waiting == 0
        assert engine.counts.finished["cancelled"] == cancelled + n

    asyncio.run(visit())


def test_a_time_limit_is_for_texts_and_embeddings_alike(stepped):
    _, served = stepped
    limited, before = replace(served, timeout=5.0), time.monotonic()
    requests = [
        *limited.completions(parse(CompletionRequest, b'{"prompt": ["a", "b"]}')),
        *limited.chat(parse(ChatRequest, json.dumps({"messages": CHAT}).encode())),
        *limited.embeddings(parse(EmbeddingRequest, b'{"input": ["a", "b"]}')),
    ]
    assert len(requests) == 5
    assert all(before + 5 <= request.deadline <= time.monotonic() + 5 for request in requests)


def test_a_body_that_does_not_come_is_given_up(stepped, monkeypatch):
    monkeypatch.setattr("infer.body.BODY_SECONDS", 0.1)
    for path in ("/v1/completions", "/tokenize"):
        status, answer = post(stepped[1], path, None)
        assert (status, answer["error"]["message"]) == (408, "the body did not come in 0.1 seconds")


@pytest.mark.parametrize("role", ["system", "user", "tool", "assistant"])
@pytest.mark.parametrize("content", [{}, {"content": None}])
def test_a_message_without_content_is_refused(stepped, role, content):
    status, answer = post(stepped[1], "/v1/chat/completions", {"messages": [*CHAT, {"role": role, **content}]})
    assert (status, answer["error"]["param"]) == (400, "messages")
    assert answer["error"]["message"] == f"a message of role {role} has no content: give a text"


def test_a_text_too_long_to_tokenize_at_once_is_refused(stepped):
    status, answer = post(stepped[1], "/tokenize", {"prompt": "é" * (MAX_TOKENIZE // 2 + 1)})
    assert (status, answer["error"]["param"]) == (400, "prompt") and "at most 1,048,576" in answer["error"]["message"]
