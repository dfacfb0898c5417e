"""A conversation with a server of OpenAI's API, in a pipe and in a terminal: what it is asked, what may go wrong."""

import asyncio
import json
import os
import signal
import socket
import stat
import threading

import pytest
import uvicorn
from pseudo_terminal import PseudoTerminal
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from typer.testing import CliRunner

from infer.__main__ import app
from model.errors import JobFailed, PunaError

BROKEN = RuntimeError("the connection is cut")


class FakeServer:
    """Answers with the script's next entry: a status with its error, or the pieces of a reply, as a list, that may end
    in None (no end is said), an error object, BROKEN, or `...` (nothing more comes). Without a script it echoes."""

    def __init__(self):
        self.models, self.script, self.asked, self.keys = ["puna-7b"], [], [], []
        self._arrived = threading.Condition()
        routes = [Route("/v1/models", self.list_models), Route("/v1/chat/completions", self.chat, methods=["POST"])]
        config = uvicorn.Config(Starlette(routes=routes), log_level="critical", lifespan="off", ws="none")
        self._server = uvicorn.Server(config)
        self._socket = socket.create_server(("127.0.0.1", 0))  # accepts from now on
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._server.force_exit = self._server.should_exit = True
        self._thread.join()
        self._socket.close()

    def expect(self, requests):
        """Waits until it was asked so often."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.asked) >= requests, 60)

    async def list_models(self, request):
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "us"} for name in self.models]
        return JSONResponse({"object": "list", "data": data})

    async def chat(self, request):
        body = await request.json()
        with self._arrived:
            self.asked.append(body)
            self._arrived.notify_all()
        self.keys.append(request.headers.get("authorization"))
        step = self.script.pop(0) if self.script else ["You said: ", body["messages"][-1]["content"]]
        if isinstance(step, tuple):
            status, message = step
            error = {"error": {"message": message, "type": "t", "code": None}}
            return JSONResponse(error, status, {"retry-after-ms": "1"})
        return StreamingResponse(self.stream(step), media_type="text/event-stream")

    async def stream(self, pieces):
        said = True
        for piece in pieces:
            if piece is BROKEN:
                raise piece
            if piece is ...:
                await asyncio.Event().wait()  # until the client leaves
            if isinstance(piece, dict):
                yield f"data: {json.dumps(piece)}\n\n"
                return
            said = piece is not None
            if said:
                yield self.chunk({"content": piece}, None)
        if said:
            yield self.chunk({}, "stop")
        yield "data: [DONE]\n\n"

    @staticmethod
    def chunk(delta, finish):
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        head = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": [choice]}
        return f"data: {json.dumps(head)}\n\n"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with FakeServer() as server:
        yield server


@pytest.fixture
def talk(server):
    """Run `python -m infer chat --endpoint` over lines; returns stdout, the lines of stderr and the exit code."""

    def talk(*lines, flags=(), url=server.url):
        typed = "".join(f"{line}\n" for line in lines)
        arguments = ["chat", "--endpoint", url, *map(str, flags)]
        done = CliRunner().invoke(app, arguments, input=typed, catch_exceptions=False)
        return done.stdout, done.stderr.splitlines(), done.exit_code

    return talk


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def test_the_server_is_asked_what_was_said(talk, server):
    server.script = [["Hel", "", "lo 羊", "\ud800"]]
    assert talk("Hi", "Why?", flags=["--system", "Be kind."]) == ("Hello 羊?\nYou said: Why?\n", [], 0)
    system = {"role": "system", "content": "Be kind."}
    first, second = server.asked
    assert first == {"model": "puna-7b", "messages": [system, user("Hi")], "stream": True}
    assert second["messages"] == [system, user("Hi"), assistant("Hello 羊?"), user("Why?")]


def test_a_reply_that_the_server_cut_off_is_said_to_be(talk, server):
    last = {"index": 0, "delta": {"content": " two"}, "finish_reason": "length"}
    head = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": [last]}
    server.script = [["one", head]]
    said, lines, code = talk("Hi", "Why?")
    assert (said, code) == ("one two\nYou said: Why?\n", 0)
    assert len(lines) == 1 and lines[0].startswith("the reply was cut off")


def test_settings_are_sent_where_they_are_given(talk, server):
    settings = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "seed": 3,
        "max_tokens": 9,
    }  # fmt: skip
    flags = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]
    flags[-2] = "--max-new-tokens"
    talk("Hi", "!!regen", "Why?", flags=[*flags, "--model", "other"])
    asked = [{key: body[key] for key in body if key not in ("messages", "stream")} for body in server.asked]
    seeds = [3, 4, 3]
    assert asked == [settings | {"model": "other", "seed": seed} for seed in seeds]
    assert server.asked[0]["messages"] == server.asked[1]["messages"]


def test_the_key_is_given_or_in_the_environment(talk, server, monkeypatch):
    talk("Hi")
    talk("Hi", flags=["--api-key", "mine"])
    monkeypatch.setenv("OPENAI_API_KEY", "theirs")
    talk("Hi")
    assert server.keys == ["Bearer none", "Bearer mine", "Bearer theirs"]
    with pytest.raises(PunaError, match="the API key holds characters that no key has"):
        talk("Hi", flags=["--api-key", "mïne"])


def test_the_only_model_is_taken_and_one_of_several_is_to_be_named(talk, server):
    assert talk("Hi", url=server.url.removesuffix("/v1") + "/")[0] == "You said: Hi\n"
    server.models = ["b", "a"]
    with pytest.raises(PunaError, match=r"has 2 models \(a, b\): name one with --model"):
        talk("Hi")
    server.models = []
    with pytest.raises(PunaError, match="names no model: name one with --model"):
        talk("Hi")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://localhost/v1", "http://"])
def test_a_url_that_is_none_is_named(talk, url):
    with pytest.raises(PunaError, match=f"--endpoint {url} is no URL: give one as http"):
        talk("Hi", url=url)


def test_a_server_that_is_not_there_is_an_error_in_a_line(talk):
    with socket.create_server(("127.0.0.1", 0)) as held:
        url = f"http://127.0.0.1:{held.getsockname()[1]}/v1"
    with pytest.raises(JobFailed, match=rf"{url}/: no connection: .*Connection refused"):
        talk("Hi", url=url)


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ((401, "bad key"), "401 Unauthorized: bad key"),
        ((404, "no model puna"), "404 Not Found: no model puna"),
        ((400, "two\nlines"), "400 Bad Request: two lines"),
        (["Hel", {"error": {"message": "out of memory", "type": "t"}}], "out of memory"),
        (["Hel", {"error": "plain"}], "An error occurred during streaming"),
        (["Hel", BROKEN], "peer closed connection without sending complete message body (incomplete chunked read)"),
        (["Hel", None], "the reply broke off"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_error_is_a_line_and_the_conversation_is_as_before(talk, server, step, said):
    server.script = [["Hello"], step, ["Good"], step]
    output, errors, code = talk("Hi", "What?", "Why?", "!!regen", "Sure?")
    part = "Hel\n" if isinstance(step, list) else ""
    assert output == f"Hello\n{part}Good\n{part}You said: Sure?\n"
    assert (errors, code) == ([f"error: {server.url}/: {said}"] * 2, 1)
    assert server.asked[2]["messages"] == [user("Hi"), assistant("Hello"), user("Why?")]
    assert server.asked[-1]["messages"][2:] == [user("Why?"), assistant("Good"), user("Sure?")]


def test_a_server_that_is_busy_is_asked_again(talk, server):
    server.script = [(429, "slow down"), (429, "slow down")]
    assert talk("Hi") == ("You said: Hi\n", [], 0) and len(server.asked) == 3
    server.script = [(429, "slow down")] * 3
    assert talk("Hi") == ("", [f"error: {server.url}/: 429 Too Many Requests: slow down"], 1)


def test_a_conversation_of_a_model_goes_on_with_a_server(talk, server, tmp_path):
    file = tmp_path / "c.json"
    saved = {"template": "chatml", "system": "Be kind.", "messages": [user("Hi"), assistant("Hello")]}
    file.write_text(json.dumps(saved))
    assert talk("Why?", "!!remove", f"!!save {file}", flags=["--load", file])[2] == 0
    assert server.asked[0]["messages"][1:] == [user("Hi"), assistant("Hello"), user("Why?")]
    assert json.loads(file.read_text()) == saved


# --- in a terminal


@pytest.fixture
def terminal(server, tmp_path):
    """Start `python -m infer chat --endpoint` in a pseudo-terminal."""
    environment = {"XDG_STATE_HOME": str(tmp_path / "state")}

    def terminal(output=""):
        arguments = ("-m", "infer", "chat", "--endpoint", server.url)
        return PseudoTerminal(*arguments, environment=environment, output=output)

    return terminal


def saved(file):
    return json.loads(file.read_text())["messages"]


@pytest.mark.slow
def test_lines_are_typed_pasted_and_kept(terminal, server, tmp_path):
    file = tmp_path / "c.json"
    with terminal() as first:
        first.expect("!!help lists the commands")
        first.enter("one\x1b\rtwo\\\rthree\r")  # Alt+Enter, and a backslash
        first.expect("You said: one")
        first.enter("\x1b[200~a\nb\\\nc\x1b[201~\r")  # pasted
        first.expect("You said: a")
        first.enter("half\x03")  # Ctrl-C empties the line
        first.enter("!!help\r")
        first.expect("!!regen        ask")
        first.enter("Gut\x1b[D\x1b[Da\r")  # edited: left, left
        first.expect("You said: Gaut")
        first.enter(f"!!save {file}\r")
        first.expect("3 exchanges written")
        first.enter("\x04")
        assert first.end()[1] == 0
    assert [message["content"] for message in saved(file)[::2]] == ["one\ntwo\nthree", "a\nb\\\nc", "Gaut"]
    history = tmp_path / "state" / "puna" / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    with terminal() as second:
        second.enter("\x1b[A\x1b[A\r")  # up to the message before !!save
        second.expect("You said: Gaut")
        second.enter("!!exit\r")
        assert second.end()[1] == 0


@pytest.mark.slow
def test_ctrl_c_stops_a_reply_and_keeps_what_came(terminal, server, tmp_path):
    file = tmp_path / "c.json"
    server.script = [["Once upon\x1b]0;a title\x07", ...], [...], (400, "not so")]
    with terminal() as opened:
        opened.enter("Hi\r")
        opened.expect("Once upon\ufffd]0;a title\ufffd")  # no orders to the terminal
        opened.type("\x03")
        opened.enter("Silence\r")
        server.expect(2)
        opened.type("\x03")
        opened.enter("!\r")  # the message is back in the input line
        opened.expect("error: ")
        opened.expect("not so")
        opened.enter("!\r")
        opened.expect("You said: Silence!!")
        opened.enter(f"!!save {file}\r")
        opened.expect("2 exchanges written")
        opened.enter("\x04")
        assert opened.end()[1] == 0
    partial = "Once upon\x1b]0;a title\x07"
    assert saved(file) == [user("Hi"), assistant(partial), user("Silence!!"), assistant("You said: Silence!!")]


@pytest.mark.slow
def test_replies_alone_go_to_a_file(terminal, tmp_path):
    with terminal(output=tmp_path / "replies") as opened:
        opened.enter("Hi\r")
        opened.enter("\x04")
        assert opened.end()[1] == 0
    assert (tmp_path / "replies").read_text() == "You said: Hi\n"


@pytest.mark.slow
def test_sigterm_ends_the_program_in_a_line(terminal, server):
    server.script = [["Once upon", ...]]
    with terminal() as opened:
        opened.enter("Hi\r")
        opened.expect("Once upon")
        os.kill(opened.process.pid, signal.SIGTERM)
        shown, code = opened.end()
    assert code == 143 and "interrupted by SIGTERM" in shown
